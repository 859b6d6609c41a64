"""How much of the differences between input channels the weights should carry: SmoothQuant (Xiao et al. 2023), with its
exponent chosen by the error of the layer's output, of activations and weights together.

X W = (X / s)(s W): with s [K] large where the channel is loud, 8 bits cover the activations better and the weights
worse. Rounding errors count as independent, so both are known from the channels' ranges and powers alone: no data is
kept and nothing is run.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparse_onnx.passes.solvers.ranges import LEVELS

__all__ = ["ChannelRange", "rounding_errors", "smoothing_scale"]

_EXPONENTS = np.arange(0.0, 1.01, 0.1)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelRange:
    """Of every input channel the least and the largest value, and the mean square: [K] each, float64."""

    low: np.ndarray
    high: np.ndarray
    power: np.ndarray


def rounding_errors(
    W: np.ndarray, channels: ChannelRange, scale: np.ndarray, weight_bits: int = 8
) -> tuple[float, float]:
    """Mean square of the output error for a token, summed over outputs: of activations in 8 bits with one range, and of
    weights [K, N] in ``weight_bits`` with one scale an output, both after smoothing with ``scale`` [K]."""
    low, high = channels.low / scale, channels.high / scale
    step = (max(high.max(), 0.0) - min(low.min(), 0.0)) / (LEVELS - 1)
    wide = W.astype(np.float64) * scale[:, None]
    steps = np.abs(wide).max(axis=0) / (2 ** (weight_bits - 1) - 1)
    of_activations = step**2 / 12 * float((wide**2).sum())
    return of_activations, float((steps**2).sum()) / 12 * float((channels.power / scale**2).sum())


def smoothing_scale(W: np.ndarray, channels: ChannelRange, weight_bits: int = 8) -> np.ndarray:
    """The best s [K] float32 of those of the form a^α and a^α / w^(1-α), α from 0 to 1, a and w [K] being the largest
    magnitudes of the channel's activations and weights; geometric mean 1. Ones where nothing is better."""
    loudest = np.maximum(np.maximum(-channels.low, channels.high), 0.0)
    weights = np.abs(W.astype(np.float64)).max(axis=1)
    loudest = np.maximum(loudest, 1e-5 * max(float(loudest.max()), 1e-30))
    weights = np.maximum(weights, 1e-5 * max(float(weights.max()), 1e-30))
    candidates = [
        loudest**exponent / weights ** (balance * (1 - exponent))
        for balance in (0, 1)
        for exponent in _EXPONENTS
    ]
    scales = [(scale / np.exp(np.log(scale).mean())).astype(np.float32) for scale in candidates]
    return min(
        scales, key=lambda scale: sum(rounding_errors(W, channels, scale.astype(np.float64), weight_bits))
    )
