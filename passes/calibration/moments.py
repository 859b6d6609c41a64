"""Sums over calibration tokens: X'X, means and counts, in float64 and in bounded blocks."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["BLOCK", "Layout", "Moments", "chunks"]

BLOCK = 1024
"""Input channels of one block of a block-diagonal Gram."""

_ROWS = 4096  # tokens multiplied at once: float32 keeps about 6 digits over so many


class Layout(enum.StrEnum):
    """How much of X'X [K, K] is kept: all, square blocks of :data:`BLOCK` on the diagonal, or the diagonal."""

    FULL = "full"
    BLOCKS = "block-diagonal"
    DIAGONAL = "diagonal"

    def nbytes(self, size: int) -> int:
        """Bytes of a Gram of ``size`` channels in float64."""
        if self is Layout.DIAGONAL:
            return 8 * size
        whole, rest = divmod(size, size if self is Layout.FULL else min(size, BLOCK))
        block = size if self is Layout.FULL else min(size, BLOCK)
        return 8 * (whole * block**2 + rest**2)


class Moments:
    """Running sums for inputs of ``size`` channels.

    Products are taken in float32 (float64 for float64 rows) over at most 4096 tokens and added up in float64, so the
    result depends on the order and size of the batches by rounding only, about 1e-7.
    """

    def __init__(self, size: int, layout: Layout = Layout.FULL) -> None:
        self.size, self.layout = size, layout
        self.count = 0
        self.total = np.zeros(size)
        step = BLOCK if layout is Layout.BLOCKS else size
        self._cuts = [*range(0, size, step), size]
        widths = [end - start for start, end in itertools.pairwise(self._cuts)]
        self.gram: tuple[np.ndarray, ...] = (
            (np.zeros(size),)
            if layout is Layout.DIAGONAL
            else tuple(np.zeros((width, width)) for width in widths)
        )

    def add(self, rows: np.ndarray) -> None:
        """Add ``rows`` [n, K] of X."""
        for (x,) in chunks(rows):
            self.total += x.sum(axis=0, dtype=np.float64)
            if self.layout is Layout.DIAGONAL:
                np.add(self.gram[0], np.einsum("nk,nk->k", x, x, dtype=np.float64), out=self.gram[0])
                continue
            for (start, end), block in zip(itertools.pairwise(self._cuts), self.gram, strict=True):
                part = np.ascontiguousarray(x[:, start:end])
                np.add(block, part.T @ part, out=block)  # one array twice: NumPy computes one triangle only
        self.count += len(rows)

    def merge(self, other: Moments) -> None:
        """Add the sums of ``other``, of the same size and layout."""
        if (self.size, self.layout) != (other.size, other.layout):
            raise ValueError("only sums of equal size and layout can be added")
        self.count += other.count
        self.total += other.total
        for mine, theirs in zip(self.gram, other.gram, strict=True):
            mine += theirs

    def statistics(self, name: str) -> InputStatistics:
        """The result; the arrays are those of the sums, so add nothing more. ``name`` is told in an error.

        Raises UsageError if there was no token, or if a sum is NaN or Inf.
        """
        if self.count == 0:
            raise UsageError(
                f"calibration: no token reached {name}: give more data, or data that is not all padding"
            )
        if not all(np.isfinite(part.sum()) for part in (*self.gram, self.total)):
            raise UsageError(
                f"calibration: the activations {name} hold NaN or Inf; run the model in float32, or check the data"
            )
        gram = self.gram if self.layout is Layout.BLOCKS else self.gram[0]
        return InputStatistics(gram, self.total / self.count, self.count)


def chunks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The rows of all arrays [n, ...] side by side, as many as may be multiplied at once.

    As float32, or float64 as they are: half precision would overflow in a sum of squares.
    """
    for start in range(0, len(arrays[0]), _ROWS):
        parts = [array[start : start + _ROWS] for array in arrays]
        yield tuple(
            part if part.dtype == np.float64 else part.astype(np.float32, copy=False) for part in parts
        )
