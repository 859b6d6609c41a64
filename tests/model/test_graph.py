"""Small questions to a graph: who makes and who needs a value, and what goes when nothing does any more."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparse_onnx.model.graph import (
    STANDARD_DOMAINS,
    axis_from_end,
    input_at,
    is_read,
    is_read_once,
    is_read_outside,
    is_standard,
    producer,
    remove_if_unread,
)

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.example" : 1]>'
BODY = """If(c) <then_branch = yes () => (float[N] y) {{ {} }}, else_branch = no () => (float[N] z) {{ z = Neg(X) }}>"""


def value(model, name):
    """The value of that name, wherever it is."""
    graphs = [model.graph, *model.graph.subgraphs()]
    made = [
        v for g in graphs for v in (*g.inputs, *g.initializers.values(), *(o for n in g for o in n.outputs))
    ]
    (found,) = [v for v in made if v.name == name]
    return found


def build(from_text, body, *, inputs="float[N] X, bool c", outputs="float[N] Y", **tensors):
    return from_text(f"{HEAD} g ({inputs}) => ({outputs}) {{ {body} }}", **tensors)


def names(model):
    return [node.op_type for node in model.graph], sorted(model.graph.initializers)


@pytest.mark.parametrize("domain", STANDARD_DOMAINS)
def test_operators_of_the_standard(domain):
    proto = onnx.helper.make_node("Relu", ["X"], ["Y"], domain=domain)
    node = ir.from_proto(proto)
    assert is_standard(node, "Relu")
    assert is_standard(node, "Abs", "Relu")
    assert not is_standard(node, "Abs")
    assert not is_standard(node)


def test_an_operator_of_the_same_name_is_another_one(from_text):
    node = build(from_text, "Y = com.example.Relu(X)").graph[0]
    assert not is_standard(node, "Relu")
    assert producer(node.outputs[0]) is node
    assert producer(node.outputs[0], "Relu") is None


def test_what_makes_a_value(from_text):
    model = build(from_text, "a = Relu(X) Y = Neg(a)")
    relu = model.graph[0]
    assert producer(value(model, "a")) is relu
    assert producer(value(model, "a"), "Neg", "Relu") is relu
    assert producer(value(model, "a"), "Neg") is None
    assert producer(value(model, "X")) is None  # an input
    assert producer(None) is None
    assert producer(None, "Relu") is None


def test_what_makes_a_value_may_be_around_the_body_that_reads_it(from_text):
    model = build(from_text, "a = Relu(X) Y = " + BODY.format("y = Neg(a)"))
    (node,) = value(model, "y").producer().inputs
    assert producer(node, "Relu") is model.graph[0]


def test_inputs_that_are_left_out(from_text):
    clip = build(from_text, "Y = Clip(X, , high)", high=np.float32(1)).graph[0]
    assert [getattr(input_at(clip, i), "name", None) for i in range(4)] == ["X", None, "high", None]


@pytest.mark.parametrize(
    ("body", "outputs", "read", "once"),
    [
        ("a = Relu(X) Y = Neg(a)", "float[N] Y", True, True),
        ("a = Relu(X) b = Neg(a) Y = Add(a, b)", "float[N] Y", True, False),
        ("a = Relu(X) Y = Mul(a, a)", "float[N] Y", True, False),
        ("a = Relu(X) Y = Neg(X)", "float[N] Y, float[N] a", True, False),
        ("a = Relu(X) Y = Neg(a)", "float[N] Y, float[N] a", True, False),
        ("a = Relu(X) Y = Neg(X)", "float[N] Y", False, False),
        ("a = Relu(X) Y = " + BODY.format("y = Neg(a)"), "float[N] Y", True, True),
        ("Y = " + BODY.format("a = Relu(X) y = Neg(a)"), "float[N] Y", True, True),
    ],
)  # fmt: skip
def test_who_needs_a_value(from_text, body, outputs, read, once):
    a = value(build(from_text, body, outputs=outputs), "a")
    assert (is_read(a), is_read_once(a)) == (read, once)


@pytest.mark.parametrize(
    ("body", "outputs", "outside"),
    [
        ("a = Relu(X) b = Neg(a) Y = Add(a, b)", "float[N] Y", False),
        ("a = Relu(X) Y = Mul(a, a)", "float[N] Y", False),
        ("a = Relu(X) Y = Neg(X)", "float[N] Y", False),
        ("a = Relu(X) b = Neg(a) Y = Add(a, b)", "float[N] Y, float[N] a", True),
        ("a = Relu(X) b = Neg(a) Y = " + BODY.format("y = Add(a, b)"), "float[N] Y", True),
    ],
)
def test_who_else_needs_a_value(from_text, body, outputs, outside):
    model = build(from_text, body, outputs=outputs)
    assert is_read_outside(value(model, "a"), list(model.graph)) is outside
    assert is_read_outside(value(model, "X"), list(model.graph)[1:])


def test_an_output_of_a_body_is_needed(from_text):
    model = build(from_text, "Y = " + BODY.format("y = Relu(X)"))
    assert is_read(value(model, "y"))
    assert not is_read_once(value(model, "y"))


@pytest.mark.parametrize(
    ("axis", "rank", "expected"), [(0, 3, -3), (2, 3, -1), (-1, 3, -1), (-3, 3, -3), (0, 1, -1)]
)
def test_axes_from_the_end(axis, rank, expected):
    assert axis_from_end(axis, rank) == expected


def test_a_node_goes_with_its_initializers(from_text):
    model = build(
        from_text,
        "a = Relu(X) b = Mul(a, w) Y = Add(X, v)",
        w=np.ones(1, np.float32),
        v=np.ones(1, np.float32),
    )
    assert remove_if_unread(model.graph[1])
    assert names(model) == (["Relu", "Add"], ["v"])
    assert remove_if_unread(model.graph[0])
    assert names(model) == (["Add"], ["v"])


def test_what_others_need_stays(from_text):
    body = "k = Constant<value = float {2.0}>() a = Mul(X, w) b = Mul(a, k) u = Add(b, w) Y = Add(X, w)"
    model = build(from_text, body, w=np.ones(1, np.float32))
    constant, a, b, u, y = model.graph
    assert not remove_if_unread(y)
    assert not remove_if_unread(a)
    assert remove_if_unread(u)
    assert not remove_if_unread(u)  # it has gone
    assert remove_if_unread(b)
    assert names(model) == (["Constant", "Mul", "Add"], ["w"])
    assert constant.graph is model.graph


def test_what_only_a_node_needed_goes_with_it(from_text):
    body = "k = Constant<value = float {2.0}>() s = Neg(X) a = Mul(s, w) b = Mul(a, k) u = Mul(b, b) Y = Add(s, v)"
    model = build(from_text, body, w=np.ones(1, np.float32), v=np.ones(1, np.float32))
    assert remove_if_unread(model.graph[4], with_makers=True)
    assert names(model) == (["Neg", "Add"], ["v"])


@pytest.mark.parametrize(
    ("outputs", "body"),
    [
        ("float[N] Y, float[N] a", "a = Neg(X) b = Abs(a) Y = Neg(X)"),
        ("float[N] Y", "a = Neg(X) b = Abs(a) Y = " + BODY.format("y = Neg(a)")),
    ],
)
def test_makers_that_an_output_or_a_body_needs_stay(from_text, outputs, body):
    model = build(from_text, body, outputs=outputs)
    assert remove_if_unread(model.graph[1], with_makers=True)
    assert value(model, "a").producer().graph is model.graph


def test_a_long_chain_goes(from_text):
    links = " ".join(f"a{i + 1} = Neg(a{i})" for i in range(3000))
    model = build(from_text, f"a0 = Neg(X) {links} Y = Neg(X)")
    assert remove_if_unread(model.graph[3000], with_makers=True)
    assert len(model.graph) == 1
