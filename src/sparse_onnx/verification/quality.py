"""Figures of quality on arrays: classification against labels, neighbours of embeddings, and what a drop is.

Pure functions; :mod:`sparse_onnx.verification.metrics` takes them on models.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["Confusion", "drop", "group_recall", "nearest", "neighbour_recall", "predicted_classes"]

_ROWS = 1024  # queries whose similarities are held together


def predicted_classes(scores: np.ndarray) -> np.ndarray:
    """The most probable class for ``scores`` [.., C] float, int64 [..]; -1 where a score is NaN. Integers are classes
    already."""
    if scores.dtype.kind != "f":
        return scores.astype(np.int64)
    return np.where(np.isnan(scores).any(axis=-1), -1, scores.argmax(axis=-1))


@dataclasses.dataclass
class Confusion:
    """Counts by class, int64 [C], over all samples so far: predicted ``right``, ``predicted`` at all, and ``actual``.

    Labels below 0 are left out, predictions below 0 are wrong.
    """

    right: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    predicted: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    actual: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, predicted: np.ndarray, labels: np.ndarray) -> None:
        """Count ``predicted`` against ``labels``, integers of equal shape."""
        counted = labels >= 0
        predicted, labels = predicted[counted], labels[counted]
        given = predicted[predicted >= 0]
        size = max(len(self.actual), *(int(x.max(initial=-1)) + 1 for x in (given, labels)))
        counts = {"right": labels[predicted == labels], "predicted": given, "actual": labels}
        for name, classes in counts.items():
            total = np.bincount(classes, minlength=size)
            total[: len(getattr(self, name))] += getattr(self, name)
            setattr(self, name, total)

    def accuracy(self) -> float:
        """The share of samples that are right; NaN without samples."""
        return _share(int(self.right.sum()), int(self.actual.sum()))

    def recall(self) -> float:
        """Of each class the share that was found, as a mean over the classes that occur (macro average)."""
        occurs = self.actual > 0
        return _mean(self.right[occurs] / self.actual[occurs])

    def f1(self) -> float:
        """2 · right / (predicted + actual), as a mean over the classes that occur or are predicted (macro average)."""
        total = self.predicted + self.actual
        return _mean(2 * self.right[total > 0] / total[total > 0])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def nearest(embeddings: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` other rows of the largest cosine, nearest first, for every row of ``embeddings`` [N, D]: int64 [N, k].

    -1 where there is none: a row with NaN or Inf has no neighbours, and is nobody's. Of equal ones the first is taken.
    Raises ValueError unless 1 <= k < N.
    """
    count = len(embeddings)
    if not 1 <= k < count:
        raise ValueError(f"k must lie in 1..{count - 1} for {count} embeddings, not {k}")
    values = embeddings.astype(np.float64)
    broken = np.asarray(~np.isfinite(values).all(axis=1))
    values[broken] = 0
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    values /= np.where(norms > 0, norms, 1)
    found = np.empty((count, k), np.int64)
    for start in range(0, count, _ROWS):
        rows = np.arange(start, min(start + _ROWS, count))
        similarity = values[rows] @ values.T
        similarity[:, broken] = -np.inf
        similarity[np.arange(len(rows)), rows] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        missing = broken[rows, None] | (np.take_along_axis(similarity, order, axis=1) == -np.inf)
        found[rows] = np.where(missing, -1, order)
    return found


def neighbour_recall(expected: np.ndarray, found: np.ndarray) -> float:
    """The share of the neighbours ``expected`` [N, k] that are among those ``found`` [N, k] of the same row."""
    known = expected >= 0
    hits = known & (expected[:, :, None] == found[:, None, :]).any(axis=-1)
    return _share(int(hits.sum()), int(known.sum()))


def group_recall(found: np.ndarray, groups: np.ndarray) -> float:
    """The share of rows with a neighbour of their own group among those ``found`` [N, k]; ``groups`` are integers [N].

    Rows that are alone in their group, or whose group is below 0, are not asked for.
    """
    names, sizes = np.unique(groups, return_counts=True)
    asked = np.isin(groups, names[(sizes > 1) & (names >= 0)])
    hits = asked & ((groups[found] == groups[:, None]) & (found >= 0)).any(axis=1)
    return _share(int(hits.sum()), int(asked.sum()))


def drop(before: float, after: float, *, lower_is_better: bool) -> float:
    """What a metric lost. Higher is better: ``before - after``, in its own unit, so that .02 of an accuracy are two
    points. Lower is better: the relative increase ``(after - before) / |before|``, so that .02 of a perplexity are two
    per cent; from 0 any increase is infinite. Negative where it gained."""
    if not lower_is_better:
        return before - after
    if before == 0:
        return 0.0 if after == 0 else math.copysign(math.inf, after)
    return (after - before) / abs(before)
