"""The schema of reports: complete, documented, and held up by what is read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sparse_onnx.document import SCHEMA_VERSION
from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.report.environment import describe_call
from sparse_onnx.report.schema import check_report, load_schema, read_report

Report = dict[str, Any]


def objects(part: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every description of an object with known keys, with its place in the schema."""
    if isinstance(part, dict):
        if isinstance(part.get("properties"), dict) and part.get("type") is not None:
            yield path, part
        for key, value in part.items():
            yield from objects(value, f"{path}.{key}")
    elif isinstance(part, list):
        for value in part:
            yield from objects(value, path)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(load_schema())
    assert load_schema()["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_the_published_schema_is_what_the_types_say() -> None:
    text = resources.files("sparse_onnx.report").joinpath("schema.json").read_text(encoding="utf-8")
    anew = "write it anew: report.environment.write_json(load_schema(), Path('src/sparse_onnx/report/schema.json'))"
    assert json.loads(text) == load_schema(), anew


def test_every_key_is_described_and_no_other_is_allowed() -> None:
    found = dict(objects(load_schema()))
    assert len(found) > 10
    for path, part in found.items():
        assert part["additionalProperties"] is False, path
        assert set(part.get("required", ())) <= part["properties"].keys(), path
        for key, value in part["properties"].items():
            assert len(value.get("description", "")) > 5, f"{path}: {key}"


def test_reports_fit(report: Report, full_report: Report) -> None:
    check_report(report)
    check_report(full_report)


def test_the_full_report_has_every_key(full_report: Report) -> None:
    """So that what is tested with it is everything there is."""
    assert full_report.keys() == load_schema()["properties"].keys()


CHANGES: dict[str, Callable[[Report], Any]] = {
    "$: 'stages' is a required property": lambda r: r.pop("stages"),
    "$: Additional properties are not allowed ('mine'": lambda r: r.update(mine=1),
    "$.layers[0].sparsity: 1.5 is greater than the maximum of 1": lambda r: r["layers"][0].update(
        sparsity=1.5
    ),
    "$.layers[1].decision: 3 is not of type 'string'": lambda r: r["layers"][1].update(decision=3),
    "$.layers[0].times.sparse: -1 is less than": lambda r: r["layers"][0]["times"].update(sparse=-1),
    "$.summary.speedup: '2x' is not of type": lambda r: r["summary"].update(speedup="2x"),
    "$.layers: None is not of type 'array'": lambda r: r.update(layers=None),
    "$.stages[0].seconds: -1 is less than": lambda r: r["stages"][0].update(seconds=-1),
    f"$.schema_version: {SCHEMA_VERSION} was expected": lambda r: r.update(schema_version=0),
    "$.curves[0].points: [] should be non-empty": lambda r: r.update(
        curves=[
            {
                "layer": "a",
                "form": "sparse",
                "mask_structure": "2:4",
                "points": [],
                "break_even": None,
                "chosen": None,
            }
        ]
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_does_not_fit_is_said_with_its_place(tmp_path: Path, report: Report, message: str) -> None:
    CHANGES[message](report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(UsageError) as caught:
        read_report(tmp_path)
    assert f"report.json: does not fit the schema at {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_in_messages(report: Report) -> None:
    report["layers"][0]["pruning"] = "x" * 10_000
    with pytest.raises(UsageError) as caught:
        check_report(report)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 99])
def test_newer_reports_are_refused(report: Report, version: int) -> None:
    report.update(schema_version=version, future=True)
    with pytest.raises(
        UsageError, match=f"newer sparse-onnx .schema {version}, this one reads {SCHEMA_VERSION}"
    ):
        check_report(report)


def test_older_reports_are_refused(tmp_path: Path, report: Report) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**report, "schema_version": 1}))
    with pytest.raises(
        UsageError,
        match=rf"older sparse-onnx .schema 1, this one reads {SCHEMA_VERSION}.: compile the model again",
    ):
        read_report(tmp_path)


@pytest.mark.parametrize(
    "document", [[], {}, 3, "report", None, {"schema_version": 1}, {"version": 1, "stages": []}]
)
def test_foreign_documents_are_named_so(tmp_path: Path, document: Any) -> None:
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"other.json: is JSON, but no report of sparse-onnx"):
        read_report(tmp_path / "other.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema_version": 1, "summary": NaN, "layers": []}',
        b'{"schema_version": 1, "summary": 1e999, "layers": []}',
        b'{"schema_version": 1, "summary": 1' + b"0" * 400 + b', "layers": []}',
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"report.json: cannot be read as JSON") as caught:
        read_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_reports(tmp_path: Path, report: Report) -> None:
    text = json.dumps(report, indent=2)
    for end in range(0, len(text), 701):
        (tmp_path / "report.json").write_text(text[:end])
        with pytest.raises(UsageError, match="cannot be read as JSON"):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text(text)
    assert read_report(tmp_path) == report


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"this folder has no report\.json"):
        read_report(tmp_path)
    with pytest.raises(UsageError, match="there is no such file"):
        read_report(tmp_path / "nosuch")


def test_unreadable_file(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_arguments: Any, **_options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(HostError, match="cannot be read: Permission denied"):
        read_report(tmp_path)


def test_calls_are_described_as_python() -> None:
    def compress(
        model: str | Path, output: str, *, sparsity: float = 0.5, data: Any = None, progress: Any = None
    ) -> None:
        pass

    given = {
        "model": Path("a b.onnx"),
        "output": "out",
        "sparsity": 0.5,
        "data": {"X": (1, 2)},
        "progress": print,
    }
    assert describe_call(compress, given) == "sparse_onnx.compress('a b.onnx', 'out', data={'X': (1, 2)})"
    given["data"] = list(range(1000))
    assert describe_call(compress, given).endswith("data=list(…))")
