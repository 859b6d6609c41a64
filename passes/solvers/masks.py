"""Which weights to keep: mask structures and exact selection. Pure functions on arrays; W is always [K, N].

K input channels (the axis that is summed over) by N output channels. A torch weight is the transpose, so a
``block:RxC``, R output channels by C input channels, covers C rows and R columns of W.

The k smallest scores are found by counting, not sorting: for finite non-negative floats the order of the
values is the order of their bits as an unsigned integer, so one histogram for each 16 bits (two for float32)
gives the k-th smallest exactly. Arrays are streamed, so a selection over a whole model needs the memory of
one layer.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

from sparse_onnx.errors import UsageError

__all__ = [
    "Cut",
    "MaskStructure",
    "Norm",
    "below",
    "expand",
    "find_cut",
    "keep_mask",
    "obeys",
    "resolve_sparsity",
    "structure_reason",
    "unit_scores",
]

Norm = Literal["l1", "l2"]

_FORMS = "unstructured, N:M (keep N of M, 1 <= N < M), RxC or block:RxC (R, C >= 1), channel"
_DIGIT = 16
_STEP = 1 << 20  # elements that are looked at together: bounds the scratch


@dataclasses.dataclass(frozen=True)
class MaskStructure:
    """The shape of what is pruned together.

    ``size`` is (N, M) for "n:m": N of M consecutive input channels of one output channel are kept; it is
    (R, C) for "block": R output by C input channels are kept or pruned as one. "channel" prunes whole output
    channels.
    """

    kind: Literal["unstructured", "n:m", "block", "channel"] = "unstructured"
    size: tuple[int, int] = (1, 1)

    @staticmethod
    def parse(text: str) -> MaskStructure:
        """Read ``unstructured``, ``2:4``, ``block:4x1`` or, for short, ``4x1``, or ``channel``; UsageError with the
        nearest form."""
        if text == "unstructured":
            return MaskStructure()
        if text == "channel":
            return MaskStructure("channel")
        if match := re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text):
            keep, group = int(match[1]), int(match[2])
            if keep < group:
                return MaskStructure("n:m", (keep, group))
        if match := re.fullmatch(r"(?:block:)?([1-9]\d{0,3})x([1-9]\d{0,3})", text):
            return MaskStructure("block", (int(match[1]), int(match[2])))
        raise UsageError(
            f"mask_structure {text[:40]!r} is not known; the nearest is {_nearest(text)!r} ({_FORMS})"
        )

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.size[0]}:{self.size[1]}"
        return f"block:{self.size[0]}x{self.size[1]}" if self.kind == "block" else self.kind

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of W [K, N] = ``shape`` that are pruned as one unit (not for N:M)."""
        if self.kind == "channel":
            return shape[0], 1
        return self.size[1], self.size[0]


def _nearest(text: str) -> str:
    """The valid form that ``text`` most likely meant."""
    text = text.strip().lower()[:40]
    numbers = [int(digits[:4]) for digits in re.findall(r"\d+", text)]
    if len(numbers) == 2 and "x" in text:
        return f"block:{max(numbers[0], 1)}x{max(numbers[1], 1)}"
    if len(numbers) == 2:
        group = max(*numbers, 2)
        return f"{min(max(min(numbers), 1), group - 1)}:{group}"
    return difflib.get_close_matches(text, ("unstructured", "channel", "2:4", "block:4x1"), n=1, cutoff=0.0)[
        0
    ]


def resolve_sparsity(sparsity: float | None, structure: MaskStructure) -> float:
    """The share of zeros to reach, in [0, 1). N:M implies it, and any other value is a UsageError."""
    if structure.kind == "n:m":
        implied = 1 - structure.size[0] / structure.size[1]
        if sparsity is not None and abs(sparsity - implied) > 5e-4:  # 0.667 is meant as 2/3
            raise UsageError(
                f"mask_structure {structure} implies sparsity {implied:g}, not {sparsity:g}: leave one out"
            )
        return implied
    if sparsity is None:
        raise UsageError(f"mask_structure {structure} needs a sparsity")
    if not 0 <= sparsity < 1:
        meant = f" ({sparsity:g} % are {sparsity / 100:g})" if 1 < sparsity < 100 else ""
        raise UsageError(f"sparsity must be at least 0 and below 1, not {sparsity:g}{meant}")
    return sparsity


def structure_reason(shape: tuple[int, int], structure: MaskStructure) -> str | None:
    """Why a weight W [K, N] = ``shape`` cannot take ``structure``, or None if it can."""
    K, N = shape
    if structure.kind == "n:m" and K % structure.size[1]:
        return f"{K} input channels are not a multiple of {structure.size[1]}, as {structure} needs"
    if structure.kind == "block" and (N % structure.size[0] or K % structure.size[1]):
        return f"{N} output by {K} input channels cannot be cut into {structure}"
    return None


def keep_mask(
    score: np.ndarray, sparsity: float | None, structure: MaskStructure | None = None, norm: Norm = "l2"
) -> np.ndarray:
    """Where to keep the weights whose importance is ``score`` [K, N] (float, sign ignored): bool [K, N].

    The lowest ``round(sparsity * units)`` units go, a unit being an element, a block (scored by its ``norm``)
    or an output channel; of N:M groups the N highest stay. Among equals the first in flat [K, N] order goes.
    NaN and Inf are always kept, even if an N:M group then has more than N (see :func:`obeys`).

    Raises UsageError for a wrong ``sparsity``, ValueError if the shape cannot take the structure.
    """
    structure = structure or MaskStructure()
    share = resolve_sparsity(sparsity, structure)
    if reason := structure_reason((score.shape[0], score.shape[1]), structure):
        raise ValueError(reason)
    if structure.kind == "n:m":
        return _keep_n_of_m(score, *structure.size)
    units = unit_scores(score, structure, norm)
    cut = find_cut(lambda: (units,), round(share * units.size), _key_dtype(units))
    pruned, _ = below(units, cut)
    return expand(~pruned, structure, (score.shape[0], score.shape[1]))


