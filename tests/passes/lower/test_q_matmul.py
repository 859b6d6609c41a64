"""Linears of graphs that are quantized already: the integers of the graph, in our operators, and what is left."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx.model import model_io
from sparse_onnx.model.work import Work
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.int8_matmul import SparseInt8Form
from sparse_onnx.passes.lower.q_matmul import LowerQMatMul, LowerSparseQMatMul
from sparse_onnx.running.runtime import open_session

RNG = np.random.default_rng(4)
K, N = 96, 40
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
FORMS = {"int8-given", "int8-given-quads"}
LOWERINGS = {"": LowerQMatMul, "Sparse": LowerSparseQMatMul}
every_lowering = pytest.mark.parametrize("word", LOWERINGS)


def _integers():
    kept = np.repeat(RNG.random((K // 4, N)) < 0.3, 4, axis=0)
    return np.where(kept, RNG.integers(-127, 128, (K, N)), 0).astype(np.int8)


V = _integers()
SCALES = RNG.uniform(0.002, 0.01, N).astype(np.float32)
STEP = np.float32(0.025)
TENSORS = {
    "s": STEP,
    "z": np.uint8(117),
    "zs": np.int8(-11),
    "z16": np.uint16(117),
    "s2": np.full(K, STEP),
    "z2": np.full(K, 117, np.uint8),
    "V": V,
    "T": np.ascontiguousarray(V.T),
    "U": (V.astype(np.int16) + 128).astype(np.uint8),
    "A": np.clip(V.astype(np.int16) + 117, 0, 244).astype(np.uint8),
    "az": np.uint8(117),
    "F": V * SCALES,
    "w": SCALES,
    "w1": np.float32(0.004),
    "n": np.zeros(N, np.int8),
    "n1": np.int8(0),
    "nu": np.full(N, 128, np.uint8),
    "odd": np.full(N, 3, np.int8),
    "hs": np.float32(0.03),
    "hz": np.uint8(120),
    "hzs": np.int8(5),
    "hs2": np.float32(0.031),
    "bias": RNG.standard_normal(N).astype(np.float32),
    "row": RNG.standard_normal((5, N)).astype(np.float32),
    "bi": RNG.integers(-4000, 4000, N).astype(np.int32),
    "bs": STEP * SCALES,
    "bz": np.zeros(N, np.int32),
    "bz1": np.ones(N, np.int32),
    "both": STEP * SCALES,
    "u": RNG.integers(0, 256, (2, 5, K)).astype(np.uint8),
    "M": RNG.integers(-127, 128, (N, N)).astype(np.int8),
    "rows": np.array([10, K], np.int64),
    "back": np.array([2, 5, N], np.int64),
}
Q = "q = QuantizeLinear(X, s, z) x = DequantizeLinear(q, s, z)"
W = "W = DequantizeLinear<axis = 1>(V, w, n)"
H = "hq = QuantizeLinear(h, hs, hz) g = DequantizeLinear(hq, hs, hz)"
B = "b = DequantizeLinear<axis = 0>(bi, bs, bz)"
DYNAMIC = "q, d, p = DynamicQuantizeLinear(X) i = MatMulInteger(q, V, p, n) f = Cast<to = 1>(i)"
STATIC = "q = QuantizeLinear(X, s, z) i = MatMulInteger(q, V, z, n1)"
QLINEAR = "q = QuantizeLinear(X, s, z) y = QLinearMatMul(q, s, z, V, w, n, hs, hz)"

FOUND = {
    "matmul": (f"{Q} {W} Y = MatMul(x, W)", "QMatMul"),
    "signed": (
        f"q = QuantizeLinear(X, s, zs) x = DequantizeLinear(q, s, zs) {W} Y = MatMul(x, W)",
        "QMatMul",
    ),
    "no zero point": (
        f"q = QuantizeLinear(X, s) x = DequantizeLinear(q, s) {W} Y = MatMul(x, W)",
        "QMatMul",
    ),
    "unsigned weight": (f"{Q} W = DequantizeLinear<axis = 1>(U, w, nu) Y = MatMul(x, W)", "QMatMul"),
    "a zero point of the weight": (f"{Q} W = DequantizeLinear(A, w1, az) Y = MatMul(x, W)", "QMatMul"),
    "turned weight": (
        f"{Q} D = DequantizeLinear<axis = 0>(T, w, n) W = Transpose<perm = [1, 0]>(D) Y = MatMul(x, W)",
        "QMatMul",
    ),
    "floats that are rounded": (
        f"{Q} R = QuantizeLinear<axis = 1>(F, w, n) W = DequantizeLinear<axis = 1>(R, w, n) Y = MatMul(x, W)",
        "QMatMul",
    ),
    "one scale": (f"{Q} W = DequantizeLinear(V, w1) Y = MatMul(x, W)", "QMatMul"),
    "bias": (f"{Q} {W} h = MatMul(x, W) Y = Add(bias, h)", "QMatMul"),
    "integer bias": (f"{Q} {W} {B} h = MatMul(x, W) Y = Add(h, b)", "QMatMul"),
    "gelu": (f"{Q} {W} h = MatMul(x, W) a = Add(bias, h) Y = Gelu(a)", "QMatMulGelu"),
    "grid": (f"{Q} {W} h = MatMul(x, W) {H} a = Add(bias, g) Y = Relu(a)", "QMatMulRelu"),
    "signed grid": (
        f"{Q} {W} h = MatMul(x, W) hq = QuantizeLinear(h, hs, hzs) g = DequantizeLinear(hq, hs, hzs)"
        " Y = Add(bias, g)",
        "QMatMul",
    ),
    "grid of an activation": (f"{Q} {W} h = MatMul(x, W) {H} Y = Relu(g)", "QMatMulRelu"),
    "gemm": (
        f"r = Reshape(X, rows) q = QuantizeLinear(r, s, z) x = DequantizeLinear(q, s, z)"
        f" W = DequantizeLinear<axis = 0>(T, w, n) {B} h = Gemm<transB = 1>(x, W, b) a = Relu(h)"
        " Y = Reshape(a, back)",
        "QMatMulRelu",
    ),
    "dynamic": (f"{DYNAMIC} c = Mul(d, w) Y = Mul(f, c)", "QMatMul"),
    "dynamic, scale by scale": (f"{DYNAMIC} c = Mul(f, d) h = Mul(c, w) Y = Add(h, bias)", "QMatMul"),
    "dynamic, gelu": (
        f"{DYNAMIC} c = Mul(w, d) h = Mul(c, f) a = Add(bias, h) Y = Gelu(a)",
        "QMatMulGelu",
    ),
    "static integers": (f"{STATIC} j = Add(i, bi) f = Cast<to = 1>(j) Y = Mul(f, both)", "QMatMul"),
    "static integers, scale by scale": (
        f"{STATIC} f = Cast<to = 1>(i) c = Mul(f, s) h = Mul(c, w) Y = Relu(h)",
        "QMatMulRelu",
    ),
    "qlinear": (f"{QLINEAR} g = DequantizeLinear(y, hs, hz) a = Add(g, bias) Y = Relu(a)", "QMatMulRelu"),
    "qlinear alone": (f"{QLINEAR} Y = DequantizeLinear(y, hs, hz)", "QMatMul"),
}

LEFT = {
    "several scales": (
        f"q = QuantizeLinear<axis = 2>(X, s2, z2) x = DequantizeLinear<axis = 2>(q, s2, z2) {W} Y = MatMul(x, W)",
        "more than one scale",
    ),
    "16 bits": (
        f"q = QuantizeLinear(X, s, z16) x = DequantizeLinear(q, s, z16) {W} Y = MatMul(x, W)",
        "UINT16, not of 8 bits",
    ),
    "zero points of the weight": (
        f"{Q} W = DequantizeLinear<axis = 1>(V, w, odd) Y = MatMul(x, W)",
        "further from their zero point than 8 bits reach",
    ),
    "a scale that is computed": (
        f"t = Sqrt(s) q = QuantizeLinear(X, t, z) x = DequantizeLinear(q, t, z) {W} Y = MatMul(x, W)",
        "no constant",
    ),
    "other integers of a dynamic input": (
        "q, d, p = DynamicQuantizeLinear(X) i = MatMulInteger(q, V, z, n) f = Cast<to = 1>(i)"
        " c = Mul(d, w) Y = Mul(f, c)",
        "zero point is not that of its input",
    ),
    "the scale of a dynamic input is missing": (f"{DYNAMIC} Y = Mul(f, w)", "a scale that is not known"),
    "sums stay integers": (f"{STATIC} j = Add(i, bi) Y = Cast<to = 1>(j)", "a scale that is not known"),
    "other sums": (
        f"{STATIC} j = Add(i, i) f = Cast<to = 1>(j) Y = Mul(f, both)",
        "a scale that is not known",
    ),
    "a bias of integers of a dynamic input": (
        "q, d, p = DynamicQuantizeLinear(X) i = MatMulInteger(q, V, p, n1) j = Add(i, bi)"
        " f = Cast<to = 1>(j) c = Mul(d, w) Y = Mul(f, c)",
        "whose scale is computed in every run",
    ),
    "a constant input": (
        f"x = DequantizeLinear(u, s, z) {W} Y = MatMul(x, W)",
        "constant activation",
    ),
    "a Gemm with alpha": (
        f"r = Reshape(X, rows) q = QuantizeLinear(r, s, z) x = DequantizeLinear(q, s, z) {W}"
        " h = Gemm<alpha = 0.5>(x, W) Y = Reshape(h, back)",
        "alpha or beta",
    ),
    "integers are read elsewhere": (
        f"{QLINEAR} c = Cast<to = 1>(y) d = DequantizeLinear(y, hs, hz) Y = Add(c, d)",
        "other layers read its integers",
    ),
    "decoded with another scale": (f"{QLINEAR} Y = DequantizeLinear(y, hs2, hz)", "another scale"),
}


@pytest.fixture
def model(from_text):
    def model(text):
        used = {name: array for name, array in TENSORS.items() if re.search(rf"[(,] ?{name}[,)]", text)}
        return from_text(
            f"""<ir_version: 10, opset_import: ["" : 21]>
            g (float[2, 5, {K}] X) => (float[2, 5, {N}] Y) {{ {text} }}""",
            **used,
        )

    return model


def exact_outputs(found, tmp_path):
    """As the standard says: ONNX Runtime without any fusion."""
    path = model_io.save_model(found, tmp_path, name="exact")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options).run(None, {"X": X})[0]


def outputs(found, tmp_path, *, library):
    path = model_io.save_model(found, tmp_path, name="model")
    return open_session(path, threads=1, library=library).run(None, {"X": X})[0]


def assert_same(found, expected, step):
    """But for how floats round: on a grid, a few may be one step off."""
    off = np.abs(found - expected) > 2e-5
    assert off.mean() < 0.01
    assert np.abs(found - expected).max() < step + 2e-5


@every_lowering
@pytest.mark.parametrize(("text", "op_type"), FOUND.values(), ids=FOUND)
def test_the_integers_are_those_of_the_graph(model, tmp_path, text, op_type, word):
    lowered = model(text)
    expected = exact_outputs(lowered, tmp_path)
    (candidate,) = find_candidates(lowered)[0]
    assert {form.name for form in candidate.allowed_forms()} == FORMS
    assert LOWERINGS[word]()(lowered).modified
    ours = [node.op_type for node in lowered.graph if node.domain == "sparse_onnx"]
    assert ours == [word + op_type]
    others = {node.op_type for node in lowered.graph if node.domain != "sparse_onnx"}
    assert others <= {"QuantizeLinear", "DynamicQuantizeLinear", "Reshape", "Constant"}
    assert exact_twin(lowered) is None
    for library in (True, False):
        assert_same(outputs(lowered, tmp_path, library=library), expected, 0.03)


@pytest.mark.parametrize(("text", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_another_arithmetic_is_left(model, text, reason):
    before = model(text)
    proto = ir.to_proto(before).SerializeToString()
    result = LowerQMatMul()(before)
    assert not result.modified
    assert any(reason in place.reason for place in result.declined)
    assert ir.to_proto(before).SerializeToString() == proto
    forms = {form.name for candidate in find_candidates(before)[0] for form in candidate.forms}
    assert not forms & FORMS


def test_linears_of_floats_are_not_looked_at(model):
    for text in (f"{W} Y = MatMul(X, W)", "Y = MatMul(X, F)"):
        assert LowerQMatMul.find_candidates(model(text)) == ([], [])


OUTSIDE = {
    "two read the product": (f"{Q} {W} h = MatMul(x, W) {H} a = Add(bias, g) r = Relu(h) Y = Add(a, r)", 5),
    "no bias": (f"{Q} {W} h = MatMul(x, W) {H} Y = Add(g, row)", 3),
    "decoded otherwise": (
        f"{Q} {W} h = MatMul(x, W) hq = QuantizeLinear(h, hs, hz) g = DequantizeLinear(hq, hs2, hz)"
        " Y = Add(g, bias)",
        3,
    ),
    "a bias with zero points": (
        f"{Q} {W} b = DequantizeLinear<axis = 0>(bi, bs, bz1) h = MatMul(x, W) Y = Add(h, b)",
        2,
    ),
    "rounded behind the bias": (f"{Q} {W} a = MatMul(x, W) h = Add(a, bias) {H} Y = Relu(g)", 3),
}


@pytest.mark.parametrize(("text", "left"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_is_not_of_the_layer_stays_outside(model, tmp_path, text, left):
    lowered = model(text)
    expected = exact_outputs(lowered, tmp_path)
    LowerSparseQMatMul()(lowered)
    kinds = [node.op_type for node in lowered.graph]
    assert kinds[:2] in (["QuantizeLinear", "SparseQMatMul"], ["QuantizeLinear", "DequantizeLinear"])
    assert len(kinds) == 2 + left
    assert_same(outputs(lowered, tmp_path, library=True), expected, 0.03)


def test_linears_of_one_input_share_its_integers(model, tmp_path):
    lowered = model(f"{Q} {W} h = MatMul(x, W) i = MatMul(x, W) Y = Add(h, i)")
    expected = exact_outputs(lowered, tmp_path)
    LowerSparseQMatMul()(lowered)
    kinds = [node.op_type for node in lowered.graph]
    assert kinds == ["QuantizeLinear", "SparseQMatMul", "SparseQMatMul", "Add"]
    one, two = (node for node in lowered.graph if node.domain == "sparse_onnx")
    assert one.inputs[0] is two.inputs[0]
    assert [value.name for value in one.inputs] == [value.name for value in two.inputs]
    assert_same(outputs(lowered, tmp_path, library=True), expected, 0)


def test_integers_that_are_rounded_for_another_linear_stay(model, tmp_path):
    """What the products of the first are rounded to is what the second multiplies."""
    lowered = model(f"{Q} {W} h = MatMul(x, W) {H} P = DequantizeLinear(M, w1) Y = MatMul(g, P)")
    expected = exact_outputs(lowered, tmp_path)
    LowerQMatMul()(lowered)
    kinds = [node.op_type for node in lowered.graph]
    assert kinds == ["QuantizeLinear", "QMatMul", "QuantizeLinear", "QMatMul"]
    step = 0.03 * 127 * 0.004  # of what one integer of the second counts
    assert_same(outputs(lowered, tmp_path, library=True), expected, step)


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_quads_are_counted_not_guessed(model, share):
    """What a file says of its pattern is nothing: whether zeros lie together is seen."""
    text = FOUND["matmul"][0]
    (candidate,) = find_candidates(model(text))[0]
    forms = {form.name: form for form in candidate.forms}
    assert not candidate.refusal(forms["int8-given"])
    assert not candidate.refusal(forms["int8-given-quads"])
    scattered = model(text)
    zeros = np.where(RNG.random((K, N)) < share, 0, 1).astype(np.int8)
    scattered.graph.initializers["V"].const_value = ir.tensor(zeros, name="V")
    (candidate,) = find_candidates(scattered)[0]
    forms = {form.name: form for form in candidate.forms}
    assert ("larger" in candidate.refusal(forms["int8-given-quads"])) == (share == 0.4)


@every_lowering
def test_its_work_is_counted(model, word):
    lowered = model(FOUND["grid"][0])
    LOWERINGS[word]()(lowered)
    (found,) = Work(lowered).count()
    assert found.products == 10 * K * N
    assert found.weight == "V.values"
    assert found.sparse == (word == "Sparse")


def test_patterns_that_leave_other_shares_of_quads_are_timed_apart():
    forms = [SparseInt8Form("int8-given-quads", LowerSparseQMatMul, kept=kept) for kept in (0.2, 0.59)]
    assert [form.lies for form in forms] == [{"quads": "0.20"}, {"quads": "0.59"}]
