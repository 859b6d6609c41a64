"""quant.static, quant.dynamic and quant.smooth: numbers against NumPy, what ONNX Runtime makes of it, what stays."""

import collections

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import sparse_onnx
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import CalibrationData, PassContext, Pipeline
from sparse_onnx.passes.quantize.dynamic import Dynamic
from sparse_onnx.passes.quantize.layers import quantized_weight
from sparse_onnx.passes.quantize.smooth import Smooth
from sparse_onnx.passes.quantize.static import Static
from sparse_onnx.running.host import has_integer_dot_products

RNG = np.random.default_rng(5)
LOUD = np.exp(1.5 * RNG.standard_normal(64)).astype(np.float32)
LOUD[7] = 60
X = (RNG.standard_normal((96, 64)) * LOUD).astype(np.float32)
U, V = (RNG.standard_normal((64, 32)).astype(np.float32) for _ in range(2))
W = RNG.standard_normal((16, 32)).astype(np.float32)
b = RNG.standard_normal(16).astype(np.float32)

GATED = "A = MatMul(X, U) C = MatMul(X, V) R = Relu(A) S = Mul(R, C) Y = Gemm<transB = 1>(S, W, b)"
NORMED = """N = LayerNormalization(X, gamma, beta) A = MatMul(N, U) D = Add(A, d) R = Relu(D)
            Y = Gemm<transB = 1>(R, W, b)"""
GAMMA, BETA = (RNG.standard_normal(64).astype(np.float32) * LOUD for _ in range(2))
NORM = {"gamma": GAMMA, "beta": BETA, "U": U, "d": RNG.standard_normal(32).astype(np.float32), "W": W, "b": b}


def context(tmp_path, x=X, name="X", size=16):
    batches = [{name: x[start : start + size]} for start in range(0, len(x), size)]
    return PassContext(calibration=CalibrationData(Samples.of(batches, "rows"), tmp_path))


def make(from_text, body, opset=17, inputs="float[B, 64] X", outputs="float[B, 16] Y", **tensors):
    return from_text(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}', **tensors
    )


def gated(from_text, opset=17):
    return make(from_text, GATED, opset, U=U, V=V, W=W, b=b)


def gated_by_numpy(x):
    x = x.astype(np.float64)
    return (np.maximum(x @ U, 0) * (x @ V)) @ W.T + b


