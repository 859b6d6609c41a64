"""Lowering to SparseConv: what is fused, right answers on plain ONNX Runtime, and what must not fire."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.timing.choose import decide_by_table

RNG = np.random.default_rng(2)


def filters(*shape, sparsity=0.8, dtype=np.float32):
    return np.where(RNG.random(shape) < sparsity, 0, RNG.standard_normal(shape)).astype(dtype)


W, V = filters(8, 4, 3, 3), filters(8, 4, 3, 3)
P, SQUARE = filters(8, 4, 1, 1), filters(4, 4, 3, 3)
B = RNG.standard_normal(8).astype(np.float32)
X = RNG.standard_normal((2, 4, 6, 7)).astype(np.float32)
ZERO, SIX = np.float32(0), np.float32(6)


def build(from_text, body, *, opset=17, x="float[B, 4, 6, 7] X", y="float[B, C, H, V] Y", **tensors):
    ir_version = 9 if opset < 21 else 10
    return from_text(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> g ({x}) => ({y}) {{ {body} }}', **tensors
    )


def op_types(model):
    return [node.op_type for node in model.graph]


def check(run, model, lowered, *, feeds=None):
    """Lower ``model``; its operators then are ``lowered``, and its answers what they were."""
    feeds = feeds or {"X": X}
    before = run(model, feeds)
    result = LowerSparseConv(min_sparsity=0.5)(model)
    assert op_types(model) == lowered
    after = run(model, feeds)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5)
    return result


PAD = "Conv<pads = [1, 1, 1, 1]>"
FUSED = {
    "alone": (f"Y = {PAD}(X, W)", ["SparseConv"]),
    "bias": (f"Y = {PAD}(X, W, B)", ["SparseConv"]),
    "relu": (f"h = {PAD}(X, W, B) Y = Relu(h)", ["SparseConvRelu"]),
    "clip": (f"h = {PAD}(X, W, B) Y = Clip(h, zero, six)", ["SparseConvClip"]),
    "clip, one limit": (f"h = {PAD}(X, W, B) Y = Clip(h, , six)", ["SparseConvClip"]),
    "clip, no limits": (f"h = {PAD}(X, W, B) Y = Clip(h)", ["SparseConvClip"]),
    "silu": (f"h = {PAD}(X, W, B) s = Sigmoid(h) Y = Mul(s, h)", ["SparseConvSilu"]),
    "hard swish": (f"h = {PAD}(X, W, B) Y = HardSwish(h)", ["SparseConvHardSwish"]),
    "hard sigmoid": (
        f"h = {PAD}(X, W, B) s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(h) Y = Mul(h, s)",
        ["SparseConvHardSwish"],
    ),
    "residual": (
        f"r = Conv(X, D) h = {PAD}(X, W, B) Y = Add(h, r)",
        ["Conv", "SparseConvAdd"],
    ),
    "residual, first operand": (
        f"q = Conv(X, D) r = Neg(q) h = {PAD}(X, W, B) s = Add(r, h) Y = Relu(s)",
        ["Conv", "Neg", "SparseConvAddRelu"],
    ),
    "residual made between the two": (
        f"h = {PAD}(X, W, B) r = Conv(X, D) s = Add(h, r) Y = Clip(s, zero, six)",
        ["Conv", "SparseConvAddClip"],
    ),
    "residual is a graph input": (f"h = {PAD}(X, W) s = Add(h, R) Y = Relu(s)", ["SparseConvAddRelu"]),
    "own input as residual": (f"h = {PAD}(X, SQUARE) s = Add(h, X) Y = Relu(s)", ["SparseConvAddRelu"]),
    "two convolutions added": (
        f"a = {PAD}(X, W) b = {PAD}(X, V) s = Add(a, b) Y = Relu(s)",
        ["SparseConv", "SparseConvAddRelu"],
    ),
    "chain": (
        f"a = {PAD}(X, SQUARE) b = Relu(a) c = {PAD}(b, SQUARE) d = Add(c, b) e = Relu(d) f = {PAD}(e, W) Y = Relu(f)",
        ["SparseConvRelu", "SparseConvAddRelu", "SparseConvRelu"],
    ),
    "valid padding": ('Y = Conv<auto_pad = "VALID">(X, W)', ["SparseConv"]),
    "same upper": ('Y = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(X, W)', ["SparseConv"]),
    "same lower": ('Y = Conv<auto_pad = "SAME_LOWER", strides = [1, 2]>(X, W)', ["SparseConv"]),
    "groups": ("Y = Conv<group = 2, strides = [2, 1]>(X, G)", ["SparseConv"]),
    "dilation": ("Y = Conv<dilations = [2, 3], pads = [2, 0, 1, 3]>(X, W)", ["SparseConv"]),
}
TENSORS = {
    "W": W, "V": V, "P": P, "SQUARE": SQUARE, "B": B, "D": filters(8, 4, 1, 1, sparsity=0),
    "G": filters(8, 2, 3, 3), "zero": ZERO, "six": SIX,
}  # fmt: skip


def used(body):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in TENSORS.items() if name in words}


@pytest.mark.parametrize("case", FUSED)
def test_fused(case, from_text, run):
    body, lowered = FUSED[case]
    x = "float[B, 4, 6, 7] X" + (", float[B, 8, 6, 7] R" if "R)" in body else "")
    feeds = {"X": X} | ({"R": RNG.standard_normal((2, 8, 6, 7)).astype(np.float32)} if "R)" in body else {})
    result = check(run, build(from_text, body, x=x, **used(body)), lowered, feeds=feeds)
    assert result.modified
    assert result.statistics["convolutions"] == sum(name.startswith("Sparse") for name in lowered)


NOT_FUSED = {
    "bias added as a constant": (
        f"h = {PAD}(X, W) s = Add(h, row) Y = Relu(s)", ["SparseConv", "Add", "Relu"]
    ),
    "residual that is broadcast": (
        f"m = GlobalAveragePool(X) r = Conv(m, D) h = {PAD}(X, W) Y = Add(h, r)",
        ["GlobalAveragePool", "Conv", "SparseConv", "Add"],
    ),
    "result used twice": (
        f"h = {PAD}(X, W) r = Relu(h) Y = Add(r, h)", ["SparseConv", "Relu", "Add"]
    ),
    "result added to itself": (f"h = {PAD}(X, W) Y = Add(h, h)", ["SparseConv", "Add"]),
    "hard sigmoid of the standard": (
        f"h = {PAD}(X, W) s = HardSigmoid(h) Y = Mul(h, s)", ["SparseConv", "HardSigmoid", "Mul"]
    ),
    "computed limit": (
        f"h = {PAD}(X, W) low = ReduceMin<keepdims = 0>(X) Y = Clip(h, low)",
        ["SparseConv", "ReduceMin", "Clip"],
    ),
    "gelu": (f"h = {PAD}(X, W) e = Erf(h) Y = Mul(h, e)", ["SparseConv", "Erf", "Mul"]),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FUSED)
def test_not_fused(case, from_text, run):
    body, lowered = NOT_FUSED[case]
    row = {"row": B.reshape(1, 8, 1, 1)} if "row" in body else {}
    check(run, build(from_text, body, **used(body), **row), lowered)


@pytest.mark.parametrize("batches", [("?", "?"), (-1, -1), (None, None), ("", ""), ("B", "C")])
def test_residual_whose_batch_is_any_is_not_fused(from_text, run, batches):
    """Names for any size are not the same size: here one of the two is 1."""
    body = f"h = {PAD}(X, W, B) s = Add(h, R) Y = Relu(s)"
    model = build(from_text, body, x="float[N, 4, 6, 7] X, float[N, 8, 6, 7] R", W=W, B=B)
    for value, batch in zip(model.graph.inputs, batches, strict=True):
        value.shape = ir.Shape([batch, *list(value.shape)[1:]])
    R = RNG.standard_normal((1, 8, 6, 7)).astype(np.float32)
    LowerSparseConv(min_sparsity=0.5)(model)
    assert op_types(model) == ["SparseConv", "Add", "Relu"]
    for value in model.graph.inputs:
        value.shape = ir.Shape([f"batch of {value.name}", *list(value.shape)[1:]])
    assert run(model, {"X": X, "R": R})["Y"].shape == (2, 8, 6, 7)


def test_residual_of_unknown_shape_is_not_fused(from_text, run):
    model = build(
        from_text, f"h = {PAD}(X, W) Y = Add(h, R)", x="float[B, 4, 6, 7] X, float[N, 8, 6, 7] R", W=W
    )
    feeds = {"X": X, "R": RNG.standard_normal((1, 8, 6, 7)).astype(np.float32)}
    check(run, model, ["SparseConv", "Add"], feeds=feeds)


LEFT = {
    "depthwise alone": ("Y = Conv<group = 4>(X, dw)", {"dw": filters(4, 1, 3, 3)}, "around it is lowered"),
    "depthwise beside a dense one": (
        "h = Conv<group = 4>(X, dw) Y = Conv(h, W)",
        {"dw": filters(4, 1, 3, 3), "W": filters(8, 4, 1, 1, sparsity=0)}, "around it is lowered",
    ),
    "bias computed": (
        "b = ReduceMax<axes = [0, 2, 3], keepdims = 0>(X) Y = Conv(X, W, b)", {"W": SQUARE}, "bias is no constant"
    ),
    "dense": ("Y = Conv(X, W)", {"W": filters(8, 4, 3, 3, sparsity=0)}, "zeros, fewer than"),
    "weight is a graph output": ("Y = Conv(X, W) Z = Identity(W)", {"W": W}, "also used by Identity"),
    "transposed": (
        "T = Transpose<perm = [0, 1, 3, 2]>(W) a = Conv(X, T) b = Conv(X, W) Y = Add(a, b)",
        {"W": W}, "also used by Transpose",
    ),
    "shared by groups": (
        "a = Conv(X, W) s = Concat<axis = 1>(X, X) b = Conv<group = 2>(s, W) Y = Add(a, b)",
        {"W": W}, "different groups",
    ),
    "constant images": (
        "Y = Conv(C, W)", {"W": W, "C": np.ones((1, 4, 6, 7), np.float32)}, "constant activation"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_alone_with_the_reason(case, from_text):
    body, tensors, reason = LEFT[case]
    y = "float[B, C, H, V] Y" + (", float[8, 4, 3, 3] Z" if "Z" in body else "")
    result = LowerSparseConv(min_sparsity=0.5)(build(from_text, body, y=y, **tensors))
    assert not result.modified
    assert any(reason in declined.reason for declined in result.declined), result.declined


@pytest.mark.parametrize(
    ("x", "y", "weight", "reason"),
    [
        ("double[B, 4, 6, 7] X", "double[B, C, H, V] Y", W.astype(np.float64), "dtype DOUBLE"),
        ("float[B, 4, 5, 5, 5] X", "float[B, C, K, L, M] Y", filters(8, 4, 3, 3, 3), "rank 5"),
    ],
)
def test_other_types_and_ranks_are_left_alone(x, y, weight, reason, from_text):
    result = LowerSparseConv(min_sparsity=0.5)(build(from_text, "Y = Conv(X, W)", x=x, y=y, W=weight))
    assert not result.modified
    assert reason in result.declined[0].reason


ROW_TENSORS = {
    "W": filters(8, 4, 5), "V": filters(8, 4, 5), "SQUARE": filters(4, 4, 3), "B": B, "D": filters(8, 4, 1, sparsity=0),
    "G": filters(8, 2, 3), "dw": filters(4, 1, 3, sparsity=0), "P": filters(4, 4, 1), "zero": ZERO, "six": SIX,
}  # fmt: skip
ROWS = {
    "alone": ("Y = Conv(X, W)", ["SparseConv"]),
    "uneven pads": ("Y = Conv<pads = [1, 3]>(X, W, B)", ["SparseConv"]),
    "kernel_shape": ("Y = Conv<kernel_shape = [5]>(X, W)", ["SparseConv"]),
    "stride and dilation": ("Y = Conv<strides = [2], dilations = [3], pads = [0, 4]>(X, W)", ["SparseConv"]),
    "groups": ("Y = Conv<group = 2, strides = [2]>(X, G)", ["SparseConv"]),
    "valid padding": ('Y = Conv<auto_pad = "VALID">(X, W)', ["SparseConv"]),
    "same upper": ('Y = Conv<auto_pad = "SAME_UPPER", strides = [2]>(X, W)', ["SparseConv"]),
    "same lower": ('Y = Conv<auto_pad = "SAME_LOWER", strides = [3]>(X, W)', ["SparseConv"]),
    "relu": ("h = Conv(X, W, B) Y = Relu(h)", ["SparseConvRelu"]),
    "clip": ("h = Conv(X, W, B) Y = Clip(h, zero, six)", ["SparseConvClip"]),
    "silu": ("h = Conv(X, W, B) s = Sigmoid(h) Y = Mul(s, h)", ["SparseConvSilu"]),
    "residual": (
        "r = Conv(X, D) h = Conv<pads = [2, 2]>(X, W, B) s = Add(h, r) Y = Relu(s)", ["Conv", "SparseConvAddRelu"]
    ),
    "chain": (
        "a = Conv<pads = [1, 1]>(X, SQUARE) b = Relu(a) c = Add(b, X) Y = Conv(c, W)",
        ["SparseConvRelu", "Add", "SparseConv"],
    ),
    "depthwise behind it": (
        "h = Conv(X, P) r = Relu(h) d = Conv<group = 4, pads = [1, 1]>(r, dw) Y = Relu(d)", ["SparseConvDepthwiseRelu"]
    ),
    "depthwise beside it": (
        "d = Conv<group = 4, pads = [1, 1], strides = [2]>(X, dw) h = Relu(d) Y = Conv(h, P)",
        ["SparseConvRelu", "SparseConv"],
    ),
    "bias added as a constant": ("h = Conv(X, W) Y = Add(h, row)", ["SparseConv", "Add"]),
}  # fmt: skip


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("case", ROWS)
def test_convolutions_of_one_axis(case, opset, from_text, run):
    body, lowered = ROWS[case]
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    tensors = {name: array for name, array in ROW_TENSORS.items() if name in words}
    if "row" in words:
        tensors["row"] = B.reshape(1, 8, 1)
    x = RNG.standard_normal((2, 4, 29)).astype(np.float32)
    model = build(from_text, body, opset=opset, x="float[B, 4, 29] X", y="float[B, C, L] Y", **tensors)
    check(run, model, lowered, feeds={"X": x})


def test_products_of_one_axis(from_text):
    model = build(
        from_text,
        "Y = Conv<strides = [2]>(X, W)",
        x="float[B, 4, L] X",
        y="float[B, C, M] Y",
        W=filters(8, 4, 5),
    )
    (candidate,), _ = find_candidates(model)
    assert [layer.products((3, 4, 29)) for layer in candidate.layers] == [3 * 13]


@pytest.mark.parametrize("attributes", ["strides = [1, 1]", "pads = [1, 1, 1, 1]", "dilations = [1, 2]"])
def test_attributes_of_two_axes_for_one_are_declined(attributes, from_text):
    model = from_text(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[B, 4, 29] X) => (float[B, C, L] Y) { Y = Conv(X, W) }',
        W=filters(8, 4, 5),
    )
    name, _, value = attributes.partition(" = ")
    model.graph[0].attributes.add(ir.AttrInt64s(name, json.loads(value)))
    (declined,) = LowerSparseConv(min_sparsity=0.5)(model).declined
    assert declined.reason == "is a Conv with attributes that do not fit its weight"


@pytest.mark.parametrize(
    "attributes",
    ['strides = [1], auto_pad = "SAME_UPPER"', "dilations = [1, 1, 1]", "group = 0", "group = -1"],
)
def test_attributes_that_no_runtime_takes_are_declined(attributes, from_text):
    model = build(from_text, f"Y = Conv<{attributes}>(X, W)", W=filters(8, 4, 3, 3))
    (declined,) = LowerSparseConv(min_sparsity=0.5)(model).declined
    assert declined.reason == "is a Conv with attributes that do not fit its weight"


def test_same_padding_of_unknown_size_is_left_alone(from_text):
    model = build(from_text, 'Y = Conv<auto_pad = "SAME_UPPER">(X, W)', x="float[B, 4, H, V] X", W=W)
    (declined,) = LowerSparseConv(min_sparsity=0.5)(model).declined
    assert "auto_pad SAME_UPPER whose input has no fixed size" in declined.reason


def test_convolution_in_a_subgraph_is_left_alone(from_text):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 4, 6, 7] X, bool c) => (float[B, 8, 4, 5] Y) {
            Y = If (c) <then_branch = t () => (float[B, 8, 4, 5] p) { p = Conv(X, W) },
                        else_branch = e () => (float[B, 8, 4, 5] q) { q = Conv(X, W) }> }""",
        W=W,
    )
    (declined,) = LowerSparseConv()(model).declined
    assert "If" in declined.reason


