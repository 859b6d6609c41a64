"""AWQ (Lin et al. 2024): a scale for every input, so that weights of loud inputs are rounded more finely."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers.clipping import clipped_grid, whole_grid
from sparse_onnx.passes.solvers.grid import GridOptions, QuantizedMatrix, round_to_grid
from sparse_onnx.passes.solvers.quantizer import Rounding, output_errors
from sparse_onnx.passes.solvers.solver import check_layer
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["InputScales", "awq", "rescaled"]


@dataclasses.dataclass(frozen=True, eq=False)
class InputScales:
    """What AWQ found for a weight W [K, N].

    Attributes:
        scale: [K] float32, positive: what makes the input must be divided by it. Ones where nothing better was found.
        exponent: α of the search.
        quantized: W · scale[:, None] on the grid.
    """

    scale: np.ndarray
    exponent: float
    quantized: QuantizedMatrix

    def matrix(self) -> np.ndarray:
        """What W is as seen from the old input: [K, N] float32."""
        return np.asarray(self.quantized.matrix() / self.scale[:, None])


def awq(
    W: np.ndarray, statistics: InputStatistics, grid: GridOptions, *, steps: int = 20, clip: bool = True
) -> InputScales:
    """The scale s_i = (G_ii / n)^(α/2) of every input, α of 0, 1/``steps`` .. 1, whose rounded W · s, divided by s
    again, has the least error of the output on G (on its diagonal, where no more is known).

    The root mean square stands for the paper's mean of |x|, which a Gram does not have. Weights that share an input
    share its scales: give them side by side, W [K, all of their outputs]. Scales are divided by the root of their
    largest times their smallest, and inputs that were never seen keep 1. With ``clip`` the grids are searched, too.
    Raises UsageError as solvers do.
    """
    W = np.asarray(W, np.float32)
    check_layer(W, W, statistics)
    if steps < 1:
        raise UsageError(f"steps must be 1 or more, not {steps}")
    problem = Rounding(W, W, None, statistics.gram)
    power = statistics.diagonal
    seen = power > 0
    loud = np.sqrt(np.where(seen, power / max(power.max(), np.finfo(np.float64).tiny), 1.0))
    best, least = None, np.inf
    for step in range(steps + 1):
        exponent = step / steps
        scale = np.ones(len(W))
        if seen.any():
            spread = loud[seen] ** exponent
            scale[seen] = spread / np.sqrt(spread.max() * spread.min())
        each = scale.astype(np.float32)[:, None]
        scaled = W * each
        if not np.isfinite(scaled).all():
            continue
        limits = clipped_grid(scaled, grid, power / scale**2) if clip else whole_grid(scaled, grid)
        found = InputScales(each[:, 0], exponent, round_to_grid(scaled, limits))
        error = float(output_errors(problem, found.matrix()).sum())
        if error < least:
            best, least = found, error
    assert best is not None  # α = 0 changes nothing
    return best


def rescaled(
    W: np.ndarray, statistics: InputStatistics, scale: np.ndarray
) -> tuple[np.ndarray, InputStatistics]:
    """The same layer once what makes its input divides that by ``scale`` [K], positive: W · scale[:, None] float32, and
    the statistics of X / scale. Any solver may go on with them."""
    wide = scale.astype(np.float64)
    gram = statistics.gram
    if isinstance(gram, tuple):
        ends = np.cumsum([len(block) for block in gram])
        sides = [wide[end - len(block) : end] for end, block in zip(ends, gram, strict=True)]
        gram = tuple(block / side / side[:, None] for block, side in zip(gram, sides, strict=True))
    else:
        gram = gram / wide**2 if gram.ndim == 1 else gram / wide / wide[:, None]
    mean = None if statistics.mean is None else statistics.mean / wide
    scaled = np.asarray(W * scale[:, None], np.float32)
    return scaled, InputStatistics(gram, mean, statistics.count)
