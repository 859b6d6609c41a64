"""One-shot pruning of one layer: pure functions of its weight and the statistics of its input.

:data:`SOLVERS` lists the methods; each is a frozen dataclass of its options with ``solve(W, statistics, structure,
sparsity, scope)``. Scores that can be ranked over a whole model are in ``scores``; ``refit`` and ``aimed_target`` go
with any of them. :data:`QUANTIZERS` lists the methods that round a layer to integers of few bits, with ``solve(W,
statistics)``: zeros of W stay zeros, so the two go one behind the other.
"""

from __future__ import annotations

from sparse_onnx.passes.solvers.admm import AdmmSolver
from sparse_onnx.passes.solvers.alps import AlpsSolver
from sparse_onnx.passes.solvers.auto import AutoSolver
from sparse_onnx.passes.solvers.auto_quantizer import AutoQuantizer
from sparse_onnx.passes.solvers.budget import Budget, Scope
from sparse_onnx.passes.solvers.correction import aimed_target, centred_gram
from sparse_onnx.passes.solvers.gptq import GptqQuantizer
from sparse_onnx.passes.solvers.gram import relative_error
from sparse_onnx.passes.solvers.grid import GridOptions, QuantizedMatrix
from sparse_onnx.passes.solvers.hqq import HqqQuantizer
from sparse_onnx.passes.solvers.iht import IhtSolver
from sparse_onnx.passes.solvers.lasso import LassoSolver
from sparse_onnx.passes.solvers.omp import OmpSolver
from sparse_onnx.passes.solvers.quantizer import DampedQuantizer, WeightQuantizer
from sparse_onnx.passes.solvers.refit import refit
from sparse_onnx.passes.solvers.rounding import RtnQuantizer
from sparse_onnx.passes.solvers.scored import MagnitudeSolver, ObdSolver, RandomSolver, RiaSolver, WandaSolver
from sparse_onnx.passes.solvers.scores import (
    magnitude_score,
    obd_score,
    random_score,
    ria_score,
    taylor_score,
    wanda_score,
)
from sparse_onnx.passes.solvers.solver import DampedSolver, Solver
from sparse_onnx.passes.solvers.sparsegpt import SparseGPTSolver
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = [
    "QUANTIZERS",
    "SOLVERS",
    "AdmmSolver",
    "AlpsSolver",
    "AutoQuantizer",
    "AutoSolver",
    "Budget",
    "DampedQuantizer",
    "DampedSolver",
    "GptqQuantizer",
    "GridOptions",
    "HqqQuantizer",
    "IhtSolver",
    "InputStatistics",
    "LassoSolver",
    "MagnitudeSolver",
    "ObdSolver",
    "OmpSolver",
    "QuantizedMatrix",
    "RandomSolver",
    "RiaSolver",
    "RtnQuantizer",
    "Scope",
    "Solver",
    "SparseGPTSolver",
    "WandaSolver",
    "WeightQuantizer",
    "aimed_target",
    "centred_gram",
    "magnitude_score",
    "obd_score",
    "random_score",
    "refit",
    "relative_error",
    "ria_score",
    "taylor_score",
    "wanda_score",
]

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (
        AdmmSolver,
        AlpsSolver,
        AutoSolver,
        IhtSolver,
        LassoSolver,
        MagnitudeSolver,
        ObdSolver,
        OmpSolver,
        RandomSolver,
        RiaSolver,
        SparseGPTSolver,
        WandaSolver,
    )
}

QUANTIZERS: dict[str, type[WeightQuantizer]] = {
    quantizer.name: quantizer
    for quantizer in (
        AutoQuantizer,
        GptqQuantizer,
        HqqQuantizer,
        RtnQuantizer,
    )
}
