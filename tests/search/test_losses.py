"""What a layer loses with zeros: against the definition, and from measured errors."""

import numpy as np
import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.sensitivity import Loss
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.solvers import GridOptions, RtnQuantizer
from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask
from sparse_onnx.search.losses import measured_losses, weight_losses


class _Weight:
    """What is asked of a weight."""

    def __init__(self, name, W):
        self.name, self.shape, self._W = name, W.shape, W

    def matrix(self):
        return self._W

    def release(self):
        pass


def test_without_data_it_is_the_share_of_the_weight():
    W = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    loss = weight_losses([_Weight("a", W)], ("unstructured", "2:4", "block:4x1"), [].append)
    for structure, share in (("unstructured", 0.5), ("unstructured", 0.9), ("2:4", 0.5), ("block:4x1", 0.8)):
        kind = MaskStructure.parse(structure)
        kept = W * keep_mask(np.abs(W), None if kind.kind == "n:m" else share, kind)
        expected = np.linalg.norm(W - kept) ** 2 / np.linalg.norm(W) ** 2
        assert loss("a", Choice(share, structure)) == pytest.approx(expected, rel=1e-5)
    between = loss("a", Choice(0.55))
    assert loss("a", Choice(0.5)) < between < loss("a", Choice(0.6))


def test_a_pattern_that_does_not_fit_and_a_weight_of_zeros():
    weights = [_Weight("odd", np.ones((47, 64), np.float32)), _Weight("zeros", np.zeros((8, 8), np.float32))]
    loss = weight_losses(weights, ("unstructured", "2:4"), [].append)
    assert loss("odd", Choice(0.5, "2:4")) is None
    assert loss("zeros", Choice(0.5)) == 0


def test_without_data_bits_lose_what_rounding_to_the_nearest_does(from_text):
    rng = np.random.default_rng(1)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 64] X) => (float[B, 8] Y)
           { H = MatMul(X, W) Y = MatMul(H, V) }""",
        W=rng.standard_normal((64, 32)).astype(np.float32),
        V=(1e6 * rng.standard_normal((32, 8))).astype(np.float32),
    )
    weights = find_weights(model)[0]
    step = QuantizeWeights(bits=4, symmetric=False)
    loss = weight_losses(weights, ("unstructured",), [].append, step, (8, 4))
    W = weights[0].matrix()
    for bits, grid in (
        (8, GridOptions(8, 0, True, "float16")),
        (4, GridOptions(4, 64, False, "float16")),
    ):
        after = RtnQuantizer(grid=grid, clip=True).solve(W).matrix().astype(np.float64)
        expected = np.linalg.norm(W - after) ** 2 / np.linalg.norm(W) ** 2
        assert loss("W", Choice(bits=bits)) == pytest.approx(expected, rel=1e-5)
        assert loss("W", Choice(0.5, bits=bits)) == pytest.approx(loss("W", Choice(0.5)) + expected)
        assert loss("W", Choice(bits=bits, activations=8)) > expected
    assert loss("W", Choice(bits=3)) is None, "not looked at"
    assert loss("V", Choice(bits=4)) is None, "its 32 inputs are fewer than a group"
    assert loss("V", Choice(0.5, "2:4", bits=8)) is None


def test_without_a_quantizer_no_bits_are_known():
    loss = weight_losses([_Weight("a", np.ones((8, 8), np.float32))], ("unstructured",), [].append)
    assert loss("a", Choice(bits=8)) is None


def test_with_data_it_is_the_square_of_the_measured_error():
    known = Loss(2.0, {"unstructured": (0.5, 0.9)}, {"unstructured": (0.1, 0.3)})
    loss = measured_losses({"a": known})
    assert loss("a", Choice(0.7)) == pytest.approx((2.0 * 0.2) ** 2)
    assert loss("a", Choice(0.5, "2:4")) is None
    assert loss("b", Choice(0.5)) is None
    assert loss("a", Choice(bits=8)) is None
    few = Loss(2.0, known.sparsities, known.errors, (0.0, 0.5), {8: (0.2, 0.1)}, 0.3)
    loss = measured_losses({"a": few})
    assert loss("a", Choice(bits=8)) == pytest.approx(0.4**2)
    assert loss("a", Choice(0.5, bits=8, activations=8)) == pytest.approx(4 * (0.1**2 + 0.1**2 + 0.3**2))
