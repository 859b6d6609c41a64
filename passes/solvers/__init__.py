"""One-shot pruning of one layer: pure functions of its weight and the statistics of its input.

:data:`SOLVERS` lists the methods; each is a frozen dataclass of its options with ``solve(W, statistics, structure,
sparsity, scope)``. Scores that can be ranked over a whole model are in ``scores``; ``refit`` and ``aimed_target`` go
with any of them.
"""

from __future__ import annotations

from sparse_onnx.errors import UsageError
from sparse_onnx.options import unknown
from sparse_onnx.passes.solvers.admm import Admm
from sparse_onnx.passes.solvers.alps import Alps
from sparse_onnx.passes.solvers.auto import Auto
from sparse_onnx.passes.solvers.budget import Budget, Scope
from sparse_onnx.passes.solvers.correction import aimed_target, centred_gram
from sparse_onnx.passes.solvers.gram import relative_error
from sparse_onnx.passes.solvers.iht import Iht
from sparse_onnx.passes.solvers.lasso import Lasso
from sparse_onnx.passes.solvers.omp import Omp
from sparse_onnx.passes.solvers.refit import refit
from sparse_onnx.passes.solvers.scored import Magnitude, Obd, Random, Ria, Wanda
from sparse_onnx.passes.solvers.scores import (
    magnitude_score,
    obd_score,
    random_score,
    ria_score,
    taylor_score,
    wanda_score,
)
from sparse_onnx.passes.solvers.solver import DampedSolver, Solver
from sparse_onnx.passes.solvers.sparsegpt import SparseGPT
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = [
    "SOLVERS",
    "Admm",
    "Alps",
    "Auto",
    "Budget",
    "DampedSolver",
    "Iht",
    "InputStatistics",
    "Lasso",
    "Magnitude",
    "Obd",
    "Omp",
    "Random",
    "Ria",
    "Scope",
    "Solver",
    "SparseGPT",
    "Wanda",
    "aimed_target",
    "centred_gram",
    "magnitude_score",
    "obd_score",
    "random_score",
    "refit",
    "relative_error",
    "ria_score",
    "solver_by_name",
    "taylor_score",
    "wanda_score",
]

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (Admm, Alps, Auto, Iht, Lasso, Magnitude, Obd, Omp, Random, Ria, SparseGPT, Wanda)
}


def solver_by_name(name: str) -> type[Solver]:
    """The method ``name``; UsageError with the nearest name and the list if there is none."""
    if name not in SOLVERS:
        raise UsageError(unknown("method", name, SOLVERS))
    return SOLVERS[name]
