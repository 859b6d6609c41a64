"""The vocabulary of the patterns: what each word means, and where it must not hold."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.model.shapes import Shapes
from sparse_onnx.passes.patterns.match import (
    both_ways,
    float32_constant,
    gate_of,
    is_bias,
    is_last_axis,
    is_scalar,
    is_scaled,
    is_vector,
    only_user,
    other_operand,
    transposed,
    users_of,
)

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.example" : 1]>'
BODY = """If(c) <then_branch = yes () => (float[N, 4] y) {{ {} }},
    else_branch = no () => (float[N, 4] z) {{ z = Neg(X) }}>"""


def build(from_text, body, *, outputs="float[N, 4] Y", **tensors):
    return from_text(f"{HEAD} g (float[N, 4] X, bool c) => ({outputs}) {{ {body} }}", **tensors)


def value(model, name):
    graphs = [model.graph, *model.graph.subgraphs()]
    made = [
        v for g in graphs for v in (*g.inputs, *g.initializers.values(), *(o for n in g for o in n.outputs))
    ]
    (found,) = [v for v in made if v.name == name]
    return found


USERS = {
    "one": ("h = Neg(X) Y = Relu(h)", ["Relu"]),
    "another domain": ("h = Neg(X) Y = com.example.Relu(h)", ["Relu"]),
    "both operands": ("h = Neg(X) Y = Mul(h, h)", ["Mul", "Mul"]),
    "two": ("h = Neg(X) r = Relu(h) Y = Add(r, h)", ["Relu", "Add"]),
    "all in one body": ("Y = " + BODY.format("h = Neg(X) y = Relu(h)"), ["Relu"]),
    "nobody": ("h = Neg(X) Y = Relu(X)", []),
    "in a body": ("h = Neg(X) Y = " + BODY.format("y = Relu(h)"), []),
    "in a body, too": ("h = Neg(X) r = Relu(h) Y = " + BODY.format("y = Add(h, r)"), []),
}  # fmt: skip


@pytest.mark.parametrize("case", USERS)
def test_users(from_text, case):
    body, expected = USERS[case]
    h = value(build(from_text, body), "h")
    assert [node.op_type for node in users_of(h)] == expected
    found = only_user(h, "Relu")
    alone = case in ("one", "all in one body")
    assert (found is not None and found.op_type == "Relu") is alone
    assert only_user(h, "Neg") is None


def test_an_output_has_more_users_than_the_graph_shows(from_text):
    h = value(build(from_text, "h = Neg(X) Y = Relu(h)", outputs="float[N, 4] Y, float[N, 4] h"), "h")
    assert users_of(h) == []
    assert only_user(h, "Relu") is None


def test_an_output_of_a_body(from_text):
    model = build(from_text, "Y = " + BODY.format("y = Neg(X)"))
    assert users_of(value(model, "y")) == []


def test_the_only_user_in_another_domain(from_text):
    h = value(build(from_text, "h = Neg(X) Y = com.example.Relu(h)"), "h")
    assert only_user(h, "Relu") is None
    assert only_user(h, "Relu", "com.example") is users_of(h)[0]
    h = value(build(from_text, "h = Neg(X) Y = Relu(h)"), "h")
    assert only_user(h, "Relu", "com.example") is None


def test_operands(from_text):
    model = build(from_text, "h = Neg(X) Y = Sub(X, h)")
    node, x, h = model.graph[1], value(model, "X"), value(model, "h")
    assert other_operand(node, x) is h
    assert other_operand(node, h) is x
    assert both_ways(node) == ((x, h), (h, x))


def test_both_operands_alike(from_text):
    model = build(from_text, "h = Neg(X) Y = Mul(h, h)")
    h = value(model, "h")
    assert other_operand(model.graph[1], h) is h


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("s = Sigmoid(h) Y = Mul(h, s)", True),
        ("s = Sigmoid(h) Y = Mul(s, h)", True),
        ("s = HardSigmoid(h) Y = Mul(h, s)", False),
        ("s = com.example.Sigmoid(h) Y = Mul(h, s)", False),
        ("s = Sigmoid(h) Y = com.example.Mul(h, s)", False),
        ("s = Sigmoid(h) Y = Add(h, s)", False),
        ("s = Sigmoid(h) Y = Mul(s, s)", False),
        ("s = Sigmoid(h) t = Sigmoid(h) Y = Mul(s, t)", False),
        ("s = Sigmoid(h) p = Mul(h, s) Y = Add(p, h)", False),
        ("s = Sigmoid(h) p = Mul(h, s) Y = Add(p, s)", False),
        ("s = Sigmoid(h) p = Mul(X, s) Y = Mul(p, h)", False),
        ("Y = " + BODY.format("s = Sigmoid(h) y = Mul(h, s)"), False),
        ("s = Sigmoid(h) Y = " + BODY.format("y = Mul(h, s)"), False),
    ],
)
def test_a_gate(from_text, body, found):
    model = build(from_text, "h = Neg(X) " + body)
    gate = gate_of(value(model, "h"), "Sigmoid")
    assert (gate is not None) is found
    if gate is not None:
        assert [node.op_type for node in gate] == ["Sigmoid", "Mul"]


def test_the_long_name_of_the_domain():
    text = """<ir_version: 9, opset_import: ["ai.onnx" : 17]> g (float[N, 4] X) => (float[N, 4] Y)
        { h = ai.onnx.Neg(X) s = ai.onnx.Sigmoid(h) p = ai.onnx.Mul(h, s) Y = ai.onnx.Relu(p) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert gate_of(value(model, "h"), "Sigmoid") is not None
    assert only_user(value(model, "p"), "Relu") is model.graph[3]


@pytest.mark.parametrize("also", ["h", "s"])
def test_a_gate_whose_operands_are_outputs(from_text, also):
    model = build(
        from_text, "h = Neg(X) s = Sigmoid(h) Y = Mul(h, s)", outputs=f"float[N, 4] Y, float[N, 4] {also}"
    )
    assert gate_of(value(model, "h"), "Sigmoid") is None


def test_a_transpose(from_text):
    model = build(
        from_text,
        "t = Transpose<perm = [1, 0]>(X) u = Transpose(t) Y = com.example.Transpose<perm = [1, 0]>(u)",
    )
    x, t, u, y = (value(model, name) for name in "XtuY")
    assert transposed(t, 1, 0) is x
    assert transposed(t, 0, 1) is None
    assert transposed(t, 0, 2, 1) is None
    assert transposed(u, 1, 0) is None  # not written out
    assert transposed(y, 1, 0) is None
    assert transposed(x, 1, 0) is None
    assert transposed(None, 1, 0) is None


@pytest.mark.parametrize(
    ("axis", "name", "expected"),
    [(-1, "X", True), (1, "X", True), (0, "X", False), (-2, "X", False), (2, "X", False),
     (-1, "r", True), (0, "r", False), (1, "r", False)],
)  # fmt: skip
def test_the_last_axis(from_text, axis, name, expected):
    """Nothing is known of r, but that the last axis is the last one."""
    model = build(from_text, "r = com.example.Unknown(X) Y = com.example.Other(r)")
    assert is_last_axis(axis, value(model, name), Shapes(model)) is expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [("", False), ("<alpha = 1.0, beta = 1.0>", False), ("<alpha = 2.0>", True), ("<beta = 0.5>", True),
     ("<transB = 1>", False)],
)  # fmt: skip
def test_a_scaled_gemm(from_text, attributes, expected):
    model = build(from_text, f"Y = Gemm{attributes}(X, w)", w=np.ones((4, 4), np.float32))
    assert is_scaled(model.graph[0]) is expected


