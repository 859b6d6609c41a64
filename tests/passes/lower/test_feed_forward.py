"""Two sparse linears in a row as one operator: right nodes and answers, and what must not fire."""

import functools
import re

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul

K, HIDDEN = 40, 64
X = np.random.default_rng(5).standard_normal((2, 3, K)).astype(np.float32)
LOWER = Pipeline((LowerSparseMatMul(min_sparsity=0.0), MergeLinears()))

PLACES = {
    "sparse linears in a row": {
        "body": "A = Gemm(X, u, b) H = Relu(A) Y = Gemm(H, v, c)",
        "tensors": {"u": (8, 16), "b": (16,), "v": (16, 8), "c": (8,)},
        "outputs": "float[B, 8] Y",
        "lowered": (LowerSparseMatMul,),
    }
}
"""Models for the suite that all passes have in common."""


def sparse(k, n, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((k, n)) < 0.3, rng.standard_normal((k, n)), 0).astype(np.float32)


def vector(n, seed=9):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def weights(hidden=HIDDEN, **more):
    """Up, gate and down projection, and biases."""
    up_and_down = {"U": sparse(K, hidden), "G": sparse(K, hidden, 2), "D": sparse(hidden, K, 1)}
    return {**up_and_down, "bu": vector(hidden), "bd": vector(K), "slope": np.float32(1.702), **more}


