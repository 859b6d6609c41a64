"""Lowering to SparseInt8Conv: what is fused, the same integers as before, and what must not fire."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.sparse_int8_conv import LowerSparseInt8Conv
from sparse_onnx.timing.choose import decide_by_table

RNG = np.random.default_rng(3)
STEP, WS = np.float32(2**-5), (2.0 ** RNG.integers(-7, -3, 8)).astype(np.float32)


def filters(*shape, zeros=0.7):
    """int8, with zeros in groups of four channels as far as there are so many."""
    groups = RNG.random((shape[0], -(-shape[1] // 4), *shape[2:])) >= zeros
    mask = np.repeat(groups, 4, axis=1)[:, : shape[1]]
    return np.where(mask, RNG.integers(-127, 128, shape), 0).astype(np.int8)


TENSORS = {
    "xs": STEP,
    "xz": np.uint8(7),
    "xn": np.int8(-9),
    "ys": np.float32(0.5),
    "yz": np.uint8(0),
    "yn": np.int8(-128),
    "wide": np.uint8(60),
    "w": filters(8, 6, 3, 3),
    "p": filters(8, 6, 1, 1),
    "g": filters(8, 3, 3, 3),
    "one": filters(8, 6, 3),
    "ws": WS,
    "wz": np.zeros(8, np.int8),
    "b": RNG.integers(-2000, 2000, 8).astype(np.int32),
    "bs": WS * STEP,
    "bz": np.zeros(8, np.int32),
    "zero": np.float32(0),
    "six": np.float32(6),
}
X = {"uint8": RNG.integers(0, 256, (2, 6, 9, 8)).astype(np.uint8)}
X["int8"] = (X["uint8"].astype(np.int16) - 128).astype(np.int8)

HEAD = "x = DequantizeLinear(X, xs, xz) W = DequantizeLinear<axis = 0>(w, ws) B = DequantizeLinear<axis = 0>(b, bs) "
PAD = "Conv<pads = [1, 1, 1, 1]>"


def build(from_text, body, *, dtype="uint8", opset=17, shape="B, 6, 9, 8", y=None, **changed):
    words = set(re.findall(r"\w+", body))
    tensors = {name: array for name, array in (TENSORS | changed).items() if name in words}
    text = f'<ir_version: {9 if opset < 21 else 10}, opset_import: ["" : {opset}]>'
    output = y or f"{dtype}[B, C, H, V] Y"
    return from_text(f"{text} g ({dtype}[{shape}] X) => ({output}) {{ {body} }}", **tensors)


def op_types(model):
    return [node.op_type for node in model.graph]


def outputs(model, feeds, *, library):
    """From ONNX Runtime as it is: told to be precise, it cannot run some of these models before they are lowered."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        sparse_ops.register(options)
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"]).run(None, feeds)[0]


def check(model, lowered, feeds):
    """Lower ``model``; its operators then are ``lowered``, and its integers what ONNX Runtime's own were."""
    before = outputs(model, feeds, library=False)
    result = LowerSparseInt8Conv(min_sparsity=0.5)(model)
    assert op_types(model) == lowered
    for library in (True, False):
        after = outputs(model, feeds, library=library)
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, before)
    return result


OURS, SIGNED = ["SparseInt8Conv"], ["SparseInt8ConvSigned"]
NO_BIAS = HEAD.split("B = ")[0]
FUSED = {
    "alone": (f"{HEAD} h = {PAD}(x, W, B) Y = QuantizeLinear(h, ys, wide)", OURS),
    "no bias": (f"{NO_BIAS} h = {PAD}(x, W) Y = QuantizeLinear(h, ys, wide)", OURS),
    "relu": (f"{HEAD} h = {PAD}(x, W, B) r = Relu(h) Y = QuantizeLinear(r, ys, yz)", OURS),
    "clip": (f"{HEAD} h = {PAD}(x, W, B) r = Clip(h, zero, six) Y = QuantizeLinear(r, ys, yz)", OURS),
    "clip, one limit": (
        f"{HEAD} h = {PAD}(x, W, B) r = Clip(h, , six) Y = QuantizeLinear(r, ys, wide)",
        OURS,
    ),
    "zero points of weight and bias": (
        HEAD.replace("w, ws", "w, ws, wz").replace("b, bs", "b, bs, bz")
        + f"h = {PAD}(x, W, B) Y = QuantizeLinear(h, ys, wide)",
        OURS,
    ),
    "stride and dilation": (
        f"{HEAD} h = Conv<pads = [0, 2, 1, 0], strides = [2, 1], dilations = [1, 2]>(x, W, B) "
        "Y = QuantizeLinear(h, ys, wide)",
        OURS,
    ),
    "same": (f'{HEAD} h = Conv<auto_pad = "SAME_UPPER">(x, W, B) Y = QuantizeLinear(h, ys, wide)', OURS),
    "pointwise": (
        HEAD.replace("(w,", "(p,") + "h = Conv(x, W, B) Y = QuantizeLinear(h, ys, wide)",
        OURS,
    ),
    "groups": (
        HEAD.replace("(w,", "(g,") + f"h = {PAD[:-1]}, group = 2>(x, W, B) Y = QuantizeLinear(h, ys, wide)",
        OURS,
    ),
    "to signed": (f"{HEAD} h = {PAD}(x, W, B) r = Relu(h) Y = QuantizeLinear(r, ys, yn)", SIGNED),
}


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name, opset, from_text):
    body, lowered = FUSED[name]
    y = "int8[B, C, H, V] Y" if lowered == SIGNED else None
    model = build(from_text, body, opset=opset, y=y)
    check(model, lowered, {"X": X["uint8"]})


