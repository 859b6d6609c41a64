"""Importance of every weight: scores [K, N], of which the lowest go. Any scope can rank them, a model's too.

All are scaled so that the L2 norm of a block's scores is the block's score.
"""

from __future__ import annotations

import numpy as np

__all__ = ["magnitude_score", "obd_score", "random_score", "ria_score", "taylor_score", "wanda_score"]


def magnitude_score(W: np.ndarray) -> np.ndarray:
    """|w|."""
    return np.asarray(np.abs(W))


def random_score(W: np.ndarray, seed: int) -> np.ndarray:
    """Uniform in (0, 1], float32; 0 where the weight is 0, so that zeros go first."""
    scores = 1 - np.random.default_rng(seed).random(W.shape, np.float32)
    return np.asarray(scores * (W != 0), np.float32)


def wanda_score(W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """|w| · ‖x_i‖₂ (Sun et al. 2023), ``diagonal`` [K] being ‖x_i‖² = G_ii: float32 [K, N]."""
    return np.asarray(np.abs(W) * np.sqrt(diagonal).astype(np.float32)[:, None])


def ria_score(W: np.ndarray, diagonal: np.ndarray, exponent: float = 0.5) -> np.ndarray:
    """(|w| / Σ of its input + |w| / Σ of its output) · ‖x_i‖₂^exponent (Zhang et al. 2024): float32 [K, N]."""
    size = np.abs(W).astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    relative = size / np.maximum(size.sum(axis=1, keepdims=True), tiny)
    relative += size / np.maximum(size.sum(axis=0, keepdims=True), tiny)
    return np.asarray(relative * (np.maximum(diagonal, 0) ** (exponent / 2)).astype(np.float32)[:, None])


def taylor_score(W: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """|w · g|, the first-order change of the loss (Molchanov et al. 2017), g [K, N] being its gradient."""
    return np.asarray(np.abs(W * gradient))


def obd_score(W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """sqrt(½ G_ii w²): the square root of LeCun's OBD saliency with the layer's own curvature, float32.

    It ranks as :func:`wanda_score` does; the root makes L2 norms of blocks add up savings.
    """
    return wanda_score(W, 0.5 * diagonal)
