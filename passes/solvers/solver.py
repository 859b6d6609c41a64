"""What all solvers share: the interface, checks of the input, dead inputs, partial statistics."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.errors import PassError, UsageError
from sparse_onnx.options import check_types, require
from sparse_onnx.passes.solvers.budget import Budget, Scope
from sparse_onnx.passes.solvers.masks import MaskStructure, resolve_sparsity, structure_reason
from sparse_onnx.passes.solvers.scores import wanda_score
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["DampedSolver", "Problem", "Solver", "check_layer", "refuse_structure"]

_FORMS = {"unstructured": "unstructured", "n:m": "N:M", "block": "block:RxC", "channel": "channel"}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One layer: approximate ``target`` T [K, N] float32 by a sparse V, min tr((T - V)' G (T - V)).

    ``gram`` is the whole G [K, K] float32 or float64 (the diagonal [K] alone for a solver that needs no more).
    Rows of T whose input is dead (G_ii = 0) are zero. ``budget`` is how many go and ``scope`` their extent.
    ``initial`` is where to start: bool [K, N], or None.
    """

    target: np.ndarray
    gram: np.ndarray
    budget: Budget
    scope: Scope
    initial: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    """A one-shot pruning method with its options: the fields, validated when built.

    ``name`` is how :data:`~sparse_onnx.passes.solvers.SOLVERS` calls it, ``structures`` are the kinds of mask
    structure that it takes, ``needs`` what it reads of the statistics.
    """

    name: ClassVar[str]
    structures: ClassVar[tuple[str, ...]] = ("unstructured", "n:m", "block", "channel")
    needs: ClassVar[str] = "gram"

    def __post_init__(self) -> None:
        check_types(self)
        self.check()

    def check(self) -> None:  # noqa: B027 - a solver without options has nothing to add
        """Raise a UsageError for options out of range; the types are checked already."""

    @abc.abstractmethod
    def approximate(self, problem: Problem) -> np.ndarray:
        """The pruned weight [K, N]: exactly 0 where pruned."""

    def solve(
        self,
        W: np.ndarray,
        statistics: InputStatistics,
        structure: MaskStructure | None = None,
        sparsity: float | None = None,
        scope: Scope = "layer",
        *,
        target: np.ndarray | None = None,
        initial: np.ndarray | None = None,
    ) -> np.ndarray:
        """Prune W [K, N]: float32 [K, N] with ``round(sparsity * units)`` zero units per ``scope``.

        ``target`` [K, N] replaces W as what is approximated (see :func:`aimed_target`), ``initial`` is a
        mask [K, N] (True: kept) for solvers that start from one. Weights of dead inputs (G_ii = 0) go first,
        even beyond the budget: they change nothing. Equal input gives equal bytes, with as many BLAS threads.

        A Gram that is known in part counts as zero elsewhere. Block by block, each block has the budget that
        ``|w| · sqrt(G_ii)`` gives it within the layer. For a diagonal Gram, and for whole output channels, the
        best choice is known in closed form, and taken: pruning what adds least to the output.

        Raises UsageError for values that are not finite, shapes that do not fit, and structures that the
        method does not take.
        """
        structure = structure or MaskStructure()
        share = resolve_sparsity(sparsity, structure)
        aim = np.asarray(W if target is None else target, np.float32)
        check_layer(W, aim, statistics, initial)
        if structure.kind not in self.structures:
            raise refuse_structure(self.name, structure, self.structures)
        if reason := structure_reason((W.shape[0], W.shape[1]), structure):
            raise UsageError(reason)
        if structure.kind == "channel" and scope == "row":
            raise UsageError("scope row prunes within output channels: channel needs scope layer")
        alive = statistics.diagonal > 0
        if self.needs != "nothing":
            aim = aim * alive[:, None]
        budget = Budget.of((W.shape[0], W.shape[1]), structure, share, scope)
        problem = Problem(aim, statistics.diagonal, budget, scope, initial)
        on_gram = self.needs == "gram"
        result = self._on_gram(problem, statistics.gram) if on_gram else self.approximate(problem)
        if not np.isfinite(result).all():
            raise PassError(f"{self.name} gave NaN or Inf: raise the damping or give more calibration data")
        return np.asarray(result, np.float32)

    def _on_gram(self, problem: Problem, gram: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
        if problem.budget.structure.kind == "channel":
            return _prune(problem, _output_norms(problem.target, gram))
        if isinstance(gram, tuple):
            return self._by_blocks(problem, gram)
        if gram.ndim == 1:
            return _prune(problem, wanda_score(problem.target, gram))
        if not problem.target.any():
            return np.zeros_like(problem.target)
        return self.approximate(dataclasses.replace(problem, gram=gram))

    def _by_blocks(self, problem: Problem, blocks: tuple[np.ndarray, ...]) -> np.ndarray:
        """Each block of input channels by itself, with its share of the zeros."""
        budget, structure = problem.budget, problem.budget.structure
        pruned = ~budget.keep(wanda_score(problem.target, problem.gram))
        parts: list[np.ndarray] = []
        start = 0
        for gram in blocks:
            rows = slice(start, start := start + len(gram))
            part = problem.target[rows]
            shape = part.shape[0], part.shape[1]
            if reason := structure_reason(shape, structure):
                raise UsageError(f"{reason} (a block of the Gram)")
            own = budget
            if structure.kind != "n:m":
                height, width = structure.tile(shape)
                units = pruned[rows][::height, ::width]
                zeros = units.sum(axis=0) if problem.scope == "row" else int(units.sum())
                own = dataclasses.replace(budget, zeros=zeros)
            initial = None if problem.initial is None else problem.initial[rows]
            inner = dataclasses.replace(problem, target=part, budget=own, initial=initial)
            parts.append(self._on_gram(inner, gram))
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DampedSolver(Solver):
    """A method that inverts the Gram: ``damping`` of its mean diagonal is added to the diagonal."""

    damping: float = 0.01

    def check(self) -> None:
        require(self.damping >= 0, "damping", self.damping, "0 or more")


def _prune(problem: Problem, score: np.ndarray) -> np.ndarray:
    return np.where(problem.budget.keep(score), problem.target, np.float32(0))


def _output_norms(target: np.ndarray, gram: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """‖X t‖ of every output channel, for each of its weights: [K, N]."""
    energy, start = np.zeros(target.shape[1]), 0
    for part in gram if isinstance(gram, tuple) else (gram,):
        t = target[start : (start := start + len(part))].astype(np.float64)
        energy += np.einsum("kn,kn->n", t, part @ t if part.ndim == 2 else part[:, None] * t)
    return np.broadcast_to(np.sqrt(np.maximum(energy, 0)), target.shape)


def check_layer(
    W: np.ndarray, aim: np.ndarray, statistics: InputStatistics, mask: np.ndarray | None = None
) -> None:
    """Raise a UsageError unless the arrays of one layer fit each other and are finite."""
    if W.ndim != 2 or not W.size:
        raise UsageError(f"a weight must be [K, N] and not empty, not {list(W.shape)}")
    if aim.shape != W.shape:
        raise UsageError(f"the target must be {list(W.shape)} like the weight, not {list(aim.shape)}")
    if mask is not None and mask.shape != W.shape:
        raise UsageError(f"the mask must be {list(W.shape)} like the weight, not {list(mask.shape)}")
    if statistics.size != len(W):
        raise UsageError(f"the statistics have {statistics.size} input channels, the weight has {len(W)}")
    if not np.isfinite(aim).all():
        raise UsageError("the weight holds NaN or Inf, which no solver can approximate: leave it out")


def refuse_structure(name: str, structure: MaskStructure, allowed: tuple[str, ...]) -> UsageError:
    """The error for a mask structure that a method does not take; it names those that it does."""
    return UsageError(
        f"{name} does not take mask_structure {structure}: use {', '.join(_FORMS[kind] for kind in allowed)}"
    )
