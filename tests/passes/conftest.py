"""Models written as ONNX text, and a way to run them."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.passes.base import Pass, PassResult
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN


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


def _answers(model: ir.Model, feeds: Mapping[str, np.ndarray], *, library: bool) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        sparse_ops.register(options)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def _op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == DOMAIN]


def _check_joined(
    step: Pass, model: ir.Model, expected_ops: list[str], feeds: Mapping[str, np.ndarray], *, exact: bool
) -> PassResult:
    before = {library: _answers(model, feeds, library=library) for library in (True, False)}
    names = [value.name for value in model.graph.outputs]
    result = step(model)
    assert result.modified
    assert _op_types(model) == expected_ops
    assert [value.name for value in model.graph.outputs] == names
    for library in (True, False):
        for got, expected in zip(_answers(model, feeds, library=library), before[library], strict=True):
            if library == exact:
                np.testing.assert_array_equal(got, expected)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    again = step(model)
    assert not again.modified
    assert again.statistics == dict.fromkeys(result.statistics, 0)
    return result


def _check_not_joined(step: Pass, model: ir.Model) -> list[tuple[str, str]]:
    before = _op_types(model)
    result = step(model)
    assert not result.modified
    assert _op_types(model) == before
    return [(place.place, place.reason) for place in result.declined]


@pytest.fixture
def op_types() -> Callable[[ir.Model], list[str]]:
    """The operators of ours in the main graph."""
    return _op_types


@pytest.fixture
def check_joined() -> Callable[..., PassResult]:
    """``check_joined(step, model, expected_ops, feeds, exact=..)``: ``step`` makes one operator of several, once.
    Answers must not change: with the library (``exact`` true) or on the bodies (false) not in a single bit."""
    return _check_joined


@pytest.fixture
def check_not_joined() -> Callable[[Pass, ir.Model], list[tuple[str, str]]]:
    """``check_not_joined(step, model)``: ``step`` leaves the model alone. (Place, reason) of what it declined."""
    return _check_not_joined
