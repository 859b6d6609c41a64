"""What passes that join nodes are held to."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.passes.base import Pass, PassResult
from sparse_onnx.sparse_ops.domain import DOMAIN


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
def answers() -> Callable[..., list[np.ndarray]]:
    """``answers(model, feeds, library=..)``: all outputs, with the library or on the bodies of functions."""
    return _answers


@pytest.fixture
def check_joined() -> Callable[..., PassResult]:
    """``check_joined(step, model, expected_ops, feeds, exact=..)``: ``step`` makes one operator of several, once.
    Answers must not change: with the library (``exact`` true) or on the bodies (false) not in a single bit."""
    return _check_joined


@pytest.fixture
def check_not_joined() -> Callable[[Pass, ir.Model], list[tuple[str, str]]]:
    """``check_not_joined(step, model)``: ``step`` leaves the model alone. (Place, reason) of what it declined."""
    return _check_not_joined
