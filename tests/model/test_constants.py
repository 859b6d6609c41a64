"""What is constant: nothing that a caller can replace."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparse_onnx.model.constants import (
    constant_array,
    constant_integers,
    constant_number,
    constant_tensor,
    is_constant,
)

HEAD = '<ir_version: 9, opset_import: ["" : 13, "com.example" : 1]>'


def operand(from_text, body, *, inputs="float[N] X", **tensors):
    """The second input of the last node."""
    return from_text(f"{HEAD} g ({inputs}) => (float[N] Y) {{ {body} }}", **tensors).graph[-1].inputs[1]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("Y = Mul(X, w)", [3.0]),
        ("c = Constant<value = float[1] {3.0}>() Y = Mul(X, c)", [3.0]),
        ("c = Constant<value_float = 3.0>() Y = Mul(X, c)", 3.0),
        ("c = Constant<value_floats = [3.0]>() Y = Mul(X, c)", [3.0]),
    ],
)
def test_constants(from_text, body, expected):
    value = operand(from_text, body, **({"w": np.float32([3])} if "w)" in body else {}))
    assert is_constant(value)
    np.testing.assert_array_equal(constant_array(value), np.float32(expected))
    assert constant_tensor(value).shape.numpy() == np.shape(expected)
    assert constant_number(value) == 3


def test_the_long_name_of_the_domain():
    tensor = onnx.numpy_helper.from_array(np.float32(3))
    node = ir.from_proto(onnx.helper.make_node("Constant", [], ["c"], domain="ai.onnx", value=tensor))
    assert constant_number(node.outputs[0]) == 3


@pytest.mark.parametrize(
    ("body", "inputs", "tensors"),
    [
        ("Y = Mul(X, X)", "float[N] X", {}),
        ("c = Neg(w) Y = Mul(X, c)", "float[N] X", {"w": np.float32([3])}),
        ("c = com.example.Constant<value = float[1] {3.0}>() Y = Mul(X, c)", "float[N] X", {}),
        ("Y = Mul(X, w)", "float[N] X, float[1] w", {"w": np.float32([3])}),  # the value is a default
    ],
)
def test_what_is_computed_or_may_be_replaced_is_none(from_text, body, inputs, tensors):
    value = operand(from_text, body, inputs=inputs, **tensors)
    assert not is_constant(value)
    assert constant_tensor(value) is None
    assert constant_array(value) is None
    assert constant_number(value) is None


def test_an_input_that_is_left_out_is_none():
    assert not is_constant(None)
    assert constant_array(None) is None
    assert constant_number(None) is None


@pytest.mark.parametrize(
    ("array", "rank", "expected"),
    [
        (np.float32(2), None, 2),
        (np.full((1, 1), 2, np.int64), None, 2),
        (np.full((1, 1), 2, np.float32), 2, 2),
        (np.full((1, 1), 2, np.float32), 1, None),
        (np.full(2, 2, np.float32), None, None),
        (np.zeros(0, np.float32), None, None),
    ],
)
def test_numbers(from_text, array, rank, expected):
    assert constant_number(operand(from_text, "Y = com.example.Mul(X, w)", w=array), rank) == expected


def test_a_text_is_no_number(from_text):
    value = operand(from_text, 'c = Constant<value_string = "2">() Y = com.example.Use(X, c)')
    assert is_constant(value)
    assert constant_number(value) is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("Y = ReduceMean<axes = [-1, 0]>(X)", (-1, 0)),
        ("Y = ReduceSum(X, axes)", (-1, 2)),
        ("Y = ReduceSum(X, one)", (1,)),
        ("Y = ReduceSum(X)", None),
        ("Y = ReduceMean(X)", None),
        ("a = Shape(X) Y = ReduceSum(X, a)", None),
    ],
)
def test_integers_of_an_attribute_or_an_input(from_text, body, expected):
    known = {"axes": np.array([-1, 2]), "one": np.array(1)}
    tensors = {name: array for name, array in known.items() if f", {name})" in body}
    node = from_text(f"{HEAD} g (float[A, B, C] X) => (float[N] Y) {{ {body} }}", **tensors).graph[-1]
    assert constant_integers(node, "axes", 1) == expected
