"""Lasso (Tibshirani 1996) by FISTA (Beck & Teboulle 2009), then least squares without the penalty."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.gram import unit_form
from sparse_onnx.passes.solvers.iht import lipschitz
from sparse_onnx.passes.solvers.refit import conjugate_gradients
from sparse_onnx.passes.solvers.solver import DampedSolver, Problem

__all__ = ["Lasso"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lasso(DampedSolver):
    """min ½ tr((T - V)' H (T - V)) + λ‖V‖₁, λ such that the budget is met; the mask is then refitted (debias).

    λ follows the iteration: in each of ``steps`` steps it is what just removes the budget, for the layer or
    for each output channel.
    """

    name: ClassVar[str] = "lasso"
    structures: ClassVar[tuple[str, ...]] = ("unstructured",)
    steps: int = 100

    def check(self) -> None:
        super().check()
        require(self.steps >= 1, "steps", self.steps, "1 or more")

    def approximate(self, problem: Problem) -> np.ndarray:
        form = unit_form(problem.gram, self.damping)
        T = form.scale * problem.target
        step = 1 / lipschitz(form.matrix)
        pull = form.matrix @ T
        axis = 0 if problem.scope == "row" else None
        V = ahead = T
        keep, pace = np.ones(T.shape, bool), 1.0
        for _ in range(self.steps):
            full = ahead + step * (pull - form.matrix @ ahead)
            keep = problem.budget.keep(full)
            size = np.abs(full)
            penalty = np.max(size, axis=axis, keepdims=True, where=~keep, initial=0)
            before, V = V, np.where(keep, np.sign(full) * (size - penalty), np.float32(0))
            following = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
            ahead = V + np.float32((pace - 1) / following) * (V - before)
            pace = following
        return np.asarray(conjugate_gradients(form.matrix, pull, keep, V, 30, 1e-5) / form.scale)
