"""Calibration data from every kind of source, and what is said about data that does not fit."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_onnx.data.inputs import InputSpec
from sparse_onnx.data.samples import Samples, open_samples, weighted_source
from sparse_onnx.errors import DataError, UsageError

SPECS = (
    InputSpec("ids", np.dtype(np.int64), ("batch", "sequence"), 100),
    InputSpec("x", np.dtype(np.float32), ("batch", 3), None),
)
EXPECTED = r"expected .*ids: int64\[batch, sequence\]; x: float32\[batch, 3\]"


def _arrays(count: int = 5, start: int = 0) -> dict[str, np.ndarray]:
    numbers = np.arange(start, start + count)
    return {"ids": numbers[:, None] % 100 + np.zeros((1, 4), int), "x": np.ones((count, 3), np.float32)}


def _firsts(samples: Samples) -> list[list[int]]:
    """The number in every sample, batch by batch."""
    return [feeds["ids"][:, 0].tolist() for feeds in samples]


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **_arrays())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "batches"
    path.mkdir()
    for index in range(3):
        np.savez(path / f"{index}.npz", **_arrays(2, 2 * index))
    return path


# -- sources


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0, 1, 2, 3, 4]]),
        ({"batch": 2}, [[0, 1], [2, 3], [4]]),
        ({"batch": 2, "limit": 3}, [[0, 1], [2]]),
        ({"limit": 99}, [[0, 1, 2, 3, 4]]),
    ],
)
def test_an_npz_is_cut_into_batches(npz, options, expected):
    samples = open_samples(npz, SPECS, **options)
    assert _firsts(samples) == expected
    assert _firsts(samples) == expected  # and again
    assert len(samples) == len(expected)


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, [[0, 1], [2, 3], [4, 5]]), (3, [[0, 1], [2]]), (4, [[0, 1], [2, 3]])]
)
def test_a_folder_gives_one_batch_a_file(folder, limit, expected):
    (folder / "notes.txt").write_text("not data")
    assert _firsts(open_samples(folder, SPECS, limit=limit)) == expected


# -- several sources


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.npz:0.5", ("a.npz", 0.5)),
        ("a.npz:2", ("a.npz", 2)),
        ("a.npz:.25", ("a.npz", 0.25)),
        ("text.txt", ("text.txt", 1)),
        ("module:function", ("module:function", 1)),
        ("module:function:3", ("module:function", 3)),
        ("feeds.py:f2", ("feeds.py:f2", 1)),
        (Path("a.npz:0.5"), (Path("a.npz:0.5"), 1)),
    ],
)
def test_a_weight_stands_behind_a_source(source, expected):
    assert weighted_source(source) == expected


def test_a_file_that_is_called_like_a_weighted_source_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder:2").mkdir()
    assert weighted_source("folder:2") == ("folder:2", 1)


@pytest.mark.parametrize("weight", ["0", "0.0", "00"])
def test_a_weight_of_nothing_is_refused(npz, weight):
    with pytest.raises(UsageError, match=r"data\.npz:0.*must be above 0, not 0"):
        open_samples(f"{npz}:{weight}", SPECS)


def test_sources_are_mixed_evenly_and_keep_their_weights(npz, folder):
    samples = open_samples([str(npz), f"{folder}:0.5"], SPECS, batch=1)
    assert _firsts(samples) == [[0], [0, 1], [1], [2], [2, 3], [3], [4, 5], [4]]
    assert samples.weights == (1, 0.5, 1, 1, 0.5, 1, 0.5, 1)
    assert samples.weighted
    assert samples.part(1, 3).weights == (0.5, 1)
    assert samples.part(2, 4).weighted is False
    assert samples.without("x").weights == samples.weights
    assert samples.source == f"{npz}, {folder}"


@pytest.mark.parametrize(("limit", "expected"), [(2, [[0, 1], [0, 1]]), (3, [[0, 1], [0, 1, 2], [2]])])
def test_the_limit_holds_for_every_source(npz, folder, limit, expected):
    assert _firsts(open_samples([npz, folder], SPECS, limit=limit)) == expected


def test_one_source_in_a_list_is_that_source(npz):
    alone = open_samples(npz, SPECS, batch=2)
    listed = open_samples([npz], SPECS, batch=2)
    assert listed.digest() == alone.digest()
    assert (listed.weighted, listed.source) == (False, alone.source)


def test_the_digest_depends_on_the_weights(npz, folder):
    one, half, same = (open_samples([npz, f"{folder}{w}"], SPECS).digest() for w in ("", ":0.5", ":1"))
    assert one == same
    assert half != one


def test_no_source_at_all_is_refused():
    with pytest.raises(UsageError, match="no source of data"):
        open_samples([], SPECS)


def _yielding():
    for start in (0, 3):
        yield _arrays(3, start)


@pytest.mark.parametrize(("limit", "expected"), [(None, [[0, 1, 2], [3, 4, 5]]), (4, [[0, 1, 2], [3]])])
def test_a_function_yields_batches(limit, expected):
    samples = open_samples(_yielding, SPECS, limit=limit)
    assert _firsts(samples) == expected
    assert _firsts(samples) == expected


def test_a_function_is_not_asked_for_more_than_the_limit():
    def endless():
        while True:
            yield _arrays(2)

    assert len(open_samples(endless, SPECS, limit=6)) == 3


@pytest.mark.parametrize("kind", ["module", "file"])
def test_a_function_by_name(tmp_path, monkeypatch, kind):
    (tmp_path / "calibration_feeds.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    yield {'ids': np.full((2, 4), 7), 'x': np.zeros((2, 3), np.float32)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "calibration_feeds", raising=False)
    name = "calibration_feeds" if kind == "module" else str(tmp_path / "calibration_feeds.py")
    assert _firsts(open_samples(f"{name}:feeds", SPECS)) == [[7, 7]]


def test_values_are_cast_where_nothing_is_lost(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.ones((2, 4), np.int32), x=np.ones((2, 3)))
    (feeds,) = open_samples(tmp_path / "a.npz", SPECS)
    assert feeds["ids"].dtype == np.int64
    assert feeds["x"].dtype == np.float32


def test_digest_depends_on_values_and_names_only(npz, tmp_path):
    one = open_samples(npz, SPECS).digest()
    np.savez(tmp_path / "copy.npz", **_arrays())
    assert open_samples(tmp_path / "copy.npz", SPECS).digest() == one
    np.savez(tmp_path / "other.npz", **_arrays(start=1))
    assert open_samples(tmp_path / "other.npz", SPECS).digest() != one


def test_the_models_own_batch_size_wins(npz, tmp_path):
    fixed = (
        InputSpec("ids", np.dtype(np.int64), (5, 4), None),
        InputSpec("x", np.dtype(np.float32), (5, 3), None),
    )
    assert _firsts(open_samples(npz, fixed, batch=2)) == [[0, 1, 2, 3, 4]]
    np.savez(tmp_path / "six.npz", **_arrays(6))
    with pytest.raises(DataError, match="6 samples are no multiple of the model's fixed batch of 5"):
        open_samples(tmp_path / "six.npz", fixed)
    with pytest.raises(DataError, match="batch 0: 2 samples in a batch; the model takes exactly 5"):
        open_samples(lambda: [_arrays(2)], fixed)


def test_an_empty_cache_is_no_empty_data():
    specs = (*SPECS, InputSpec("past", np.dtype(np.float32), ("batch", 2, "past_length", 4), None))
    given = {**_arrays(2), "past": np.zeros((2, 2, 0, 4), np.float32)}
    (feeds,) = open_samples(lambda: [given], specs)
    assert feeds["past"].shape == (2, 2, 0, 4)


# -- what does not fit

BAD_ARRAYS = {
    "missing": ({"x": None}, f"has no x; it has ids; {EXPECTED}"),
    "rank": ({"x": np.ones((5, 3, 1))}, r"x is float64\[5, 3, 1\]; expected x: float32\[batch, 3\]"),
    "size": ({"x": np.ones((5, 4))}, r"x is float64\[5, 4\]; expected x: float32\[batch, 3\]"),
    "dtype": ({"ids": np.ones((5, 4))}, "ids has dtype float64; expected int64"),
    "empty": ({"ids": np.ones((0, 4), int)}, r"ids is int64\[0, 4\]; expected ids: int64\[batch, sequence\]"),
    "no token": ({"ids": np.ones((5, 0), int)}, r"ids is int64\[5, 0\]; expected ids"),
    "NaN": ({"x": np.full((5, 3), np.nan)}, "x holds NaN, Inf or values beyond float32"),
    "Inf": ({"x": np.full((5, 3), np.inf)}, "x holds NaN, Inf or values beyond float32"),
    "overflow": ({"x": np.full((5, 3), 1e300)}, "x holds NaN, Inf or values beyond float32"),
    "text": ({"ids": np.full((5, 4), "a")}, "ids has dtype <U1; expected int64"),
    "count": ({"x": np.ones((4, 3))}, r"differ in their number of samples: .*'ids': 5, 'x': 4"),
    "index": ({"ids": np.full((5, 4), 100)}, "ids holds the index 100, but the table has 100 rows"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
@pytest.mark.parametrize("source", ["npz", "folder", "function"])
def test_arrays_that_do_not_fit(tmp_path, case, source):
    changes, said = BAD_ARRAYS[case]
    arrays = {name: array for name, array in {**_arrays(), **changes}.items() if array is not None}
    if source == "function":
        what, where = (lambda: [_arrays(), arrays]), "batch 1"
    else:
        np.savez(tmp_path / "bad.npz", **arrays)
        what, where = tmp_path / "bad.npz" if source == "npz" else tmp_path, "bad.npz"
    with pytest.raises(DataError, match=said) as caught:
        open_samples(what, SPECS)
    assert where in str(caught.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match=f"torn.npz cannot be read as .npz .*{EXPECTED}"):
        open_samples(tmp_path / "torn.npz", SPECS)
    with pytest.raises(DataError, match=r"none.npz: no such file; expected an \.npz with"):
        open_samples(tmp_path / "none.npz", SPECS)
    with pytest.raises(DataError, match=r"none.txt: no such file or folder; give an \.npz, a folder"):
        open_samples(tmp_path / "none.txt", SPECS)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(DataError, match=r"is no \.npz; for a text file give the tokenizer's folder"):
        open_samples(tmp_path / "text.txt", SPECS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.npz file; expected arrays ids"):
        open_samples(tmp_path / "empty", SPECS)


def test_an_npz_with_objects_is_refused(tmp_path):
    objects = np.empty(5, object)
    np.savez(tmp_path / "a.npz", ids=objects, x=np.ones((5, 3)))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        open_samples(tmp_path / "a.npz", SPECS)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (list, "no calibration data in it"),
        (lambda: [np.ones(3)], "yields ndarray; expected a dictionary with ids"),
        (lambda: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda: 5, "failed: TypeError"),
    ],
)
def test_functions_that_fail(function, said):
    with pytest.raises(UsageError, match=said):
        open_samples(function, SPECS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_here:feeds", "cannot be imported: ModuleNotFoundError"),
        ("json:no_such_function", "cannot be imported: AttributeError"),
        ("json:__name__", "is no function"),
        ("no_such_file.py:feeds", "no such Python file"),
    ],
)
def test_functions_that_are_not_there(name, said):
    with pytest.raises(UsageError, match=said):
        open_samples(name, SPECS)


@pytest.mark.parametrize("option", ["limit", "batch", "max_length"])
def test_options_below_one(npz, option):
    with pytest.raises(UsageError, match="must be at least 1, not 0") as caught:
        open_samples(npz, SPECS, **{option: 0})
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize("source", ["npz", "folder", "function"])
def test_labels_come_with_their_samples(tmp_path, source):
    arrays = {**_arrays(5), "y": np.array([[i, -i] for i in range(5)], np.int8)}
    if source == "npz":
        np.savez(tmp_path / "data.npz", **arrays)
        given = tmp_path / "data.npz"
    elif source == "folder":
        given = tmp_path / "folder"
        given.mkdir()
        np.savez(given / "data.npz", **arrays)
    else:
        given = functools.partial(iter, [arrays])
    samples = open_samples(given, SPECS, labels="y", limit=4, batch=2)
    labels = np.concatenate([feeds["y"] for feeds in samples])
    assert labels.dtype == np.int64
    assert labels.tolist() == [[i, -i] for i in range(4)]
    plain = open_samples(given, SPECS, limit=4, batch=2)
    assert samples.without("y").digest() == plain.digest() != samples.digest()
    assert all("y" not in feeds for feeds in plain)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros(5, np.float32), r"labels y are float32\[5\]; expected integers"),
        (np.int64(1), r"labels y are int64\[\]; expected integers"),
        (np.zeros(4, np.int64), "differ in their number of samples"),
        (None, "has no labels 'y'"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels, said):
    np.savez(tmp_path / "data.npz", **_arrays(5), **({} if labels is None else {"y": labels}))
    with pytest.raises(DataError, match=said):
        open_samples(tmp_path / "data.npz", SPECS, labels="y")
