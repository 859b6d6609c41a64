"""Descent on a grid: every integer, then every scale, set to its best value given all others, until few move.

The error of one output channel is e'He with e = t − v. Given all others, the level l_i of input i is best at the grid
point nearest to (v_i + (He)_i / H_ii) / s, and the scale of a group moves by l'(He) / l'Hl over its inputs. Every move
is the exact minimum along its coordinate, so the error never grows: coordinate descent on the problem that GPTQ solves
greedily (QuantEase, Behdin et al. 2023, section 3; there with fixed scales). Scales stay on what their type can store:
a move that rounding makes worse is not made.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparse_onnx.passes.solvers.grid import Grid, GridOptions, QuantizedMatrix, stored_scale
from sparse_onnx.passes.solvers.quantizer import Rounding

__all__ = ["descend"]

_COLUMNS = 768  # output channels at a time: independent of each other, and the residual stays in the cache
_BLOCK = 16  # inputs whose moves reach the rest of their group together
_STILL = 2e-4  # share of the levels; where no more of them move in a sweep, it was the last


def descend(
    problem: Rounding,
    start: QuantizedMatrix,
    forms: list[tuple[slice, np.ndarray]],
    *,
    sweeps: int = 8,
    scales: bool = True,
) -> QuantizedMatrix:
    """``start`` improved in at most ``sweeps`` passes over all inputs, each output channel by itself.

    ``forms`` are the blocks H [b, b] on the diagonal of the form with the inputs of each, float32, their diagonals
    positive. Levels outside ``problem.kept`` stay 0. With ``scales`` those of groups that lie in one block move, too.
    """
    K, N = start.integers.shape
    span, scale, levels = start.options.span(K), start.scale.copy(), np.empty((K, N), np.float32)
    for first in range(0, N, _COLUMNS):
        some = slice(first, min(first + _COLUMNS, N))
        grid = Grid(scale[:, some], start.zero_point[:, some], start.options)
        _, low, high = grid.levels(K, None if problem.kept is None else problem.kept[:, some])
        levels[:, some] = start.integers[:, some] - grid.of_inputs(K)[1]
        for rows, form in forms:
            part = _Part(
                form=form,
                target=problem.target[rows, some],
                levels=levels[rows, some],
                low=low[rows],
                high=high[rows],
                scale=scale[:, some],
                groups=_groups(rows, span, K),
                options=start.options,
            )
            part.descend(sweeps, scales)
    return dataclasses.replace(start.grid, scale=scale).at(levels)


def _groups(rows: slice, span: int, inputs: int) -> list[tuple[int, slice, bool]]:
    """The groups that ``rows`` touch: index, which of the rows, and whether that is all of the group."""
    found = []
    for group in range(rows.start // span, -(-rows.stop // span)):
        first, last = group * span, min((group + 1) * span, inputs)
        some = slice(max(first, rows.start) - rows.start, min(last, rows.stop) - rows.start)
        found.append((group, some, some.stop - some.start == last - first))
    return found


@dataclasses.dataclass(eq=False)
class _Part:
    """Some output channels on one block of inputs. ``levels`` [b, n] and ``scale`` [groups, n] are changed in place."""

    form: np.ndarray
    target: np.ndarray
    levels: np.ndarray
    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray
    groups: list[tuple[int, slice, bool]]
    options: GridOptions

    def descend(self, sweeps: int, scales: bool) -> None:
        scale = np.empty_like(self.levels)
        for group, rows, _ in self.groups:
            scale[rows] = self.scale[group]
        values = self.levels * scale
        wrong = self.target - values
        for _ in range(sweeps):
            moved = 0
            for group, rows, whole in self.groups:
                pull = self.form[rows] @ wrong  # of H(T − V), the rows of this group
                if scales and whole:
                    self._move_scale(group, rows, pull)
                    np.multiply(self.levels[rows], self.scale[group], out=values[rows])
                moved += self._move_levels(group, rows, pull, values[rows])
                np.subtract(self.target[rows], values[rows], out=wrong[rows])
            if moved <= _STILL * self.levels.size:
                break

    def _move_scale(self, group: int, rows: slice, pull: np.ndarray) -> None:
        """Set the scale of ``group`` to its best for its levels, where that helps; ``pull`` [g, n] follows."""
        levels = self.levels[rows]
        image = self.form[rows, rows] @ levels
        slope = np.einsum("kn,kn->n", levels, pull)
        curve = np.einsum("kn,kn->n", levels, image)
        now = self.scale[group]
        wanted = now + slope / np.where(curve > 0, curve, np.inf)
        change = stored_scale(np.where(wanted > 0, wanted, now), self.options) - now
        change *= np.sign(change) * (2 * slope - change * curve) > 0
        self.scale[group] += change
        image *= change
        pull -= image

    def _move_levels(self, group: int, rows: slice, pull: np.ndarray, values: np.ndarray) -> int:
        """Set the levels of ``group`` one by one; ``values`` and ``pull`` [g, n] follow, the pull only of what is still
        to come. Returns how many moved."""
        levels, low, high = self.levels[rows], self.low[rows], self.high[rows]
        form, scale = self.form[rows, rows], self.scale[group]
        moved, point = 0, np.empty_like(scale)
        for first in range(0, len(levels), _BLOCK):
            last = min(first + _BLOCK, len(levels))
            before, change = levels[first:last].copy(), np.empty_like(levels[first:last])
            for i in range(first, last):
                wanted = levels[i]
                np.divide(pull[i], form[i, i], out=wanted)
                wanted += values[i]
                wanted /= scale
                np.rint(wanted, out=wanted)
                np.maximum(wanted, low[i], out=wanted)  # np.clip takes several times as long for one row
                np.minimum(wanted, high[i], out=wanted)
                np.multiply(wanted, scale, out=point)
                np.subtract(point, values[i], out=change[i - first])
                values[i] = point
                pull[i + 1 : last] -= form[i + 1 : last, i, None] * change[i - first]
            moved += int(np.count_nonzero(before != levels[first:last]))
            pull[last:] -= form[last:, first:last] @ change
        return moved
