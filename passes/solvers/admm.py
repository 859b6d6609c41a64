"""ADMM with a gradual mask (Boža 2024)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.gram import inverse, unit_form
from sparse_onnx.passes.solvers.solver import DampedSolver, Problem

__all__ = ["Admm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admm(DampedSolver):
    """V = (H + ρI)⁻¹(H T + ρ(Z - U)); Z = keep(V + U); U += V - Z, on the Gram H scaled to a unit diagonal.

    The budget of zeros rises as 1 - (1 - t/``gradual``)³ over the first ``gradual`` of ``steps`` steps and is
    full from then on. An N:M group starts with all M kept and goes down one by one.
    """

    name: ClassVar[str] = "admm"
    structures: ClassVar[tuple[str, ...]] = ("unstructured", "n:m", "block", "channel")
    steps: int = 20
    gradual: int = 15
    penalty: float = 1.0

    def check(self) -> None:
        super().check()
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(1 <= self.gradual <= self.steps, "gradual", self.gradual, f"1 to {self.steps}")
        require(self.penalty > 0, "penalty", self.penalty, "above 0")

    def approximate(self, problem: Problem) -> np.ndarray:
        form = unit_form(problem.gram, self.damping)
        T = form.scale * problem.target
        rho = np.float32(self.penalty)
        shifted = form.matrix.astype(np.float64)
        shifted[np.diag_indices_from(shifted)] += rho
        solve = inverse(shifted).astype(np.float32)
        del shifted
        pull = form.matrix @ T
        V, dual = T, np.zeros_like(T)
        sparse = T
        for step in range(1, self.steps + 1):
            share = 1 - (1 - min(step / self.gradual, 1)) ** 3
            full = V + dual
            sparse = np.where(problem.budget.relaxed(share).keep(full), full, np.float32(0))
            dual = full - sparse
            if step < self.steps:
                V = solve @ (pull + rho * (sparse - dual))
        return np.asarray(sparse / form.scale)