@pytest.mark.parametrize("opset", [13, 15, 18, 20, 22, 24])
def test_every_opset(opset, from_text, run):
    model = build(
        from_text, f"h = {PAD}(X, W, B) Y = Clip(h, zero, six)", opset=opset, W=W, B=B, zero=ZERO, six=SIX
    )
    check(run, model, ["SparseConvClip"])


@pytest.mark.parametrize("outputs", [4, 8])
def test_depthwise_goes_along_and_is_never_pruned(outputs, from_text, run):
    dw = filters(outputs, 1, 3, 3, sparsity=0)
    body = "h = Conv<group = 4, pads = [1, 1, 1, 1], strides = [2, 1]>(X, dw) r = Relu(h) Y = Conv(r, U)"
    model = build(from_text, body, dw=dw, U=filters(8, outputs, 1, 1, sparsity=0))
    result = Magnitude(sparsity=0.75)(model)
    assert [declined.reason for declined in result.declined] == ["belongs to a depthwise convolution"]
    np.testing.assert_array_equal(model.graph.initializers["dw"].const_value.numpy(), dw)
    candidates, _ = find_candidates(model)
    assert [(c.weight.name, c.companion) for c in candidates] == [("dw", True), ("U", False)]
    decisions = {d.candidate.weight.name: d for d in decide_by_table(candidates)}
    assert [decisions[name].lowered for name in ("U", "dw")] == [True, True]
    check(run, model, ["SparseConvRelu", "SparseConv"])


