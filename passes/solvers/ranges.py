"""Which range of an activation 8 bits should cover: from a histogram alone, never from the activations themselves.

A *range* (low, high) always holds 0, so that padding and zeros stay exact. Four choices, pure functions:

==============  ============================================================================================
`minmax`        all that was seen
`percentile`    all but a share of the values at either end
`mse`           least squared error of rounding and clipping; with weighted counts, the least output error
`entropy`       least information lost: Kullback-Leibler divergence of the rounded distribution from the true
==============  ============================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["CALIBRATORS", "LEVELS", "PERCENTILE", "Histogram", "entropy", "minmax", "mse", "percentile"]

LEVELS = 256
"""Integers of 8 bits."""

PERCENTILE = 0.9999
"""Share of the values that lie below the upper end of the range of :func:`percentile`, and above the lower one."""

_SHRINK = np.linspace(1.0, 0.1, 46)  # candidates: parts of the whole range


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Values from ``low`` to ``high`` (low <= 0 <= high, low < high), ``counts`` [bins] of them, or weights, in bins of
    equal width."""

    low: float
    high: float
    counts: np.ndarray

    @property
    def centres(self) -> np.ndarray:
        """The middle of every bin: [bins] float64."""
        step = (self.high - self.low) / len(self.counts)
        return self.low + step * (np.arange(len(self.counts)) + 0.5)


def minmax(histogram: Histogram) -> tuple[float, float]:
    """All that was seen."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, share: float = PERCENTILE) -> tuple[float, float]:
    """Without the ``1 - share`` smallest and as many largest values."""
    total = np.cumsum(histogram.counts, dtype=np.float64)
    if not total[-1] > 0:
        return minmax(histogram)
    step = (histogram.high - histogram.low) / len(total)
    first = int(np.searchsorted(total, (1 - share) * total[-1], side="right"))
    last = int(np.searchsorted(total, share * total[-1], side="left"))
    low, high = histogram.low + first * step, histogram.low + (last + 1) * step
    return _with_zero(low, high, histogram)


def mse(histogram: Histogram) -> tuple[float, float]:
    """The ends, each for itself a part of the whole range, with the least squared error of rounding and clipping."""
    centres, counts = histogram.centres, histogram.counts.astype(np.float64)
    low, high = histogram.low, histogram.high
    for _ in range(2):  # one end after the other; the second round sees the other end's choice
        high = min(
            (histogram.high * part for part in _SHRINK),
            key=lambda end: _squared_error(centres, counts, low, end),
        )
        low = min(
            (histogram.low * part for part in _SHRINK),
            key=lambda end: _squared_error(centres, counts, end, high),
        )
    return _with_zero(low, high, histogram)


def entropy(histogram: Histogram) -> tuple[float, float]:
    """The part of the whole range whose rounded distribution tells most of the true one; what is cut off counts to
    the outermost bins."""
    candidates = [(histogram.low * part, histogram.high * part) for part in _SHRINK]
    low, high = min(candidates, key=lambda ends: _divergence(histogram, *ends))
    return _with_zero(low, high, histogram)


CALIBRATORS: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
"""By the name that options have."""


def _with_zero(low: float, high: float, histogram: Histogram) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if low < high else minmax(histogram)


def _squared_error(centres: np.ndarray, counts: np.ndarray, low: float, high: float) -> float:
    """Clipped values lose what is cut off, all others a twelfth of a step squared."""
    step = (high - low) / (LEVELS - 1)
    if not step > 0:
        return float("inf")
    beyond = centres - np.clip(centres, low, high)
    inside = beyond == 0
    return float(counts @ (beyond**2) + counts @ inside * step**2 / 12)


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    """KL(P, Q): P the counts with those outside moved to the ends, Q the same, spread over each of the levels."""
    centres = histogram.centres
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    if not len(inside):
        return float("inf")
    first, last = int(inside[0]), int(inside[-1])
    kept = histogram.counts[first : last + 1].astype(np.float64)
    true = kept.copy()
    true[0] += histogram.counts[:first].sum()
    true[-1] += histogram.counts[last + 1 :].sum()
    level = np.arange(len(kept)) * LEVELS // len(kept) if len(kept) > LEVELS else np.arange(len(kept))
    present = true > 0
    filled = np.bincount(level, present)
    spread = np.bincount(level, kept)[level] / np.maximum(filled, 1)[level]
    p, q = true[present] / true.sum(), spread[present]
    if not q.sum() > 0:
        return float("inf")
    q = np.maximum(q / q.sum(), 1e-12)  # an end that only holds what was cut off is not to be infinitely bad
    return float(np.sum(p * np.log(p / q)))