@pytest.fixture
def lowered(from_text):
    """``lowered(body, outputs, **weights)``: all linears of a graph over X [B, S, K] made sparse; weights that the body
    does not name are left out."""

    def lowered(body, outputs, opset=20, **weights):
        results = ", ".join(f"float[B, S, {n}] {y}" for y, n in outputs.items())
        text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
            g (float[B, S, {K}] X) => ({results}) {{ {body} }}"""
        named = set(re.findall(r"\w+", body))
        model = from_text(text, **{name: array for name, array in weights.items() if name in named})
        LOWER(model)
        return model

    return lowered


@pytest.fixture
def check_fused(check_joined):
    """Fuse; answers must not change, on the bodies not in a single bit."""

    def check_fused(model, expected_ops, **feeds):
        return check_joined(FuseFeedForward(), model, expected_ops, {"X": X, **feeds}, exact=False)

    return check_fused


@pytest.fixture
def check_not_fused(check_not_joined):
    return functools.partial(check_not_joined, FuseFeedForward())


UP, DOWN = "u = MatMul(X, U) h = Add(u, bu)", "d = MatMul(a, D) Y = Add(d, bd)"
GELU_TANH = 'a = Gelu<approximate = "tanh">(h)'
SILU_GATE = "g = MatMul(X, G) s = Sigmoid(g) w = Mul(g, s)"
GELU_GATE = 'g = MatMul(X, G) w = Gelu<approximate = "tanh">(g)'
PAIRS = {
    "SparseFeedForward": "a = Add(u, bu)",
    "SparseFeedForwardRelu": "a = Relu(h)",
    "SparseFeedForwardGelu": "a = Gelu(h)",
    "SparseFeedForwardGeluTanh": GELU_TANH,
    "SparseFeedForwardSilu": "t = Sigmoid(h) a = Mul(h, t)",
    "SparseFeedForwardQuickGelu": "m = Mul(h, slope) t = Sigmoid(m) a = Mul(h, t)",
    "SparseFeedForwardSiluGate": f"{SILU_GATE} a = Mul(w, h)",
    "SparseFeedForwardGeluTanhGate": f"{GELU_GATE} a = Mul(h, w)",
}


@pytest.mark.parametrize("hidden", [HIDDEN, 1, 65, 383])
@pytest.mark.parametrize("op_type", PAIRS)
def test_two_linears_are_one_operator(lowered, op_type, hidden, check_fused):
    body = f"{'u = MatMul(X, U)' if op_type == 'SparseFeedForward' else UP} {PAIRS[op_type]} {DOWN}"
    model = lowered(body, {"Y": K}, **weights(hidden))
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    result = check_fused(model, [op_type])
    assert result.statistics == {"pairs": 1}
    assert result.declined == ()
    (node,) = model.graph
    assert [key[:2] for key in model.functions] == [("sparse_onnx", op_type)]
    gated = op_type.endswith("Gate")
    sizes = {name: node.attributes.get_int(name) for name in ("K", "N", "down_K", "down_N")}
    assert sizes == {"K": K, "N": 2 * hidden if gated else hidden, "down_K": hidden, "down_N": K}
    padded = gated and hidden % node.attributes.get_int("block") != 0
    assert node.attributes.get_string("format") == ("chunked_csc_parts" if padded else "chunked_csc")
    assert node.attributes.get_string("down_mask_structure") == "unstructured"
    assert "down_format" not in node.attributes
    down = [value.name for value in node.inputs[6:]]
    assert down == ["D.values", "D.offsets", "D.counts", "D.rows", "bd"]
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == stored


@pytest.mark.parametrize("hidden", [HIDDEN, 100])
@pytest.mark.parametrize("opset", [13, 17, 21, 23])
def test_every_opset(lowered, opset, hidden, check_fused):
    body = f"{UP} {SILU_GATE} a = Mul(w, h) {DOWN}"
    check_fused(lowered(body, {"Y": K}, opset=opset, **weights(hidden)), ["SparseFeedForwardSiluGate"])


def test_a_layer_of_bert_and_one_of_llama(lowered, check_fused):
    """With a residual and a normalization between."""
    norm = "n{0} = LayerNormalization<axis = -1>(r{0}, gamma, beta)"
    body = f"""{UP} a = Gelu(h) d = MatMul(a, D) e = Add(d, bd) r1 = Add(e, X) {norm.format(1)}
        g = MatMul(n1, G) s = Sigmoid(g) w = Mul(g, s) v = MatMul(n1, V) m = Mul(w, v) f = MatMul(m, F)
        r2 = Add(f, n1) {norm.format(2)} Y = Identity(n2)"""
    more = {"V": sparse(K, HIDDEN, 3), "F": sparse(HIDDEN, K, 4), "gamma": vector(K), "beta": vector(K, 1)}
    model = lowered(body, {"Y": K}, **weights(**more))
    result = check_fused(model, ["SparseFeedForwardGelu", "SparseFeedForwardSiluGate"])
    assert result.statistics == {"pairs": 2}


def test_factors_of_low_rank(lowered, check_fused):
    """Both projections of an MLP as two factors each: the widest activations are those that stay inside."""
    body = "a = MatMul(X, A) b = MatMul(a, B) c = Relu(b) d = MatMul(c, C) Y = MatMul(d, E)"
    factors = {"A": sparse(K, 8), "B": sparse(8, HIDDEN, 1), "C": sparse(HIDDEN, 8, 2), "E": sparse(8, K, 3)}
    model = lowered(body, {"Y": K}, **factors)
    check_fused(model, ["SparseMatMul", "SparseFeedForwardRelu", "SparseMatMul"])
    body = "a = MatMul(X, A) b = MatMul(a, B) Y = Neg(b)"
    check_fused(lowered(body, {"Y": HIDDEN}, **factors), ["SparseFeedForward"])


def test_three_and_four_in_a_row(lowered, check_fused):
    steps = ["X", "a", "b", "c", "Y"]
    for count, expected in ((3, ["SparseFeedForward", "SparseMatMul"]), (4, ["SparseFeedForward"] * 2)):
        names = [*steps[:count], "Y"]
        body = " ".join(f"{names[i + 1]} = MatMul({names[i]}, W{i})" for i in range(count))
        check_fused(lowered(body, {"Y": K}, **{f"W{i}": sparse(K, K, i) for i in range(count)}), expected)


def test_what_the_second_needs_may_stand_between(lowered, check_fused):
    """The operator stands where the second linear did, before what reads it."""
    body = f"{UP} n = Neg(X) a = Gelu(h) m = Abs(n) d = MatMul(a, D) Y = Add(d, m)"
    model = lowered(body, {"Y": K}, **weights())
    check_fused(model, ["SparseFeedForwardGelu"])
    assert [node.op_type for node in model.graph] == ["Neg", "Abs", "SparseFeedForwardGelu", "Add"]


def test_shared_weights_are_not_copied(lowered, check_fused):
    body = f"{UP} a = Gelu(h) {DOWN} n = Neg(X) p = MatMul(n, U) q = Relu(p) Z = MatMul(q, D)"
    model = lowered(body, {"Y": K, "Z": K}, **weights())
    check_fused(model, ["SparseFeedForwardGelu", "SparseFeedForwardRelu"])
    first, second = (node for node in model.graph if node.domain == "sparse_onnx")
    for places in (slice(1, 5), slice(6, 10)):
        assert first.inputs[places] == second.inputs[places]


def test_names_and_modules(lowered, check_fused):
    model = lowered(f"{UP} a = Gelu(h) {DOWN}", {"Y": K}, **weights())
    for node, name in zip(model.graph, ("intermediate.dense", "output.dense"), strict=True):
        node.name = f"/layer.0/{name}/MatMul"
        node.metadata_props[MODULE_KEY] = f"layer.0.{name}"
    old = model.graph[1].outputs[0]
    old.doc_string = "what comes out"
    old.metadata_props["key"] = "value"
    check_fused(model, ["SparseFeedForwardGelu"])
    (node,) = model.graph
    assert node.name == "/layer.0/intermediate.dense/MatMul+output.dense/MatMul"
    assert node.metadata_props[MODULE_KEY] == "layer.0.intermediate.dense+output.dense"
    assert node.outputs[0].doc_string == "what comes out"
    assert node.outputs[0].metadata_props == {"key": "value"}
    assert str(node.outputs[0].shape) == "[B,S,40]"


def test_bodies_that_are_still_used_stay(lowered, check_fused):
    body = f"{UP} a = Gelu(h) {DOWN} Z = MatMul(X, V)"
    model = lowered(body, {"Y": K, "Z": K}, **weights(V=sparse(K, K, 3)))
    check_fused(model, ["SparseFeedForwardGelu", "SparseMatMul"])
    assert {key[1] for key in model.functions} == {"SparseMatMul", "SparseFeedForwardGelu"}


# The body, how wide its output Z is, and what is said: nothing where it does not look like a pair.
NOT_FUSED = {
    "used twice": (f"{UP} a = Gelu(h) {DOWN} Z = Neg(a)", HIDDEN, "its output is used by more than Y"),
    "two linears behind it": (
        f"{UP} a = Gelu(h) {DOWN} Z = MatMul(a, E)",
        HIDDEN,
        "its output is used by more than Y",
    ),
    "an activation behind the second": (f"{UP} a = Gelu(h) d = MatMul(a, D) Z = Relu(d)", K, ""),
    "a node between": (f"{UP} r = Gelu(h) a = Neg(r) {DOWN} Z = Neg(Y)", K, ""),
    "an activation that no linear computes": (f"{UP} a = Tanh(h) {DOWN} Z = Neg(Y)", K, ""),
    "no linear before": ("h = Add(X, bd) a = Gelu(h) Z = MatMul(a, U)", HIDDEN, ""),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_not_fused(lowered, case, check_not_fused):
    body, width, reason = NOT_FUSED[case]
    outputs = {"Z": width, **({"Y": K} if "Y = " in body else {})}
    model = lowered(body, outputs, **weights(E=sparse(HIDDEN, HIDDEN, 3)))
    assert [said for _, said in check_not_fused(model)] == ([reason] if reason else [])


def test_an_output_of_the_graph_is_no_inner_value(lowered, check_not_fused):
    model = lowered(f"{UP} a = Gelu(h) {DOWN}", {"Y": K, "a": HIDDEN}, **weights())
    assert check_not_fused(model) == [("a", "its output is used by more than Y")]


def test_projections_that_were_merged_are_no_second_linear(lowered, check_not_fused, op_types):
    body = f"{UP} a = Gelu(h) q = MatMul(a, D) k = MatMul(a, E) Y = Sub(q, k)"
    model = lowered(body, {"Y": K}, **weights(E=sparse(HIDDEN, K, 3)))
    assert op_types(model) == ["SparseMatMulGelu", "SparseMatMulSplit2"]
    assert check_not_fused(model) == []


SPOILED = {
    "stored in another format": (
        lambda _first, second: second.attributes.add(ir.AttrString("format", "newer")),
        "its weight is stored as chunked_csc, and that of Y as newer",
    ),
    "another K": (
        lambda _first, second: second.attributes.add(ir.AttrInt64("K", 32)),
        "it has 64 outputs, and Y takes 32",
    ),
    "another domain of the first": (lambda first, _second: setattr(first, "domain", "other"), ""),
    "another domain of the second": (lambda _first, second: setattr(second, "domain", "other"), ""),
    "read as something else than activations": (
        lambda first, second: (
            second.replace_input_with(5, first.outputs[0]),
            second.replace_input_with(0, first.inputs[0]),
        ),
        "",
    ),
    "read as activations and bias": (
        lambda first, second: second.replace_input_with(5, first.outputs[0]),
        "its output is used by more than Y",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_nodes_that_are_no_pair(lowered, case, check_not_fused):
    change, reason = SPOILED[case]
    model = lowered(f"{UP} a = Gelu(h) {DOWN}", {"Y": K}, **weights())
    change(*model.graph)
    declined = check_not_fused(model)
    assert declined == ([("a", reason)] if reason else [])


def test_linears_of_different_graphs_stay_apart(lowered, check_not_fused):
    model = lowered(f"{UP} a = Gelu(h) {DOWN}", {"Y": K}, **weights())
    first, second = model.graph
    output = ir.Value(name="Z", type=ir.TensorType(ir.DataType.FLOAT))
    inner = ir.node(
        "SparseMatMul",
        second.inputs,
        dict(second.attributes),
        domain="sparse_onnx",
        outputs=[output],
        name="inner",
    )
    branch = ir.Graph([], [output], nodes=[inner], name="branch")
    model.graph.outputs.clear()
    model.graph.remove(second, safe=True)
    model.graph.append(ir.node("Loop", [None, None], {"body": branch}))
    assert check_not_fused(model) == [("a", "inner is in another graph")]
    assert first.outputs[0].uses()


def test_dense_neighbours_stay(from_text, check_not_fused):
    text = f"""<ir_version: 8, opset_import: ["" : 20]>
        g (float[B, {K}] X) => (float[B, {K}] Y) {{ u = MatMul(X, U) a = Relu(u) Y = MatMul(a, D) }}"""
    for layers in ((), ("U",), ("D",)):
        model = from_text(text, U=sparse(K, HIDDEN), D=sparse(HIDDEN, K, 1))
        LowerSparseMatMul(layers=layers)(model)
        assert check_not_fused(model) == []