@pytest.mark.parametrize("name", ["alone", "relu", "groups", "pointwise"])
def test_signed_activations(name, from_text):
    body = FUSED[name][0].replace("xz", "xn").replace("yz", "yn").replace("wide", "xn")
    model = build(from_text, body, dtype="int8")
    check(model, SIGNED, {"X": X["int8"]})


def test_one_axis(from_text):
    body = HEAD.replace("(w,", "(one,") + "h = Conv<pads = [1, 1]>(x, W, B) Y = QuantizeLinear(h, ys, wide)"
    model = build(from_text, body, shape="B, 6, 9", y="uint8[B, C, H] Y")
    check(model, OURS, {"X": X["uint8"][..., 0]})


def test_a_chain_stays_in_integers(from_text):
    """And so does a residual: what is between two convolutions are bytes, and the sum is ONNX Runtime's."""
    body = f"""{HEAD} h = {PAD}(x, W, B) r = Relu(h) q = QuantizeLinear(r, ys, yz)
        x2 = DequantizeLinear(q, ys, yz) W2 = DequantizeLinear(v, xs) h2 = {PAD}(x2, W2)
        q2 = QuantizeLinear(h2, ys, wide)
        x3 = DequantizeLinear(q2, ys, wide) s = Add(x3, x2) r3 = Relu(s) Y = QuantizeLinear(r3, ys, yz)"""
    model = build(from_text, body, v=filters(8, 8, 3, 3))
    lowered = [*OURS, "DequantizeLinear", *OURS, "DequantizeLinear", "Add", "Relu", "QuantizeLinear"]
    check(model, lowered, {"X": X["uint8"]})


def test_a_weight_that_two_share(from_text):
    body = f"""{HEAD} h = {PAD}(x, W, B) p1 = QuantizeLinear(h, ys, wide) k = Conv<strides = [2, 2]>(x, W, B)
        p2 = QuantizeLinear(k, xs, yz) a = DequantizeLinear(p1, ys, wide) c = DequantizeLinear(p2, xs, yz)
        m = GlobalAveragePool(a) n = GlobalAveragePool(c) Y = Add(m, n)"""
    model = build(from_text, body, y="float[B, C, H, V] Y")
    before = outputs(model, {"X": X["uint8"]}, library=False)
    LowerSparseInt8Conv(min_sparsity=0.5)(model)
    assert op_types(model).count("SparseInt8Conv") == 2
    after = outputs(model, {"X": X["uint8"]}, library=True)
    np.testing.assert_allclose(after, before, rtol=1e-6)


