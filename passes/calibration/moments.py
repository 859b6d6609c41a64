"""Sums over calibration tokens: X'X, means and counts, in float64 and in bounded blocks."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator

import numpy as np

from sparse_onnx.errors import DataError
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["BLOCK", "CrossMoments", "Layout", "Moments", "chunks"]

BLOCK = 1024
"""Input channels of one block of a block-diagonal Gram."""

_ROWS = 4096  # tokens multiplied at once: float32 keeps about 6 digits over so many
_STRIP = 256  # rows of a Gram that are moved at a time


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


class _Side:
    """The rows of one matrix less ``shift``, which is near their mean: ``total`` is the sum of what is left."""

    def __init__(self, size: int) -> None:
        self.shift, self.total = np.zeros(size), np.zeros(size)

    def near_mean(self, x: np.ndarray, count: float) -> np.ndarray:
        """A better shift, in the type of ``x``: the mean of the rows so far and of ``x``, which is to be added."""
        with _not_finite():
            mean = (count * self.shift + self.total + x.sum(axis=0, dtype=np.float64)) / (count + len(x))
        return np.where(np.isfinite(mean), mean.astype(x.dtype).astype(np.float64), self.shift)

    def less_shift(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x - self.shift.astype(x.dtype))

    def move(self, shift: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray]:
        """Take another shift; returns the step [size], and the total before."""
        step, before = self.shift - shift, self.total.copy()
        self.shift[:] = shift
        self.total += count * step
        return step, before


def _move(
    products: np.ndarray,
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
    count: float,
) -> None:
    """Make of the sums A'B [a, b] those of (A + left step)'(B + right step); each side is (step, sum of its rows)."""
    (step, total), (other_step, other_total) = left, right
    moved = total + count * step
    for start in range(0, len(products), _STRIP):
        rows = slice(start, start + _STRIP)
        with _not_finite():
            products[rows] += np.outer(step[rows], other_total) + np.outer(moved[rows], other_step)


def _not_finite() -> np.errstate:
    """Inf in the sums is told when they are asked for, and is not to be warned of before."""
    return np.errstate(invalid="ignore")


def _is_due(count: float, more: float) -> bool:
    """Whether the shift is to be chosen anew: as often as the number of tokens has doubled."""
    return math.frexp(count + more)[1] > math.frexp(count)[1] or not count


class Moments:
    """Running sums for inputs of ``size`` channels.

    Products are taken in float32 (float64 for float64 rows) over at most 4096 tokens and added up in float64, of rows
    less a shift near their mean: what does not vary is not in them, and is added in float64. So the result depends on
    the order and size of the batches by rounding only, about 1e-7 of what varies, however large the mean is.
    """

    def __init__(self, size: int, layout: Layout = Layout.FULL) -> None:
        self.size, self.layout = size, layout
        self.count: float = 0
        self._side = _Side(size)
        step = BLOCK if layout is Layout.BLOCKS else size
        self._cuts = [*range(0, size, step), size]
        widths = [end - start for start, end in itertools.pairwise(self._cuts)]
        self._gram: tuple[np.ndarray, ...] = (
            (np.zeros(size),)
            if layout is Layout.DIAGONAL
            else tuple(np.zeros((width, width)) for width in widths)
        )

    def add(self, rows: np.ndarray, weight: float = 1) -> None:
        """Add ``rows`` [n, K] of X; each counts as often as ``weight`` says."""
        for (given,) in chunks(rows):
            if _is_due(self.count, weight * len(given)):
                self._move(self._side.near_mean(given, self.count))
            x = self._side.less_shift(given)
            self._side.total += weight * x.sum(axis=0, dtype=np.float64)
            self.count += weight * len(x)
            if self.layout is Layout.DIAGONAL:
                power = np.einsum("nk,nk->k", x, x, dtype=np.float64)
                np.add(self._gram[0], weight * power, out=self._gram[0])
                continue
            for (start, end), block in zip(itertools.pairwise(self._cuts), self._gram, strict=True):
                part = np.ascontiguousarray(x[:, start:end])
                products = part.T @ part  # one array twice: NumPy computes one triangle only
                if weight != 1:
                    products *= weight
                np.add(block, products, out=block)

    def _move(self, shift: np.ndarray) -> None:
        step, total = self._side.move(shift, self.count)
        if self.count == 0 or not step.any():
            return
        if self.layout is Layout.DIAGONAL:
            with _not_finite():
                self._gram[0][:] += step * total + (total + self.count * step) * step
            return
        for (start, end), block in zip(itertools.pairwise(self._cuts), self._gram, strict=True):
            part = step[start:end], total[start:end]
            _move(block, part, part, self.count)

    def sums(self) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The sum of X [K], and X'X: its blocks, or its diagonal alone. The arrays are those that are added to."""
        self._move(np.zeros(self.size))
        return self._side.total, self._gram

    def arrays(self) -> dict[str, np.ndarray]:
        """What the state is but for the count, by name: those of another one of the same kind may be put into them."""
        blocks = {f"gram.{index}": block for index, block in enumerate(self._gram)}
        return {"shift": self._side.shift, "total": self._side.total, **blocks}

    def merge(self, other: Moments) -> None:
        """Add the sums of ``other``, of the same size and layout."""
        if (self.size, self.layout) != (other.size, other.layout):
            raise ValueError("only sums of equal size and layout can be added")
        other._move(self._side.shift.copy())
        self.count += other.count
        self._side.total += other._side.total
        for mine, theirs in zip(self._gram, other._gram, strict=True):
            mine += theirs

    def statistics(self, name: str) -> InputStatistics:
        """The result; the arrays are those of the sums, so add nothing more. ``name`` is told in an error.

        Raises DataError if there was no token, or if a sum is NaN or Inf.
        """
        if self.count == 0:
            raise DataError(
                f"calibration: no token reached {name}: give more data, or data that is not all padding"
            )
        total, gram = self.sums()
        if not all(np.isfinite(part.sum()) for part in (*gram, total)):
            raise DataError(
                f"calibration: the activations {name} hold NaN or Inf; run the model in float32, or check the data"
            )
        return InputStatistics(
            gram if self.layout is Layout.BLOCKS else gram[0], total / self.count, self.count
        )


