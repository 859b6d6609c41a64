"""Lengths of ranges and of positions: told where they hold for all inputs, and not where they only look so."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.model.shapes import Shapes

TABLE = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)
NUMBERS = {
    "zero": np.array(0),
    "one": np.array(1),
    "two": np.array(2),
    "z1": np.array([0]),
    "o1": np.array([1]),
    "t1": np.array([2]),
    "flat": np.array([-1]),
    "table": TABLE,
    "positions": np.arange(8)[None],
}
LENGTH = "s = Shape(X) n = Gather(s, one)"
SLICE = f"{LENGTH} n1 = Unsqueeze(n, z1) p = Slice(positions, z1, n1, o1, o1)"


def dims(body, name, *, opset=17, inputs="float[B, S, 4] X"):
    """Of a value of the graph, as Shapes knows them."""
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g ({inputs}) => (float[N] Y) {{ {body} Y = Identity(X) }}'
    proto = onnx.parser.parse_model(text)
    for key, array in NUMBERS.items():
        proto.graph.initializer.append(ir.serde.serialize_tensor(ir.tensor(array, name=key)))
    model = ir.from_proto(proto)
    value = next(value for node in model.graph for value in node.outputs if value.name == name)
    return Shapes(model, inputs={}).dims(value)


@pytest.mark.parametrize(
    "length",
    [
        LENGTH,
        "s = Shape<start = 1, end = 2>(X) n = Squeeze(s)",
        "s = Shape<start = -2, end = -1>(X) n = Squeeze(s)",
        "s = Shape(X) m = Slice(s, o1, t1) n = Squeeze(m)",
        "s = Shape(X) m = Gather(s, o1) k = Cast<to = 7>(m) n = Squeeze(k)",
        "r = Relu(X) s = Shape(r) n = Gather(s, one)",
    ],
)
def test_a_range_counts_an_axis(length):
    assert dims(f"{length} r1 = Range(zero, n, one)", "r1") == ("S",)


def test_ranges_over_what_follows_from_others():
    """The second length is known only behind the sum with the first one."""
    body = f"""{LENGTH} p = Range(zero, n, one) q = Unsqueeze(p, z1) e = Gather(table, q) x = Add(X, e)
               s2 = Shape(x) m = Gather(s2, one) r1 = Range(zero, m, one)"""
    assert dims(body, "x") == ("B", "S", 4)
    assert dims(body, "r1") == ("S",)


@pytest.mark.parametrize(
    "body",
    [
        f"{LENGTH} r1 = Range(one, n, one)",
        f"{LENGTH} r1 = Range(zero, n, two)",
        f"{LENGTH} m = Mul(n, two) r1 = Range(zero, m, one)",
        "s = Shape(X) m = ReduceProd<keepdims = 0>(s) r1 = Range(zero, m, one)",
        "s = Shape<start = 0, end = 2>(X) m = ReduceMax<keepdims = 0>(s) r1 = Range(zero, m, one)",
        "c = NonZero(X) s = Shape(c) n = Gather(s, one) r1 = Range(zero, n, one)",  # a length of its own
    ],
)
def test_a_range_that_counts_something_else(body):
    (length,) = dims(body, "r1")
    assert length not in ("B", "S", 4)


def test_positions_that_are_added_to_tokens():
    body = f"{SLICE} e = Gather(table, p) x = Add(X, e)"
    assert dims(body, "p") == (1, "S")
    assert dims(body, "x") == ("B", "S", 4)


def test_positions_that_are_expanded():
    """As BERT makes its token types: taken by the positions, then expanded to [batch, tokens]."""
    body = f"""{SLICE} b = Gather(s, z1) t = Concat<axis = 0>(b, n1) g = GatherElements<axis = 1>(positions, p)
               e = Expand(g, t)"""
    assert dims(body, "e") == ("B", "S")


@pytest.mark.parametrize(
    "rest",
    [
        "x = Neg(p)",  # nothing says that there are as many positions as tokens
        "e = Gather(table, p) x = Relu(e)",
        "e = Gather(table, p) t = Transpose<perm = [1, 0, 2]>(e) x = Add(X, t)",
        "q = Shape(p) x = Add(q, q)",
    ],
)
def test_positions_that_nothing_is_added_to(rest):
    assert "S" not in dims(f"{SLICE} {rest}", "p")


def test_a_slice_from_elsewhere_or_in_steps():
    for slices in ("Slice(positions, o1, n1, o1, o1)", "Slice(positions, z1, n1, o1, t1)"):
        body = f"{LENGTH} n1 = Unsqueeze(n, z1) p = {slices} e = Gather(table, p) x = Add(X, e)"
        assert "S" not in dims(body, "p")


def test_a_reshape_of_opset_13_by_what_is_computed():
    body = "s = Shape(X) h = Slice(s, z1, t1) t = Concat<axis = 0>(h, o1, flat) y = Reshape(X, t)"
    assert dims(body, "y", opset=13)[:3] == ("B", "S", 1)