def loss(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def optimized(model, tmp_path):
    """How often each operator is in the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(
    "step", [Static(weight_bits=8), Static(weight_bits=7, weights="rtn"), Dynamic(weight_bits=8)]
)
def test_a_network_of_linears_keeps_its_answers_but_for_a_few_percent(from_text, run, tmp_path, step, opset):
    model = gated(from_text, opset)
    result = step(model, context(tmp_path))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert result.statistics["weights"] == 3
    assert result.statistics["inputs"] == 2
    assert loss(run(model, {"X": X})["Y"], gated_by_numpy(X)) < 0.04
    assert not {"U", "V", "W"} & {weight.name for weight in find_weights(model)[0]}, (
        "nothing is float any more"
    )


def test_onnx_runtime_makes_integer_products_of_all_static_linears(from_text, tmp_path):
    model = make(from_text, GATED.replace("R = Relu(A) S = Mul(R, C)", "S = Mul(A, C)"), U=U, V=V, W=W, b=b)
    Static(weight_bits=8)(model, context(tmp_path))
    counts = optimized(model, tmp_path)
    assert counts["QGemm"] + counts["MatMulIntegerToFloat"] == 3
    assert not counts["Gemm"] + counts["MatMul"] + counts["FusedGemm"]


def test_onnx_runtime_makes_integer_products_of_matrices_with_a_bias(from_text, run, tmp_path):
    model = make(from_text, "A = MatMul(X, U) Y = Add(A, d)", outputs="float[B, 32] Y", U=U, d=NORM["d"])
    Static(weight_bits=8)(model, context(tmp_path))
    counts = optimized(model, tmp_path)
    assert counts["QGemm"] == 1
    assert not counts["Gemm"] + counts["MatMul"]
    assert loss(run(model, {"X": X})["Y"], X.astype(np.float64) @ U + NORM["d"]) < 0.03


def test_onnx_runtime_makes_integer_products_of_tokens_too(from_text, tmp_path):
    model = make(
        from_text,
        "A = MatMul(X, U) Y = Add(A, d)",
        inputs="float[B, S, 64] X",
        outputs="float[B, S, 32] Y",
        U=U,
        d=NORM["d"],
    )
    Static(weight_bits=8)(model, context(tmp_path, X.reshape(6, 16, 64), size=2))
    counts = optimized(model, tmp_path)
    assert counts["MatMulIntegerToFloat"] == 1
    assert not counts["Gemm"] + counts["MatMul"]


def test_static_is_what_its_docstring_says(from_text, run, tmp_path):
    model = make(from_text, "Y = MatMul(X, U)", outputs="float[B, 32] Y", U=U)
    Static(weight_bits=8, calibrator="minmax", smooth=False, weights="rtn")(model, context(tmp_path))
    low, high = min(X.min(), 0), max(X.max(), 0)
    step = np.float64(np.float32((np.float64(high) - low) / 255))
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(X / np.float32(step)) + zero, 0, 255) - zero) * step
    weight = quantized_weight(U, 8, None)
    found = run(model, {"X": X})["Y"]
    # Clipping weighs inputs by their power there: the weights may differ by their ranges, not by more.
    assert loss(found, rounded @ weight.matrix().astype(np.float64)) < 0.01


def test_dynamic_is_what_its_docstring_says(from_text, run):
    model = make(from_text, "Y = MatMul(X, U)", outputs="float[B, 32] Y", U=U)
    Dynamic(weight_bits=8)(model)
    x = np.concatenate([X, np.zeros((1, 64), np.float32), np.abs(X[:2]), -np.abs(X[:2])])
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = np.maximum((high - low) / np.float32(255), np.float32(1e-30))
    zero = -np.rint(low / scale)
    integers = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
    weight = quantized_weight(U, 8)
    expected = (
        (integers - zero.astype(np.int64))
        @ weight.integers.astype(np.int64)
        * scale.astype(np.float64)
        * weight.scale
    )
    np.testing.assert_allclose(
        run(model, {"X": x})["Y"], expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max()
    )


def test_evening_channels_out_and_feedback_each_make_the_error_smaller(from_text, run, tmp_path):
    def error(**options):
        model = make(from_text, "Y = MatMul(X, U)", outputs="float[B, 32] Y", U=U)
        Static(weight_bits=8, **options)(model, context(tmp_path))
        return loss(run(model, {"X": X})["Y"] * 1.0, X.astype(np.float64) @ U)

    plain = error(smooth=False, weights="rtn", calibrator="minmax")
    evened = error(weights="rtn", calibrator="minmax")
    assert evened < 0.9 * plain
    assert error(calibrator="minmax") < evened


def test_layers_that_would_lose_too_much_stay(from_text, run, tmp_path):
    model = gated(from_text)
    result = Static(weight_bits=8, max_layer_error=1e-6)(model, context(tmp_path))
    assert not result.modified
    assert {place.place for place in result.declined} == {"U", "V", "W"}
    assert all("max_layer_error" in place.reason for place in result.declined)


def test_what_is_never_seen_stays(from_text, tmp_path):
    model = make(from_text, "Y = MatMul(X, U)", outputs="float[B, 32] Y", U=U)
    result = Static()(model, context(tmp_path, np.zeros_like(X)))
    assert not result.modified
    assert "0 in all calibration data" in result.declined[0].reason


@pytest.mark.parametrize("step", [Static(), Dynamic(), Smooth()])
@pytest.mark.parametrize(
    ("body", "tensors", "reason"),
    [
        ("Y = Gemm<alpha = 0.5>(X, U)", {"U": U}, "alpha"),
        ("Y = MatMul(X, U)", {"U": np.where(np.arange(32) == 3, np.nan, U).astype(np.float32)}, "NaN"),
        ("Z = MatMul(X, Q) Y = MatMul(Z, Q2)", {"Q": U, "Q2": U[:32]}, "ignore"),
    ],
)
def test_what_cannot_be_quantized_is_left_alone(from_text, tmp_path, step, body, tensors, reason):
    model = make(from_text, body, outputs="float[B, 32] Y", **tensors)
    step = type(step)(ignore=("Q", "Q2"))
    result = step(model, context(tmp_path))
    assert not result.modified
    assert reason in result.declined[0].reason


@pytest.mark.parametrize("step", [Static(), Dynamic(), Smooth()])
def test_a_weight_of_layers_with_different_inputs_stays(from_text, tmp_path, step):
    square = RNG.standard_normal((64, 64)).astype(np.float32)
    model = make(from_text, "A = MatMul(X, Q) Y = MatMul(A, Q)", outputs="float[B, 64] Y", Q=square)
    result = step(model, context(tmp_path))
    assert not result.modified
    assert result.declined[0].reason == "shared by layers with different inputs"


def test_static_and_smooth_say_that_they_need_data(from_text):
    for step in (Static(), Smooth()):
        with pytest.raises(UsageError, match="needs calibration data"):
            step(make(from_text, NORMED, **NORM))


@pytest.mark.parametrize("options", [{"weight_bits": 4}, {"max_layer_error": 0.0}, {"calibrator": "best"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        Static(**options)


def test_smooth_changes_no_answer_and_makes_rounding_lose_less(from_text, run, tmp_path):
    x = RNG.standard_normal((96, 64)).astype(np.float32)
    plain = make(from_text, NORMED, **NORM)
    expected = run(plain, {"X": x})["Y"]
    model = make(from_text, NORMED, **NORM)
    result = Smooth()(model, context(tmp_path, x))
    assert result.statistics == {"weights": 2, "inputs": 2}
    np.testing.assert_allclose(
        run(model, {"X": x})["Y"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )
    losses = {}
    for name, given in (("plain", plain), ("smooth", model)):
        Dynamic(weight_bits=8)(given)
        losses[name] = loss(run(given, {"X": x})["Y"], expected)
    assert losses["smooth"] < 0.9 * losses["plain"]


def test_smooth_scales_the_linear_of_a_gated_product(from_text, run, tmp_path):
    model = gated(from_text)
    result = Smooth()(model, context(tmp_path))
    assert result.statistics["inputs"] == 1
    assert {place.place for place in result.declined} == {"U", "V"}, "an input of the model takes no scale"
    np.testing.assert_allclose(
        run(model, {"X": X})["Y"], gated_by_numpy(X), rtol=1e-3, atol=1e-3 * np.abs(gated_by_numpy(X)).max()
    )


@pytest.mark.parametrize(
    "body",
    [
        "N = LayerNormalization(X, gamma, beta) A = MatMul(N, U) M = ReduceMean<axes = [1]>(N) Y = Add(A, M)",
        "N = LayerNormalization(X, gamma, beta) E = Exp(N) Y = MatMul(E, U)",
        "N = LayerNormalization(X, gamma, beta) S = Sigmoid(N) T = Tanh(N) P = Mul(S, T) Y = MatMul(P, U)",
    ],
)
def test_smooth_leaves_alone_what_others_read_or_cannot_be_scaled(from_text, tmp_path, body):
    model = make(from_text, body, outputs="float[B, 32] Y", gamma=GAMMA, beta=BETA, U=U)
    result = Smooth()(model, context(tmp_path))
    assert not result.modified
    assert len(result.declined) == 1


def test_smooth_then_static(from_text, run, tmp_path):
    x = RNG.standard_normal((96, 64)).astype(np.float32)
    model = make(from_text, NORMED, **NORM)
    expected = run(model, {"X": x})["Y"]
    result = Pipeline((Smooth(), Static(weight_bits=8)))(model, context(tmp_path, x))
    assert result.statistics["quant.static.inputs"] == 2
    assert loss(run(model, {"X": x})["Y"], expected) < 0.03


@pytest.mark.parametrize(
    ("features", "exact"),
    [(["avx2"], False), (["avx2", "avx512f", "avx512_vnni"], True), (["asimd"], True), (None, False)],
)
def test_seven_bits_where_products_of_bytes_saturate(features, exact):
    assert has_integer_dot_products(features) is exact
    assert int(np.abs(quantized_weight(U, 7).integers.astype(int)).max()) <= 64


# -- convolutions ------------------------------------------------------------------------------------

IMAGES = RNG.standard_normal((24, 3, 12, 12)).astype(np.float32)
FILTERS = {
    "f": RNG.standard_normal((16, 3, 3, 3)).astype(np.float32) / 5,
    "fb": RNG.standard_normal(16).astype(np.float32),
    "g": RNG.standard_normal((16, 1, 3, 3)).astype(np.float32) / 3,
    "h": RNG.standard_normal((16, 16, 1, 1)).astype(np.float32) / 4,
    "hb": RNG.standard_normal(16).astype(np.float32),
    "W": RNG.standard_normal((10, 16)).astype(np.float32),
    "k": np.array(6, np.float32),
    "z": np.array(0, np.float32),
}
NETWORK = """A = Conv<pads = [1, 1, 1, 1]>(X, f, fb) R = Relu(A)
             B = Conv<group = 16, pads = [1, 1, 1, 1]>(R, g) C = Clip(B, z, k)
             D = Conv(C, h, hb) E = Add(D, R) P = GlobalAveragePool(E) F = Flatten(P) Y = Gemm<transB = 1>(F, W)"""


def network(from_text):
    return make(from_text, NETWORK, inputs="float[B, 3, 12, 12] X", outputs="float[B, 10] Y", **FILTERS)


def test_convolutions_become_integer_convolutions(from_text, run, tmp_path):
    expected = run(network(from_text), {"X": IMAGES})["Y"]
    model = network(from_text)
    result = Static(weight_bits=8)(model, context(tmp_path, IMAGES, size=8))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert result.statistics["weights"] == 4
    assert not result.declined
    counts = optimized(model, tmp_path)
    assert counts["QLinearConv"] == 3
    assert counts["QGemm"] == 1
    assert not counts["Conv"] + counts["FusedConv"] + counts["Gemm"]
    assert loss(run(model, {"X": IMAGES})["Y"], expected) < 0.04


def test_a_convolution_whose_result_is_an_output_stays(from_text, tmp_path):
    model = make(
        from_text,
        "Y = Conv(X, f, fb)",
        inputs="float[B, 3, 12, 12] X",
        outputs="float[B, 16, 10, 10] Y",
        f=FILTERS["f"],
        fb=FILTERS["fb"],
    )
    result = Static()(model, context(tmp_path, IMAGES, size=8))
    assert not result.modified
    assert result.declined[0].reason == "its result is an output of the model"


# -- in a recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize("modifier", ["quant.static", "quant.dynamic"])
def test_a_compilation_writes_integers_and_says_what_was_lost(from_text, tmp_path, modifier):
    x = RNG.standard_normal((96, 64)).astype(np.float32)
    ir.save(make(from_text, NORMED, **NORM), tmp_path / "model.onnx")
    np.savez(tmp_path / "rows.npz", X=x)
    text = f"""
version: 1
stages:
  - {{name: even, modifiers: [quant.smooth: {{}}]}}
  - {{name: quantize, modifiers: [{modifier}: {{weight_bits: 8}}]}}
"""
    result = sparse_onnx.optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        recipe=parse_recipe(text),
        calibration_data=tmp_path / "rows.npz",
        benchmark=False,
    )
    written = onnx.load(result.folder / "model.onnx")
    matrices = {
        tuple(tensor.dims): tensor.data_type for tensor in written.graph.initializer if len(tensor.dims) == 2
    }
    assert set(matrices.values()) == {onnx.TensorProto.INT8}
    verification = result.report["verification"]
    assert 1e-4 < verification["against_original"]["relative_error"] < 0.1
    assert verification["against_pruned_dense"]["relative_error"] < 1e-5
