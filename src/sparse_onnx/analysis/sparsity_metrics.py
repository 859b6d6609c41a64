"""How the non-zeros of a weight lie: what a sparse format can gain from them. Pure functions on W [K, N].

K input channels by N output channels. A weight is zero if it equals 0 (-0.0 does, NaN does not). A block RxC covers R
output by C input channels, as in ``mask_structure``; blocks at the end of an axis that is no multiple are smaller.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = [
    "BLOCKS",
    "Blocks",
    "Metrics",
    "Spread",
    "clustering_index",
    "count_blocks",
    "count_neighbours",
    "measure",
    "row_spread",
]

BLOCKS = {"1x4": (1, 4), "4x1": (4, 1), "8x1": (8, 1), "4x4": (4, 4)}
"""(R, C) of the blocks that are counted, by name."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """``total`` blocks of one size, ``occupied`` of them with a non-zero; these cover ``covered`` weights, of which
    ``nonzeros`` are not zero."""

    total: int
    occupied: int
    covered: int
    nonzeros: int

    @property
    def occupancy(self) -> float:
        """Share of blocks with any non-zero; 0 where there is no block."""
        return self.occupied / self.total if self.total else 0.0

    @property
    def fill(self) -> float:
        """Share of non-zeros within the occupied blocks: 1 if the zeros are whole blocks; 0 where all are empty."""
        return self.nonzeros / self.covered if self.covered else 0.0

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks(
            self.total + other.total,
            self.occupied + other.occupied,
            self.covered + other.covered,
            self.nonzeros + other.nonzeros,
        )


@dataclasses.dataclass(frozen=True)
class Spread:
    """Share of non-zeros in each of ``count`` output channels: their mean, and the sum of squares around it."""

    count: int
    mean: float
    squares: float

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation / mean; 0 where all is zero. In one weight it is that of the
        number of non-zeros in each output channel."""
        return math.sqrt(self.squares / self.count) / self.mean if self.mean else 0.0

    def __add__(self, other: Spread) -> Spread:
        """Both together (Chan, Golub & LeVeque 1983: no difference of large sums is taken)."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        return Spread(
            count,
            self.mean + step * other.count / count,
            self.squares + other.squares + step**2 * self.count * other.count / count,
        )


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What is known of the zeros of one weight, or with ``+`` of several together.

    ``neighbours`` counts, for every non-zero, the non-zeros among the 8 weights around it. ``dense_bytes`` is the
    weight as it is stored without a sparse format, ``sparse_bytes`` with values, offsets, counts and rows.
    """

    size: int
    nonzeros: int
    neighbours: int
    spread: Spread
    blocks: Mapping[str, Blocks]
    dense_bytes: int
    sparse_bytes: int

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(
            self.size + other.size,
            self.nonzeros + other.nonzeros,
            self.neighbours + other.neighbours,
            self.spread + other.spread,
            {name: blocks + other.blocks[name] for name, blocks in self.blocks.items()},
            self.dense_bytes + other.dense_bytes,
            self.sparse_bytes + other.sparse_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``sparsity`` (share of zeros), ``row_variation`` (of :class:`Spread`), ``clustering_index`` (mean
        number of non-zero neighbours of a non-zero, 0 to 8), ``blocks`` (of each size ``occupancy`` and ``fill``),
        ``dense_bytes``, ``sparse_bytes`` and ``bits_per_weight`` (of the sparse form, zeros counted as weights)."""
        return {
            "sparsity": 1 - self.nonzeros / self.size if self.size else 0.0,
            "row_variation": self.spread.variation,
            "clustering_index": self.neighbours / self.nonzeros if self.nonzeros else 0.0,
            "blocks": {
                name: {"occupancy": blocks.occupancy, "fill": blocks.fill}
                for name, blocks in self.blocks.items()
            },
            "dense_bytes": self.dense_bytes,
            "sparse_bytes": self.sparse_bytes,
            "bits_per_weight": 8 * self.sparse_bytes / self.size if self.size else 0.0,
        }


def measure(W: np.ndarray, dense_bytes: int, sparse_bytes: int) -> Metrics:
    """Everything about ``W`` [K, N], of any type; the sizes are those that its two forms have in a file."""
    mask = _nonzero(W)
    return Metrics(
        mask.size,
        int(np.count_nonzero(mask)),
        count_neighbours(mask),
        row_spread(mask),
        {name: count_blocks(mask, *size) for name, size in BLOCKS.items()},
        dense_bytes,
        sparse_bytes,
    )


def row_spread(W: np.ndarray) -> Spread:
    """How unevenly the non-zeros of ``W`` [K, N] are spread over its output channels."""
    mask = _nonzero(W)
    K, N = mask.shape
    if not mask.size:
        return Spread(0, 0.0, 0.0)
    shares = np.count_nonzero(mask, axis=0) / K
    mean = float(shares.mean())
    return Spread(N, mean, float(np.square(shares - mean).sum()))


def count_blocks(W: np.ndarray, R: int, C: int) -> Blocks:
    """The blocks of R output by C input channels that ``W`` [K, N] is cut into from its first channel on."""
    mask = _nonzero(W)
    K, N = mask.shape
    if not mask.size:
        return Blocks(0, 0, 0, 0)
    occupied = _any_of(_any_of(mask, C).T, R).T
    rows, columns = occupied.shape
    heights = C * np.count_nonzero(occupied, axis=0) - (C * rows - K) * occupied[-1]
    widths = np.full(columns, R)
    widths[-1] -= R * columns - N
    return Blocks(
        occupied.size,
        int(np.count_nonzero(occupied)),
        int(heights @ widths),
        int(np.count_nonzero(mask)),
    )


def _any_of(mask: np.ndarray, step: int) -> np.ndarray:
    """Whether any of ``step`` rows is true, from the first row on."""
    result = mask[::step].copy(order="K")
    for offset in range(1, step):
        part = mask[offset::step]
        result[: len(part)] |= part
    return result


def count_neighbours(W: np.ndarray) -> int:
    """Pairs (non-zero, non-zero among the 8 weights around it) of ``W`` [K, N]."""
    mask = _nonzero(W)
    pairs = (
        mask[1:] & mask[:-1],
        mask[:, 1:] & mask[:, :-1],
        mask[1:, 1:] & mask[:-1, :-1],
        mask[1:, :-1] & mask[:-1, 1:],
    )
    return 2 * sum(int(np.count_nonzero(pair)) for pair in pairs)


def clustering_index(W: np.ndarray) -> float:
    """Mean number of non-zeros among the 8 weights around a non-zero of ``W`` [K, N]: 8 · density where they lie at
    random in a large weight, more where they lie together; 0 if there is none. diag(1, 2, 3) has 4/3."""
    nonzeros = int(np.count_nonzero(_nonzero(W)))
    return count_neighbours(W) / nonzeros if nonzeros else 0.0


def _nonzero(W: np.ndarray) -> np.ndarray:
    return W if W.dtype == np.bool_ else W != 0
