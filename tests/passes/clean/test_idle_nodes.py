"""clean.idle-nodes: what gives back its input goes, what may change it stays."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.passes.clean.idle_nodes import IdleNodes

IDLE = IdleNodes()
X = np.float32([[1, -2, 3], [0, 5, -6]])
TENSORS = {
    "one": np.float32(1),
    "one1": np.float32([[1]]),
    "one3": np.float32([[[1]]]),
    "ones": np.ones(3, np.float32),
    "two": np.float32(2),
    "true": np.ones((1, 3), bool),
    "tall": np.ones((2, 3), bool),
    "mixed": np.array([True, False, True]),
    "false": np.zeros(1, bool),
    "small": np.array([1, 3]),
    "large": np.array([4, 1, 1]),
    "grow": np.array([2, 3]),
    "as_is": np.array([0, 3]),
    "inferred": np.array([-1, 3]),
    "flat": np.array([-1]),
    "other": np.array([3, -1]),
}


def build(from_text, expression, *, inputs="float[B, 3] X", outputs=None, between="Relu(X)"):
    """``x`` is what the expression may give back; a Neg follows."""
    words = set(expression.replace("(", " ").replace(")", " ").replace(",", " ").split())
    tensors = {name: array for name, array in TENSORS.items() if name in words}
    body = f"x = {between} y = {expression} z = Cast<to = 1>(y) Y = Neg(z)"
    head = '<ir_version: 9, opset_import: ["" : 17]>'
    return from_text(f"{head} g ({inputs}) => ({outputs or 'float[N, M] Y'}) {{ {body} }}", **tensors)


def op_types(model):
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    "expression",
    [
        "Cast<to = 1>(x)", "Mul(x, one)", "Mul(one1, x)", "Div(x, one)", "Expand(x, small)",
        "Reshape(x, as_is)", "Transpose<perm = [0, 1]>(x)", "Concat<axis = 0>(x)", "Reshape(x, same)",
    ],
)  # fmt: skip
def test_what_gives_back_its_input_goes(from_text, run, expression):
    if "same" in expression:
        expression = "Reshape(x, s)"
        model = build(from_text, expression, between="Relu(X) s = Shape(x)")
        left = ["Relu", "Shape", "Neg"]
    else:
        model, left = build(from_text, expression), ["Relu", "Neg"]
    before = run(model, {"X": X})["Y"]
    assert IDLE(model).modified
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)
    assert op_types(model) == left
    assert not IDLE(model).modified


@pytest.mark.parametrize("expression", ["And(x, true)", "And(true, x)", "Or(x, false)"])
def test_masks_that_change_nothing_go(from_text, run, expression):
    model = build(from_text, expression, between="Less(X, X)")
    before = run(model, {"X": X})["Y"]
    assert IDLE(model).statistics == {"nodes": 1}
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)
    assert op_types(model) == ["Less", "Cast", "Neg"]


@pytest.mark.parametrize(
    "expression",
    [
        "Cast<to = 11>(x)", "Mul(x, two)", "Mul(one3, x)", "Mul(x, ones)", "Div(one, x)", "Div(x, two)",
        "Expand(x, large)", "Expand(x, grow)", "Reshape(x, flat)", "Reshape(x, other)",
        "Transpose<perm = [1, 0]>(x)", "Transpose(x)", "Concat<axis = 0>(x, x)",
    ],
)  # fmt: skip
def test_what_may_change_something_stays(from_text, run, expression):
    outputs = "float[N] Y" if "flat" in expression else None
    if "one3" in expression or "large" in expression:
        outputs = "float[N, B, M] Y"
    model = build(from_text, expression, outputs=outputs)
    op_type = expression.split("(")[0].split("<")[0]
    IDLE(model)
    assert op_type in op_types(model)


@pytest.mark.parametrize("expression", ["And(x, mixed)", "And(x, tall)", "Or(x, true)", "And(x, false)"])
def test_masks_that_may_change_something_stay(from_text, expression):
    model = build(from_text, expression, between="Less(X, X)")
    assert not IDLE(model).modified


def test_a_caller_may_replace_the_one(from_text):
    model = build(from_text, "Mul(x, one1)", inputs="float[B, 3] X, float[1, 1] one1")
    assert "Mul" in op_types(model)
    IDLE(model)
    assert "Mul" in op_types(model)


def test_an_output_keeps_its_node(from_text):
    model = build(from_text, "Cast<to = 1>(x)", outputs="float[B, 3] Y, float[B, 3] y")
    IDLE(model)
    assert op_types(model) == ["Relu", "Cast", "Neg"]


def test_nothing_is_known_of_another_operator(from_text):
    """Behind it, a scalar may be given: a one of one axis would add to it."""
    head = '<ir_version: 9, opset_import: ["" : 17, "local" : 1]>'
    model = from_text(
        head + "g (float[B, 3] X) => (float[N] Y) { x = local.unknown(X) Y0 = Mul(x, one) Y = Neg(Y0) }"
        '<domain: "local", opset_import: ["" : 17]> unknown (a) => (b) { b = Neg(a) }',
        one=np.float32([1]),
    )
    unknown = model.graph.node(0).outputs[0]
    unknown.shape, unknown.type = None, None
    model.functions.clear()
    assert not IDLE(model).modified
    assert isinstance(model, ir.Model)
