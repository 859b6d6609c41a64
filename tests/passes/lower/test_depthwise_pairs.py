"""A convolution with the depthwise one behind it as one operator: what makes a pair, and what must not."""

import numpy as np
import pytest

from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv
from sparse_onnx.timing.choose import decide_by_table

RNG = np.random.default_rng(4)


def filters(*shape, sparsity=0.0):
    return np.where(RNG.random(shape) < sparsity, 0, RNG.standard_normal(shape)).astype(np.float32)


N = 8
TENSORS = {
    "W": filters(N, 4, 1, 1, sparsity=0.7),
    "S": filters(N, 3, 3, 3),
    "K": filters(N, 4, 3, 3, sparsity=0.7),
    "GROUPED": filters(N, 2, 1, 1, sparsity=0.7),
    "D": filters(N, 1, 3, 3),
    "TWICE": filters(2 * N, 1, 3, 3),
    "P": filters(4, N, 1, 1, sparsity=0.7),
    "B": filters(N),
    "C": filters(N),
    "zero": np.float32(0),
    "six": np.float32(6),
    "five": np.float32(5),
}
DEPTHWISE = f"Conv<group = {N}, pads = [1, 1, 1, 1]>"


def build(from_text, body, *, channels=4, y="float[b, n, h, w] Y", opset=17):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    tensors = {name: array for name, array in TENSORS.items() if name in words}
    x = f"float[B, {channels}, 9, 10] X"
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g ({x}) => ({y}) {{ {body} }}'
    return from_text(text, **tensors)


def lower(run, model, channels=4):
    x = {"X": RNG.standard_normal((2, channels, 9, 10)).astype(np.float32)}
    before = run(model, x)
    result = LowerSparseConv(min_sparsity=0.5)(model)
    after = run(model, x)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)
    return result


PAIRS = {
    "clip": (
        f"a = Conv(X, W, B) b = Clip(a, zero, six) c = {DEPTHWISE}(b, D, C) Y = Clip(c, zero, six)",
        "SparseConvDepthwiseClip",
    ),
    "relu, no bias": (
        f"a = Conv(X, W) b = Relu(a) c = {DEPTHWISE}(b, D) Y = Relu(c)",
        "SparseConvDepthwiseRelu",
    ),
    "silu": (
        f"a = Conv(X, W, B) s = Sigmoid(a) b = Mul(a, s) c = {DEPTHWISE}(b, D, C) t = Sigmoid(c) Y = Mul(t, c)",
        "SparseConvDepthwiseSilu",
    ),
    "hard swish": (
        f"a = Conv(X, W, B) b = HardSwish(a) c = {DEPTHWISE}(b, D, C) Y = HardSwish(c)",
        "SparseConvDepthwiseHardSwish",
    ),
    "strides of both": (
        f"a = Conv<strides = [2, 1]>(X, W) b = Relu(a) c = Conv<group = {N}, strides = [1, 2]>(b, D) Y = Relu(c)",
        "SparseConvDepthwiseRelu",
    ),
    "dilation": (
        f"a = Conv(X, W) b = Relu(a) c = Conv<group = {N}, dilations = [2, 2]>(b, D) Y = Relu(c)",
        "SparseConvDepthwiseRelu",
    ),
}


@pytest.mark.parametrize("opset", [14, 17])
@pytest.mark.parametrize("case", PAIRS)
def test_pairs_become_one_operator(case, opset, from_text, run):
    body, op_type = PAIRS[case]
    model = build(from_text, body, opset=opset)
    (candidate,), _ = find_candidates(model)
    assert (candidate.weight.name, candidate.companion) == ("W", False)
    lower(run, model)
    (node,) = model.graph
    assert node.op_type == op_type
    assert node.attributes.get_int("N", 0) == N
    assert "group" not in node.attributes
    assert set(model.graph.initializers) >= {"W.values", "D.filters"}
    assert not {"W", "D", "C"} & set(model.graph.initializers)


