"""The time of a whole model from the times of its layers alone.

    T = rest + dense_factor · Σ dense times of the layers left dense + sparse_factor · Σ sparse times of the others
        + Σ over bits of factor[bits] · Σ times of the layers in forms of so few bits

Alone a layer is slower than inside a model: its input is cold, a runtime's own layout has to be made and undone, and
the call itself costs (which makes the rest smaller, even negative). What lies between the layers is fused, or not,
whatever their zeros. Both are nearly the same for all plans. So a few compiled models, the *anchors*, are timed as a
whole, and the three numbers are those that fit them best: least squares of the relative errors. The more these times
scatter, the less they may say against what is expected beforehand: that both factors are nearly equal, since all layers
were timed in the same minutes, and not far from 1.

Sessions that are made anew differ, even of the same file: by 3 to 6 % on a virtual machine where no other program runs,
by more where some do. :func:`scatter` of repeated timings tells by how much here, and three things follow. What is left
of the anchors' errors is corrected in proportion, between them by their share of zeros, but only the part of it that
scatter does not explain. An anchor's own time is no better known than its repetitions allow. And a prediction is
compared with another timing, which scatters as well: the expected error holds that, too.

A model with weights of few bits is another one: what rounds activations is shared by the layers that read them, and
other operators fall away. The three numbers are those of models in floats. The factor of so many bits is then what the
anchor with these has left.

What a call costs alone is no constant, so a rest below zero says too much about sums that are smaller than those of all
anchors: the line would reach zero. There the time lies between the line and proportion to the sum, and is as unsure.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["ROUGH", "Anchor", "Sums", "TimeModel", "fit", "make_anchor", "scatter"]

_COMMON, _APART = 0.3, 0.05
"""Expected before any anchor is timed: by how much the factors differ from 1, and from each other."""

_SUREST = 0.01  # relative: no time of a whole model is known better
_LEAST = 0.05  # of the sums: a rest below zero must not make a model free
_INTERVAL = 2.2
"""Half a 95 % interval in standard deviations that were estimated from ten repetitions or a few more."""

ROUGH, _FINE = 0.15, 0.05
"""Relative errors to expect at least: of fewer than three anchors, and of more, by which nine of ten models were
predicted that well."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Over the layers of a model, each timed alone: those left dense, those in other forms of floats, and by bits those
    in forms of few. ``zeros`` is the mean share of zeros, by dense time; a layer left dense counts as having none, and
    so does one of few bits."""

    dense_ms: float
    sparse_ms: float
    zeros: float
    encoded_ms: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        return self.dense_ms + self.sparse_ms + sum(self.encoded_ms.values())


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A model that was timed as a whole; ``spread`` is half the interval of its time, relative."""

    sums: Sums
    whole_ms: float
    spread: float


@dataclasses.dataclass(frozen=True)
class TimeModel:
    """See the module's docstring. ``zeros`` (rising) and ``corrections`` have an entry an anchor; ``error`` is the
    relative error to expect of :meth:`milliseconds` against one timing of the model, ``least_ms`` the least sum of an
    anchor's layers. ``encoded`` has the factors of few bits that an anchor has."""

    rest_ms: float
    dense_factor: float
    sparse_factor: float
    zeros: tuple[float, ...]
    corrections: tuple[float, ...]
    error: float
    least_ms: float = 0.0
    encoded: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def factor(self, bits: int) -> float:
        """From the time of a layer alone, not left dense, to what it adds to the whole."""
        return self.encoded.get(bits, self.sparse_factor)

    def milliseconds(self, sums: Sums) -> float:
        """Time of a whole model."""
        return math.sqrt(math.prod(self._ends(sums)))

    def error_beyond(self, sums: Sums) -> float:
        """The relative error that comes on top where ``sums`` are smaller than those of all anchors."""
        line, proportional = self._ends(sums)
        return math.sqrt(max(line / proportional, proportional / line)) - 1

    def _ends(self, sums: Sums) -> tuple[float, float]:
        """The time by the line and by proportion, which are the same up to the least anchor, and with few bits, whose
        anchors lie on the line."""
        line = self._corrected(sums)
        total = sums.dense_ms + sums.sparse_ms
        if self.rest_ms >= 0 or sums.encoded_ms or not 0 < total < self.least_ms:
            return line, line
        scale = self.least_ms / total
        least = Sums(sums.dense_ms * scale, sums.sparse_ms * scale, sums.zeros)
        return line, self._corrected(least) / scale

    def _corrected(self, sums: Sums) -> float:
        return self._fitted(sums) * float(np.interp(sums.zeros, self.zeros, self.corrections))

    def _fitted(self, sums: Sums) -> float:
        whole = self.rest_ms + self.dense_factor * sums.dense_ms + self.sparse_factor * sums.sparse_ms
        whole += sum(self.factor(bits) * ms for bits, ms in sums.encoded_ms.items())
        return max(whole, _LEAST * sums.total_ms)


