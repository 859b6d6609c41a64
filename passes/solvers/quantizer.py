"""What all solvers of weight quantization share: the interface, checks of the input, partial statistics."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.options import check_types, require
from sparse_onnx.passes.solvers.grid import Grid, GridOptions, QuantizedMatrix
from sparse_onnx.passes.solvers.parallel import cuts, together
from sparse_onnx.passes.solvers.solver import check_layer
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["DampedQuantizer", "Rounding", "WeightQuantizer", "at_nearest", "output_errors"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rounding:
    """One layer: min over V on a grid of tr((T - V)' G (T - V)).

    ``target`` T [K, N] float32; ``start`` [K, N] float32 are the values to round: T, or where zeros must stay, the
    pruned weight; ``kept`` bool [K, N]: where V may differ from 0, or None for everywhere. ``gram`` G as statistics
    have it, or None where there is no data.
    """

    target: np.ndarray
    start: np.ndarray
    kept: np.ndarray | None
    gram: np.ndarray | tuple[np.ndarray, ...] | None

    @property
    def power(self) -> np.ndarray:
        """G_ii of every input, [K] float64; 1 without data."""
        if self.gram is None:
            return np.ones(len(self.target))
        return InputStatistics(self.gram).diagonal

    def of(self, outputs: slice) -> Rounding:
        """The same problem for some output channels."""
        target, start = (np.ascontiguousarray(each[:, outputs]) for each in (self.target, self.start))
        kept = None if self.kept is None else np.ascontiguousarray(self.kept[:, outputs])
        return Rounding(target, start, kept, self.gram)

    @property
    def blocks(self) -> list[tuple[slice, np.ndarray]]:
        """The square blocks [b, b] of G with their inputs; none where only the diagonal is known."""
        if self.gram is None or (isinstance(self.gram, np.ndarray) and self.gram.ndim == 1):
            return []
        blocks = self.gram if isinstance(self.gram, tuple) else (self.gram,)
        ends = np.cumsum([len(block) for block in blocks])
        return [
            (slice(int(end) - len(block), int(end)), block) for end, block in zip(ends, blocks, strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightQuantizer(abc.ABC):
    """A method of weight quantization with its options: the fields, validated when built.

    ``grid`` is what the integers may be; outputs are solved side by side on ``threads``. ``name`` is how
    :data:`~sparse_onnx.passes.solvers.QUANTIZERS` calls the method, ``needs`` what it reads of the statistics:
    "nothing", "diagonal" or "gram".
    """

    name: ClassVar[str]
    needs: ClassVar[str] = "gram"
    grid: GridOptions = dataclasses.field(default_factory=GridOptions)
    threads: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        require(self.threads >= 1, "threads", self.threads, "1 or more")
        self.check()

    def check(self) -> None:  # noqa: B027 - a method without options has nothing to add
        """Raise a UsageError for options out of range; the types are checked already."""

    @abc.abstractmethod
    def approximate(self, problem: Rounding) -> QuantizedMatrix:
        """The integers for one layer; those outside ``problem.kept`` are zero points."""

    def in_parts(
        self,
        problem: Rounding,
        solve: Callable[[Rounding], QuantizedMatrix],
        parts: int | None = None,
    ) -> QuantizedMatrix:
        """What ``solve`` gives for the outputs of ``problem``, cut into ``parts``; None: one for each thread."""
        found = [problem.of(some) for some in cuts(problem.start.shape[1], parts or self.threads)]
        return QuantizedMatrix.side_by_side(
            together([functools.partial(solve, part) for part in found], self.threads)
        )

    def solve(
        self, W: np.ndarray, statistics: InputStatistics | None = None, *, target: np.ndarray | None = None
    ) -> QuantizedMatrix:
        """Integers for W [K, N], float and finite. Exact zeros of W stay exact zeros.

        ``target`` [K, N] replaces W as what is approximated (see :func:`aimed_target`; for a pruned W it may be
        dense). Where a bias will take up the shift of the mean, give the statistics of :func:`centred_gram`, as for
        pruning. ``statistics`` may be left out where ``needs`` is "nothing". Inputs that calibration never saw
        (G_ii = 0) are rounded to nearest. What a partial Gram leaves out counts as zero. Equal input gives equal
        bytes, with as many threads.

        Raises UsageError for values that are not finite, shapes that do not fit, missing statistics, and weights too
        large for the type of the scales.
        """
        aim = np.asarray(W if target is None else target, np.float32)
        if statistics is None and self.needs != "nothing":
            raise UsageError(f"{self.name} needs calibration data: give some, or use hqq or rtn")
        known = statistics if statistics is not None else InputStatistics(np.ones(len(W)))
        check_layer(W, aim, known)
        start = np.asarray(W, np.float32)
        if not np.isfinite(start).all():
            raise UsageError("the weight holds NaN or Inf, which no grid has: leave it out")
        kept = start != 0
        everywhere = bool(kept.all())
        return self.approximate(
            Rounding(
                target=aim,
                start=aim if everywhere else start,
                kept=None if everywhere else kept,
                gram=None if statistics is None else statistics.gram,
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DampedQuantizer(WeightQuantizer):
    """A method that inverts the Gram: ``damping`` of its mean diagonal is added to the diagonal."""

    damping: float = 0.01

    def check(self) -> None:
        require(self.damping >= 0, "damping", self.damping, "0 or more")


def at_nearest(problem: Rounding, grid: Grid) -> QuantizedMatrix:
    """Every value of ``problem`` at the nearest point of ``grid`` that it may have."""
    scale, low, high = grid.levels(len(problem.start), problem.kept)
    return grid.at(np.clip(np.rint(problem.start / scale), low, high))


def output_errors(problem: Rounding, V: np.ndarray) -> np.ndarray:
    """‖X (t − v)‖² of every output channel, [N] float64, of V [K, N] against the target."""
    change = problem.target.astype(np.float64) - V
    if not problem.blocks:
        return np.asarray(problem.power @ change**2)
    errors = np.zeros(change.shape[1])
    for rows, gram in problem.blocks:
        part = change[rows]
        errors += np.einsum("kn,kn->n", part, gram.astype(np.float64, copy=False) @ part)
    return errors
