"""Sizes that operators and weights fix."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.data.operator_sizes import operator_sizes


def sure(inputs, nodes, **arrays):
    return dict(reversed(facts(inputs, nodes, **arrays)[0]))


def facts(inputs, nodes, **arrays):
    """What is found of a graph of ``nodes`` (operator, inputs, outputs, attributes); shapes of inputs by name."""
    made = [
        helper.make_node(
            op.split("::")[-1], reads, writes, domain=op.split("::")[0] if "::" in op else "", **attributes
        )
        for op, reads, writes, attributes in nodes
    ]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(nodes[-1][2][0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return operator_sizes(ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10)))


W = np.ones((64, 32))


@pytest.mark.parametrize(
    ("inputs", "node", "arrays", "found"),
    [
        ({"x": ["n", "k"]}, ("MatMul", ["x", "w"], {}), {"w": W}, {"k": 64}),
        ({"x": ["n", None]}, ("MatMul", ["x", "w"], {}), {"w": W}, {"x.1": 64}),
        ({"x": ["n", "?"]}, ("MatMul", ["x", "w"], {}), {"w": W}, {"x.1": 64}),
        ({"x": ["n", "k"]}, ("MatMul", ["w", "x"], {}), {"w": W}, {"n": 32}),
        ({"x": ["n", "k"]}, ("Gemm", ["x", "w"], {}), {"w": W}, {"k": 64}),
        ({"x": ["k", "n"]}, ("Gemm", ["x", "w"], {"transA": 1, "transB": 1}), {"w": W}, {"k": 32}),
        ({"x": ["n", "c", "h", "w_"]}, ("Conv", ["x", "w"], {}), {"w": np.ones((8, 3, 1, 1))}, {"c": 3}),
        ({"x": ["n", "c", "l"]}, ("Conv", ["x", "w"], {"group": 4}), {"w": np.ones((8, 3, 1))}, {"c": 12}),
        ({"x": ["n", "c", "l"]}, ("ConvTranspose", ["x", "w"], {}), {"w": np.ones((8, 3, 1))}, {"c": 8}),
        ({"x": ["n", "d"]}, ("LayerNormalization", ["x", "w"], {}), {"w": np.ones(48)}, {"d": 48}),
        (
            {"x": ["t", "b", "i"], "h": ["d", "b", "s"]},
            ("GRU", ["x", "w", "r", "", "", "h"], {"hidden_size": 5}),
            {"w": np.ones((2, 15, 7)), "r": np.ones((2, 15, 5))},
            {"i": 7, "d": 2, "s": 5},
        ),
        (
            {"past": ["b", "h", "p", "d"], "k": ["b", 4, "s", 16]},
            ("Concat", ["past", "k"], {"axis": 2}),
            {},
            {"h": 4, "d": 16},
        ),
    ],
)
def test_weights_and_joins(inputs, node, arrays, found):
    op, reads, attributes = node
    assert sure(inputs, [(op, reads, ["y"], attributes)], **arrays) == found


def test_sizes_go_through_operators_that_keep_them():
    nodes = [
        ("Transpose", ["x"], ["a"], {"perm": [0, 2, 1]}),
        ("Relu", ["a"], ["b"], {}),
        ("MatMul", ["b", "w"], ["y"], {}),
    ]
    assert sure({"x": ["n", "k", "m"]}, nodes, w=W) == {"k": 64}


def test_broadcasting_is_only_likely():
    found = facts(
        {"x": ["n", "c", "h", "w_"]}, [("Sub", ["x", "mean"], ["y"], {})], mean=np.ones((1, 3, 1, 1))
    )
    assert found == ((), (("c", 3),))


GQA = ("com.microsoft::GroupQueryAttention", {"num_heads": 4, "kv_num_heads": 2})
CACHES = {"pk": ["b", "h", "p", "d"], "pv": ["b", "h", "p", "e"], "lengths": ["b"], "total": []}


@pytest.mark.parametrize(
    ("before", "reads", "arrays"),
    [
        ([("MatMul", ["x", "w"], ["q"], {})], ["q", "", ""], {"w": np.ones((64, 128))}),
        # behind what has no shape inference: the weight says it
        (
            [
                ("com.microsoft::SkipSimplifiedLayerNormalization", ["x", "x", "g"], ["n"], {}),
                ("MatMul", ["n", "w"], ["a"], {}),
                ("Add", ["a", "bias"], ["q"], {}),
            ],
            ["q", "", ""],
            {"w": np.ones((64, 128)), "bias": np.ones(128), "g": np.ones(64)},
        ),
        (
            [
                (
                    "com.microsoft::MatMulNBits",
                    ["x", "w", "g"],
                    ["q"],
                    {"N": 128, "K": 64, "bits": 4, "block_size": 32},
                )
            ],
            ["q", "", ""],
            {"w": np.ones((64, 2, 16)), "g": np.ones(64)},
        ),
        (
            [
                ("MatMul", ["x", "w"], ["q0"], {}),
                ("com.microsoft::RotaryEmbedding", ["q0", "x", "x", "x"], ["q"], {}),
                ("MatMul", ["x", "v"], ["k"], {}),
            ],
            ["q", "k", "k"],
            {"w": np.ones((64, 64)), "v": np.ones((64, 32))},
        ),
        # the queries' width is hidden, the values' is not
        (
            [
                ("com.microsoft::Unknown", ["x"], ["q"], {}),
                ("com.microsoft::Unknown", ["x"], ["k"], {}),
                ("MatMul", ["x", "v"], ["v0"], {}),
            ],
            ["q", "k", "v0"],
            {"v": np.ones((64, 32))},
        ),
    ],
)
def test_group_query_attention(before, reads, arrays):
    op, attributes = GQA
    nodes = [*before, (op, [*reads, "pk", "pv", "lengths", "total"], ["y", "k1", "v1"], attributes)]
    found = sure({"x": ["b", "s", 64], **CACHES}, nodes, **arrays)
    assert {name: found.get(name) for name in "hde"} == {"h": 2, "d": 16, "e": 16}


def test_group_query_attention_by_its_cosines():
    op, attributes = GQA
    nodes = [(op, ["x", "", "", "pk", "pv", "lengths", "total", "cos", "cos"], ["y", "k1", "v1"], attributes)]
    found = sure({"x": ["b", "s", "w"], **CACHES}, nodes, cos=np.ones((32, 8)))
    assert (found["h"], found["d"]) == (2, 16)


def test_multi_head_attention():
    nodes = [
        ("MatMul", ["x", "w"], ["q"], {}),
        ("MatMul", ["x", "u"], ["v"], {}),
        (
            "com.microsoft::MultiHeadAttention",
            ["q", "q", "v", "", "", "", "pk", "pv"],
            ["y", "k1", "v1"],
            {"num_heads": 4},
        ),
    ]
    found = sure({"x": ["b", "s", 64], **CACHES}, nodes, w=np.ones((64, 48)), u=np.ones((64, 32)))
    assert (found["d"], found["e"], found["h"]) == (12, 8, 4)


def test_packed_attention():
    nodes = [
        ("com.microsoft::Attention", ["x", "w", "bias", "", "past"], ["y", "present"], {"num_heads": 4}),
    ]
    inputs = {"x": ["b", "s", "k"], "past": [2, "b", "h", "p", "d"]}
    assert sure(inputs, nodes, w=np.ones((64, 192)), bias=np.ones(192)) == {"k": 64, "h": 4, "d": 16}


def test_standard_attention():
    nodes = [
        ("MatMul", ["x", "w"], ["q"], {}),
        ("MatMul", ["x", "u"], ["k"], {}),
        (
            "Attention",
            ["q", "k", "k", "", "pk", "pv"],
            ["y", "k1", "v1"],
            {"q_num_heads": 4, "kv_num_heads": 2},
        ),
    ]
    found = sure({"x": ["b", "s", 64], **CACHES}, nodes, w=np.ones((64, 64)), u=np.ones((64, 32)))
    assert (found["d"], found["e"], found["h"]) == (16, 16, 2)
    heads = {"q": ["b", 4, "s", 16], "k": ["b", 2, "s", 16]}
    nodes = [("Attention", ["q", "k", "k", "", "pk", "pv"], ["y", "k1", "v1"], {})]
    found = sure({**heads, **CACHES}, nodes)
    assert (found["d"], found["e"], found["h"]) == (16, 16, 2)


def test_what_cannot_be_inferred_is_nothing():
    assert facts({"x": ["n", "k"]}, [("NoSuch", ["x"], ["y"], {})]) == ((), ())
    assert facts({"x": None}, [("MatMul", ["x", "w"], ["y"], {})], w=W) == ((), ())


def test_the_model_is_left_as_it_was():
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[n, k] x) => (float[n, m] y) { y = Relu(x) }'
    )
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    operator_sizes(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


BRANCHES = """<ir_version: 9, opset_import: ["" : 17]> g (float[n, k] x, bool c) => (float[a, b] y) {
    y = If (c) <then_branch = yes () => (float[a, b] e) { t = Relu(x) e = MatMul(t, w) },
                else_branch = no () => (float[a, b] e) { t = Transpose(x) e = MatMul(t, v) }> }"""


def test_what_branches_want_is_likely_and_each_has_its_own_names():
    model = ir.from_proto(onnx.parser.parse_model(BRANCHES))
    for name, array in {"w": W, "v": np.ones((5, 7))}.items():
        tensor = ir.tensor(array.astype(np.float32), name=name)
        value = next(
            value
            for graph in model.graph.subgraphs()
            for node in graph
            for value in node.inputs
            if value is not None and value.name == name
        )
        value.const_value = tensor
        model.graph.register_initializer(value)
    sure, likely = operator_sizes(model)
    assert sure == ()
    assert likely == (("k", 64), ("n", 5))


def test_what_a_file_claims_of_shapes_in_between_is_no_fact():
    nodes = [("my::Unknown", ["x"], ["h"], {}), ("Concat", ["x", "h"], ["y"], {"axis": 1})]
    graph = helper.make_graph(
        [
            helper.make_node(
                op.split("::")[-1], reads, writes, domain="my" if "::" in op else "", **attributes
            )
            for op, reads, writes, attributes in nodes
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        value_info=[helper.make_tensor_value_info("h", TensorProto.FLOAT, [9, 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    assert operator_sizes(ir.from_proto(helper.make_model(graph, opset_imports=opsets))) == ((), ())
