"""awq of quant.weight: scales go into what makes the inputs, answers stay, loud inputs are rounded more finely."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model.metadata_keys import RESCALED_KEY
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import CalibrationData, PassContext
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.verification.layer_errors import layer_errors

RNG = np.random.default_rng(11)
K, H, N = 64, 96, 16
X = RNG.standard_normal((256, K)).astype(np.float32)
LOUD = np.exp(1.2 * RNG.standard_normal(K)).astype(np.float32)
TENSORS = {
    "gamma": LOUD,
    "beta": RNG.standard_normal(K).astype(np.float32) * LOUD,
    "U": RNG.standard_normal((K, H)).astype(np.float32),
    "V": RNG.standard_normal((K, H)).astype(np.float32),
    "c": RNG.standard_normal(H).astype(np.float32),
    "W": RNG.standard_normal((N, H)).astype(np.float32),
}
GATED = """M = LayerNormalization(X, gamma, beta) A = MatMul(M, U) G = Sigmoid(A)
           B = MatMul(M, V) D = Add(B, c) S = Mul(G, D) Y = Gemm<transB = 1>(S, W)"""


@pytest.fixture
def make(from_text):
    def built(body=GATED, **changed):
        used = {name: array for name, array in (TENSORS | changed).items() if f"{name}" in body}
        return from_text(
            f'<ir_version: 8, opset_import: ["" : 17]> g (float[B, {K}] X) => (float[B, {N}] Y) {{ {body} }}',
            **used,
        )

    return built


@pytest.fixture
def context(tmp_path):
    batches = [{"X": X[start : start + 32]} for start in range(0, 192, 32)]
    return PassContext(calibration=CalibrationData(Samples.of(batches, "rows"), tmp_path))


def loss(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_scales_move_and_answers_stay(make, context, run):
    """With 8 bits next to nothing is rounded: what is left of the difference would be the scales'."""
    dense, model = make(), make()
    result = QuantizeWeights(method="awq", bits=8, group_size=16, scale_type="float32", storage="float")(
        model, context
    )
    assert loss(run(model, {"X": X[192:]})["Y"], run(dense, {"X": X[192:]})["Y"]) < 0.01
    assert not result.declined
    assert {layer.name for layer in result.layers} == {"U", "V", "W"}
    after = {weight.name: np.array(weight.matrix()) for weight in find_weights(model)[0]}
    ratios = np.median(after["U"] / TENSORS["U"], axis=1)
    gamma = next(node for node in model.graph if node.op_type == "LayerNormalization").inputs[1]
    moved = TENSORS["gamma"] / gamma.const_value.numpy()
    np.testing.assert_allclose(ratios, moved, rtol=0.02)
    assert moved.max() / moved.min() > 2, "loud inputs have larger weights"
    assert np.corrcoef(np.log(moved), np.log(LOUD))[0, 1] > 0.8


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16)])
def test_it_loses_less_than_rounding(make, context, run, bits, group):
    losses, expected = {}, run(make(), {"X": X[192:]})["Y"]
    for method in ("rtn", "awq"):
        model = make()
        QuantizeWeights(method=method, bits=bits, group_size=group)(model, context)
        losses[method] = loss(run(model, {"X": X[192:]})["Y"], expected)
    assert losses["awq"] < 0.85 * losses["rtn"]


def test_zeros_stay_zero(make, context):
    W = np.where(RNG.random((N, H)) < 0.5, 0, TENSORS["W"]).astype(np.float32)
    model = make(W=W)
    (layer,) = (each for each in QuantizeWeights(method="awq")(model, context).layers if each.name == "W")
    assert layer.zeros_before == np.count_nonzero(W == 0) <= layer.zeros_after
    after = {weight.name: weight.matrix() for weight in find_weights(model, encoded=True)[0]}
    assert (after["W"].T[W == 0] == 0).all()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("M = LayerNormalization(X, gamma, beta) A = MatMul(M, U) E = Tanh(A) Y = Gemm<transB = 1>(E, W)", "W"),
        ("A = MatMul(X, U) Y = Gemm<transB = 1>(A, W)", "U"),
        ("""M = LayerNormalization(X, gamma, beta) A = MatMul(M, U) P = ReduceMean<axes = [1]>(M)
            F = Add(A, P) R = Relu(F) Y = Gemm<transB = 1>(R, W)""", "U"),
    ],
)  # fmt: skip
def test_an_input_that_nothing_can_scale_is_rounded_without(make, context, run, body, reason):
    dense, model = make(body), make(body)
    result = QuantizeWeights(method="awq", bits=8, group_size=0)(model, context)
    assert reason in {place.place for place in result.declined}
    assert all("rounded without scales: " in place.reason for place in result.declined)
    assert result.statistics["changed"] == 2
    assert loss(run(model, {"X": X[192:]})["Y"], run(dense, {"X": X[192:]})["Y"]) < 0.03


def test_a_convolution_is_rounded_without_scales(from_text, tmp_path, run):
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[B, 4, 6, 6] X) => (float[B, 8, 6, 6] Y)
              { Y = Conv<pads = [1, 1, 1, 1]>(X, F) }"""
    filters = RNG.standard_normal((8, 4, 3, 3)).astype(np.float32)
    x = RNG.standard_normal((32, 4, 6, 6)).astype(np.float32)
    model, dense = from_text(text, F=filters), from_text(text, F=filters)
    data = CalibrationData(Samples.of([{"X": x}], "images"), tmp_path)
    result = QuantizeWeights(method="awq", bits=8, group_size=0)(model, PassContext(calibration=data))
    assert [place.reason for place in result.declined] == ["rounded without scales: a Conv is no linear"]
    assert loss(run(model, {"X": x})["Y"], run(dense, {"X": x})["Y"]) < 0.01


def test_scaled_weights_are_left_out_of_layer_errors(make, context, tmp_path):
    """Their elements are others by design; on the old inputs they say nothing."""
    dense = make()
    model = dense.clone()
    QuantizeWeights(method="awq", targets=("U", "V"))(model, context)
    marked = {
        value.name for value in model.graph.initializers.values() if RESCALED_KEY in value.metadata_props
    }
    assert marked == {"U", "V"}
    assert layer_errors(dense, model, context.calibration.samples, work=tmp_path) == {}


def test_what_it_cannot_aim_at(make):
    with pytest.raises(UsageError, match="asymmetric calibration cannot aim"):
        QuantizeWeights(method="awq", calibration="asymmetric")
    with pytest.raises(UsageError, match="needs calibration data"):
        QuantizeWeights(method="awq")(make())


def test_the_stand_in_of_a_plan_rounds(make):
    step = QuantizeWeights(method="awq", calibration="sequential").stand_in()
    model = make()
    assert step is not None
    assert {layer.name for layer in step(model).layers} == {"U", "V", "W"}
    assert isinstance(model, ir.Model)
