"""The time of a whole model from the times of its layers alone.

    T = rest + dense_factor · Σ dense times of the layers left dense + sparse_factor · Σ sparse times of the others

Alone a layer is slower than inside a model: its input is cold, a runtime's own layout has to be made and undone, and
the call itself costs. What lies between the layers is fused, or not, whatever their zeros. Both are nearly the same for
all plans. So a few compiled models, the *anchors*, are timed as a whole, and the three numbers are those that fit them
best: least squares of the relative errors, with factors that stay at 1 where the anchors do not say otherwise. What
is left of the errors is corrected in proportion, between the anchors by their share of zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["ROUGH", "Anchor", "Sums", "TimeModel", "fit"]

_PRIOR = 0.01  # an error of 1 in a factor weighs as much as one of 1 % in the time of an anchor
_LEAST = 0.05  # of the sums: a rest below zero must not make a model free
ROUGH, _FINE = 0.15, 0.05
"""Relative errors to expect of fewer than three anchors, and at best: nine of ten models were predicted that well."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Over the layers of a model, each timed alone: those left dense, and the others. ``zeros`` is the mean share of
    zeros, by dense time; a layer left dense counts as having none."""

    dense_ms: float
    sparse_ms: float
    zeros: float


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A model that was timed as a whole; ``spread`` is half the interval of its time, relative."""

    sums: Sums
    whole_ms: float
    spread: float


@dataclasses.dataclass(frozen=True)
class TimeModel:
    """See the module's docstring. ``zeros`` (rising) and ``corrections`` have an entry an anchor; ``error`` is the
    relative error to expect of :meth:`milliseconds`."""

    rest_ms: float
    dense_factor: float
    sparse_factor: float
    zeros: tuple[float, ...]
    corrections: tuple[float, ...]
    error: float

    def milliseconds(self, sums: Sums) -> float:
        """Time of a whole model."""
        return self._fitted(sums) * float(np.interp(sums.zeros, self.zeros, self.corrections))

    def _fitted(self, sums: Sums) -> float:
        whole = self.rest_ms + self.dense_factor * sums.dense_ms + self.sparse_factor * sums.sparse_ms
        return max(whole, _LEAST * (sums.dense_ms + sums.sparse_ms))


def fit(anchors: Sequence[Anchor]) -> TimeModel:
    """The model that fits ``anchors``, at least one."""
    anchors = sorted(anchors, key=lambda anchor: anchor.sums.zeros)
    rows = np.array([[1.0, a.sums.dense_ms, a.sums.sparse_ms] for a in anchors])
    weights = 1 / np.array([a.whole_ms for a in anchors])
    prior = np.array([[0.0, _PRIOR, 0.0], [0.0, 0.0, _PRIOR]])
    system = np.concatenate([rows * weights[:, None], prior])
    wanted = np.concatenate([np.ones(len(anchors)), [_PRIOR, _PRIOR]])
    rest, dense, sparse = map(float, np.linalg.lstsq(system, wanted, rcond=None)[0])
    plain = TimeModel(rest, dense, sparse, (0.0,), (1.0,), 0.0)
    fitted = [anchor.whole_ms / plain.milliseconds(anchor.sums) for anchor in anchors]
    residual = math.sqrt(sum((value - 1) ** 2 for value in fitted) / max(1, len(anchors) - 3))
    spread = sum(anchor.spread for anchor in anchors) / len(anchors)
    return TimeModel(
        rest,
        dense,
        sparse,
        tuple(anchor.sums.zeros for anchor in anchors),
        tuple(fitted),
        ROUGH if len(anchors) < 3 else math.hypot(residual / 2, spread, _FINE),
    )
