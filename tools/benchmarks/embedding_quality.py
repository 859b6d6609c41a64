"""How near the embeddings of a pruned sentence encoder are to those of the dense one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench

__all__ = ["Quality", "embeddings", "quality"]


@dataclasses.dataclass(frozen=True)
class Quality:
    """``one_minus_cosine`` and ``cosine_p5`` over passages, ``recall10`` in [0, 1]."""

    one_minus_cosine: float
    cosine_p5: float
    recall10: float


def quality(dense: np.ndarray, pruned: np.ndarray) -> Quality:
    """Of embeddings [passages, d], both normalised."""
    cosine = (dense * pruned).sum(axis=1)
    near = [_nearest(embedded) for embedded in (dense, pruned)]
    recall = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(*near, strict=True)])
    return Quality(float(1 - cosine.mean()), float(np.quantile(cosine, 0.05)), float(recall))


def _nearest(embedded: np.ndarray, count: int = 10) -> np.ndarray:
    similarity = embedded @ embedded.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def embeddings(model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], threads: int) -> np.ndarray:
    """Mean over the tokens that are no padding of the first output, normalised: [passages, d], float64."""
    parts = []
    with (
        tempfile.TemporaryDirectory() as work,
        open_runner(model, Workbench(threads, Path(work)), library=False) as runner,
    ):
        for batch in feeds:
            hidden = next(iter(runner.run(dict(batch)).values())).astype(np.float64)
            mask = batch["attention_mask"][:, :, None]
            parts.append((hidden * mask).sum(axis=1) / mask.sum(axis=1))
    embedded = np.concatenate(parts)
    return np.asarray(embedded / np.linalg.norm(embedded, axis=1, keepdims=True))
