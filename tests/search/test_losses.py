"""What a layer loses with zeros: against the definition, and from measured errors."""

import numpy as np
import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.sensitivity import Loss
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


def test_with_data_it_is_the_square_of_the_measured_error():
    known = Loss(2.0, {"unstructured": (0.5, 0.9)}, {"unstructured": (0.1, 0.3)})
    loss = measured_losses({"a": known})
    assert loss("a", Choice(0.7)) == pytest.approx((2.0 * 0.2) ** 2)
    assert loss("a", Choice(0.5, "2:4")) is None
    assert loss("b", Choice(0.5)) is None