def scatter(repeated: Sequence[Sequence[float]]) -> float:
    """The relative standard deviation of one measurement, from several things that were each measured repeatedly
    (values above 0); 0 where nothing was measured twice."""
    logs = [np.log(values) for values in repeated if len(values)]
    freedom = sum(len(group) - 1 for group in logs)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in logs)
    return math.sqrt(squares / freedom) if freedom else 0.0


def make_anchor(sums: Sums, dense_ms: float, speedups: Sequence[float], noise: float) -> Anchor:
    """A model whose speedup over one of ``dense_ms`` was measured in several sessions, ``noise`` as :func:`scatter` has
    it. The variance of a median is at most π/2 times that of a mean."""
    error = noise * math.sqrt(math.pi / 2 / len(speedups))
    return Anchor(sums, dense_ms / statistics.median(speedups), _INTERVAL * error)


def fit(anchors: Sequence[Anchor], noise: float = 0.0) -> TimeModel:
    """The model that fits ``anchors``, at least one in floats; ``noise`` is the relative standard deviation of a
    measurement that a prediction will be compared with."""
    few_bits = [anchor for anchor in anchors if anchor.sums.encoded_ms]
    floats = _fit_floats([anchor for anchor in anchors if not anchor.sums.encoded_ms], noise)
    encoded = {bits: _left_for(anchor, floats) for anchor in few_bits for bits in anchor.sums.encoded_ms}
    return dataclasses.replace(floats, encoded=encoded)


def _left_for(anchor: Anchor, floats: TimeModel) -> float:
    """The factor of the few bits of ``anchor``, with which its time is met."""
    sums = anchor.sums
    known = floats.rest_ms + floats.dense_factor * sums.dense_ms + floats.sparse_factor * sums.sparse_ms
    scale = float(np.interp(sums.zeros, floats.zeros, floats.corrections))
    return max(_LEAST, (anchor.whole_ms / scale - known) / sum(sums.encoded_ms.values()))


def _fit_floats(anchors: Sequence[Anchor], noise: float) -> TimeModel:
    anchors = sorted(anchors, key=lambda anchor: anchor.sums.zeros)
    count = len(anchors)
    spread = math.sqrt(sum(anchor.spread**2 for anchor in anchors) / count)
    rows = np.array([[1.0, a.sums.dense_ms, a.sums.sparse_ms] for a in anchors])
    weights = 1 / np.array([a.whole_ms for a in anchors])
    unsure = max(_SUREST, spread / _INTERVAL)
    common, apart = unsure / _COMMON, unsure / _APART
    prior = np.array([[0.0, common, 0.0], [0.0, -apart, apart]])
    system = np.concatenate([rows * weights[:, None], prior])
    wanted = np.concatenate([np.ones(count), [common, 0.0]])
    rest, dense, sparse = map(float, np.linalg.lstsq(system, wanted, rcond=None)[0])
    plain = TimeModel(rest, dense, sparse, (0.0,), (1.0,), 0.0)
    fitted = [anchor.whole_ms / plain.milliseconds(anchor.sums) for anchor in anchors]
    # With factors that are nearly equal, two numbers are free.
    variance = sum((value - 1) ** 2 for value in fitted) / max(1, count - 2)
    unexplained = max(0.0, variance - (spread / _INTERVAL) ** 2)
    share = unexplained / variance if variance else 0.0
    expected = math.hypot(math.sqrt(unexplained) / 2, spread, _INTERVAL * noise)
    return TimeModel(
        rest,
        dense,
        sparse,
        tuple(anchor.sums.zeros for anchor in anchors),
        tuple(1 + share * (value - 1) for value in fitted),
        max(ROUGH if count < 3 else _FINE, expected),
        min(anchor.sums.total_ms for anchor in anchors),
    )
