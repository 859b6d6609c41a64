"""Text of several kinds for benchmarks: read as it is laid out on disk, or the package to install."""

import gzip

import pytest

from sparse_onnx.tools.benchmarks import texts


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name in ("_FORTUNES", "_WORDNET", "_REFERENCE"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(texts, name, tmp_path / name)
    return tmp_path


def test_the_help_topics_are_everywhere():
    found = texts.passages()
    assert len(found) > 700
    assert all(len(text.split(" ")) == 90 for text in found)
    assert sorted(texts.passages(seed=1)) == sorted(found)
    assert texts.passages(seed=1) != found


def test_quotations(files):
    (files / "_FORTUNES" / "wisdom").write_text("One two\nthree.\n%\nFour five six.\n%\n")
    (files / "_FORTUNES" / "wisdom.dat").write_bytes(b"\x00\xff index")
    (files / "_FORTUNES" / "wisdom.u8").write_text("the same again " * 9)
    (files / "_FORTUNES" / "ascii-art").write_text("/\\ \\/ " * 9)
    assert sorted(texts.passages("quotations", words=2)) == ["One two", "five six.", "three. Four"]


def test_glosses(files):
    (files / "_WORDNET" / "data.noun").write_text(
        "  1 licence | not this\n0001 03 n 01 hinge | a joint  that turns\n0002 no bar\n0003 n | an oak\n"
    )
    assert sorted(texts.passages("glosses", words=2)) == ["a joint", "that turns"]


@pytest.mark.parametrize("packed", [False, True])
def test_reference(files, packed):
    content = b"Chapter 1.\n\nHow to install a system.\n"
    name = "debian-reference.en.txt"
    (files / "_REFERENCE" / "debian-reference.de.txt").write_bytes(b"Kapitel eins und zwei und drei")
    if packed:
        (files / "_REFERENCE" / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (files / "_REFERENCE" / name).write_bytes(content)
    assert sorted(texts.passages("reference", words=3)) == ["Chapter 1. How", "to install a"]


@pytest.mark.parametrize(
    ("kind", "package"),
    [("quotations", "fortunes"), ("glosses", "wordnet-base"), ("reference", "debian-reference-en")],
)
def test_what_is_missing_names_its_package(files, kind, package):
    assert texts.available() == ["topics"]
    with pytest.raises(SystemExit, match=f"apt-get install {package}$"):
        texts.passages(kind)
