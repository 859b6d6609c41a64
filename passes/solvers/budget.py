"""Which weights stay, within a budget: the projection that every solver repeats."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from sparse_onnx.passes.solvers.masks import MaskStructure, expand, keep_mask, unit_scores

__all__ = ["Budget", "Scope", "smallest"]

Scope = Literal["row", "layer"]


def smallest(score: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Where the ``count`` smallest entries are: bool, shape of ``score`` (finite, not negative).

    An int counts over the whole array; an array [N] counts in each column of ``score`` [K, N]. Among equals
    the first in order goes.
    """
    if isinstance(count, np.ndarray):
        return _smallest_of_columns(score, count)
    flat = score.reshape(-1)
    if count <= 0 or count >= flat.size:
        return np.full(score.shape, count > 0)
    limit = np.partition(flat, count - 1)[count - 1]
    chosen = flat <= limit
    if surplus := int(np.count_nonzero(chosen)) - count:
        chosen[np.flatnonzero(flat == limit)[-surplus:]] = False
    return np.asarray(chosen.reshape(score.shape))


def _smallest_of_columns(score: np.ndarray, count: np.ndarray) -> np.ndarray:
    if (count == count[0]).all() and 0 < count[0] < len(score):
        limit = np.partition(score, count[0] - 1, axis=0)[count[0] - 1]
    else:
        ordered = np.sort(score, axis=0)
        limit = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None], axis=0)[0]
    chosen = score <= limit
    chosen[:, count <= 0] = False
    for column in np.flatnonzero(np.count_nonzero(chosen, axis=0) > count):
        equal = np.flatnonzero(score[:, column] == limit[column])
        chosen[equal[int(count[column]) - np.count_nonzero(chosen[:, column]) :], column] = False
    return np.asarray(chosen)


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
    """A budget of weights W [K, N]: how many units of ``structure`` must be zero.

    ``zeros`` counts elements, blocks or channels: an int for the layer, or an array [units of N] for each
    output channel (scope "row"). N:M needs none.
    """

    structure: MaskStructure
    zeros: int | np.ndarray = 0

    @staticmethod
    def of(shape: tuple[int, int], structure: MaskStructure, sparsity: float, scope: Scope) -> Budget:
        """The lowest ``round(sparsity * units)`` of the layer or of each output channel."""
        if structure.kind == "n:m":
            return Budget(structure)
        rows, columns = structure.tile(shape)
        units = shape[0] // rows, shape[1] // columns
        if scope == "row":
            return Budget(structure, np.full(units[1], round(sparsity * units[0])))
        return Budget(structure, round(sparsity * units[0] * units[1]))

    def keep(self, score: np.ndarray) -> np.ndarray:
        """Where to keep the weights of importance ``score`` [K, N] (sign ignored; a block has its L2 norm)."""
        if self.structure.kind == "n:m":
            return keep_mask(score, None, self.structure)
        units = np.abs(unit_scores(score, self.structure))
        return expand(~smallest(units, self.zeros), self.structure, (score.shape[0], score.shape[1]))

    def relaxed(self, share: float) -> Budget:
        """The budget with only ``share`` (0 to 1) of the zeros, rounded; N:M keeps more of each group."""
        if self.structure.kind == "n:m":
            keep, group = self.structure.size
            kept = group - round(share * (group - keep))
            return Budget(MaskStructure("n:m", (kept, group))) if kept < group else Budget(MaskStructure())
        if isinstance(self.zeros, np.ndarray):
            return dataclasses.replace(self, zeros=np.rint(self.zeros * share).astype(int))
        return dataclasses.replace(self, zeros=round(self.zeros * share))
