"""GPTQ (Frantar et al. 2023): round input by input, each error absorbed by the inputs that follow."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.clipping import clipped_grid, whole_grid
from sparse_onnx.passes.solvers.gram import damped, inverse_factor
from sparse_onnx.passes.solvers.grid import QuantizedMatrix
from sparse_onnx.passes.solvers.quantizer import DampedQuantizer, Rounding

__all__ = ["GptqQuantizer", "fed_back", "invertible"]


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
        W, power = problem.start, problem.power
        grid = clipped_grid(W, self.grid, power) if self.clip else whole_grid(W, self.grid)
        scale, low, high = grid.levels(len(W), problem.kept)
        levels = np.clip(np.rint(W / scale), low, high)
        for rows, gram in problem.blocks:
            form = invertible(gram, self.damping)
            order = np.argsort(-power[rows], kind="stable") if self.ordered else np.arange(len(form))
            factor = inverse_factor(form[np.ix_(order, order)])
            some = (part[rows][order] for part in (W, scale, low, high))
            levels[rows.start + order] = fed_back(factor, *some, self.block)
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
            np.clip(level, low[row], high[row], out=level)
            np.subtract(part[i], level * scale[row], out=errors[i])
            errors[i] /= U[i, i]
            part[i + 1 :] -= U[i, i + 1 :, None] * errors[i]
        values[last:] -= factor[first:last, last:].T @ errors
    return levels