def test_depthwise_stays_where_all_others_do(from_text):
    body = "h = Conv<group = 4>(X, dw) Y = Conv(h, U)"
    tensors = {"dw": filters(4, 1, 3, 3, sparsity=0.9), "U": filters(8, 4, 1, 1, sparsity=0)}
    candidates, _ = find_candidates(build(from_text, body, **tensors))
    assert not any(decision.lowered for decision in decide_by_table(candidates))


def test_second_run_changes_nothing(from_text):
    model = build(from_text, f"h = {PAD}(X, W, B) Y = Relu(h)", W=W, B=B)
    assert LowerSparseConv()(model).modified
    assert not LowerSparseConv()(model).modified


def test_filters_are_pruned_as_a_matrix(from_text, run):
    dense = filters(8, 4, 3, 3, sparsity=0)
    model = build(from_text, "Y = Conv(X, W)", W=dense)
    (weight,), _ = find_weights(model)
    assert weight.shape == (36, 8)
    np.testing.assert_array_equal(weight.matrix(), dense.reshape(8, 36).T)
    Magnitude(sparsity=0.75)(model)
    pruned = model.graph.initializers["W"].const_value.numpy()
    assert pruned.shape == dense.shape
    assert (pruned == 0).mean() == 0.75
    np.testing.assert_array_equal(pruned[pruned != 0], dense[pruned != 0])
    check(run, model, ["SparseConv"])


def test_two_of_four_runs_along_the_input_channels(from_text):
    model = build(from_text, "Y = Conv(X, P)", P=filters(8, 4, 1, 1, sparsity=0))
    Magnitude(mask_structure="2:4")(model)
    pruned = model.graph.initializers["P"].const_value.numpy()
    np.testing.assert_array_equal((pruned != 0).sum(1), np.full((8, 1, 1), 2))


def test_guard_finds_both_kinds_of_layers(from_text):
    model = build(
        from_text,
        "h = Conv(X, W) p = GlobalAveragePool(h) f = Flatten(p) Y = MatMul(f, M)",
        y="float[B, 5] Y",
        W=W,
        M=filters(8, 5),
    )
    candidates, declined = find_candidates(model)
    assert [candidate.kind for candidate in candidates] == ["linear", "convolution"]
    assert declined == []
    assert [layer.products((2, 4, 6, 7)) for layer in candidates[1].layers] == [2 * 4 * 5]
    assert [layer.products((2, 8)) for layer in candidates[0].layers] == [2]
    assert [decision.lowered for decision in decide_by_table(candidates)] == [
        candidate.sparsity >= 0.65 for candidate in candidates
    ]
