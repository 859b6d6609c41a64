"""The passes that prune with calibration data, one for each method of :mod:`sparse_onnx.passes.solvers`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from sparse_onnx.passes import solvers
from sparse_onnx.passes.calibration.unseen import UNSEEN_SHARE
from sparse_onnx.passes.prune.oneshot import OneShot

__all__ = [
    "Admm",
    "Alps",
    "Auto",
    "Iht",
    "Lasso",
    "Omp",
    "Ria",
    "SparseGPT",
    "Taylor",
    "Wanda",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(OneShot):
    """By |w| · ‖x‖ within each output channel (Sun et al. 2024)."""

    name: ClassVar[str] = "prune.wanda"
    solver = solvers.WandaSolver
    scope: Literal["row", "layer"] = "row"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ria(OneShot):
    """By relative importance and activations (Zhang et al. 2024)."""

    name: ClassVar[str] = "prune.ria"
    solver = solvers.RiaSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(OneShot):
    """Input by input, each error absorbed by the inputs that follow (Frantar & Alistarh 2023)."""

    name: ClassVar[str] = "prune.sparsegpt"
    solver = solvers.SparseGPTSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admm(OneShot):
    """ADMM with a gradual mask (Boža 2024): nearly as good as ``prune.alps`` in a third of the time."""

    name: ClassVar[str] = "prune.admm"
    solver = solvers.AdmmSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alps(OneShot):
    """ADMM until the mask stands still, then least squares on it (Meng et al. 2024)."""

    name: ClassVar[str] = "prune.alps"
    solver = solvers.AlpsSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(OneShot):
    """The most accurate combination: the best solver, aimed at the dense model's outputs, biases corrected."""

    name: ClassVar[str] = "prune.auto"
    solver = solvers.AutoSolver
    calibration: Literal["oneshot", "sequential", "asymmetric"] = "asymmetric"
    bias_correction: bool = True
    unseen_tokens: float = UNSEEN_SHARE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iht(OneShot):
    """Pruning as compressed sensing: iterative hard thresholding (Blumensath & Davies 2009)."""

    name: ClassVar[str] = "prune.iht"
    solver = solvers.IhtSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omp(OneShot):
    """Pruning as compressed sensing: orthogonal matching pursuit within each output channel."""

    name: ClassVar[str] = "prune.omp"
    solver = solvers.OmpSolver
    scope: Literal["row", "layer"] = "row"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lasso(OneShot):
    """Pruning as compressed sensing: l1-penalised least squares, then least squares on what is left."""

    name: ClassVar[str] = "prune.lasso"
    solver = solvers.LassoSolver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(OneShot):
    """By ½ G_ii w²: what a weight adds to the layer's squared error by itself (LeCun et al. 1990)."""

    name: ClassVar[str] = "prune.taylor"
    solver = solvers.ObdSolver
