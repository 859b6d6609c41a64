"""Methods that rank the weights once and leave those that stay as they are."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers import scores
from sparse_onnx.passes.solvers.solver import Problem, Solver

__all__ = ["Magnitude", "Obd", "Random", "Ria", "Scored", "Wanda"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(Solver):
    """V = T ∘ keep(score): no update of what stays."""

    needs: ClassVar[str] = "diagonal"

    @abc.abstractmethod
    def score(self, W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        """Importance [K, N] of W [K, N] with ``diagonal`` G_ii [K]."""

    def approximate(self, problem: Problem) -> np.ndarray:
        keep = problem.budget.keep(self.score(problem.target, problem.gram))
        return np.where(keep, problem.target, np.float32(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Scored):
    """|w|."""

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[str] = "nothing"

    def score(self, W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        return scores.magnitude_score(W)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Scored):
    """By chance: the floor. ``seed`` alone decides."""

    name: ClassVar[str] = "random"
    needs: ClassVar[str] = "nothing"
    seed: int = 0

    def check(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")

    def score(self, W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        return scores.random_score(W, self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(Scored):
    """|w| · ‖x‖₂ (its paper ranks per output channel: scope row)."""

    name: ClassVar[str] = "wanda"

    def score(self, W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        return scores.wanda_score(W, diagonal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ria(Scored):
    """Relative importance and activations: :func:`~sparse_onnx.passes.solvers.scores.ria_score`."""

    name: ClassVar[str] = "ria"
    exponent: float = 0.5

    def check(self) -> None:
        require(0 <= self.exponent <= 4, "exponent", self.exponent, "0 to 4")

    def score(self, W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        return scores.ria_score(W, diagonal, self.exponent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Obd(Scored):
    """½ G_ii w²: second-order Taylor with the layer's own curvature. Gradients of a loss: ``taylor_score``."""

    name: ClassVar[str] = "taylor"

    def score(self, W: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        return scores.obd_score(W, diagonal)