class CrossMoments:
    """Running sums of X'Y [``size``, ``width``] and of Y, for rows of X and Y side by side.

    As exact as :class:`Moments`.
    """

    def __init__(self, size: int, width: int) -> None:
        self.count: float = 0
        self._left, self._right = _Side(size), _Side(width)
        self._products = np.zeros((size, width))

    def add(self, x: np.ndarray, y: np.ndarray, weight: float = 1) -> None:
        """Add rows [n, size] of X and [n, width] of Y; each counts as often as ``weight`` says."""
        for some, wanted in chunks(x, y):
            if _is_due(self.count, weight * len(some)):
                self._move(self._left.near_mean(some, self.count), self._right.near_mean(wanted, self.count))
            a, b = self._left.less_shift(some), self._right.less_shift(wanted)
            self._left.total += weight * a.sum(axis=0, dtype=np.float64)
            self._right.total += weight * b.sum(axis=0, dtype=np.float64)
            products = a.T @ b
            if weight != 1:
                products *= weight
            self._products += products
            self.count += weight * len(a)

    def _move(self, left: np.ndarray, right: np.ndarray) -> None:
        steps = self._left.move(left, self.count), self._right.move(right, self.count)
        if self.count:
            _move(self._products, *steps, self.count)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """X'Y and the sum of Y, float64; the arrays are those that are added to."""
        self._move(np.zeros(len(self._left.shift)), np.zeros(len(self._right.shift)))
        return self._products, self._right.total


def chunks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The rows of all arrays [n, ...] side by side, as many as may be multiplied at once.

    As float32, or float64 as they are: half precision would overflow in a sum of squares.
    """
    for start in range(0, len(arrays[0]), _ROWS):
        parts = [array[start : start + _ROWS] for array in arrays]
        yield tuple(
            part if part.dtype == np.float64 else part.astype(np.float32, copy=False) for part in parts
        )
