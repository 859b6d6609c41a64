"""SparseGPT (Frantar & Alistarh 2023): prune input by input, each error absorbed by the inputs that follow."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparse_onnx.options import require
from sparse_onnx.passes.solvers.budget import smallest
from sparse_onnx.passes.solvers.gram import damped, inverse_factor
from sparse_onnx.passes.solvers.masks import keep_mask
from sparse_onnx.passes.solvers.solver import DampedSolver, Problem

__all__ = ["SparseGPT"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(DampedSolver):
    """One sweep over the inputs with U'U = H⁻¹ (U upper triangular, H the damped Gram).

    In each block of ``block`` inputs the lowest w²/U_ii² go (N:M: in each group, when the sweep reaches it);
    w of input i that goes moves those after it, w_j -= U_ij · w_i / U_ii. The zeros are spread evenly over the
    blocks of live inputs.
    """

    name: ClassVar[str] = "sparsegpt"
    structures: ClassVar[tuple[str, ...]] = ("unstructured", "n:m")
    block: int = 128

    def check(self) -> None:
        super().check()
        require(self.block >= 1, "block", self.block, "1 or more")

    def approximate(self, problem: Problem) -> np.ndarray:
        W = problem.target.copy()
        gram = problem.gram
        dead = gram.diagonal() <= 0
        form = damped(gram, self.damping)
        form[dead, dead] += form.diagonal().mean()
        factor = inverse_factor(form).astype(np.float32)
        del form
        quota = _Quota(problem, dead)
        group = problem.budget.structure.size[1]
        width = -(-self.block // group) * group if quota.grouped else self.block
        for first in range(0, len(W), width):
            last = min(first + width, len(W))
            U = factor[first:last, first:last]
            part, errors = W[first:last], np.empty_like(W[first:last])
            gone = np.zeros(part.shape, bool) if quota.grouped else quota.pruned(part, U, first)
            for i in range(last - first):
                if quota.grouped and i % group == 0:
                    score = np.abs(part[i : i + group]) / U.diagonal()[i : i + group, None]
                    gone[i : i + group] = ~keep_mask(score, None, problem.budget.structure)
                errors[i] = np.where(gone[i], part[i], 0) / U[i, i]
                part[i + 1 :] -= U[i, i + 1 :, None] * errors[i]
                part[i][gone[i]] = 0
            W[last:] -= factor[first:last, last:].T @ errors
        W[dead] = 0
        return W


class _Quota:
    """How many zeros the block of inputs [first, last) takes: dead inputs all, live ones their even share."""

    def __init__(self, problem: Problem, dead: np.ndarray) -> None:
        self.grouped = problem.budget.structure.kind == "n:m"
        self._dead = np.concatenate([[0], np.cumsum(dead)])
        zeros = problem.budget.zeros
        self._by_column = isinstance(zeros, np.ndarray)
        units = 1 if self._by_column else problem.target.shape[1]
        self._unit = units
        self._live = max(int(np.count_nonzero(~dead)) * units, 1)
        self._zeros = np.maximum(np.asarray(zeros) - int(self._dead[-1]) * units, 0)

    def _until(self, end: int) -> np.ndarray:
        dead = int(self._dead[end])
        live = (end - dead) * self._unit
        return np.asarray(dead * self._unit + np.rint(self._zeros * (live / self._live)), np.int64)

    def pruned(self, part: np.ndarray, U: np.ndarray, first: int) -> np.ndarray:
        count = self._until(first + len(part)) - self._until(first)
        score = np.abs(part) / U.diagonal()[:, None]
        return smallest(score, count if self._by_column else int(count))