@pytest.mark.parametrize(
    ("array", "float32", "vector", "bias"),
    [
        (np.ones(4, np.float32), True, True, True),
        (np.ones((1, 4), np.float32), True, False, True),
        (np.ones((1, 1, 4), np.float32), True, False, True),
        (np.ones((4, 1), np.float32), True, False, False),
        (np.ones((2, 2), np.float32), True, False, False),
        (np.ones(1, np.float32), True, True, False),
        (np.float32(1), True, False, False),
        (np.ones(4, np.float64), False, False, False),
        (np.ones(4, np.int64), False, False, False),
    ],
)
def test_vectors_and_biases(from_text, array, float32, vector, bias):
    b = build(from_text, "Y = com.example.Use(X, b)", b=array).graph[0].inputs[1]
    assert (float32_constant(b) is not None, is_vector(b), is_bias(b, 4)) == (float32, vector, bias)


@pytest.mark.parametrize("declared", ["", ", float[4] b"])
def test_a_bias_that_a_caller_may_replace_is_none(from_text, declared):
    text = f"{HEAD} g (float[N, 4] X{declared}) => (float[N, 4] Y) {{ Y = Add(X, b) }}"
    b = from_text(text, b=np.ones(4, np.float32)).graph[0].inputs[1]
    assert is_bias(b, 4) is is_vector(b) is (not declared)
    assert not is_bias(None, 4)
    assert not is_vector(None)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.float32(2), True),
        (np.full((1, 1), 2.0001, np.float32), True),
        (np.float32(2.01), False),
        (np.full((1, 1, 1), 2, np.float32), False),  # would add an axis
        (np.full(4, 2, np.float32), False),
    ],
)
def test_numbers(from_text, array, expected):
    model = build(from_text, "Y = Mul(X, b)", b=array)
    x, b = model.graph[0].inputs
    assert is_scalar(b, 2.0, x, Shapes(model)) is expected
