"""clean.reshapes: what is known of sizes is written down, for all sizes that inputs may have."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.passes.clean.cleanup import Unused
from sparse_onnx.passes.clean.reshapes import Reshapes

STEP = Reshapes()
NUMBERS = {
    "c0": np.array([0]),
    "c1": np.array([1]),
    "c2": np.array([2]),
    "c12": np.array([12]),
    "c4": np.array([4]),
    "c8": np.array([8]),
    "c48": np.array([48]),
    "rest": np.array([-1]),
    "heads": np.array([2, 5, -1, 4]),
    "keep": np.array([0, 0, -1, 4]),
    "rows": np.array([-1, 12]),
    "fixed": np.array([2, 3, 4, 5]),
    "other": np.array([3, 2, 4, 5]),
    "both": np.array([-1, 3, 4, 5]),
}
SIZES = "s = Shape(X) b = Gather(s, c0) l = Gather(s, c1)"


def build(from_text, body, *, inputs="float[B, S, 12] X", outputs="float[N, M, K, L] Y", opset=17, **tensors):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in {**NUMBERS, **tensors}.items() if name in words}
    head = f'<ir_version: 9, opset_import: ["" : {opset}]>'
    return from_text(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}", **used)


def x(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(model, run, feeds, step=STEP):
    before = [run(model, feed) for feed in feeds]
    result = step(model)
    Unused()(model)
    for feed, outputs in zip(feeds, before, strict=True):
        for name, array in run(model, feed).items():
            np.testing.assert_array_equal(array, outputs[name])
    assert not step(model).modified
    return result


def targets(model):
    return [node.inputs[1].const_value for node in model.graph if node.op_type == "Reshape"]


def op_types(model):
    return [node.op_type for node in model.graph]


SOME = [{"X": x(b, s, 12)} for b, s in ((2, 3), (1, 7), (4, 1))]


@pytest.mark.parametrize(
    ("body", "target"),
    [
        (f"{SIZES} t = Concat<axis = 0>(b, l, rest, c4) Y = Reshape(X, t)", [0, 0, 3, 4]),
        (f"{SIZES} t = Concat<axis = 0>(b, rest, c4, c4) Y = Reshape(X, t)", [0, -1, 4, 4]),
        (f"{SIZES} t = Concat<axis = 0>(b, l, c4, rest) Y = Reshape(X, t)", [0, 0, 4, 3]),
        ("Y = Reshape(X, keep)", [0, 0, 3, 4]),
        (f"{SIZES} p = Mul(b, l) t = Concat<axis = 0>(p, c1, c1, c12) Y = Reshape(X, t)", [-1, 1, 1, 12]),
    ],
)
def test_targets_of_known_sizes(from_text, run, body, target):
    model = build(from_text, body)
    feeds = SOME if 4 not in target[2:] or target[1] == 0 else [{"X": x(2, 4, 12)}]
    assert check(model, run, feeds).statistics["targets"] == 1
    assert [t.numpy().tolist() for t in targets(model)] == [target]
    assert op_types(model) == ["Reshape"]


def test_a_reshape_that_changes_nothing(from_text, run):
    """All sizes but one are those of x, so the last one is, too."""
    body = f"{SIZES} t = Concat<axis = 0>(rest, l, c12) Y = Reshape(X, t)"
    model = build(from_text, body, outputs="float[N, M, K] Y")
    check(model, run, SOME)
    assert [t.numpy().tolist() for t in targets(model)] == [[0, 0, 12]]


def test_a_zero_that_is_meant_as_a_zero(from_text, run):
    """Of dynamo: with allowzero, a 0 takes over nothing; the rewritten target has none that could be meant so."""
    body = f"{SIZES} t = Concat<axis = 0>(b, l, rest, c4) Y = Reshape<allowzero = 1>(X, t)"
    model = build(from_text, body)
    check(model, run, SOME)
    (node,) = model.graph
    assert node.inputs[1].const_value.numpy().tolist() == [0, 0, 3, 4]
    assert "allowzero" not in node.attributes


@pytest.mark.parametrize(
    "body",
    [
        f"{SIZES} t = Concat<axis = 0>(l, b, rest, c4) Y = Reshape(X, t)",  # other places: two sizes are not known
        "Y = Reshape(X, fixed)",
        "Y = Reshape<allowzero = 1>(X, fixed)",
    ],
)
def test_targets_that_stay(from_text, run, body):
    model = build(from_text, body)
    feeds = [{"X": x(2, 5, 12)}] if "fixed" in body else SOME
    nodes = op_types(model)
    assert check(model, run, feeds).statistics["targets"] == 0
    assert op_types(model) == nodes


def test_a_target_from_outside(from_text, run):
    model = build(from_text, "Y = Reshape(X, t)", inputs="float[B, S, 12] X, int64[4] t")
    assert not STEP(model).modified


def test_claimed_shapes_are_not_believed(from_text, run):
    body = "r = Relu(X) s = Shape(r) n = Neg(r) Y = Reshape(n, s)"
    model = build(from_text, body, outputs="float[N, M, K] Y")
    model.graph.node(0).outputs[0].shape = ir.Shape([7, 7, 12])
    check(model, run, SOME)


def test_keys_are_transposed_behind_the_reshape(from_text, run):
    body = "t = Transpose<perm = [0, 2, 1]>(X) Y = Reshape(t, fixed)"
    model = build(from_text, body, inputs="float[6, 5, 4] X", outputs="float[2, 3, 4, 5] Y")
    assert check(model, run, [{"X": x(6, 5, 4)}]).statistics["transposes"] == 1
    assert op_types(model) == ["Reshape", "Transpose"]
    assert model.graph.outputs[0].name == "Y"
    assert [t.numpy().tolist() for t in targets(model)] == [[2, 3, 5, 4]]


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (
            "t = Transpose<perm = [0, 2, 1]>(X) Y = Reshape(t, fixed)",
            "float[6, 4, 5] X",
        ),  # rows go over two matrices
        ("t = Transpose<perm = [0, 2, 1]>(X) Y = Reshape(t, fixed)", "float[N, 5, 4] X"),
        ("t = Transpose<perm = [1, 0, 2]>(X) Y = Reshape(t, fixed)", "float[6, 5, 4] X"),
        ("t = Transpose<perm = [0, 2, 1]>(X) Y = Reshape(t, both)", "float[6, 5, 4] X"),
    ],
)
def test_transposes_that_stay(from_text, body, inputs):
    model = build(from_text, body, inputs=inputs)
    before = op_types(model)
    Reshapes()(model)
    if "both" not in body:
        assert op_types(model) == before


def test_the_transposed_is_read_elsewhere(from_text, run):
    body = "Z = Transpose<perm = [0, 2, 1]>(X) Y = Reshape(Z, fixed)"
    model = build(from_text, body, inputs="float[6, 5, 4] X", outputs="float[2, 3, 4, 5] Y, float[6, 4, 5] Z")
    check(model, run, [{"X": x(6, 5, 4)}])
    assert op_types(model).count("Transpose") == 2


SOFTMAX = "f = Flatten<axis = 2>(X) p = Softmax<axis = -1>(f)"


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (f"{SOFTMAX} s = Shape(X) Q = Reshape(p, s) Y = Relu(Q)", "float[B, S, 12] X"),
        (f"{SOFTMAX} Q = Reshape(p, whole) Y = Relu(Q)", "float[2, 3, 12] X"),
        (
            f"{SOFTMAX} s = Shape(X) Q = Reshape(p, s) Y = Relu(Q)".replace("axis = 2", "axis = -1"),
            "float[B, S, 12] X",
        ),
    ],
)
def test_a_softmax_of_opset_12(from_text, run, body, inputs):
    """The converter of onnx makes a matrix in front of it and takes that back behind it."""
    model = build(from_text, body, inputs=inputs, outputs="float[N, M, 12] Y", whole=np.array([2, 3, 12]))
    assert check(model, run, [{"X": x(2, 3, 12)}]).statistics["softmax"] == 1
    assert op_types(model) == ["Softmax", "Relu"]


@pytest.mark.parametrize(
    "body",
    [
        f"{SOFTMAX} s = Shape(X) Q = Reshape(p, s) Y = Relu(Q)".replace("axis = 2", "axis = 1"),
        f"{SOFTMAX} s = Shape(X) Q = Reshape(p, s) Y = Relu(Q)".replace(
            "Softmax<axis = -1>", "Softmax<axis = 0>"
        ),
        f"{SOFTMAX} Q = Reshape(p, apart) Y = Relu(Q)",
    ],
)
def test_a_softmax_over_something_else(from_text, run, body):
    model = build(from_text, body, outputs="float[N, M, K] Y", apart=np.array([3, 2, 12]))
    assert check(model, run, [{"X": x(2, 3, 12)}]).statistics["softmax"] == 0
    assert "Flatten" in op_types(model)


def test_a_column_is_no_row(from_text, run):
    """Behind the last axis of a vector, Flatten makes a matrix of one column: its Softmax is 1 everywhere."""
    body = f"{SOFTMAX} s = Shape(X) Q = Reshape(p, s) Y = Relu(Q)".replace("axis = 2", "axis = 1")
    model = build(from_text, body, inputs="float[N] X", outputs="float[N] Y")
    assert check(model, run, [{"X": x(5)}]).statistics["softmax"] == 0


def test_a_softmax_whose_matrix_is_an_output(from_text, run):
    body = f"{SOFTMAX} s = Shape(X) Q = Reshape(p, s) Y = Relu(Q)"
    model = build(from_text, body, outputs="float[N, M, 12] Y, float[R, 12] p")
    assert check(model, run, [{"X": x(2, 3, 12)}]).statistics["softmax"] == 0
    assert "Flatten" in op_types(model)


EXPANDED = "q = Equal(t, less) w = Where(q, ones, t) Y = Expand(X, w)"
EXPAND = {"less": np.array([-1, -1, -1]), "ones": np.array([1, 1, 1])}


def test_sizes_of_expand(from_text, run):
    body = f"s = Shape(Z) b = Slice(s, c0, c1) t = Concat<axis = 0>(b, rest, c12) {EXPANDED}"
    inputs = "float[1, S, 12] X, float[B, 3] Z"
    model = build(from_text, body, inputs=inputs, outputs="float[N, M, K] Y", **EXPAND)
    check(model, run, [{"X": x(1, 4, 12), "Z": x(b, 3)} for b in (1, 5)])
    assert op_types(model) == ["Shape", "Slice", "Concat", "Expand"]


@pytest.mark.parametrize(
    "body",
    [
        f"t = Concat<axis = 0>(given, rest, c12) {EXPANDED}",  # a caller may give -1, too
        f"s = Shape(X) b = Slice(s, c0, c1) m = Neg(b) t = Concat<axis = 0>(m, rest, c12) {EXPANDED}",
        f"s = Shape(X) b = Slice(s, c0, c1) t = Concat<axis = 0>(b, rest, c12) {EXPANDED}".replace(
            "ones", "twos"
        ),
        f"s = Shape(X) b = Slice(s, c0, c1) t = Concat<axis = 0>(b, rest, c12) {EXPANDED}".replace(
            "less", "lower"
        ),
    ],
)
def test_sizes_that_may_be_anything(from_text, body):
    more = {"twos": np.array([2, 1, 1]), "lower": np.array([-2, -1, -1])}
    inputs = "float[1, S, 12] X, int64[1] given"
    model = build(from_text, body, inputs=inputs, outputs="float[N, M, K] Y", **EXPAND, **more)
    assert Reshapes()(model).statistics["expanded"] == 0