def unit_scores(score: np.ndarray, structure: MaskStructure, norm: Norm = "l2") -> np.ndarray:
    """One score for each unit of ``structure``: [K / rows, N / columns].

    Norms are summed in float64 and given as float32, or as float64 where ``score`` is.
    """
    K, N = score.shape
    rows, columns = structure.tile((K, N))
    if (rows, columns) == (1, 1):
        return score
    units = np.abs(np.asarray(score, _key_dtype(score))).reshape(K // rows, rows, N // columns, columns)
    with np.errstate(over="ignore"):  # what overflows ranks as Inf: kept
        if norm == "l1":
            sums = np.einsum("irjc->ij", units, dtype=np.float64)
        else:
            sums = np.sqrt(np.einsum("irjc,irjc->ij", units, units, dtype=np.float64))
        return np.asarray(sums, units.dtype)


def expand(units: np.ndarray, structure: MaskStructure, shape: tuple[int, int]) -> np.ndarray:
    """Undo :func:`unit_scores`: give every element of W [K, N] = ``shape`` the value of its unit."""
    rows, columns = structure.tile(shape)
    if (rows, columns) == (1, 1):
        return units
    return units.repeat(rows, axis=0).repeat(columns, axis=1)


def obeys(mask: np.ndarray, structure: MaskStructure) -> bool:
    """Whether ``mask`` [K, N] (not zero: kept) keeps at most N in every group of an N:M structure."""
    keep, group = structure.size
    K, N = mask.shape
    return bool((np.count_nonzero(mask.reshape(K // group, group, N), axis=1) <= keep).all())


def _keep_n_of_m(score: np.ndarray, keep: int, group: int) -> np.ndarray:
    """Rank by comparing all pairs of a group: exact, and faster than sorting short rows."""
    K, N = score.shape
    dtype = _key_dtype(score)
    keys = _keys(score, dtype).reshape(K // group, group, N)
    rank = np.zeros(keys.shape, np.min_scalar_type(group))
    for first in range(group):
        for second in range(first + 1, group):
            first_wins = keys[:, first] > keys[:, second]
            rank[:, first] += first_wins
            rank[:, second] += ~first_wins
    return ((rank >= group - keep) | (keys >= _infinity(dtype))).reshape(K, N)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Names the k smallest scores of a sequence: those whose bits, as ``dtype``, are below ``key``, and the
    first ``ties`` of those equal to it."""

    key: int
    ties: int
    dtype: type[np.float32 | np.float64] = np.float32


def _key_dtype(score: np.ndarray) -> type[np.float32 | np.float64]:
    return np.float64 if score.dtype.itemsize > 4 else np.float32


def _keys(score: np.ndarray, dtype: type[np.float32 | np.float64]) -> np.ndarray:
    """Unsigned integers in the order of |score|, NaN and Inf last."""
    if dtype is np.float64:
        return np.bitwise_and(np.asarray(score, dtype).view(np.uint64), np.uint64((1 << 63) - 1))
    return np.bitwise_and(np.asarray(score, dtype).view(np.uint32), np.uint32((1 << 31) - 1))


def _infinity(dtype: type[np.float32 | np.float64]) -> int:
    return int(_keys(np.array(np.inf), dtype))


def find_cut(
    scores: Callable[[], Iterable[np.ndarray]], count: int, dtype: type[np.float32 | np.float64] = np.float32
) -> Cut:
    """The cut below which the ``count`` smallest finite |scores| lie, over all arrays and in their order.

    ``scores()`` must yield the same arrays each time it is called: twice for float32 and four times for
    float64, the ``dtype`` in which they are compared. With fewer finite scores than ``count``, all lie below.
    """
    bits = np.dtype(dtype).itemsize * 8
    prefix, left = 0, count
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        leading = shift + _DIGIT == bits
        histogram = np.zeros(1 << _DIGIT, np.int64)
        for keys in _key_chunks(scores(), dtype):
            wanted = keys if leading else keys[keys >> (shift + _DIGIT) == prefix]
            digits = (wanted >> shift & ((1 << _DIGIT) - 1)).astype(np.intp)
            histogram += np.bincount(digits, minlength=histogram.size)
        if leading:
            left = min(left, int(histogram[: _infinity(dtype) >> shift].sum()))
        if left <= 0:
            return Cut(0, 0, dtype)
        reached = np.cumsum(histogram)
        digit = int(np.searchsorted(reached, left))
        left -= int(reached[digit] - histogram[digit])
        prefix = prefix << _DIGIT | digit
    return Cut(prefix, left, dtype)


def _key_chunks(scores: Iterable[np.ndarray], dtype: type[np.float32 | np.float64]) -> Iterator[np.ndarray]:
    for score in scores:
        flat = score.reshape(-1)
        for start in range(0, flat.size, _STEP):
            yield _keys(flat[start : start + _STEP], dtype)


def below(score: np.ndarray, cut: Cut) -> tuple[np.ndarray, Cut]:
    """Where ``score`` lies below ``cut`` (bool, same shape), and the cut for the next array."""
    keys = _keys(score, cut.dtype).reshape(-1)
    mask = keys < cut.key
    ties = np.flatnonzero(keys == cut.key)[: cut.ties]
    mask[ties] = True
    return mask.reshape(score.shape), dataclasses.replace(cut, ties=cut.ties - ties.size)
