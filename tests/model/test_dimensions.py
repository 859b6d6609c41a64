"""Names of dimensions: what says nothing, expressions, and solving."""

import re

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sparse_onnx.model.dimensions import (
    Contradiction,
    Equation,
    Unsolvable,
    forget_unknown,
    is_unknown,
    names_of,
    parse,
    put,
    read_dim,
    solve,
    value_of,
)


@pytest.mark.parametrize(
    "name", ["?", "", " ", "None", "none", "-1", "- 1", "*", "??", "unknown", "unk", "null"]
)
def test_names_that_say_nothing(name):
    assert is_unknown(name)
    assert read_dim(ir.SymbolicDim(name)) is None


@pytest.mark.parametrize(
    "name", ["n", "unk__123", "batch", "3", "?x", "None_1", "批", "any_length", "DynamicDimension.0"]
)
def test_names_that_say_something(name):
    assert not is_unknown(name)
    assert read_dim(ir.SymbolicDim(name)) == name


def test_sizes():
    assert [read_dim(size) for size in (3, 0, -1, -7)] == [3, 0, None, None]
    assert read_dim(ir.SymbolicDim(None)) is None


def test_what_says_nothing_is_cleared_in_all_graphs():
    def value(name, *dims):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["r"])], "t", [], [value("r", "?", "k")])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([branch], "g", [value("x", "?", "n", 3), value("z")], [value("y", "None", 0)])
    graph.input[0].type.tensor_type.shape.dim[2].dim_value = -1
    forget_unknown(graph)

    def dims(entry):
        return [(d.dim_param, d.dim_value, d.WhichOneof("value")) for d in entry.type.tensor_type.shape.dim]

    assert dims(graph.input[0]) == [("", 0, None), ("n", 0, "dim_param"), ("", 0, None)]
    assert dims(graph.output[0]) == [("", 0, None), ("", 0, "dim_value")]
    for attribute in graph.node[0].attribute:
        assert dims(attribute.g.output[0]) == [("", 0, None), ("k", 0, "dim_param")]
    assert graph.input[1].type.tensor_type.HasField("shape")


# Expressions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n", {("n",): 1}),
        ("past_sequence_length + sequence_length", {("past_sequence_length",): 1, ("sequence_length",): 1}),
        ("past_sequence_length+1", {("past_sequence_length",): 1, (): 1}),
        ("batch_size*num_heads", {("batch_size", "num_heads"): 1}),
        ("batch_size x num_heads", {("batch_size", "num_heads"): 1}),
        ("2*batch", {("batch",): 2}),
        ("s0 - 1", {("s0",): 1, (): -1}),
        ("s0-1", {("s0",): 1, (): -1}),
        ("-(a - b)*3", {("a",): -3, ("b",): 3}),
        ("a*(b + 2)", {("a", "b"): 1, ("a",): 2}),
        ("a + a", {("a",): 2}),
        ("(n)", {("n",): 1}),
        ("x x x", {("x", "x"): 1}),
    ],
)
def test_expressions(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["batch-size", "3", "", "input:0_dim", "n/2", "floor(n/2)", "max(a, b)", "a b", "2batch", "a +", "((a)", "a - a",
     "a * 0", "a**2", "a" * 200, "+".join("abcdefghijklmnopqrst"), "*".join("a" * 20), "Länge-1 m",
     "(" * 80 + "a" + ")" * 30],
)  # fmt: skip
def test_what_is_no_expression_is_a_name(text):
    assert parse(text) == {(text,): 1}


_NAMES = st.sampled_from(["a", "batch_size", "seq.len", "x1"])
_SUMS = st.recursive(
    st.integers(0, 9).map(str) | _NAMES,
    lambda inner: st.tuples(inner, st.sampled_from([" + ", "+", " - ", "*", " * "]), inner).map(
        lambda parts: f"({parts[0]}{parts[1]}{parts[2]})"
    ),
    max_leaves=6,
)


@given(_SUMS, st.lists(st.integers(0, 50), min_size=4, max_size=4))
def test_values_are_those_of_arithmetic(text, sizes):
    known = dict(zip(["a", "batch_size", "seq.len", "x1"], sizes, strict=True))
    expression = parse(text)
    if expression == {(text,): 1} and text not in known:  # a number, or too long
        return
    truth = re.sub(r"[a-z][\w.]*", lambda match: str(known[match[0]]), text)
    assert value_of(expression, known) == eval(truth)
    assert value_of(put(expression, {"a": known["a"]}), known) == eval(truth)


@given(st.text(max_size=130))
def test_any_text_is_read(text):
    expression = parse(text)
    assert expression
    assert all(isinstance(count, int) and count for count in expression.values())
    assert names_of(expression)


# Solving


def equation(text, size):
    return Equation(parse(text), size, text)


def test_what_follows_is_found_in_any_order():
    given = [equation("past + new", 9), equation("2*heads*past", 24), equation("new", 6)]
    for order in (given, given[::-1]):
        assert solve(order, {}) == {"new": 6, "past": 3, "heads": 4}


def test_what_does_not_follow_stays_open():
    assert solve([equation("a + b", 9), equation("a*c", 4)], {}) == {}
    assert solve([equation("n*n", 9)], {"m": 2}) == {"m": 2}


def test_contradictions():
    with pytest.raises(Contradiction) as caught:
        solve([equation("a", 2), equation("a + 1", 4)], {})
    assert (caught.value.text, caught.value.size, caught.value.found) == ("a + 1", 4, 3)
    for text, size in (("2*a", 3), ("a + 5", 4)):
        with pytest.raises(Unsolvable):
            solve([equation(text, size)], {})


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 9))
def test_a_total_gives_its_parts(past, new, factor):
    total = factor * past + new
    found = solve([equation(f"{factor}*past + new", total), equation("new", new)], {})
    assert found == {"past": past, "new": new}


def test_no_shape_is_no_trouble():
    forget_unknown(onnx.GraphProto())
