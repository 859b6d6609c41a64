"""Names of our own making: a model that has them already is compiled like any other."""

import numpy as np
import pytest

from sparse_onnx.model.graph import Names, value_names
from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.fuse.attention import FuseAttention
from sparse_onnx.passes.fuse.batch_norm import FuseBatchNorm
from sparse_onnx.passes.fuse.skip_layer_norm import FuseSkipLayerNorm
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.presets import CLEAN_PASSES

E, H = 64, 4
PASSES = Pipeline(
    (
        *CLEAN_PASSES,
        FuseBatchNorm(),
        FuseAttention(),
        FuseSkipLayerNorm(),
        LowerSparseMatMul(min_sparsity=0.3),
        LowerSparseConv(min_sparsity=0.3),
        MergeLinears(),
        FuseFeedForward(),
    )
)
TRANSFORMER = """
    q = MatMul(X, Wq) k0 = MatMul(X, Wk) k = Add(k0, row) v = MatMul(X, Wv)
    q4 = Reshape(q, heads) Q = Transpose<perm = [0, 2, 1, 3]>(q4)
    k4 = Reshape(k, heads) K = Transpose<perm = [0, 2, 3, 1]>(k4)
    v4 = Reshape(v, heads) V = Transpose<perm = [0, 2, 1, 3]>(v4)
    s = MatMul(Q, K) S = Mul(s, half) m = Where(keep, S, lowest) M = Add(m, mask)
    p = Softmax<axis = -1>(M) n = IsNaN(p) P = Where(n, zero, p)
    c = MatMul(P, V) r = Transpose<perm = [0, 2, 1, 3]>(c) a = Reshape(r, whole)
    o = MatMul(a, Wo) t = Add(X, o) u = LayerNormalization<axis = -1>(t, gamma)
    up = MatMul(u, Wu) g = Relu(up) y = MatMul(g, Wd) Y = Add(y, t)"""
IMAGES = """
    c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(X, F)
    n = BatchNormalization(c, gamma16, gamma16, gamma16, gamma16) R = Relu(n)
    d = Conv<kernel_shape = [3, 3], group = 16>(R, D) Y = Relu(d)"""


def random(*shape, seed=0, zeros=0.7):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < zeros, 0, rng.standard_normal(shape)).astype(np.float32)


TENSORS = {
    **{f"W{x}": random(E, E, seed=i) for i, x in enumerate("qkvoud")},
    "row": random(1, E, seed=9, zeros=0),
    "heads": np.array([0, 0, H, E // H]),
    "whole": np.array([0, 0, E]),
    "half": np.float32(0.5),
    "zero": np.float32(0),
    "lowest": np.float32(-np.inf),
    "gamma": np.linspace(0.5, 2, E, dtype=np.float32),
    "F": random(16, 3, 3, 3, seed=20),
    "gamma16": np.linspace(0.5, 2, 16, dtype=np.float32),
    "D": random(16, 1, 3, 3, seed=21),
}
KINDS = {
    "transformer": (
        TRANSFORMER,
        f"float[B, S, {E}] X, bool[B, 1, 1, S] keep, float[S, S] mask",
        f"float[B, S, {E}] Y",
        {
            "X": random(2, 5, E, zeros=0),
            "keep": np.array([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]], bool).reshape(2, 1, 1, 5),
            "mask": random(5, 5),
        },
    ),
    "images": (IMAGES, "float[B, 3, 9, 9] X", "float[B, 16, 7, 7] Y", {"X": random(2, 3, 9, 9, zeros=0)}),
}


def build(from_text, kind, more_nodes="", more_inputs="", more_outputs="", **tensors):
    body, inputs, outputs, feeds = KINDS[kind]
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in TENSORS.items() if name in words}
    text = f"""<ir_version: 9, opset_import: ["" : 17]>
        g ({inputs}{more_inputs}) => ({outputs}{more_outputs}) {{ {body} {more_nodes} }}"""
    return from_text(text, **used, **tensors), dict(feeds)


def made_names(from_text, kind):
    """Names of the compiled model that the original does not have."""
    model, _ = build(from_text, kind)
    before = value_names(model)
    PASSES(model)
    return sorted(value_names(model) - before)


def rename(model, old, new):
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph.all_nodes() for value in node.outputs]
    next(value for value in values if value.name == old).name = new


def check_names(model):
    values = [*model.graph.inputs]
    values += [value for value in model.graph.initializers.values() if not value.is_graph_input()]
    names = [
        value.name for value in (*values, *(out for node in model.graph.all_nodes() for out in node.outputs))
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("what", ["initializer", "input", "output of a node"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_all_these_names(from_text, run, kind, what):
    """Each is taken by a value that has a say in another output of the model."""
    names = made_names(from_text, kind)
    assert len(names) >= 7
    terms = [f"taken{i}" for i in range(len(names))]
    more = {"more_outputs": ", float Z", "more_nodes": f"Z = Sum({', '.join(terms)})"}
    numbers = {term: np.array(i + 1, np.float32) for i, term in enumerate(terms)}
    if what == "input":
        model, feeds = build(from_text, kind, more_inputs="".join(f", float {t}" for t in terms), **more)
    elif what == "initializer":
        model, feeds = build(from_text, kind, **more, **numbers)
    else:
        nodes = "one = Constant<value = float {1.0}>() " + " ".join(
            f"{t} = Mul(one, number{i})" for i, t in enumerate(terms)
        )
        inner = {f"number{i}": value for i, value in enumerate(numbers.values())}
        more["more_nodes"] = f"{nodes} {more['more_nodes']}"
        model, feeds = build(from_text, kind, **more, **inner)
    for term, name in zip(terms, names, strict=True):
        rename(model, term, name)
        if what == "input":
            feeds[name] = numbers[term]
    before = run(model, feeds)
    PASSES(model)
    check_names(model)
    plain, _ = build(from_text, kind)
    PASSES(plain)
    ours = [node.op_type for node in plain.graph if node.domain == "sparse_onnx"]
    assert [node.op_type for node in model.graph if node.domain == "sparse_onnx"] == ours
    for name, array in run(model, feeds).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-5)


def test_names_in_subgraphs_and_functions_are_taken(from_text):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17, "local" : 1]> g (bool C, float[2] X) => (float[2] Y) {
            Y = If(C) <then_branch = t () => (float[2] p) { inner = Neg(X) p = local.f(inner) },
                       else_branch = e () => (float[2] q) { q = Relu(X) }> }
            <domain: "local", opset_import: ["" : 17]> f (a) => (b) { deep = Neg(a) b = Neg(deep) }"""
    )
    assert value_names(model) >= {"C", "X", "Y", "p", "q", "inner", "deep", "a", "b"}
    names = Names(model)
    assert [names.new("inner"), names.new("inner"), names.new("free")] == ["inner.1", "inner.2", "free"]


def test_parts_share_a_stem_that_is_free_for_all_of_them(from_text):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[2] X) => (float[2] Y)
           { h = Neg(X) Y = Relu(h) }"""
    )
    rename(model, "h", "W.rows")
    names = Names(model)
    assert names.stem("W", [".values", ".rows"]) == "W.1"
    assert names.stem("W", [".values", ".rows"]) == "W.2"
    assert names.stem("W", [".values"]) == "W"
