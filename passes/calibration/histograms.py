"""Histograms of every channel of an activation, added up batch by batch: ranges without keeping activations."""

from __future__ import annotations

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers.ranges import Histogram
from sparse_onnx.passes.solvers.smoothing import ChannelRange

__all__ = ["ChannelHistograms"]

_BINS = 512  # of a channel
_TENSOR_BINS = 2048


class ChannelHistograms:
    """Of ``size`` channels: counts in bins from -2^e to 2^e, e of each channel as small as its values allow. Where a
    larger value comes, pairs of bins are joined, so that the result depends on the values and not on their order.

    Zeros are not counted: every range holds them exactly, and behind a Relu they would hide all else. ``low``, ``high``
    and the power are of all rows; ``stride`` of them apart, rows are counted in the bins.
    """

    def __init__(self, size: int, stride: int = 1) -> None:
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.count = 0
        self._stride = stride
        self._power = np.zeros(size)
        self._total = np.zeros(size)
        self._reach = np.zeros(size)
        self._counts = np.zeros((size, _BINS), np.int64)

    def add(self, rows: np.ndarray) -> None:
        """Add ``rows`` [n, K] of any float type."""
        if not len(rows):
            return
        x = rows.astype(np.float32, copy=False)
        low, high = x.min(axis=0), x.max(axis=0)
        if not (np.isfinite(low) & np.isfinite(high)).all():
            raise UsageError(
                "calibration: an activation holds NaN or Inf; run the model in float32, or check the data"
            )
        np.minimum(self.low, low, out=self.low)
        np.maximum(self.high, high, out=self.high)
        self._power += np.einsum("nk,nk->k", x, x, dtype=np.float64)
        self._total += x.sum(axis=0, dtype=np.float64)
        first = -self.count % self._stride
        self.count += len(x)
        self._grow(np.maximum(-low, high).astype(np.float64))
        some = x[first :: self._stride]
        position = (some / np.where(self._reach > 0, self._reach, 1).astype(np.float32) + 1) * (_BINS / 2)
        index = np.minimum(position.astype(np.int64), _BINS - 1) + np.arange(x.shape[1]) * _BINS
        counted = np.bincount(index.reshape(-1), minlength=self._counts.size).reshape(self._counts.shape)
        counted[:, _BINS // 2] -= np.count_nonzero(some == 0, axis=0)
        self._counts += counted

    def _grow(self, largest: np.ndarray) -> None:
        needed = np.zeros_like(largest)
        some = largest > 0
        needed[some] = 2.0 ** np.ceil(np.log2(largest[some]))
        fresh = (self._reach == 0) & some
        self._reach[fresh] = needed[fresh]  # of zeros alone nothing has been counted
        while (small := np.flatnonzero(self._reach < needed)).size:
            joined = self._counts[small].reshape(len(small), _BINS // 2, 2).sum(axis=2)
            self._counts[small] = 0
            self._counts[small, _BINS // 4 : 3 * _BINS // 4] = joined
            self._reach[small] *= 2

    @property
    def mean(self) -> np.ndarray:
        """Of every channel, [K] float64."""
        return self._total / max(self.count, 1)

    @property
    def channels(self) -> ChannelRange:
        """Range and power of every channel. Raises UsageError if there was no row."""
        if not self.count:
            raise UsageError(
                "calibration: no token reached a layer: give more data, or data that is not all padding"
            )
        return ChannelRange(
            self.low.astype(np.float64), self.high.astype(np.float64), self._power / self.count
        )

    def histogram(self, scale: np.ndarray, weight: np.ndarray) -> Histogram | None:
        """Of all channels together, each divided by ``scale`` [K], its counts multiplied by ``weight`` [K]; None where
        all values are 0."""
        low = min(float((self.low / scale).min()), 0.0)
        high = max(float((self.high / scale).max()), 0.0)
        if not low < high:
            return None
        centres = (np.arange(_BINS) + 0.5) * (2 / _BINS) - 1
        values = np.clip(centres * (self._reach / scale)[:, None], low, high)
        counts, _ = np.histogram(values, _TENSOR_BINS, (low, high), weights=self._counts * weight[:, None])
        return Histogram(low, high, counts)
