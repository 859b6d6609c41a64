"""Orthogonal matching pursuit in its batch form (Rubinstein et al. 2008), on the Gram, per output channel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.passes.solvers.gram import unit_form
from sparse_onnx.passes.solvers.refit import conjugate_gradients
from sparse_onnx.passes.solvers.solver import DampedSolver, Problem

__all__ = ["Omp"]

_BATCH = 1 << 26  # bytes of the orthogonal directions that are held at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omp(DampedSolver):
    """Start empty; add the input with the largest gain g_i² / H_ii, refit, and again, until the budget is used.

    Within scope layer each output channel keeps as many as |w| · ‖x‖₂ would keep in the layer.
    """

    name: ClassVar[str] = "omp"
    structures: ClassVar[tuple[str, ...]] = ("unstructured", "n:m")

    def approximate(self, problem: Problem) -> np.ndarray:
        form = unit_form(problem.gram, self.damping)
        T = form.scale * problem.target
        pull = form.matrix @ T
        counts = np.count_nonzero(problem.budget.keep(T), axis=0)
        structure = problem.budget.structure
        group = structure.size if structure.kind == "n:m" else None
        keep = np.zeros(T.shape, bool)
        width = max(1, _BATCH // (4 * len(T) * max(int(counts.max()), 1)))
        for first in range(0, T.shape[1], width):
            some = slice(first, first + width)
            keep[:, some] = _pursue(form.matrix, pull[:, some], counts[some], group)
        V = conjugate_gradients(form.matrix, pull, keep, np.zeros_like(T), 60, 1e-5)
        return np.asarray(V / form.scale)


def _pursue(H: np.ndarray, pull: np.ndarray, counts: np.ndarray, group: tuple[int, int] | None) -> np.ndarray:
    """The chosen inputs of each column of ``pull`` p = H t: bool [K, n].

    Gram-Schmidt in the metric of H: directions a = H q with q orthonormal, so the residual's gradient is
    p - Σ a (a_i's coefficient), and each step costs K · t.
    """
    K, columns = pull.shape
    every = np.arange(columns)
    gradient = pull.T.copy()
    chosen, closed = np.zeros((columns, K), bool), np.zeros((columns, K), bool)
    directions = np.zeros((columns, int(counts.max(initial=0)), K), np.float32)
    for step in range(directions.shape[1]):
        pick = np.where(closed, -1, np.abs(gradient)).argmax(axis=1)
        known = directions[:, :step]
        fresh = H[pick] - (known[every, :, pick][:, None] @ known)[:, 0]
        length = np.sqrt(np.maximum(fresh[every, pick], np.finfo(np.float32).eps))
        active = step < counts
        fresh *= (active / length)[:, None].astype(np.float32)
        directions[:, step] = fresh
        gradient -= np.where(active, gradient[every, pick] / length, 0)[:, None] * fresh
        chosen[every[active], pick[active]] = True
        closed |= chosen
        if group is not None:
            taken = chosen.reshape(columns, -1, group[1]).sum(axis=2)
            closed |= np.repeat(taken >= group[0], group[1], axis=1)
    return chosen.T
