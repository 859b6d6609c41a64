"""``sparse-onnx report``: rebuilds a page from report.json alone, and compares two runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def make_run(run_cli, tmp_path, pruned) -> Callable[..., Path]:
    """Compiles the pruned model, decided by a table, into a folder of that name."""

    def make(name: str, *options: object) -> Path:
        shape = ("--input-shape", "X:2,3,64", "--threads", "1")
        ran = run_cli(
            "optimize", pruned, "-o", tmp_path / name, "--no-benchmark", "--quiet", *shape, *options
        )
        assert ran.code == 0, ran.err
        return tmp_path / name

    return make


@pytest.fixture
def run_folder(make_run) -> Path:
    return make_run("out")


def test_page_is_rebuilt_without_the_model(run_cli, run_folder):
    page = run_folder / "report.html"
    original = page.read_bytes()
    for name in ("model.onnx", "model.onnx.data", "report.html"):
        (run_folder / name).unlink(missing_ok=True)
    ran = run_cli("report", run_folder)
    assert ran.code == 0, ran.err
    assert page.read_bytes() == original
    assert ran.out.startswith("Look closer: pruned.onnx is now sparse, its speed not measured and ")
    assert len(ran.out.splitlines()) <= 15
    assert f"Written to {page}" in ran.err


def test_output_and_a_report_file(run_cli, run_folder, tmp_path):
    before = (run_folder / "report.html").stat().st_mtime_ns
    ran = run_cli("report", run_folder / "report.json", "-o", tmp_path / "page.html", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "page.html").read_bytes() == (run_folder / "report.html").read_bytes()
    assert (run_folder / "report.html").stat().st_mtime_ns == before


def test_json_is_the_report(run_cli, run_folder):
    ran = run_cli("report", run_folder, "--format", "json")
    assert {**json.loads((run_folder / "report.json").read_text()), "exit_code": 0} == ran.json()


def test_what_was_asked_for_is_in_the_report(run_folder):
    report = json.loads((run_folder / "report.json").read_text())
    assert report["command"].startswith("sparse-onnx optimize ")
    assert report["command"].endswith(" --input-shape X:2,3,64 --threads 1")
    assert report["recipe"]["target"] == {
        "shapes": {"X": [2, 3, 64]},
        "threads": 1,
        "precision": "float32",
        "float_inputs": [],
    }
    page = (run_folder / "report.html").read_text()
    assert report["command"] in page
    assert (run_folder / "recipe.yaml").read_text() in page


def test_comparison(run_cli, make_run, tmp_path):
    first, second = make_run("first"), make_run("second", "--method", "magnitude", "--sparsity", "0.95")
    ran = run_cli("report", first, second)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert len(lines) <= 15
    assert all(len(line) <= 200 for line in lines)
    assert "B loses accuracy. B against A: speed not comparable, " in lines[0]
    assert "A: first" in lines[1]
    assert any(line.split()[:3] == ["layers", "sparse", "2"] for line in lines)
    assert "other values in the recipe, first stages[0].name: - -> " in ran.out
    assert "Written" not in ran.err
    assert not (tmp_path / "first" / "comparison.html").exists()


def test_comparison_as_json_and_page(run_cli, run_folder, tmp_path):
    ran = run_cli("report", run_folder, run_folder, "--format", "json", "-o", tmp_path / "page.html")
    document = ran.json()
    assert document["exit_code"] == ran.code == 0
    assert document["decisions"] == document["recipe"] == document["environment"] == []
    assert "sparse-onnx comparison" in (tmp_path / "page.html").read_text()


def test_comparison_warns_of_other_machines(run_cli, run_folder, tmp_path):
    report = json.loads((run_folder / "report.json").read_text())
    report["environment"].update(cpu="Another CPU")
    (tmp_path / "other.json").write_text(json.dumps(report))
    ran = run_cli("report", run_folder, tmp_path / "other.json")
    assert ran.code == 0
    assert "Warning: The machines differ (cpu): speeds do not compare." in ran.err
    assert "Warning" not in run_cli("report", run_folder, tmp_path / "other.json", "--quiet").err


def damaged(folder: Path) -> None:
    (folder / "report.json").write_text("{")


def foreign(folder: Path) -> None:
    (folder / "report.json").write_text('{"name": "package.json"}')


def newer(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "schema_version": 3}))


def older(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "schema_version": 1}))


def missing(folder: Path) -> None:
    (folder / "report.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "cannot be read as JSON"),
        (foreign, "no report of sparse-onnx"),
        (newer, "newer sparse-onnx"),
        (older, "older sparse-onnx"),
        (missing, "has no report.json"),
    ],
)
def test_bad_reports_are_exit_2(run_cli, run_folder, spoil, message):
    spoil(run_folder)
    before = (run_folder / "report.html").read_bytes()
    ran = run_cli("report", run_folder)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("Error: ") == 1
    assert message in ran.err
    assert str(run_folder) in ran.err
    assert "Traceback" not in ran.err
    assert (run_folder / "report.html").read_bytes() == before


def test_bad_reports_as_json(run_cli, run_folder):
    missing(run_folder)
    assert run_cli("report", run_folder, "--format", "json").json()["exit_code"] == 2


def test_page_that_cannot_be_written_is_exit_6(run_cli, run_folder, tmp_path):
    ran = run_cli("report", run_folder, "-o", tmp_path / "nosuch" / "page.html")
    assert ran.code == 6
    assert ran.err.count("Error: ") == 1
    assert not (tmp_path / "nosuch").exists()


def test_run_is_required(run_cli):
    assert run_cli("report").code == 2
