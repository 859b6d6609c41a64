"""The quadratic form of a layer's output error, made safe to invert: damping, unit diagonal, factors."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = [
    "Form",
    "damped",
    "inverse",
    "inverse_factor",
    "relative_error",
    "removal_form",
    "shifted_inverse",
    "unit_form",
]

_TRIES = 8
_LEAF = 96
_SHIFT = 0.01  # added to a unit diagonal before it is inverted in float32


def damped(gram: np.ndarray, damping: float) -> np.ndarray:
    """G + damping · mean(diag G) · I in float64: [K, K]."""
    form = np.array(gram, np.float64)
    form[np.diag_indices_from(form)] += damping * form.diagonal().mean()
    return form


def inverse_factor(form: np.ndarray) -> np.ndarray:
    """U upper triangular, float64 [K, K], with U'U = H⁻¹ of the symmetric H = ``form`` with a diagonal of unit scale.

    Where H is no positive definite matrix, .0001 of the mean diagonal is added, then ten times as much, and so on;
    where that does not help, its eigenvalues are clipped. H⁻¹ itself is never made: with H = RR', R upper triangular
    (a Cholesky factor taken from the last input to the first), U is R⁻¹.
    """
    step = 1e-4 * float(form.diagonal().mean())
    for trial in range(_TRIES):
        shifted = form
        if trial:
            shifted = form.copy()
            shifted[np.diag_indices_from(form)] += step * 10 ** (trial - 1)
        try:
            factor = np.linalg.cholesky(shifted[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        _invert_lower(factor)
        return factor[::-1, ::-1]
    values, vectors = np.linalg.eigh(form)
    values = np.maximum(values, max(step, np.finfo(np.float64).tiny))
    return np.asarray(np.linalg.qr(vectors.T / np.sqrt(values)[:, None], mode="r"))


def _invert_lower(factor: np.ndarray) -> None:
    """Invert a lower triangular matrix in place, by halves: nearly all of it is matrix products."""
    size = len(factor)
    if size <= _LEAF:
        factor[:] = np.tril(np.linalg.inv(factor))
        return
    half = size // 2
    first, last = factor[:half, :half], factor[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    factor[half:, :half] = -last @ (factor[half:, :half] @ first)


def inverse(form: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric [K, K] with unit-scale diagonal, float64; see :func:`inverse_factor`."""
    factor = inverse_factor(form)
    return np.asarray(factor.T @ factor)


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """min over V of tr((T - V)' H (T - V)) with diag H = 1: the layer's problem with its inputs rescaled.

    ``matrix`` H [K, K] float32; ``scale`` [K, 1] float32 is what W's rows are multiplied with to get there.
    """

    matrix: np.ndarray
    scale: np.ndarray


def unit_form(gram: np.ndarray, damping: float) -> Form:
    """Damp ``gram`` and scale it to a unit diagonal (all zero inputs keep weight 1 on the diagonal)."""
    form = damped(gram, damping)
    scale = np.sqrt(form.diagonal())
    scale[scale == 0] = 1
    form /= scale
    form /= scale[:, None]
    form[np.diag_indices_from(form)] = 1
    return Form(form.astype(np.float32), scale.astype(np.float32)[:, None])


def removal_form(form: Form) -> Form:
    """Scale ``form`` so that diag H⁻¹ is constant and the mean of diag H is 1, H a little more damped.

    v² is then what removing a weight costs once all others adapt (OBS, Hassibi & Stork 1993), not at once.
    """
    spread = shifted_inverse(form.matrix, _SHIFT).diagonal()
    stretch = np.sqrt(np.mean(spread) / spread).astype(np.float32)
    matrix = form.matrix / stretch / stretch[:, None]
    return Form(matrix, form.scale * stretch[:, None])


def shifted_inverse(matrix: np.ndarray, shift: float) -> np.ndarray:
    """(H + shift · I)⁻¹, float64, of H [K, K], positive semidefinite with a unit diagonal; shift well above rounding.

    By halves through the Schur complement: nearly all of it is matrix products, several times faster than LU.
    In float32 the complement of loud inputs would cancel.
    """
    return _inverse_by_halves(matrix + np.float64(shift) * np.eye(len(matrix)))


def _inverse_by_halves(matrix: np.ndarray) -> np.ndarray:
    size = len(matrix)
    if size <= _LEAF:
        return np.linalg.inv(matrix)
    half = size // 2
    result = np.empty_like(matrix)
    first = _inverse_by_halves(matrix[:half, :half])
    across = first @ matrix[:half, half:]
    second = _inverse_by_halves(matrix[half:, half:] - matrix[half:, :half] @ across)
    corner = across @ second
    result[:half, :half] = first + corner @ across.T
    result[:half, half:] = -corner
    result[half:, :half] = -corner.T
    result[half:, half:] = second
    return result


def relative_error(W: np.ndarray, pruned: np.ndarray, gram: np.ndarray) -> float:
    """‖X(W − W′)‖ / ‖XW‖ from G = X'X, summed in float64; 0 where the layer's output is 0."""
    gram = gram.astype(np.float64, copy=False)
    reference = W.astype(np.float64)
    change = reference - pruned
    whole = float(np.vdot(reference, gram @ reference))
    return float(np.sqrt(max(np.vdot(change, gram @ change), 0.0) / whole)) if whole > 0 else 0.0
