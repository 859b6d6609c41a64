"""Iterative hard thresholding (Blumensath & Davies 2009) with momentum: pruning as compressed sensing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.gram import unit_form
from sparse_onnx.passes.solvers.refit import conjugate_gradients
from sparse_onnx.passes.solvers.solver import DampedSolver, Problem

__all__ = ["Iht", "lipschitz"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iht(DampedSolver):
    """V ← keep(Y - H(Y - T)/L), Y = V + momentum · (V - V before), then least squares on the mask.

    ``steps`` projected gradient steps on the Gram H scaled to a unit diagonal, L being its largest eigenvalue.
    """

    name: ClassVar[str] = "iht"
    structures: ClassVar[tuple[str, ...]] = ("unstructured", "n:m", "block", "channel")
    steps: int = 100

    def check(self) -> None:
        super().check()
        require(self.steps >= 1, "steps", self.steps, "1 or more")

    def approximate(self, problem: Problem) -> np.ndarray:
        form = unit_form(problem.gram, self.damping)
        T = form.scale * problem.target
        step = 1 / lipschitz(form.matrix)
        pull = form.matrix @ T
        keep = problem.budget.keep(T) if problem.initial is None else problem.initial
        V = np.where(keep, T, np.float32(0))
        ahead, pace = V, 1.0
        for _ in range(self.steps):
            full = ahead + step * (pull - form.matrix @ ahead)
            before, keep = V, problem.budget.keep(full)
            V = np.where(keep, full, np.float32(0))
            following = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
            ahead = V + np.float32((pace - 1) / following) * (V - before)
            if float(np.vdot(full - ahead, V - before)) > 0:  # momentum leads uphill: start it again
                following, ahead = 1.0, V
            pace = following
        return np.asarray(conjugate_gradients(form.matrix, pull, keep, V, 30, 1e-5) / form.scale)


def lipschitz(matrix: np.ndarray) -> np.float32:
    """An upper bound of the largest eigenvalue of a positive semidefinite [K, K], close to it."""
    return np.float32(np.linalg.eigvalsh(matrix)[-1] * (1 + 1e-4))
