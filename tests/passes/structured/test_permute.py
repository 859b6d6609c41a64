"""Hidden neurons in another order: the same answers, more kept by N:M, and every reason to leave them."""

import numpy as np
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model.metadata_keys import REWRITTEN_KEY
from sparse_onnx.passes.base import CalibrationData, PassContext, Pipeline
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot_methods import SparseGPT
from sparse_onnx.passes.structured.permute import PermuteNeurons
from sparse_onnx.verification.layer_errors import layer_errors

D, H = 16, 48
RNG = np.random.default_rng(5)
LOUD = np.exp(1.5 * np.repeat(RNG.standard_normal(H // 4), 4)).astype(np.float32)  # alike in every group
TENSORS = {
    "w1": RNG.standard_normal((D, H)).astype(np.float32) * LOUD,
    "w1t": (RNG.standard_normal((D, H)) * LOUD).T.astype(np.float32).copy(),
    "w3": RNG.standard_normal((D, H)).astype(np.float32),
    "b1": RNG.standard_normal(H).astype(np.float32) * LOUD,
    "w2": RNG.standard_normal((H, D)).astype(np.float32),
    "b2": RNG.standard_normal(D).astype(np.float32),
    "root2": np.float32(np.sqrt(2)),
    "one": np.float32(1),
    "half": np.float32(0.5),
}
BODIES = {
    "relu": "A = Gemm(X, w1, b1) U = Relu(A) Y = Gemm(U, w2, b2)",
    "gelu erf": """M = MatMul(X, w1) A = Add(M, b1) s = Div(A, root2) e = Erf(s) f = Add(e, one)
                   g = Mul(A, f) U = Mul(g, half) V = MatMul(U, w2) Y = Add(V, b2)""",
    "gated": "A = MatMul(X, w1) G = MatMul(X, w3) s = Sigmoid(A) t = Mul(A, s) U = Mul(t, G) Y = MatMul(U, w2)",
    "transposed": "A = Gemm<transB = 1>(X, w1t, b1) U = Relu(A) Y = MatMul(U, w2)",
}
ROWS = RNG.standard_normal((300, D)).astype(np.float32)


@pytest.fixture
def build(from_text):
    def build(body, inputs=f"float[B, {D}] X", outputs=f"float[B, {D}] Y", **changed):
        words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
        used = {name: array for name, array in (TENSORS | changed).items() if name in words}
        head = '<ir_version: 10, opset_import: ["" : 22]>'
        return from_text(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}", **used)

    return build


@pytest.fixture
def context(tmp_path):
    samples = Samples.of([{"X": ROWS[start : start + 50]} for start in range(0, 200, 50)], "rows")
    return PassContext(calibration=CalibrationData(samples, tmp_path))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_answers_stay_and_more_is_kept(build, context, run, body):
    dense, model = build(body), build(body)
    expected = run(dense, {"X": ROWS[200:]})["Y"]
    result = PermuteNeurons()(model, context)
    assert result.statistics == {"places": 1, "neurons": H}
    assert not result.declined
    close(run(model, {"X": ROWS[200:]})["Y"], expected)
    w2 = model.graph.initializers["w2"].const_value.numpy()
    order = [int(np.flatnonzero((TENSORS["w2"] == row).all(axis=1))[0]) for row in w2]
    assert sorted(order) == list(range(H))
    assert order != list(range(H))
    losses = []
    for each in (dense, model):
        SparseGPT(mask_structure="2:4", targets=("w2",))(each, context)
        losses.append(np.linalg.norm(run(each, {"X": ROWS[200:]})["Y"] - expected))
    assert losses[1] < 0.9 * losses[0]


def test_a_weight_that_others_read_stays_theirs(build, context, run):
    body = "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) Z = MatMul(X, w1)"
    outputs = f"float[B, {D}] Y, float[B, {H}] Z"
    dense, model = build(body, outputs=outputs), build(body, outputs=outputs)
    PermuteNeurons()(model, context)
    before, after = (run(each, {"X": ROWS[200:]}) for each in (dense, model))
    for name in before:
        close(after[name], before[name])


@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        (BODIES["relu"], {"ignore": ("w2",)}, "listed in ignore"),
        (BODIES["relu"], {"mask_structure": "2:5"}, "48 input channels are not a multiple of 5"),
    ],
)
def test_places_that_are_left_alone(build, context, body, options, reason):
    result = PermuteNeurons(**options)(build(body), context)
    assert not result.modified
    assert any(reason in place.reason for place in result.declined), result.declined


def test_neurons_that_are_given_out_stay(build, context, run):
    body = "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2)"
    model = build(body, outputs=f"float[B, {D}] Y, float[B, {H}] U")
    result = PermuteNeurons()(model, context)
    assert not result.modified
    assert [place.place for place in result.declined] == ["w2"]


def test_nan_and_what_lies_well_already(build, context):
    broken = TENSORS["w2"].copy()
    broken[3, 3] = np.nan
    result = PermuteNeurons()(build(BODIES["relu"], w2=broken), context)
    assert [place.reason for place in result.declined] == ["holds NaN or Inf"]
    model = build(BODIES["relu"])
    assert PermuteNeurons()(model, context).modified
    again = [PermuteNeurons()(model, context) for _ in range(6)][-1]
    assert [place.reason for place in again.declined] == ["its inputs lie well as they are"]


def test_errors_of_layers_leave_it_out(build, context, tmp_path):
    dense = build(BODIES["relu"])
    model = dense.clone()
    PermuteNeurons()(model, context)
    marked = {
        value.name for value in model.graph.initializers.values() if REWRITTEN_KEY in value.metadata_props
    }
    assert marked >= {"w1", "w2"}
    assert layer_errors(dense, model, context.calibration.samples, work=tmp_path) == {}


def test_options_and_order():
    for structure in ("block:1x4", "unstructured"):
        with pytest.raises(UsageError, match="mask_structure must be N:M"):
            PermuteNeurons(mask_structure=structure)
    Pipeline((PermuteNeurons(), Magnitude(mask_structure="2:4")))
    with pytest.raises(UsageError, match="cannot run after"):
        Pipeline((Magnitude(mask_structure="2:4"), PermuteNeurons()))
    assert PermuteNeurons().stand_in() is None
