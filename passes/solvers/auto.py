"""``auto``: the most accurate solver here. ALPS with its two choices changed, and more exact least squares.

1. Weights are ranked by what their removal costs once the others have adapted (OBS), not at once: the inputs are
   scaled to diag H⁻¹ = 1 and not to diag H = 1. An input that others can stand in for is then cheap to prune.
2. The penalty grows slowly, so the mask settles in a better minimum; steps are cheap in float32. Growth by 1.07 instead
   of 1.15 takes 1.1 to 1.8 times as long and lowers the error by less than .1 %.

What is left to gain is small. On layers of a sentence encoder, annealing the mask of each output channel by exact
removals and additions, with hundreds of times the work, lowers the error on calibration tokens by another .2 to .4 %
and that on held-out ones by 0 to .4 %. Exact exchanges of single weights alone, down to a local optimum: at most .2 %.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.gram import removal_form, unit_form
from sparse_onnx.passes.solvers.refit import conjugate_gradients
from sparse_onnx.passes.solvers.solver import DampedSolver, Problem
from sparse_onnx.passes.solvers.splitting import Schedule, settle

__all__ = ["Auto"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(DampedSolver):
    """At most ``steps`` of ADMM whose penalty grows by ``growth`` every eight, then ``refit_steps`` of refit."""

    name: ClassVar[str] = "auto"
    structures: ClassVar[tuple[str, ...]] = ("unstructured", "n:m", "block", "channel")
    steps: int = 400
    growth: float = 1.15
    refit_steps: int = 20

    def check(self) -> None:
        super().check()
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        require(self.growth > 1, "growth", self.growth, "above 1")
        require(self.refit_steps >= 0, "refit_steps", self.refit_steps, "0 or more")

    def approximate(self, problem: Problem) -> np.ndarray:
        unit = unit_form(problem.gram, self.damping)
        form = removal_form(unit)
        growth = self.growth
        schedule = Schedule(fast=growth, middle=growth, slow=growth, every=8, still=5e-4, steps=self.steps)
        keep, V = settle(form, form.scale * problem.target, problem.budget, schedule, problem.initial)
        start = V * (unit.scale / form.scale)
        pull = unit.matrix @ (unit.scale * problem.target)
        return np.asarray(conjugate_gradients(unit.matrix, pull, keep, start, self.refit_steps) / unit.scale)
