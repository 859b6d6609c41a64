"""Exact least squares on a fixed mask: min over V of tr((T - V)' G (T - V)) with V zero outside it."""

from __future__ import annotations

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers.gram import damped, unit_form
from sparse_onnx.passes.solvers.solver import check_layer
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["conjugate_gradients", "refit"]

_EXACT = 256  # above this many inputs, conjugate gradients cost less than a factorisation for every column
_BATCH = 1 << 24  # bytes of the matrices that are solved at a time
_STEPS = 500


def refit(
    W: np.ndarray,
    statistics: InputStatistics,
    mask: np.ndarray | None = None,
    *,
    damping: float = 0.01,
    start: np.ndarray | None = None,
    tolerance: float = 1e-6,
) -> np.ndarray:
    """The best values on ``mask`` [K, N] (True: kept; default: where W is not zero): float32 [K, N].

    With ``mask`` the non-zeros of an earlier model and W new weights, its sparsity is preserved. Each output
    channel solves (G_ss + damping · mean(diag G) · I) v = (G w)_s: up to 256 inputs by factorisation, above by
    conjugate gradients from ``start`` (default W ∘ mask) to ``tolerance`` of the right-hand side. What a partial Gram
    leaves out counts as zero; weights of dead inputs become 0.

    Raises UsageError for shapes that do not fit and values that are not finite.
    """
    mask = W != 0 if mask is None else np.asarray(mask, bool)
    T = np.asarray(W, np.float32)
    check_layer(W, T, statistics, mask)
    if not damping >= 0:
        raise UsageError(f"damping must be 0 or more, not {damping}")
    T = T * (statistics.diagonal > 0)[:, None]
    if not isinstance(statistics.gram, tuple) and statistics.gram.ndim == 1:
        return np.asarray(T * mask)
    blocks = statistics.gram if isinstance(statistics.gram, tuple) else (statistics.gram,)
    parts, first = [], 0
    for gram in blocks:
        rows = slice(first, first := first + len(gram))
        begin = T[rows] if start is None else np.asarray(start[rows], np.float32)
        parts.append(_refit_block(gram, T[rows], mask[rows], begin, damping, tolerance))
    return np.concatenate(parts)


def _refit_block(
    gram: np.ndarray, T: np.ndarray, mask: np.ndarray, start: np.ndarray, damping: float, tolerance: float
) -> np.ndarray:
    if not T.any() or not mask.any():
        return np.zeros_like(T)
    if len(gram) <= _EXACT:
        return _factorised(damped(gram, damping), T, mask)
    form = unit_form(gram, damping)
    matrix, scale = form.matrix.astype(np.float64), form.scale.astype(np.float64)
    pull = matrix @ (scale * T)
    values = conjugate_gradients(matrix, pull, mask, scale * start, _STEPS, tolerance)
    return np.asarray(values / scale, np.float32)


def _factorised(form: np.ndarray, T: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """All columns by batched solves: the rows and columns outside the mask become those of the identity."""
    K, N = T.shape
    pull = np.where(mask, form @ T, 0)
    scale = float(form.diagonal().mean())
    values = np.zeros((K, N))
    width = max(1, _BATCH // (8 * K * K))
    for first in range(0, N, width):
        some = slice(first, first + width)
        kept = mask[:, some].T
        systems = np.where(kept[:, :, None] & kept[:, None, :], form, 0)
        systems[:, np.arange(K), np.arange(K)] += np.where(kept, 0, scale)
        right = pull[:, some].T[:, :, None]
        try:
            solution = np.linalg.solve(systems, right)
        except np.linalg.LinAlgError:
            solution = np.linalg.pinv(systems, hermitian=True) @ right
        values[:, some] = solution[:, :, 0].T
    return np.where(mask, values, 0).astype(np.float32)


def conjugate_gradients(
    matrix: np.ndarray,
    pull: np.ndarray,
    mask: np.ndarray,
    start: np.ndarray,
    steps: int,
    tolerance: float = 0.0,
) -> np.ndarray:
    """Solve H_ss v = p_s for all columns at once, s being each column's kept rows of ``mask`` [K, N].

    H [K, K] has a unit diagonal, so no further preconditioning; ``pull`` is p [K, N]. Stops after ``steps``,
    or when every column's residual is below ``tolerance`` of its ``pull``. The dtype is that of ``pull``.
    """
    zero = pull.dtype.type(0)
    tiny = np.finfo(pull.dtype).tiny
    values = np.where(mask, start, zero)
    residual = np.where(mask, pull - matrix @ values, zero)
    direction = residual.copy()
    size = np.einsum("kn,kn->n", residual, residual)
    goal = tolerance**2 * np.einsum("kn,kn->n", pull, pull)
    for _ in range(steps):
        if (size <= goal).all():
            break
        image = matrix @ direction
        step = size / np.maximum(np.einsum("kn,kn->n", direction, image), tiny)
        values += step * direction
        image *= step
        residual -= image
        residual *= mask
        before, size = size, np.einsum("kn,kn->n", residual, residual)
        direction *= size / np.maximum(before, tiny)
        direction += residual
    return values
