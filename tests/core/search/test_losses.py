"""What a layer loses with zeros: against the definition of the error, computed in full."""

import numpy as np
import pytest

from sparse_onnx.passes.masks import MaskStructure, keep_mask
from sparse_onnx.passes.solvers import InputStatistics
from sparse_onnx.search.losses import layer_losses

_SHARES = (0.5, 0.8, 0.9)


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((48, 48)) @ np.diag(0.9 ** np.arange(48)) @ rng.standard_normal((48, 48))
    X = (rng.standard_normal((600, 48)) @ mixed).astype(np.float32)
    return rng.standard_normal((48, 64)).astype(np.float32), InputStatistics(X.T @ X, count=600), X


def test_without_data_it_is_the_share_of_the_weight(layer):
    W, _, _ = layer
    table = layer_losses(W, None, ("unstructured", "2:4", "block:4x1"), _SHARES)
    assert set(table) == {(s, x) for s in ("unstructured", "block:4x1") for x in _SHARES} | {("2:4", 0.5)}
    for (structure, share), loss in table.items():
        kind = MaskStructure.parse(structure)
        kept = W * keep_mask(np.abs(W), None if kind.kind == "n:m" else share, kind)
        assert loss == pytest.approx(np.linalg.norm(W - kept) ** 2 / np.linalg.norm(W) ** 2, rel=1e-6)


def test_with_data_it_is_between_nothing_and_what_a_mask_by_magnitude_alone_loses(layer):
    W, statistics, X = layer
    table = layer_losses(W, statistics, ("unstructured", "2:4"), _SHARES)
    for (structure, share), loss in table.items():
        kind = MaskStructure.parse(structure)
        kept = W * keep_mask(np.abs(W), None if kind.kind == "n:m" else share, kind)
        lost, energy = (np.square(X @ matrix, dtype=np.float64).sum(axis=0) for matrix in (W - kept, W))
        assert 0 < loss < (lost / energy).mean()


def test_more_zeros_and_stricter_patterns_lose_more(layer):
    W, statistics, _ = layer
    table = layer_losses(W, statistics, ("unstructured", "2:4", "block:8x1"), _SHARES)
    assert table["unstructured", 0.5] < table["unstructured", 0.8] < table["unstructured", 0.9]
    assert table["unstructured", 0.5] < table["2:4", 0.5]
    assert table["unstructured", 0.8] < table["block:8x1", 0.8]


def test_a_pattern_that_does_not_fit_is_left_out(layer):
    W, statistics, _ = layer
    assert set(layer_losses(W[:47], None, ("2:4",), _SHARES)) == set()
    assert layer_losses(np.zeros_like(W), statistics, ("unstructured",), (0.5,)) == {
        ("unstructured", 0.5): 0.0
    }


def test_a_gram_known_in_blocks_or_on_its_diagonal(layer):
    W, statistics, X = layer
    halves = InputStatistics((X[:, :24].T @ X[:, :24], X[:, 24:].T @ X[:, 24:]))
    for known in (halves, InputStatistics(statistics.diagonal)):
        table = layer_losses(W, known, ("unstructured", "block:4x1"), (0.5, 0.8))
        assert all(0 < loss < 1 for loss in table.values())
