"""Where a grid ends: the scale of every group that rounds its weights best, found by search.

The grid that just holds the largest weight of a group is rarely the best: with a smaller scale the few largest are
clipped, and all others are rounded more finely (the clipping search of AWQ, Lin et al. 2024, section 3.2; of OmniQuant
without training).
"""

from __future__ import annotations

import numpy as np

from sparse_onnx.passes.solvers.grid import Grid, GridOptions, fitted_grid, stored_scale

__all__ = ["clipped_grid", "whole_grid"]

_COLUMNS = 512  # output channels at a time: the scratch stays in the cache
_SHRINKS = np.linspace(1.0, 0.4, 11)
_POLISH = 2


def whole_grid(W: np.ndarray, options: GridOptions) -> Grid:
    """The grid that just holds every weight of W [K, N]."""
    starts = options.starts(len(W))
    return fitted_grid(np.minimum.reduceat(W, starts), np.maximum.reduceat(W, starts), options)


def clipped_grid(W: np.ndarray, options: GridOptions, importance: np.ndarray | None = None) -> Grid:
    """The grid with the least Σ c_i (w_i − w'_i)² of every group, w' being w rounded; c [K] is ``importance``, or 1.

    Searched are shrunken ranges, from the one that holds all weights of W [K, N] on; the best of them is polished by
    least squares, the scale for its integers and the integers for that scale. Never worse than :func:`whole_grid`.
    """
    share = np.ones((len(W), 1), np.float32)
    if importance is not None and (most := importance.max()) > 0:
        share = (importance / most).astype(np.float32)[:, None]
    parts = [
        _searched(np.asarray(W[:, first : first + _COLUMNS], np.float32), options, share)
        for first in range(0, W.shape[1], _COLUMNS)
    ]
    return Grid(
        np.concatenate([grid.scale for grid in parts], axis=1),
        np.concatenate([grid.zero_point for grid in parts], axis=1),
        options,
    )


def _searched(W: np.ndarray, options: GridOptions, importance: np.ndarray) -> Grid:
    starts, index = options.starts(len(W)), np.arange(len(W)) // options.span(len(W))
    low, high = np.minimum.reduceat(W, starts), np.maximum.reduceat(W, starts)
    best = fitted_grid(low, high, options)
    unit = best.scale  # steps of the whole grid: no square of a weight leaves the range of float32
    steps = W / unit[index]
    _, least = _rounded(steps, best, unit, importance)
    for shrink in _SHRINKS[1:]:
        grid = fitted_grid(low * shrink, high * shrink, options)
        _, cost = _rounded(steps, grid, unit, importance)
        best, least = _better(best, least, grid, cost)
    levels, _ = _rounded(steps, best, unit, importance)
    for _ in range(_POLISH):
        weighted = levels * importance
        power = np.add.reduceat(weighted * levels, starts)
        pull = np.add.reduceat(weighted * steps, starts)
        scale = np.where(pull > 0, pull / np.where(power > 0, power, 1) * unit, best.scale)
        grid = Grid(stored_scale(scale, options), best.zero_point, options)
        levels, cost = _rounded(steps, grid, unit, importance)
        best, least = _better(best, least, grid, cost)
    return best


def _rounded(
    steps: np.ndarray, grid: Grid, unit: np.ndarray, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The level of every weight [K, N], and Σ c (w − w')² of every group [groups, N]; float32 both. ``steps`` [K, N]
    are the weights, and the sums are, over the ``unit`` [groups, N] of each group."""
    _, low, high = grid.levels(len(steps))
    scale = (grid.scale / unit)[np.arange(len(steps)) // grid.options.span(len(steps))]
    levels = steps / scale
    np.rint(levels, out=levels)
    np.clip(levels, low, high, out=levels)
    error = levels * scale
    error -= steps
    error *= error
    error *= importance
    return levels, np.add.reduceat(error, grid.options.starts(len(steps)))


def _better(best: Grid, least: np.ndarray, grid: Grid, cost: np.ndarray) -> tuple[Grid, np.ndarray]:
    """Of every group the cheaper of two grids, and its cost."""
    wins = cost < least
    scale = np.where(wins, grid.scale, best.scale)
    zero_point = np.where(wins, grid.zero_point, best.zero_point)
    return Grid(scale, zero_point, best.options), np.where(wins, cost, least)
