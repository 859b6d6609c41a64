"""Made layers: correlated inputs with a few loud channels, as real ones have."""

from collections.abc import Callable

import numpy as np
import pytest

from sparse_onnx.passes.solvers import InputStatistics

Layer = tuple[np.ndarray, InputStatistics]


def make_layer(K: int, N: int, seed: int = 0, tokens: int | None = None) -> Layer:
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((K, K)))
    spectrum = np.arange(1, K + 1) ** -0.5
    X = generator.standard_normal((tokens or 16 * K, K)) * spectrum @ basis
    X *= np.exp(generator.normal(0, 0.5, K))
    X[:, generator.integers(0, K, max(1, K // 64))] *= 10
    W = generator.standard_normal((K, N)) / np.maximum(np.sqrt((X**2).mean(axis=0))[:, None], 1e-6) ** 0.5
    return W.astype(np.float32), InputStatistics(X.T @ X, X.mean(axis=0), len(X))


@pytest.fixture
def layer() -> Callable[..., Layer]:
    return make_layer
