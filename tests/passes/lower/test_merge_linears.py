"""Merging sparse linears that share their input: right nodes and answers, and what must not fire."""

import functools
import re

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.model.stored_weights import stored_weights
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.sparse_ops.ops import sparse_matmul, sparse_matmul_split

K, N = 40, 64
X = np.random.default_rng(5).standard_normal((2, 3, K)).astype(np.float32)

PLACES = {
    "sparse linears of one input": {
        "body": "Y = MatMul(X, u) Z = MatMul(X, w)",
        "tensors": {"u": (8, 16), "w": (8, 16)},
        "outputs": "float[B, 16] Y, float[B, 16] Z",
        "cleaned": ("clean.duplicates",),
        "lowered": (LowerSparseMatMul,),
    }
}
"""Models for the suite that all passes have in common."""


def sparse(n=N, seed=0, k=K, width=1):
    rng = np.random.default_rng(seed)
    kept = np.repeat(rng.random((k, -(-n // width))) < 0.3, width, axis=1)[:, :n]
    return np.where(kept, rng.standard_normal((k, n)), 0).astype(np.float32)


def vector(n=N, seed=9):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@pytest.fixture
def lowered(from_text):
    """``lowered(body, outputs, **weights)``: all linears of a graph over X [B, S, K] made sparse."""

    def lowered(body, outputs, opset=20, **weights):
        results = ", ".join(f"float[B, S, {n}] {y}" for y, n in outputs.items())
        text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
            g (float[B, S, {K}] X) => ({results}) {{ {body} }}"""
        model = from_text(text, **weights)
        LowerSparseMatMul(min_sparsity=0.0)(model)
        return model

    return lowered


@pytest.fixture
def check_merge(check_joined):
    """Merge; answers must not change, with the library not in a single bit."""

    def check_merge(model, expected_ops, **feeds):
        return check_joined(MergeLinears(), model, expected_ops, {"X": X, **feeds}, exact=True)

    return check_merge


@pytest.fixture
def check_no_merge(check_not_joined):
    return functools.partial(check_not_joined, MergeLinears())


QKV = "q = MatMul(X, Wq) Q = Add(q, bq) k = MatMul(X, Wk) K_ = Add(k, bk) V = MatMul(X, Wv)"


def qkv(sizes=(64, 64, 64), width=1):
    weights = {
        f"W{name}": sparse(n, seed, width=width)
        for seed, (name, n) in enumerate(zip("qkv", sizes, strict=True))
    }
    return {**weights, "bq": vector(sizes[0]), "bk": vector(sizes[1], 10)}


ANY_WIDTH = [
    (312, 312, 312),
    (383, 383, 383),
    *((size,) * 3 for size in (1, 7, 8, 9, 63, 65, 127, 129)),
    (65, 64, 63),
    (192, 100, 64),
    (384, 383, 127),
    (1, 2, 3),
]


@pytest.mark.parametrize("sizes", [(64, 64, 64), (256, 128, 128), (64, 192, 320), *ANY_WIDTH])
def test_query_key_and_value_are_one_operator(lowered, sizes, check_merge):
    model = lowered(QKV, dict(zip(("Q", "K_", "V"), sizes, strict=True)), **qkv(sizes))
    result = check_merge(model, ["SparseMatMulSplit3"])
    assert result.statistics == {"gates": 0, "splits": 1}
    assert result.declined == ()
    (node,) = model.graph
    assert node.attributes.get_ints("split") == sizes
    assert node.attributes.get_int("N") == sum(sizes)
    whole = all(size % node.attributes.get_int("block") == 0 for size in sizes[:-1])
    assert node.attributes.get_string("format") == ("chunked_csc" if whole else "chunked_csc_parts")
    assert [value.name for value in node.inputs[1:]] == [
        f"Wq+Wk+Wv.{name}" for name in ("values", "offsets", "counts", "rows", "bias")
    ]
    assert set(model.graph.initializers) == {value.name for value in node.inputs[1:]}
    assert [(domain, name) for domain, name, _ in model.functions] == [("sparse_onnx", "SparseMatMulSplit3")]


def test_the_merged_weight_says_what_it_is_made_of_in_memory_only(from_text, check_merge):
    """Names say too little: they may have the sign in them that joins them."""
    names = ["block.0.q+k", "block.0.k", "block.1/k"]
    body = " ".join(f'Y{i} = MatMul(X, "{name}")' for i, name in enumerate(names))
    text = f"""<ir_version: 8, opset_import: ["" : 20]>
        g (float[B, S, {K}] X) => ({", ".join(f"float[B, S, {N}] Y{i}" for i in range(3))}) {{ {body} }}"""
    model = from_text(text, **{name: sparse(seed=i) for i, name in enumerate(names)})
    LowerSparseMatMul(min_sparsity=0.0)(model)
    assert [weight.made_of for node in model.graph for weight in stored_weights(node)] == [
        (n,) for n in names
    ]
    check_merge(model, ["SparseMatMulSplit3"])
    (weight,) = stored_weights(model.graph[0])
    assert weight.made_of == tuple(names)
    (copy,) = stored_weights(model.clone().graph[0])
    assert copy.made_of == tuple(names)
    (read,) = stored_weights(ir.from_proto(ir.to_proto(model)).graph[0])
    assert read.made_of == (weight.name,) == ("block.0.q+k+0.k+1/k",)


@pytest.mark.parametrize("sizes", [(64, 64, 64), (312, 312, 312), (383, 383, 383)])
@pytest.mark.parametrize("width", [4, 8])
def test_entries_of_several_outputs(lowered, width, sizes, check_merge):
    model = lowered(QKV, dict(zip(("Q", "K_", "V"), sizes, strict=True)), **qkv(sizes, width))
    assert {node.attributes.get_int("width") for node in model.graph} == {width}
    check_merge(model, ["SparseMatMulSplit3"])


@pytest.mark.parametrize("n", [64, 100])
@pytest.mark.parametrize("opset", [13, 17, 21, 23])
def test_every_opset(lowered, opset, n, check_merge):
    body = QKV + " s = Sigmoid(V) G = Mul(V, s) u = MatMul(X, Wu) Y = Mul(G, u)"
    weights = {"Wu": sparse(n, seed=7), **qkv((n, n, n))}
    model = lowered(body, {"Q": n, "K_": n, "Y": n}, opset=opset, **weights)
    check_merge(model, ["SparseMatMulSplit2", "SparseMatMulSiluGate"])


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (6, [3, 3]), (7, [3, 2, 2])]
)
def test_more_than_three_are_merged_by_threes_and_twos(lowered, count, expected, check_merge):
    body = " ".join(f"Y{i} = MatMul(X, W{i})" for i in range(count))
    model = lowered(
        body, {f"Y{i}": 64 for i in range(count)}, **{f"W{i}": sparse(seed=i) for i in range(count)}
    )
    check_merge(model, [f"SparseMatMulSplit{size}" for size in expected])


def test_the_merged_node_stands_before_all_its_users(lowered, check_merge, check_no_merge):
    """K depends on Q: the first linear's place is early enough, the last one's would not be."""
    body = "q = MatMul(X, Wq) r = Relu(q) t = Neg(r) k = MatMul(X, Wk) Y = Add(t, k)"
    weights = {"Wq": sparse(), "Wk": sparse(seed=1)}
    model = lowered("q = MatMul(X, Wq) t = Neg(q) k = MatMul(X, Wk) Y = Add(t, k)", {"Y": 64}, **weights)
    check_merge(model, ["SparseMatMulSplit2"])
    assert [node.op_type for node in model.graph] == ["SparseMatMulSplit2", "Neg", "Add"]
    assert check_no_merge(lowered(body, {"Y": 64}, **weights)) == []  # q has an activation of its own


def test_linears_of_different_layers_stay_apart(lowered, check_merge):
    body = "a = MatMul(X, A) b = MatMul(X, B) c = Mul(a, b) d = Neg(c) e = MatMul(d, D) f = MatMul(d, F) Y = Add(e, f)"
    weights = {"A": sparse(), "B": sparse(seed=1), "D": sparse(k=N, seed=2), "F": sparse(k=N, seed=3)}
    model = lowered(body, {"Y": 64}, **weights)
    check_merge(model, ["SparseMatMulSplit2", "SparseMatMulSplit2"])


GATES = {
    "SparseMatMulSiluGate": "s = Sigmoid(g) a = Mul(g, s)",
    "SparseMatMulGeluTanhGate": 'a = Gelu<approximate = "tanh">(g)',
}
SILU = GATES["SparseMatMulSiluGate"]


@pytest.mark.parametrize("product", ["Mul(a, u)", "Mul(u, a)"])
@pytest.mark.parametrize("first", ["gate", "up"])
@pytest.mark.parametrize("n", [128, 312, 383, 1])
@pytest.mark.parametrize("op_type", GATES)
def test_gate_and_up_projection_are_one_operator(lowered, op_type, n, first, product, check_merge):
    steps = [f"h = MatMul(X, Wg) g = Add(h, bg) {GATES[op_type]}", "u = MatMul(X, Wu)"]
    body = " ".join([*(steps if first == "gate" else reversed(steps)), f"Y = {product}"])
    model = lowered(body, {"Y": n}, Wg=sparse(n), Wu=sparse(n, 1), bg=vector(n))
    result = check_merge(model, [op_type])
    assert result.statistics == {"gates": 1, "splits": 0}
    (node,) = model.graph
    assert node.attributes.get_int("N") == 2 * n
    assert "split" not in node.attributes
    assert [name for _, name, _ in model.functions] == [op_type]


def test_what_a_gate_leaves_is_split(lowered, check_merge):
    body = f"g = MatMul(X, Wg) {SILU} u = MatMul(X, Wu) Y = Mul(a, u) P = MatMul(X, A) Q = MatMul(X, B)"
    weights = {name: sparse(seed=seed) for seed, name in enumerate(("Wg", "Wu", "A", "B"))}
    model = lowered(body, {"Y": 64, "P": 64, "Q": 64}, **weights)
    check_merge(model, ["SparseMatMulSiluGate", "SparseMatMulSplit2"])


NO_GATE = {
    "another activation": ("g = MatMul(X, Wg) a = Relu(g) u = MatMul(X, Wu) Y = Mul(a, u)", ""),
    "exact gelu": ("g = MatMul(X, Wg) a = Gelu(g) u = MatMul(X, Wu) Y = Mul(a, u)", ""),
    "two gates": (
        f"g = MatMul(X, Wg) {SILU} u = MatMul(X, Wu) t = Sigmoid(u) v = Mul(u, t) Y = Mul(a, v)",
        "",
    ),
    "another input": (f"g = MatMul(X, Wg) {SILU} n = Neg(X) u = MatMul(n, Wu) Y = Mul(a, u)", ""),
    "a sum": (f"g = MatMul(X, Wg) {SILU} u = MatMul(X, Wu) Y = Add(a, u)", ""),
    "gate used elsewhere": (
        f"g = MatMul(X, Wg) {SILU} u = MatMul(X, Wu) p = Mul(a, u) Y = Add(p, a)",
        "the output of .* is used elsewhere, too",
    ),
    "up squared": (
        f"g = MatMul(X, Wg) {SILU} u = MatMul(X, Wu) p = Mul(a, u) Y = Mul(p, u)",
        "the output of .* is used elsewhere, too",
    ),
}


@pytest.mark.parametrize("case", NO_GATE)
def test_no_gate(lowered, case, check_no_merge):
    body, reason = NO_GATE[case]
    declined = check_no_merge(lowered(body, {"Y": 64}, Wg=sparse(), Wu=sparse(seed=1)))
    assert len(declined) == bool(reason)
    assert all(re.search(reason, found) for _, found in declined)


def test_an_output_of_the_graph_is_no_inner_value_of_a_gate(lowered, check_no_merge):
    body = f"g = MatMul(X, Wg) {SILU} u = MatMul(X, Wu) Y = Mul(a, u)"
    model = lowered(body, {"Y": 64, "u": 64}, Wg=sparse(), Wu=sparse(seed=1))
    ((place, reason),) = check_no_merge(model)
    assert place == "Y"
    assert "is used elsewhere" in reason


def test_gate_that_broadcasts(lowered, check_no_merge):
    body = f"g = MatMul(X, Wg) {SILU} u = MatMul(X, Wu) Y = Mul(a, u)"
    model = lowered(body, {"Y": 64}, Wg=sparse(), Wu=sparse(1, 1))
    ((_, reason),) = check_no_merge(model)
    assert "stored differently" in reason


def test_a_block_that_a_narrow_linear_would_not_fill(lowered, check_merge):
    """100 outputs in a block of 128 would be more padding than the other road costs."""
    sizes = (256, 100, 100)
    model = lowered(QKV, dict(zip(("Q", "K_", "V"), sizes, strict=True)), **qkv(sizes))
    result = check_merge(model, ["SparseMatMul", "SparseMatMulSplit2"])
    assert [place.place for place in result.declined] == ["Q"]


def test_large_blocks_are_not_cut(lowered, check_merge):
    sizes = (192, 128, 192)
    model = lowered(QKV, dict(zip(("Q", "K_", "V"), sizes, strict=True)), **qkv(sizes))
    result = check_merge(model, ["SparseMatMulSplit2", "SparseMatMul"])
    assert [place.place for place in result.declined] == ["K_"]
    assert {name for _, name, _ in model.functions} == {"SparseMatMul", "SparseMatMulSplit2"}


def test_both_formats_in_one_model(lowered, check_merge):
    """They share a body."""
    body = "A = MatMul(X, W) B = MatMul(X, V) n = Neg(X) C = MatMul(n, S) D = MatMul(n, T)"
    weights = {"W": sparse(), "V": sparse(seed=1), "S": sparse(65, seed=2), "T": sparse(65, seed=3)}
    model = lowered(body, {"A": 64, "B": 64, "C": 65, "D": 65}, **weights)
    check_merge(model, ["SparseMatMulSplit2", "SparseMatMulSplit2"])
    formats = [node.attributes.get_string("format") for node in model.graph if "split" in node.attributes]
    assert formats == ["chunked_csc", "chunked_csc_parts"]


def test_weights_stored_differently(lowered, check_no_merge):
    model = lowered(
        "A = MatMul(X, W) B = MatMul(X, V)", {"A": 64, "B": 64}, W=sparse(), V=sparse(seed=1, width=4)
    )
    assert [reason for _, reason in check_no_merge(model)] == [
        "is stored differently from the other linears of its input"
    ] * 2


def test_blocks_of_different_sizes(lowered, check_merge):
    sizes = (128, 64, 64)
    model = lowered(QKV, dict(zip(("Q", "K_", "V"), sizes, strict=True)), **qkv(sizes))
    result = check_merge(model, ["SparseMatMul", "SparseMatMulSplit2"])
    assert [place.reason for place in result.declined] == [
        "is stored differently from the other linears of its input"
    ]


def test_a_shared_weight_is_not_copied(lowered, check_no_merge):
    body = "A = MatMul(X, W) B = MatMul(X, V) n = Neg(X) C = MatMul(n, W)"
    model = lowered(body, {"A": 64, "B": 64, "C": 64}, W=sparse(), V=sparse(seed=1))
    assert check_no_merge(model) == [("A", "shares its weight with another node")]


@pytest.mark.parametrize("attribute", [ir.AttrString("format", "newer"), ir.AttrInt64("block", 0)], ids=str)
def test_a_weight_stored_in_an_unknown_way(lowered, attribute, check_no_merge):
    model = lowered("A = MatMul(X, W) B = MatMul(X, V)", {"A": 64, "B": 64}, W=sparse(), V=sparse(seed=1))
    for node in model.graph:
        node.attributes.add(attribute)
    reason = "does not have its weight in the format chunked_csc"
    assert check_no_merge(model) == [("A", reason), ("B", reason)]


def test_one_linear_and_dense_neighbours_stay(from_text, check_no_merge):
    text = f"""<ir_version: 8, opset_import: ["" : 20]>
        g (float[B, {K}] X) => (float[B, 64] A, float[B, 64] B_) {{ A = MatMul(X, W) B_ = MatMul(X, V) }}"""
    model = from_text(text, W=sparse(), V=sparse(seed=1))
    assert check_no_merge(model) == []
    LowerSparseMatMul(layers=("W",))(model)
    assert check_no_merge(model) == []


def test_modules_names_and_zeros_of_the_bias(lowered, check_merge):
    body = "A = MatMul(X, W) B = MatMul(X, V) D = MatMul(A, U)"
    weights = {"W": sparse(), "V": sparse(seed=1), "U": sparse(k=N, seed=2)}
    model = lowered(body, {"A": 64, "B": 64, "D": 64}, **weights)
    for node, name in zip(model.graph, ("query", "key", "out"), strict=True):
        node.name = f"/layer.0/self/{name}/MatMul"
        node.metadata_props[MODULE_KEY] = f"layer.0.self.{name}"
    check_merge(model, ["SparseMatMulSplit2", "SparseMatMul"])
    node = model.graph[0]
    assert node.name == "/layer.0/self/query/MatMul+key/MatMul"
    assert node.metadata_props[MODULE_KEY] == "layer.0.self.query+key"
    assert "sparse_onnx.zeros.64" in model.graph.initializers  # the third linear still reads them
    np.testing.assert_array_equal(node.inputs[5].const_value.numpy(), np.zeros(128, np.float32))


def test_every_merged_operator_is_one_of_the_contract():
    assert set(GATES) == set(sparse_matmul_split.GATES.values())
    assert not set(sparse_matmul_split.OP_TYPES) & set(sparse_matmul.ACTIVATIONS)