CONV = f"h = {PAD}(x, W, B) Y = QuantizeLinear(h, ys, wide)"
LEFT = {
    "floats in": (
        f"W = DequantizeLinear<axis = 0>(w, ws) f = Cast<to = 1>(X) h = {PAD}(f, W) Y = QuantizeLinear(h, ys, wide)",
        {},
        "its input is not rounded",
    ),
    "floats out": (f"{HEAD} h = {PAD}(x, W, B) Y = Cast<to = 2>(h)", {}, "its result is not rounded"),
    "result read twice": (
        f"{HEAD} h = {PAD}(x, W, B) q = QuantizeLinear(h, ys, wide) c = Cast<to = 2>(h) Y = Max(q, c)",
        {},
        "its result is not rounded",
    ),
    "another activation": (
        f"{HEAD} h = {PAD}(x, W, B) s = Sigmoid(h) Y = QuantizeLinear(s, ys, wide)",
        {},
        "its result is not rounded",
    ),
    "bias of floats": (
        f"{NO_BIAS} h = {PAD}(x, W, fb) Y = QuantizeLinear(h, ys, wide)",
        {"fb": np.ones(8, np.float32)},
        "a bias that is not of constant integers",
    ),
    "bias on another grid": (HEAD + CONV, {"bs": WS * STEP * np.float32(1.001)}, "a bias whose scale is not"),
    "bias too large": (HEAD + CONV, {"b": np.full(8, 2**30 + 1, np.int32)}, "a bias beyond"),
    "bias that is the lowest": (HEAD + CONV, {"b": np.full(8, -(2**31), np.int32)}, "a bias beyond"),
    "zero point in the weight": (
        HEAD.replace("w, ws", "w, ws, wz") + CONV,
        {"wz": np.full(8, 3, np.int8)},
        "zero points",
    ),
    "a scale that is 0": (HEAD + CONV, {"ws": WS * 0, "bs": WS * 0}, "scales that are not above 0"),
    "scales too far apart": (
        HEAD + CONV,
        {"xs": np.float32(1e-20), "ws": WS * np.float32(1e-24), "bs": WS * np.float32(0)},
        "scales that are not above 0",
    ),
    "a scale for each input": (
        f"x = DequantizeLinear<axis = 1>(X, xs6, xz6) W = DequantizeLinear<axis = 0>(w, ws) h = {PAD}(x, W) "
        "Y = QuantizeLinear(h, ys, wide)",
        {"xs6": np.full(6, STEP), "xz6": np.zeros(6, np.uint8)},
        "has more than one scale",
    ),
    "a scale for each result": (
        f"{HEAD} h = {PAD}(x, W, B) Y = QuantizeLinear<axis = 1>(h, ws, y8)",
        {"y8": np.zeros(8, np.uint8)},
        "its result has more than one scale",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_must_not_fire(name, from_text):
    body, changed, reason = LEFT[name]
    model = build(from_text, body, **changed)
    before = op_types(model)
    result = LowerSparseInt8Conv(min_sparsity=0.0)(model)
    assert not result.modified
    assert op_types(model) == before
    assert any(reason in declined.reason for declined in result.declined), result.declined


def test_depthwise_ones_are_left(from_text):
    body = NO_BIAS.replace("(w,", "(d,").replace(", ws)", ", xs)") + (
        f"h = {PAD[:-1]}, group = 6>(x, W) Y = QuantizeLinear(h, ys, wide)"
    )
    model = build(from_text, body, d=filters(6, 1, 3, 3))
    assert not LowerSparseInt8Conv(min_sparsity=0.0)(model).modified


def test_weights_of_floats_are_others_matter(from_text):
    body = f"x = DequantizeLinear(X, xs, xz) h = {PAD}(x, f) Y = QuantizeLinear(h, ys, wide)"
    model = build(from_text, body, f=filters(8, 6, 3, 3).astype(np.float32))
    result = LowerSparseInt8Conv(min_sparsity=0.0)(model)
    assert not result.modified
    assert not result.declined


def test_few_zeros_are_not_lowered(from_text):
    model = build(from_text, HEAD + CONV, w=filters(8, 6, 3, 3, zeros=0.2))
    result = LowerSparseInt8Conv(min_sparsity=0.5)(model)
    assert not result.modified
    assert "fewer than 50.0%" in result.declined[0].reason


def test_groups_that_differ_are_left(from_text):
    body = (
        HEAD.replace("(w,", "(g,")
        + f"""h = {PAD[:-1]}, group = 2>(x, W, B) p1 = QuantizeLinear(h, ys, wide)
        t = Slice(x, from, upto, axis) k = {PAD}(t2, W, B) p2 = QuantizeLinear(k, ys, wide) Y = Max(p1, p2)"""
    ).replace(
        "t = Slice(x, from, upto, axis)", "t = Slice(X, from, upto, axis) t2 = DequantizeLinear(t, xs, xz)"
    )
    places = {"from": np.array([0]), "upto": np.array([3]), "axis": np.array([1])}
    result = LowerSparseInt8Conv(min_sparsity=0.0)(build(from_text, body, **places))
    assert [declined.reason for declined in result.declined] == [
        "shared by convolutions with different groups"
    ]


def test_it_is_a_form_that_keeps_the_numbers(from_text):
    """So that it is timed without being asked for; what no curve knows stays."""
    model = build(from_text, HEAD + CONV)
    (candidate,), _ = find_candidates(model)
    (form,) = candidate.forms
    assert (form.name, form.exact, form.least_zeros > 0) == ("int8-given-quads", True, True)
    assert candidate.allowed_forms() == (form,)
    assert candidate.refusal(form) == ""
    (decision,) = decide_by_table([candidate])
    assert decision.form == "dense"


def test_quads_are_counted_along_channels(from_text):
    """The same zeros in other places leave other quads, and other times."""
    along = np.zeros((8, 8, 3, 3), np.int8)
    along[:, :4] = 1
    across = np.zeros((8, 8, 3, 3), np.int8)
    across[:, ::2] = 1
    found = []
    for w in (along, across):
        model = build(from_text, HEAD + CONV, w=w, shape="B, 8, 9, 8")
        (candidate,), _ = LowerSparseInt8Conv.find_candidates(model)
        found.append(LowerSparseInt8Conv.layout(candidate, candidate.forms[0], None)["quads"])
    assert found == ["0.50", "1.00"]


def test_ir_has_the_types_of_the_integers(from_text):
    model = build(from_text, FUSED["relu"][0])
    LowerSparseInt8Conv(min_sparsity=0.5)(model)
    assert model.graph.outputs[0].dtype == ir.DataType.UINT8
