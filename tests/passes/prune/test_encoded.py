"""Pruning of weights that are integers: they stay on their grid, zeros are the zero point, and data pays."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model.nbits import pack_bits
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import CalibrationData, PassContext
from sparse_onnx.passes.calibration.captures import find_captures
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot_methods import Auto, SparseGPT, Wanda
from sparse_onnx.passes.prune.random import Random
from sparse_onnx.passes.prune.threshold import Threshold
from sparse_onnx.passes.solvers import relative_error
from sparse_onnx.passes.solvers.masks import MaskStructure, obeys
from sparse_onnx.verification.layer_errors import layer_errors

RNG = np.random.default_rng(2)
K, N = 64, 32
HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
W = (RNG.standard_normal((K, N)) * 25).round().clip(-127, 127)
S = RNG.uniform(0.004, 0.008, N).astype(np.float32)
X_SCALE, X_ZERO = np.float32(0.05), np.uint8(117)
QUANTIZE = "x = QuantizeLinear(X, xs, xz)"
GRID = {"xs": X_SCALE, "xz": X_ZERO}
INT8 = {"q": W.astype(np.int8), "s": S, "z": np.zeros(N, np.int8)}
UINT8 = {"q": (W + 128).astype(np.uint8), "s": S[:1].reshape(()), "z": np.uint8(128)}
NIBBLES = (W / 18).round().clip(-7, 7).T.reshape(N, 2, 32) + 8

# name: (nodes from X [B, K] to Y [B, N], tensors)
FORMS = {
    "QDQ": (
        f"{QUANTIZE} d = DequantizeLinear(x, xs, xz) w = DequantizeLinear<axis = 1>(q, s, z) Y = MatMul(d, w)",
        INT8 | GRID,
    ),
    "rounded": (
        "c = QuantizeLinear(q, s, z) w = DequantizeLinear(c, s, z) Y = MatMul(X, w)",
        UINT8 | {"q": ((W + 0.2) * S[0]).astype(np.float32)},
    ),
    "in blocks": (
        "w = DequantizeLinear<axis = 0, block_size = 32>(q, s) Y = MatMul(X, w)",
        {"q": INT8["q"], "s": np.stack([S, 2 * S])},
    ),
    "QLinearMatMul": (
        f"{QUANTIZE} y = QLinearMatMul(x, xs, xz, q, s, z, ys, yz) Y = DequantizeLinear(y, ys, yz)",
        UINT8 | GRID | {"ys": np.float32(0.03), "yz": np.uint8(128)},
    ),
    "QGemm": (f"{QUANTIZE} Y = com.microsoft.QGemm(x, xs, xz, q, s, z)", INT8 | GRID),
    "MatMulInteger": (
        f"{QUANTIZE} i = MatMulInteger(x, q, xz, z) c = Cast<to = 1>(i) Y = Mul(c, f)",
        INT8 | GRID | {"f": X_SCALE * S},
    ),
    "MatMulInteger, dynamic": (
        """x, xs, xz = DynamicQuantizeLinear(X) i = MatMulInteger(x, q, xz, z) c = Cast<to = 1>(i) f = Mul(xs, s)
        Y = Mul(c, f)""",
        UINT8,
    ),
    "DynamicQuantizeMatMul": ("Y = com.microsoft.DynamicQuantizeMatMul(X, q, s, z)", UINT8),
    "by hand": ("c = Cast<to = 1>(q) d = Sub(c, z) w = Mul(d, s) Y = MatMul(X, w)", UINT8 | {"z": np.float32(128)}),
    "MatMulNBits": (
        f"Y = com.microsoft.MatMulNBits<K = {K}, N = {N}, bits = 4, block_size = 32>(X, q, s)",
        {"q": pack_bits(NIBBLES.astype(np.uint8), 4), "s": np.repeat(18 * S, 2)},
    ),
    "MatMulNBits, 8 bits": (
        f"Y = com.microsoft.MatMulNBits<K = {K}, N = {N}, bits = 8, block_size = 32>(X, q, s, z)",
        {
            "q": (W.T.reshape(N, 2, 32) + 120).clip(0, 255).astype(np.uint8),
            "s": np.repeat(S, 2),
            "z": np.full(2 * N, 120, np.uint8),
        },
    ),
    "palette": (
        "j = Cast<to = 6>(q) w = Gather(book, j) Y = MatMul(X, w)",
        {"q": ((W + 128) // 16).astype(np.uint8), "book": (np.arange(16, dtype=np.float32) - 8) / 20},
    ),
}  # fmt: skip


def build(from_text, form):
    body, tensors = FORMS[form]
    return from_text(f"{HEAD} g (float[B, {K}] X) => (float[B, {N}] Y) {{ {body} }}", **tensors)


def batches(seed=1, count=6):
    mix = np.random.default_rng(9).standard_normal((K, K)) * np.logspace(0, -1.5, K)
    rng = np.random.default_rng(seed)
    return [{"X": (rng.standard_normal((96, K)) @ mix / 3 + 0.2).astype(np.float32)} for _ in range(count)]


def only(model):
    (weight,), declined = find_weights(model, encoded=True)
    assert not declined
    return weight


def context(tmp_path):
    return PassContext(calibration=CalibrationData(Samples.of(batches(), "test"), tmp_path))


def output(run, model, matrix):
    """Of the dense model with that weight on the first batch, its input as the layer of ``model`` sees it."""
    weight = only(model)
    (capture,) = find_captures(model, [weight])[0].values()
    (view,) = capture.views
    names = [name for name in view.tensors if name != "X"]
    values = {"X": batches()[0]["X"]}
    if names:
        twin = model.clone()
        known = {value.name: value for node in twin.graph for value in node.outputs}
        twin.graph.outputs[:] = [known[name] for name in names]
        for value in twin.graph.outputs:
            floats = value.name in ("xs", "d")
            value.type = ir.TensorType(ir.DataType.FLOAT if floats else ir.DataType.UINT8)
            value.shape = ir.Shape(["B", K] if value.name in ("x", "d") else [])
        values |= run(twin, batches()[0])
    return view.array(values).astype(np.float64) @ matrix


@pytest.mark.parametrize(
    "step",
    [Magnitude(sparsity=0.6), Random(sparsity=0.6), Threshold(theta=0.15), Magnitude(mask_structure="2:4")],
    ids=lambda step: f"{step.name} {step.structure}",
)
@pytest.mark.parametrize("form", FORMS)
def test_pruning_without_data(from_text, run, form, step):
    model = build(from_text, form)
    before, tensors = (
        only(model).matrix().copy(),
        {n: v.const_value for n, v in model.graph.initializers.items()},
    )
    result = step(model)
    weight = only(model)
    after = weight.matrix()
    assert result.modified
    assert not result.declined
    np.testing.assert_array_equal(after[after != 0], before[after != 0])  # the kept are as they were
    assert not after[before == 0].any()
    (layer,) = result.layers
    assert (
        layer.zeros_after
        == np.count_nonzero(after == 0)
        > layer.zeros_before
        == np.count_nonzero(before == 0)
    )
    if step.name != "prune.threshold":
        assert layer.zeros_after == max(round(step.expected_share * K * N), layer.zeros_after)
        assert obeys(after != 0, step.structure)
    changed = {n for n, v in model.graph.initializers.items() if v.const_value is not tensors[n]}
    assert changed == {"q"}
    got, wanted = run(model, batches()[0])["Y"], output(run, model, after)
    loose = 1e-4 * np.abs(wanted).max()
    if form == "QLinearMatMul":  # the result is integers
        loose, wanted = 0.03, wanted.clip(-128 * 0.03, 127 * 0.03)
    if form == "DynamicQuantizeMatMul":  # which rounds its input inside
        loose = 0.02 * np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, atol=loose)


def gram_of(run, model):
    x = output(run, model, np.eye(K))
    return x.T @ x


@pytest.mark.parametrize(
    ("cls", "calibration"), [(SparseGPT, "oneshot"), (Auto, "asymmetric"), (Wanda, "sequential")]
)
@pytest.mark.parametrize("form", FORMS)
def test_pruning_with_data(from_text, run, tmp_path, form, cls, calibration):
    """Integers stay integers, zeros that were there stay, and it is better than by magnitude."""
    model, plain = build(from_text, form), build(from_text, form)
    before = only(model).matrix().copy()
    tensors = {n: v.const_value for n, v in model.graph.initializers.items()}
    result = cls(sparsity=0.6, calibration=calibration, bias_correction=False)(model, context(tmp_path))
    Magnitude(sparsity=0.6)(plain)
    assert not result.declined
    after = only(model).matrix()
    assert np.count_nonzero(after == 0) >= round(0.6 * K) * N  # Wanda counts for each output
    assert not after[before == 0].any()
    assert {n for n, v in model.graph.initializers.items() if v.const_value is not tensors[n]} == {"q"}
    assert model.graph.initializers["q"].dtype == tensors["q"].dtype
    gram = gram_of(run, model)
    assert relative_error(before, after, gram) < relative_error(before, only(plain).matrix(), gram)
    (layer,) = result.layers
    exact = relative_error(before, after, gram)
    assert layer.error == (
        None if cls is Wanda else pytest.approx(exact, rel=0.3)
    )  # that one sums no whole Gram
    found = layer_errors(build(from_text, form), model, Samples.of(batches(7, 2), "test"), work=tmp_path)
    assert found["q"] == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize("form", ["MatMulNBits", "QDQ"])
def test_n_m_patterns(from_text, tmp_path, form):
    model = build(from_text, form)
    SparseGPT(mask_structure="2:4")(model, context(tmp_path))
    assert obeys(only(model).matrix() != 0, MaskStructure.parse("2:4"))


CONVOLUTIONS = {
    "QLinearConv": (
        "y = QLinearConv<pads = [1, 1, 1, 1]>(x, xs, xz, q, s, z, ys, yz) Y = DequantizeLinear(y, ys, yz)",
        {"ys": np.float32(0.05), "yz": np.uint8(128)},
    ),
    "ConvInteger": (
        "i = ConvInteger<pads = [1, 1, 1, 1]>(x, q, xz, z) c = Cast<to = 1>(i) Y = Mul(c, f)",
        {"f": (X_SCALE * S[:6]).reshape(1, 6, 1, 1), "z": np.uint8(128), "q": None},
    ),
    "QDQ": (
        "d = DequantizeLinear(x, xs, xz) w = DequantizeLinear<axis = 0>(q, s, z) Y = Conv<pads = [1, 1, 1, 1]>(d, w)",
        {},
    ),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_convolutions(from_text, run, tmp_path, form):
    """Padding is the zero point of the input: the integers are made floats before they are unfolded."""
    body, tensors = CONVOLUTIONS[form]
    filters = W.reshape(-1)[: 6 * 4 * 9].reshape(6, 4, 3, 3)
    own = GRID | {"q": filters.astype(np.int8), "s": S[:6], "z": np.zeros(6, np.int8)} | tensors
    if own["q"] is None:
        own["q"] = (filters + 128).astype(np.uint8)
        del own["s"]
    model = from_text(
        f"{HEAD} g (float[B, 4, 6, 6] X) => (float[B, 6, 6, 6] Y) {{ {QUANTIZE} {body} }}", **own
    )
    rng = np.random.default_rng(0)
    feeds = [{"X": (rng.standard_normal((8, 4, 6, 6)) + 0.5).astype(np.float32)} for _ in range(3)]
    before = only(model).matrix().copy()
    data = CalibrationData(Samples.of(feeds, "test"), tmp_path)
    result = SparseGPT(sparsity=0.5)(model, PassContext(calibration=data))
    after = only(model).matrix()
    steps = {"xs": X_SCALE, "xz": X_ZERO}
    dense = from_text(
        f"""{HEAD} g (float[B, 4, 6, 6] X) => (float[B, 6, 6, 6] A, float[B, 6, 6, 6] C) {{
        {QUANTIZE} d = DequantizeLinear(x, xs, xz) A = Conv<pads = [1, 1, 1, 1]>(d, a)
        C = Conv<pads = [1, 1, 1, 1]>(d, c) }}""",
        a=np.ascontiguousarray(before.T).reshape(6, 4, 3, 3),
        c=np.ascontiguousarray(after.T).reshape(6, 4, 3, 3),
        **steps,
    )
    x = np.concatenate([f["X"] for f in feeds])
    made = run(dense, {"X": x})
    exact = np.linalg.norm(made["A"] - made["C"]) / np.linalg.norm(made["A"])
    assert result.layers[0].error == pytest.approx(exact, rel=1e-3)
    loose = 0.05 if form == "QLinearConv" else 1e-3
    got, clipped = run(model, {"X": x})["Y"], np.abs(made["C"]) < 6
    np.testing.assert_allclose(got[clipped], made["C"][clipped], atol=loose)


def test_recurrent_layers_of_integers(from_text, tmp_path):
    """Both weights of an LSTM see what they see in floats: the input, and the states."""
    own = {
        "q": RNG.integers(-90, 90, (1, 32, 6)).astype(np.int8),
        "r": RNG.integers(-90, 90, (1, 32, 8)).astype(np.int8),
        "s": np.float32(0.01),
    }
    model = from_text(
        f"""{HEAD} g (float[5, B, 6] X) => (float[5, 1, B, 8] Y) {{
        w = DequantizeLinear(q, s) v = DequantizeLinear(r, s) Y = LSTM<hidden_size = 8>(X, w, v) }}""",
        **own,
    )
    weights, _ = find_weights(model, encoded=True)
    assert {weight.name: weight.shape for weight in weights} == {"q": (6, 32), "r": (8, 32)}
    captures, declined = find_captures(model, weights)
    assert not declined
    assert {name: capture.views[0].recurrence.states for name, capture in captures.items()} == {
        "q": False,
        "r": True,
    }
    feeds = [{"X": RNG.standard_normal((5, 9, 6)).astype(np.float32)} for _ in range(3)]
    data = CalibrationData(Samples.of(feeds, "test"), tmp_path)
    result = SparseGPT(sparsity=0.5)(model, PassContext(calibration=data))
    assert {layer.name: layer.zeros_after for layer in result.layers} == {"q": 96, "r": 128}


BAD = {
    "negative": (-0.1, "has a scale that is -0.1, not positive"),
    "zero": (0.0, "has a scale that is 0, not positive"),
    "NaN": (np.nan, "has a scale that is nan, not positive"),
    "Inf": (np.inf, "has a scale that is inf, not positive"),
}


@pytest.mark.parametrize("form", ["QDQ", "QGemm", "by hand, an output", "MatMulNBits", "in blocks"])
@pytest.mark.parametrize("case", BAD)
def test_scales_that_are_no_scales(from_text, form, case):
    value, reason = BAD[case]
    body, tensors = FORMS[form.removesuffix(", an output")]
    scale = np.array(np.broadcast_to(tensors["s"], N) if form.startswith("by hand") else tensors["s"])
    scale.reshape(-1)[3] = value
    model = from_text(
        f"{HEAD} g (float[B, {K}] X) => (float[B, {N}] Y) {{ {body} }}", **tensors | {"s": scale}
    )
    result = Magnitude(sparsity=0.5)(model)
    assert not result.modified
    assert [(place.place, place.reason) for place in result.declined] == [("q", reason)]
    with pytest.raises(UsageError, match=f"targets: 'q' cannot be pruned: it {reason}"):
        Magnitude(sparsity=0.5, targets=("q",))(model)


@pytest.mark.parametrize(
    ("value", "reason"), [(0.5, "has no zero in its codebook"), (np.nan, "has NaN or Inf in its codebook")]
)
def test_codebooks_without_a_zero(from_text, value, reason):
    body, tensors = FORMS["palette"]
    book = np.where(tensors["book"] == 0, np.float32(value), tensors["book"])
    model = from_text(
        f"{HEAD} g (float[B, {K}] X) => (float[B, {N}] Y) {{ {body} }}", **tensors | {"book": book}
    )
    result = Magnitude(sparsity=0.5)(model)
    assert not result.modified
    assert [(place.place, place.reason) for place in result.declined] == [("q", reason)]


def test_an_input_with_several_scales_is_pruned_by_magnitude(from_text, tmp_path):
    """What its integers stand for is not one number: no statistics."""
    model = from_text(
        f"""{HEAD} g (uint8[6, {K}] x) => (float[6, {N}] Y) {{
        i = MatMulInteger(x, q, rows) Y = Cast<to = 1>(i) }}""",
        q=INT8["q"],
        rows=np.arange(6, dtype=np.uint8),
    )
    feeds = [{"x": RNG.integers(0, 256, (6, K)).astype(np.uint8)}]
    data = CalibrationData(Samples.of(feeds, "test"), tmp_path)
    result = SparseGPT(sparsity=0.5)(model, PassContext(calibration=data))
    ((place, reason),) = [(place.place, place.reason) for place in result.declined]
    assert place == "q"
    assert "its input has more than one scale" in reason
    assert np.count_nonzero(only(model).matrix() == 0) >= K * N // 2
