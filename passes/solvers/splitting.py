"""ADMM until the mask stands still: the engine of ``alps`` and ``auto``."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparse_onnx.passes.solvers.budget import Budget
from sparse_onnx.passes.solvers.gram import Form

__all__ = ["Schedule", "settle"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the penalty ρ grows: every ``every`` steps by ``fast``, ``middle`` or ``slow``, as more than 10 %, more
    than .5 % or fewer of the kept weights changed; no more than ``still`` of them ends it, ``steps`` at the latest."""

    start: float = 0.1
    fast: float = 1.3
    middle: float = 1.2
    slow: float = 1.1
    every: int = 3
    still: float = 0.0
    steps: int = 300


def settle(
    form: Form,
    target: np.ndarray,
    budget: Budget,
    schedule: Schedule,
    initial: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A mask [K, N] and values on it, float32, for ``target`` T [K, N] in the coordinates of ``form``.

    B = (H + ρI)⁻¹(H T + ρ(D - U)); D = keep(B + U); U += B - D, with U scaled down as ρ grows (Meng et al. 2024).
    """
    values, vectors = np.linalg.eigh(form.matrix)
    values = np.maximum(values, 0)
    pull = form.matrix @ target
    keep = budget.keep(target) if initial is None else initial
    sparse, dual = target * keep, np.zeros_like(target)
    rho = np.float32(schedule.start)
    solve = (vectors / (values + rho)) @ vectors.T
    settled, kept = keep, max(int(np.count_nonzero(keep)), 1)
    for step in range(1, schedule.steps + 1):
        full = sparse - dual
        full *= rho
        full += pull
        full = solve @ full
        full += dual
        keep = budget.keep(full)
        sparse = full * keep
        dual = full - sparse
        if step % schedule.every:
            continue
        share = int(np.count_nonzero(keep != settled)) / 2 / kept
        if share <= schedule.still:
            break
        settled = keep
        growth = schedule.fast if share > 0.1 else schedule.middle if share > 0.005 else schedule.slow
        rho *= np.float32(growth)
        dual /= np.float32(growth)
        solve = (vectors / (values + rho)) @ vectors.T
    return keep, sparse
