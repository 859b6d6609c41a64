"""Error feedback with grids chosen on the way: each when the sweep reaches its group, for what is there by then.

GPTQ's own groups are chosen so, but then inputs cannot be ordered by how loud they are: here groups are, by their
loudest input, and the inputs within each.
"""

from __future__ import annotations

import numpy as np

from sparse_onnx.passes.solvers.clipping import clipped_grid
from sparse_onnx.passes.solvers.gptq import Feedback, fed_back, invertible
from sparse_onnx.passes.solvers.gram import inverse_factor
from sparse_onnx.passes.solvers.grid import Grid, GridOptions, QuantizedMatrix
from sparse_onnx.passes.solvers.quantizer import Rounding

__all__ = ["grouped_feedbacks", "with_adaptive_grids"]


def grouped_feedbacks(problem: Rounding, options: GridOptions, damping: float) -> list[Feedback]:
    """One for each block of the Gram, its inputs group by group; none where a group is cut by these blocks."""
    K, power = len(problem.start), problem.power
    span = options.span(K)
    if any(rows.start % span or (rows.stop % span and rows.stop != K) for rows, _ in problem.blocks):
        return []
    found = []
    for rows, gram in problem.blocks:
        groups = [np.arange(i, min(i + span, rows.stop)) for i in range(rows.start, rows.stop, span)]
        groups = [inputs[np.argsort(-power[inputs], kind="stable")] for inputs in groups]
        groups.sort(key=lambda inputs: -power[inputs[0]])
        order = np.concatenate(groups)
        local = order - rows.start
        found.append(Feedback(order, inverse_factor(invertible(gram, damping)[np.ix_(local, local)])))
    return found


def with_adaptive_grids(problem: Rounding, options: GridOptions, sweeps: list[Feedback]) -> QuantizedMatrix:
    """The start of ``problem`` [K, N] rounded with error feedback in ``sweeps`` that go group by group.

    A group's grid is that of :func:`clipped_grid`, its inputs weighted with what their error costs once the inputs
    behind them in the group have adapted.
    """
    K, N = problem.start.shape
    span = options.span(K)
    scale = np.empty((options.groups(K), N), np.float32)
    zero_point, levels = np.empty(scale.shape, options.dtype), np.empty((K, N), np.float32)
    single = GridOptions(options.bits, 0, options.symmetric, options.scale_type)
    for sweep in sweeps:
        factor, values, first = sweep.factor, problem.start[sweep.inputs], 0
        ends = np.flatnonzero(np.diff(sweep.inputs // span)) + 1
        for inputs in np.split(sweep.inputs, ends):
            last = first + len(inputs)
            U, part = factor[first:last, first:last], values[first:last]
            kept = None if problem.kept is None else problem.kept[inputs]
            shown = part if kept is None else part * kept
            grid = clipped_grid(shown, single, 1 / np.einsum("ij,ij->j", U, U))
            each, low, high = grid.levels(len(inputs), kept)
            levels[inputs] = fed_back(U, part, each, low, high)
            scale[inputs[0] // span], zero_point[inputs[0] // span] = grid.scale[0], grid.zero_point[0]
            if last < len(values):
                # With e the errors over U_ii, the sweep within the group is U'e = W − V, solved row by row.
                errors = np.linalg.solve(U.T, part - levels[inputs] * each)
                values[last:] -= (factor[first:last, last:].T @ errors).astype(np.float32)
            first = last
    return Grid(scale, zero_point, options).at(levels)