def test_whole_block_and_zeros_of_the_filters(from_text, run):
    """Expand, depthwise and project; the depthwise bias is missing."""
    body = f"a = Conv(X, W) b = Relu(a) c = {DEPTHWISE}(b, D) d = Relu(c) e = Conv(d, P) Y = Add(e, X)"
    model = build(from_text, body)
    result = lower(run, model)
    assert [node.op_type for node in model.graph] == ["SparseConvDepthwiseRelu", "SparseConvAdd"]
    assert result.statistics["convolutions"] == 2
    np.testing.assert_array_equal(model.graph.initializers["D.filter_bias"].const_value.numpy(), np.zeros(N))
    assert {name for _, name, _ in model.functions} == {"SparseConvDepthwiseRelu", "SparseConvAdd"}


NO_PAIRS = {
    "different limits": f"a = Conv(X, W) b = Clip(a, zero, six) c = {DEPTHWISE}(b, D) Y = Clip(c, zero, five)",
    "different activations": f"a = Conv(X, W) b = Relu(a) c = {DEPTHWISE}(b, D) Y = HardSwish(c)",
    "no activation": f"a = Conv(X, W) Y = {DEPTHWISE}(a, D)",
    "no second activation": f"a = Conv(X, W) b = Relu(a) Y = {DEPTHWISE}(b, D)",
    "between read twice": f"a = Conv(X, W) b = Relu(a) c = {DEPTHWISE}(b, D) d = Relu(c) Y = Add(d, b)",
    "several filters a channel": f"a = Conv(X, W) b = Relu(a) c = {DEPTHWISE}(b, TWICE) Y = Relu(c)",
    "groups in the first": f"a = Conv<group = 2>(X, GROUPED) b = Relu(a) c = {DEPTHWISE}(b, D) Y = Relu(c)",
    "large window in the first": f"a = Conv(X, K) b = Relu(a) c = {DEPTHWISE}(b, D) Y = Relu(c)",
    "residual in the first": (
        f"r = Conv(X, W, B) a = Conv(X, W) s = Add(a, r) b = Relu(s) c = {DEPTHWISE}(b, D) Y = Relu(c)"
    ),
    "filters of two convolutions": (
        f"a = Conv(X, W) b = Relu(a) c = {DEPTHWISE}(b, D) d = Relu(c) e = {DEPTHWISE}(d, D) Y = Relu(e)"
    ),
}


@pytest.mark.parametrize("case", NO_PAIRS)
def test_no_pair(case, from_text, run):
    model = build(from_text, NO_PAIRS[case])
    lower(run, model)
    assert not any("Depthwise" in node.op_type for node in model.graph)
    assert any(node.op_type.startswith("SparseConv") for node in model.graph)


def test_maps_between_that_are_an_output_stay(from_text, run):
    body = f"a = Conv(X, W) b = Relu(a) c = {DEPTHWISE}(b, D) Y = Relu(c)"
    model = build(from_text, body, y="float[B, 8, 9, 10] b, float[B, 8, 9, 10] Y")
    lower(run, model)
    assert [node.op_type for node in model.graph] == ["SparseConvRelu", "SparseConvRelu"]


STEM = f"a = Conv<strides = [2, 2]>(X, S, B) b = Relu(a) c = {DEPTHWISE}(b, D, C) d = Relu(c)"


def test_dense_stem_goes_along_where_others_are_sparse(from_text, run):
    model = build(from_text, f"{STEM} Y = Conv(d, P)", channels=3)
    candidates, _ = find_candidates(model)
    assert [(c.weight.name, c.companion) for c in candidates] == [("S", True), ("P", False)]
    assert all(decision.lowered for decision in decide_by_table(candidates))
    lower(run, model, channels=3)
    assert [node.op_type for node in model.graph] == ["SparseConvDepthwiseRelu", "SparseConv"]


def test_dense_stem_alone_stays(from_text):
    candidates, _ = find_candidates(build(from_text, f"{STEM} Y = Neg(d)", channels=3))
    assert not any(decision.lowered for decision in decide_by_table(candidates))
