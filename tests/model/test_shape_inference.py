"""Shape inference is called in one place, so that all ask the same way."""

import ast
from pathlib import Path

import onnx.parser
import pytest

from sparse_onnx.model.shape_inference import inferred, proven, type_error

ROOT = Path(__file__).parents[2]
ROOMS = ("src/sparse_onnx", "passes", "exporter", "tools", "sparse_ops")
INFERENCE = {
    *("infer_shapes", "infer_shapes_path", "infer_node_outputs", "infer_function_output_types"),
    *("ShapeInferencePass", "SymbolicShapeInference"),
}


def calls(source: str) -> bool:
    """Whether a module names a function that infers shapes, or has the checker do it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.alias(name=name) if name in INFERENCE:
                return True
            case ast.keyword(arg="full_check"):
                return True
    return False


def test_one_module_calls_shape_inference():
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    found = [path.relative_to(ROOT).as_posix() for path in files if calls(path.read_text("utf-8"))]
    assert found == ["src/sparse_onnx/model/shape_inference.py"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import onnx\nonnx.shape_inference.infer_shapes(m)", True),
        ("from onnx.shape_inference import infer_shapes as f", True),
        ("from onnx_ir.passes.common import ShapeInferencePass", True),
        ("common.ShapeInferencePass()(m)", True),
        ("onnx.checker.check_model(m, full_check=True)", True),
        ("from sparse_onnx.model.shape_inference import inferred\ninferred(m)", False),
        ("'''infer_shapes is called elsewhere'''", False),
    ],
)
def test_what_counts_as_a_call(source, expected):
    assert calls(source) is expected


def model_of(text):
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')


GOOD = "g (float[2,3] X) => (float[A,B] Y) { Y = Transpose(X) }"
MISFIT = "g (float[2,3] X) => (float[A,B] Y) { h = Transpose(X) Y = MatMul(h, h) }"
MIXED = "g (float[2,3] X, int64[2,3] Z) => (float[A,B] Y) { Y = Add(X, Z) }"


def test_what_is_found_is_in_a_copy():
    model = model_of(GOOD.replace("Y = Transpose(X)", "h = Transpose(X) Y = Relu(h)"))
    before = model.SerializeToString(deterministic=True)
    for found in (inferred(model), proven(model)):
        (value,) = found.graph.value_info
        assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [3, 2]
    assert model.SerializeToString(deterministic=True) == before


def test_a_node_that_does_not_fit_is_passed_over_or_refused():
    assert inferred(model_of(MISFIT)).graph.value_info[0].name == "h"
    with pytest.raises(Exception, match="MatMul"):
        proven(model_of(MISFIT))


@pytest.mark.parametrize(("text", "wrong"), [(GOOD, False), (MIXED, True), (MISFIT, True)])
def test_errors_of_types_are_told_in_one_line(text, wrong):
    told = type_error(model_of(text))
    assert bool(told) is wrong
    assert "\n" not in told
