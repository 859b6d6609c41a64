"""Outputs with one weight changed, against ONNX Runtime on models that have it changed."""

import numpy as np
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.calibration.alone import errors_alone

RNG = np.random.default_rng(7)
U, V, W = (RNG.standard_normal(shape).astype(np.float32) for shape in ((6, 48), (48, 4), (4, 6)))
BODY = "A = MatMul(X, U) B = Relu(A) Y = MatMul(B, V) Z = Gemm<transB = 1>(Y, W)"
BATCHES = [{"X": RNG.standard_normal((5, 6)).astype(np.float32)} for _ in range(3)]


def build(from_text, outputs="float[N, 4] Y, float[N, 4] Z", **changed):
    tensors = {"U": U, "V": V, "W": np.ascontiguousarray(W[:, :4])} | changed
    return from_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 6] X) => ({outputs}) {{ {BODY} }}', **tensors
    )


def halved(weight):
    return np.asarray(weight.matrix()) * np.float32(0.5)


def test_it_is_the_error_of_the_deepest_output(from_text, run):
    model = build(from_text)
    weights, _ = find_weights(model)
    found = errors_alone(model, weights, Samples.of(BATCHES, "rows"), halved, threads=1)
    reference = [run(model, batch)["Z"] for batch in BATCHES[:2]]
    for name, array in (("U", U), ("V", V), ("W", W[:, :4])):
        other = build(from_text, **{name: np.ascontiguousarray(array * np.float32(0.5))})
        moved = [run(other, batch)["Z"] for batch in BATCHES[:2]]
        expected = np.linalg.norm(np.array(moved) - reference) / np.linalg.norm(reference)
        assert found[name] == pytest.approx(expected, rel=1e-4)
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_what_does_not_change_moves_nothing(from_text):
    model = build(from_text)
    weights, _ = find_weights(model)
    found = errors_alone(model, weights[:1], Samples.of(BATCHES, "rows"), lambda weight: weight.matrix())
    assert found == {"U": 0.0}


def test_nan_is_the_worst(from_text):
    model = build(from_text)
    weights, _ = find_weights(model)
    found = errors_alone(
        model, weights, Samples.of(BATCHES, "rows"), lambda weight: np.full(weight.shape, np.nan, np.float32)
    )
    assert set(found.values()) == {np.inf}
