"""What holds for all tests."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from sparse_onnx.report import write_json
from sparse_onnx.report_schema import check_report

settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")


@pytest.fixture(autouse=True)
def _quick_timing(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the timings in the user's cache folder, or repeats a measurement until it is sure."""
    monkeypatch.setenv("SPARSE_ONNX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("sparse_onnx.passes.guard._SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _documented_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every report that a test has written fits the schema that says what is in it."""

    def write(report: dict[str, Any], path: Path) -> None:
        check_report(report)
        write_json(report, path)

    monkeypatch.setattr("sparse_onnx.compile_report.write_json", write)
