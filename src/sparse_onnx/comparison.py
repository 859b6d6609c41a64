"""How far the outputs of two models lie apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sparse_onnx.errors import VerificationError
from sparse_onnx.inputs import Feeds

__all__ = ["Difference", "compare"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a candidate's float outputs from the reference's.

    max_abs: largest absolute difference.
    relative_error: ‖candidate − reference‖₂ / ‖reference‖₂ of the worst output.
    cosine: mean over samples (first axis) of the cosine between the two, of the worst output.
    top1_agreement: share of rows (last axis) whose largest element is the same one, of the worst output.
    worst_output: the output with the largest relative error.
    """

    max_abs: float
    relative_error: float
    cosine: float
    top1_agreement: float
    worst_output: str


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.reshape(-1)))


def _one(reference: np.ndarray, candidate: np.ndarray) -> tuple[float, float, float, float]:
    if not np.array_equal(np.isnan(reference), np.isnan(candidate)):
        return np.inf, np.inf, 0.0, 0.0
    a, b = (
        np.nan_to_num(x.astype(np.float64), posinf=np.finfo(np.float32).max) for x in (reference, candidate)
    )
    difference, scale = _norm(a - b), _norm(a)
    relative = difference / scale if scale else (0.0 if difference == 0 else np.inf)
    rows_a, rows_b = (x.reshape(x.shape[0] if x.ndim else 1, -1) for x in (a, b))
    norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
    dots = np.einsum("ij,ij->i", rows_a, rows_b)
    equal = (rows_a == rows_b).all(1)
    cosines = np.where(norms > 0, dots / np.where(norms > 0, norms, 1), equal.astype(float))
    last_a, last_b = (x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (a, b))
    agreement = float((last_a.argmax(1) == last_b.argmax(1)).mean()) if last_a.size else 1.0
    return (
        float(np.abs(a - b).max(initial=0)),
        relative,
        float(cosines.mean()) if cosines.size else 1.0,
        agreement,
    )


def compare(reference: Sequence[Feeds], candidate: Sequence[Feeds]) -> Difference:
    """Compare the outputs of two models on the same batches (one dict of arrays a batch).

    Integer and bool outputs must be equal to count as no difference: each unequal element counts as 1.
    Raises VerificationError if names or shapes differ.
    """
    worst: list[tuple[float, float, float, float, str]] = []
    for name in reference[0]:
        parts = []
        for expected, got in zip(reference, candidate, strict=True):
            if name not in got:
                raise VerificationError(f"the candidate has no output {name!r}; it has {', '.join(got)}")
            a, b = expected[name], got[name]
            if a.shape != b.shape:
                raise VerificationError(
                    f"output {name!r} has shape {list(b.shape)} instead of {list(a.shape)}"
                )
            parts.append((a, b))
        results = [_one(a, b) for a, b in parts]
        weights = [max(1, a.shape[0] if a.ndim else 1) for a, _ in parts]
        squares = [
            (_norm(np.nan_to_num(a.astype(np.float64))) ** 2, r[1])
            for (a, _), r in zip(parts, results, strict=True)
        ]
        total = sum(square for square, _ in squares)
        relative = max(r[1] for r in results)
        if total > 0 and np.isfinite(relative):
            relative = float(np.sqrt(sum(square * error**2 for square, error in squares) / total))
        cosine = float(np.average([r[2] for r in results], weights=weights))
        agreement = float(np.average([r[3] for r in results], weights=weights))
        worst.append((max(r[0] for r in results), relative, cosine, agreement, name))
    return Difference(
        max(row[0] for row in worst),
        max(row[1] for row in worst),
        min(row[2] for row in worst),
        min(row[3] for row in worst),
        max(worst, key=lambda row: row[1])[4],
    )
