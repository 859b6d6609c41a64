"""HQQ: half-quadratic quantization (Badri & Shaji 2023), scales that are robust against outliers, without data."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.clipping import whole_grid
from sparse_onnx.passes.solvers.grid import Grid, QuantizedMatrix, stored_scale
from sparse_onnx.passes.solvers.quantizer import Rounding, WeightQuantizer, at_nearest

__all__ = ["HqqQuantizer"]

_GROWTH = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class HqqQuantizer(WeightQuantizer):
    """min Σ |w − w'|^p of every group, p = ``norm`` below 1, by splitting: E ≈ W − W' is the proximal point

        e = sign(r) · max(|r| − |r|^(p − 1) / β, 0),    r = (w − w') / s,

    and then scale and zero point are the least squares fit of W − E; β grows by 5 % a step. The paper moves zero
    points that are floats; here they are integers, so that 0 stays exact, and the scale moves as well, down to
    ``least`` of what holds the whole range: without data nobody knows whether an outlier is noise or meets the loudest
    input (clipped freely, the last layer of a sentence encoder loses 2.7 times as much as by rounding). Every group
    keeps the best grid that it met, the first being that of the whole range.
    """

    name: ClassVar[str] = "hqq"
    needs: ClassVar[str] = "nothing"
    norm: float = 0.7
    strength: float = 10.0
    least: float = 0.9
    steps: int = 20

    def check(self) -> None:
        require(0 < self.norm < 1, "norm", self.norm, "above 0 and below 1")
        require(self.strength > 0, "strength", self.strength, "above 0")
        require(0 < self.least <= 1, "least", self.least, "above 0 and at most 1")
        require(self.steps >= 0, "steps", self.steps, "0 or more")

    def approximate(self, problem: Rounding) -> QuantizedMatrix:
        # As many parts as may be: what they need for a step stays in the cache.
        return self.in_parts(problem, self._solved, parts=problem.start.shape[1])

    def _solved(self, problem: Rounding) -> QuantizedMatrix:
        W, options, strength = problem.start, self.grid, self.strength
        starts = options.starts(len(W))
        count = np.diff(starts, append=len(W))[:, None]
        whole = whole_grid(W, options)
        grid = best = whole
        least = np.full(grid.scale.shape, np.inf)
        for step in range(self.steps + 1):
            scale, low, high = grid.levels(len(W), problem.kept)
            levels = np.clip(np.rint(W / scale), low, high)
            rest = W / scale
            rest -= levels
            size = np.abs(rest)
            cost = np.add.reduceat(size**self.norm, starts) * grid.scale**self.norm
            wins = cost < least
            least = np.where(wins, cost, least)
            best = Grid(
                np.where(wins, grid.scale, best.scale),
                np.where(wins, grid.zero_point, best.zero_point),
                options,
            )
            if step == self.steps:
                break
            safe = np.maximum(size, np.float32(1e-6))
            outlier = np.sign(rest) * np.maximum(size - safe ** (self.norm - 1) / strength, 0)
            aim = W - outlier * scale
            zero_point = grid.zero_point
            if not options.symmetric:
                drift = np.add.reduceat(levels - aim / scale, starts) / count
                moved = np.clip(np.rint(zero_point + drift), options.lowest, options.highest)
                zero_point = moved.astype(options.dtype)
            power = np.add.reduceat(levels * levels, starts)
            pull = np.add.reduceat(levels * aim, starts)
            wanted = np.where(pull > 0, pull / np.where(power > 0, power, 1), grid.scale)
            wanted = np.maximum(wanted, self.least * whole.scale)
            grid = Grid(stored_scale(wanted, options), zero_point, options)
            strength *= _GROWTH
        return at_nearest(problem, best)
