"""GPTQ (Frantar et al. 2023): round input by input, each error absorbed by the inputs that follow."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.clipping import clipped_grid, whole_grid
from sparse_onnx.passes.solvers.gram import damped, inverse_factor
from sparse_onnx.passes.solvers.grid import Grid, QuantizedMatrix
from sparse_onnx.passes.solvers.quantizer import DampedQuantizer, Rounding, at_nearest

__all__ = ["Feedback", "GptqQuantizer", "fed_back", "feedbacks", "invertible", "with_feedback"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqQuantizer(DampedQuantizer):
    """One sweep with U'U = H⁻¹, U upper triangular, H the damped Gram: w_j -= U_ij · (w_i − w'_i) / U_ii for j > i.

    Grids are chosen before the sweep and stay (static groups), from the whole range or, with ``clip``, by the search
    of :mod:`~sparse_onnx.passes.solvers.clipping` weighted with G_ii. With ``ordered`` the loudest input goes first.
    Zeros of W stay zeros: what comes to them by feedback goes on to those after them, as in SparseGPT.
    """

    name: ClassVar[str] = "gptq"
    clip: bool = False
    ordered: bool = True
    block: int = 64

    def check(self) -> None:
        super().check()
        require(self.block >= 1, "block", self.block, "1 or more")

    def approximate(self, problem: Rounding) -> QuantizedMatrix:
        sweeps = feedbacks(problem, self.damping, self.ordered)

        def solve(part: Rounding) -> QuantizedMatrix:
            W = part.start
            grid = clipped_grid(W, self.grid, part.power) if self.clip else whole_grid(W, self.grid)
            return with_feedback(part, grid, sweeps, self.block)

        return self.in_parts(problem, solve)


@dataclasses.dataclass(frozen=True, eq=False)
class Feedback:
    """Some inputs [b], in the order of the sweep, and U [b, b] float64, upper triangular: U'U = H⁻¹ in that order."""

    inputs: np.ndarray
    factor: np.ndarray


def feedbacks(problem: Rounding, damping: float, ordered: bool = True) -> list[Feedback]:
    """One for each block of the Gram; ``ordered``: the loudest input first."""
    found = []
    for rows, gram in problem.blocks:
        form = invertible(gram, damping)
        power = problem.power[rows]
        order = np.argsort(-power, kind="stable") if ordered else np.arange(len(power))
        found.append(Feedback(rows.start + order, inverse_factor(form[np.ix_(order, order)])))
    return found


def with_feedback(problem: Rounding, grid: Grid, sweeps: list[Feedback], block: int = 64) -> QuantizedMatrix:
    """The start of ``problem`` on ``grid``: rounded to nearest, with error feedback where there is one."""
    if not sweeps:
        return at_nearest(problem, grid)
    scale, low, high = grid.levels(len(problem.start), problem.kept)
    levels = np.empty_like(problem.start)
    for sweep in sweeps:
        i = sweep.inputs
        levels[i] = fed_back(sweep.factor, problem.start[i], scale[i], low[i], high[i], block)
    return grid.at(levels)


def invertible(gram: np.ndarray, damping: float) -> np.ndarray:
    """G, damped, float64 [K, K]; inputs that were never seen get the mean diagonal: they are apart from all others."""
    form = damped(gram, damping)
    dead = form.diagonal() <= 0
    form[dead, dead] = form.diagonal().mean() or 1.0
    return form


def fed_back(
    factor: np.ndarray, W: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray, block: int = 64
) -> np.ndarray:
    """The levels of W [K, N] in one sweep from the first input to the last; float32 [K, N].

    ``factor`` is U [K, K]. ``scale`` [K, N] and the bounds ``low`` and ``high`` of the levels as of
    :meth:`Grid.levels`. Inputs are gathered in blocks of ``block``: what follows a block is moved once, by a product.
    """
    factor = factor.astype(np.float32)
    values, levels = W.copy(), np.empty_like(W)
    for first in range(0, len(W), block):
        last = min(first + block, len(W))
        U = factor[first:last, first:last]
        part, errors = values[first:last], np.empty_like(values[first:last])
        for i in range(last - first):
            row = first + i
            level = levels[row]
            np.rint(part[i] / scale[row], out=level)
            np.maximum(level, low[row], out=level)  # np.clip takes several times as long for one row
            np.minimum(level, high[row], out=level)
            np.subtract(part[i], level * scale[row], out=errors[i])
            errors[i] /= U[i, i]
            part[i + 1 :] -= U[i, i + 1 :, None] * errors[i]
        values[last:] -= factor[first:last, last:].T @ errors
    return levels
