"""What holds for all tests; models written as ONNX text, and a way to run them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import settings

from sparse_onnx.report.environment import write_json
from sparse_onnx.report.schema import check_report

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")


@pytest.fixture(autouse=True)
def _quick_timing(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the timings in the user's cache folder, or repeats a measurement until it is sure."""
    monkeypatch.setenv("SPARSE_ONNX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("sparse_onnx.timing.choose._SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _documented_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every report that a test has written fits the schema that says what is in it."""

    def write(report: dict[str, Any], path: Path) -> None:
        check_report(report)
        write_json(report, path)

    monkeypatch.setattr("sparse_onnx.compilation.report_rows.write_json", write)


def _from_text(text: str, **tensors: np.ndarray) -> ir.Model:
    """A checked model; ``tensors`` become initializers of the main graph."""
    proto = onnx.parser.parse_model(text)
    for name, array in tensors.items():
        proto.graph.initializer.append(ir.serde.serialize_tensor(ir.tensor(array, name=name)))
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def _run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs by name, from ONNX Runtime without its own optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture
def from_text() -> Callable[..., ir.Model]:
    return _from_text


@pytest.fixture
def run() -> Callable[[ir.Model, Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    return _run
