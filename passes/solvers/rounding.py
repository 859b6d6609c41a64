"""Round to nearest: every weight by itself, on the whole range of its group or on a clipped one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparse_onnx.passes.solvers.clipping import clipped_grid, whole_grid
from sparse_onnx.passes.solvers.grid import QuantizedMatrix
from sparse_onnx.passes.solvers.quantizer import Rounding, WeightQuantizer, at_nearest

__all__ = ["RtnQuantizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RtnQuantizer(WeightQuantizer):
    """q = round(w / s) + z. ``clip`` searches the s and z with the least squared error, each input weighted with its
    power G_ii where there is data."""

    name: ClassVar[str] = "rtn"
    needs: ClassVar[str] = "nothing"
    clip: bool = False

    def approximate(self, problem: Rounding) -> QuantizedMatrix:
        W = problem.start
        grid = clipped_grid(W, self.grid, problem.power) if self.clip else whole_grid(W, self.grid)
        return at_nearest(problem, grid)
