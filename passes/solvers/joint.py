"""Zeros and bits together: a mask by a pruning solver, then integers on what it keeps."""

from __future__ import annotations

import numpy as np

from sparse_onnx.passes.solvers.auto import AutoSolver
from sparse_onnx.passes.solvers.auto_quantizer import AutoQuantizer
from sparse_onnx.passes.solvers.budget import Scope
from sparse_onnx.passes.solvers.grid import QuantizedMatrix
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.passes.solvers.quantizer import WeightQuantizer
from sparse_onnx.passes.solvers.solver import Solver
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["joint"]


def joint(
    W: np.ndarray,
    statistics: InputStatistics,
    structure: MaskStructure | None = None,
    sparsity: float | None = None,
    scope: Scope = "layer",
    *,
    pruner: Solver | None = None,
    quantizer: WeightQuantizer | None = None,
    target: np.ndarray | None = None,
) -> QuantizedMatrix:
    """W [K, N] with as many exact zeros as ``structure``, ``sparsity`` and ``scope`` say, at least, on a grid.

    ``pruner`` (default: ``auto``) chooses the mask and the values on it; ``quantizer`` (default: ``auto`` with 4 bits)
    then rounds these, aiming at the dense ``target`` (default: W) and not at the pruned weight: what pruning lost is
    part of what rounding may make good.

    Raises UsageError as the two do.
    """
    pruner = pruner or AutoSolver()
    quantizer = quantizer or AutoQuantizer()
    aim = np.asarray(W if target is None else target, np.float32)
    pruned = pruner.solve(W, statistics, structure, sparsity, scope, target=aim)
    return quantizer.solve(pruned, statistics, target=aim)
