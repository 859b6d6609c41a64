"""ALPS (Meng et al. 2024): ADMM until the mask stands still, then least squares on it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.gram import unit_form
from sparse_onnx.passes.solvers.refit import conjugate_gradients
from sparse_onnx.passes.solvers.solver import DampedSolver, Problem
from sparse_onnx.passes.solvers.splitting import Schedule, settle

__all__ = ["Alps"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alps(DampedSolver):
    """At most ``steps`` of ADMM from penalty ``penalty``, then ``refit_steps`` of conjugate gradients."""

    name: ClassVar[str] = "alps"
    structures: ClassVar[tuple[str, ...]] = ("unstructured", "n:m", "block", "channel")
    steps: int = 300
    penalty: float = 0.1
    refit_steps: int = 20

    def check(self) -> None:
        super().check()
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(self.penalty > 0, "penalty", self.penalty, "above 0")
        require(self.refit_steps >= 0, "refit_steps", self.refit_steps, "0 or more")

    def approximate(self, problem: Problem) -> np.ndarray:
        form = unit_form(problem.gram, self.damping)
        T = form.scale * problem.target
        schedule = Schedule(start=self.penalty, steps=self.steps)
        keep, V = settle(form, T, problem.budget, schedule, problem.initial)
        V = conjugate_gradients(form.matrix, form.matrix @ T, keep, V, self.refit_steps)
        return np.asarray(V / form.scale)
