"""Zeros and integers chosen in one sweep, as SparseGPT does it: what solving them one behind the other is held to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.passes.prune.oneshot import OneShot
from sparse_onnx.passes.solvers import GridOptions, SparseGPTSolver
from sparse_onnx.passes.solvers.clipping import whole_grid
from sparse_onnx.passes.solvers.gptq import invertible
from sparse_onnx.passes.solvers.gram import inverse_factor
from sparse_onnx.passes.solvers.masks import keep_mask
from sparse_onnx.passes.solvers.solver import Problem

__all__ = ["SparseGPTJoint"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPTJoint(OneShot):
    """SparseGPT that rounds what it keeps in the same sweep (Frantar & Alistarh 2023, section 3.5).

    Grids hold the whole range of each group of the dense weight. Weights stay floats, on the points of their grids.
    """

    name: ClassVar[str] = "prune.sparsegpt-joint"
    bits: int = 4
    group_size: int = 0
    symmetric: bool = True

    @property
    def solver(self) -> type[SparseGPTSolver]:
        return _on(GridOptions(self.bits, self.group_size, self.symmetric, "float16"))


def _on(grid: GridOptions) -> type[SparseGPTSolver]:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Joint(SparseGPTSolver):
        def approximate(self, problem: Problem) -> np.ndarray:
            return _one_sweep(problem, grid, self.damping, self.block)

    return Joint


def _one_sweep(problem: Problem, options: GridOptions, damping: float, block: int) -> np.ndarray:
    W, structure = problem.target.copy(), problem.budget.structure
    group = structure.size[1] if structure.kind == "n:m" else 0
    share = np.sum(problem.budget.zeros) / W.size  # 0 for N:M, whose groups decide
    scale, low, high = whole_grid(W, options).levels(len(W))
    factor = inverse_factor(invertible(problem.gram, damping)).astype(np.float32)
    for first in range(0, len(W), block):
        last = min(first + block, len(W))
        U, part = factor[first:last, first:last], W[first:last]
        errors = np.empty_like(part)
        score = np.abs(part) / U.diagonal()[:, None]
        kept = score > np.quantile(score, share)
        for i in range(last - first):
            if group and i % group == 0:
                some = slice(i, i + group)
                score = np.abs(part[some]) / U.diagonal()[some, None]
                kept[some] = keep_mask(score, None, structure)
            row = first + i
            value = np.clip(np.rint(part[i] / scale[row]), low[row], high[row]) * kept[i] * scale[row]
            errors[i] = (part[i] - value) / U[i, i]
            part[i + 1 :] -= U[i, i + 1 :, None] * errors[i]
            part[i] = value
        W[last:] -= factor[first:last, last:].T @ errors
    return W
