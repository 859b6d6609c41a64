"""How far the outputs of two models lie apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.document import DifferenceDocument, finite
from sparse_onnx.errors import VerificationError
from sparse_onnx.verification.predictions import Head, Prediction, compare_predictions

__all__ = ["Difference", "compare"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a candidate's outputs from the reference's, over all batches; of each figure that of the worst output.

    max_abs: largest absolute difference.
    max_relative: the same / the largest absolute value of the reference.
    relative_error: ‖candidate − reference‖₂ / ‖reference‖₂.
    cosine: mean over samples (first axis) of the cosine between the two.
    top1_agreement: share of rows (last axis) whose largest element is the same one.
    worst_output: the output with the largest relative error.
    predictions: of each output that holds logits, how far the predictions lie apart.
    outputs: the figures of each output alone, ``worst_output`` being its name; () for such a one.

    NaN and Inf must stand in the same places, with the same sign, and then count as no difference; if they do
    not, the differences are infinite and the others 0. Integer and bool outputs are equal or not, whatever the
    distance: each unequal element counts as 1 in 1, and cosine and agreement are the share of equal elements.
    """

    max_abs: float
    relative_error: float
    cosine: float
    top1_agreement: float
    worst_output: str
    predictions: tuple[Prediction, ...] = ()
    max_relative: float = 0.0
    outputs: tuple[Difference, ...] = dataclasses.field(default=(), compare=False)

    def to_dict(self) -> DifferenceDocument:
        """For JSON, which has no Inf and NaN: None there."""
        return {
            **self._figures(),
            "worst_output": self.worst_output,
            "predictions": [found.to_dict() for found in self.predictions],
            "outputs": [{"output": found.worst_output, **found._figures()} for found in self.outputs],
        }

    def _figures(self) -> _Figures:
        return {
            "max_abs": finite(self.max_abs),
            "max_relative": finite(self.max_relative),
            "relative_error": finite(self.relative_error),
            "cosine": finite(self.cosine),
            "top1_agreement": finite(self.top1_agreement),
        }


class _Figures(TypedDict):
    max_abs: float | None
    max_relative: float | None
    relative_error: float | None
    cosine: float | None
    top1_agreement: float | None


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What adds up over batches; ``cosine`` and ``agreeing`` are sums over ``samples`` and ``rows``."""

    max_abs: float
    difference: float  # squared norms
    reference: float
    cosine: float
    samples: int
    agreeing: float
    rows: int
    largest: float  # of the reference's absolute values


_BROKEN = _Sums(math.inf, math.inf, 0.0, 0.0, 1, 0.0, 1, 0.0)


def compare(
    reference: Sequence[Feeds],
    candidate: Sequence[Feeds],
    heads: Sequence[Head] = (),
    inputs: Sequence[Feeds] = (),
) -> Difference:
    """Compare the outputs of two models on the same batches (one dict of arrays a batch).

    With ``heads``, the outputs that hold logits, their predictions are compared too; that takes the ``inputs``.

    Raises VerificationError if names or shapes differ.
    """
    results = []
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
            parts.append(_sums(a, b) if a.dtype.kind == "f" else _unequal(a, b))
        results.append(_total(parts, name))
    return Difference(
        max(result.max_abs for result in results),
        max(result.relative_error for result in results),
        min(result.cosine for result in results),
        min(result.top1_agreement for result in results),
        max(results, key=lambda result: result.relative_error).worst_output,
        compare_predictions(heads, reference, candidate, inputs) if heads else (),
        max(result.max_relative for result in results),
        tuple(results),
    )


def _total(parts: Sequence[_Sums], name: str) -> Difference:
    if _BROKEN in parts:
        return Difference(math.inf, math.inf, 0.0, 0.0, name, max_relative=math.inf)
    difference, scale = sum(part.difference for part in parts), sum(part.reference for part in parts)
    samples, rows = sum(part.samples for part in parts), sum(part.rows for part in parts)
    max_abs, largest = max(part.max_abs for part in parts), max(part.largest for part in parts)
    return Difference(
        max_abs,
        _ratio(math.sqrt(difference), math.sqrt(scale)),
        sum(part.cosine for part in parts) / samples if samples else 1.0,
        sum(part.agreeing for part in parts) / rows if rows else 1.0,
        name,
        max_relative=_ratio(max_abs, largest),
    )


def _ratio(difference: float, scale: float) -> float:
    return difference / scale if scale else math.inf if difference else 0.0


def _sums(reference: np.ndarray, candidate: np.ndarray) -> _Sums:
    if not reference.size:
        return _Sums(0.0, 0.0, 0.0, 0.0, 0, 0.0, 0, 0.0)
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], candidate[~finite], equal_nan=True):
        return _BROKEN
    if not np.isfinite(candidate[finite]).all():
        return _BROKEN
    a, b = (np.where(finite, x, 0).astype(np.float64) for x in (reference, candidate))
    samples_a, samples_b = (x.reshape(x.shape[0] if x.ndim else 1, -1) for x in (a, b))
    norms = np.linalg.norm(samples_a, axis=1) * np.linalg.norm(samples_b, axis=1)
    dots = np.einsum("ij,ij->i", samples_a, samples_b)
    equal = (samples_a == samples_b).all(1)  # exactly 1 for these, zeros included
    cosines = np.where(equal, 1.0, np.clip(dots / np.where(norms > 0, norms, 1), -1, 1))
    rows_a, rows_b = (x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (a, b))
    agreeing = rows_a.argmax(1) == rows_b.argmax(1)
    return _Sums(
        float(np.abs(a - b).max()),
        float(np.square(a - b).sum()),
        float(np.square(a).sum()),
        float(cosines.sum()),
        cosines.size,
        float(agreeing.sum()),
        agreeing.size,
        float(np.abs(a).max()),
    )


def _unequal(reference: np.ndarray, candidate: np.ndarray) -> _Sums:
    unequal = int(np.count_nonzero(reference != candidate))
    size = reference.size
    return _Sums(float(unequal > 0), unequal, size, size - unequal, size, size - unequal, size, 1.0)
