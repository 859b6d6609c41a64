"""What each layer loses with zeros, in units that add up: squares of relative errors of the model's outputs.

On real inputs as :mod:`sparse_onnx.analysis.sensitivity` measures them. Without, every layer counts as much as the
share of its weight that goes, as if its inputs were uncorrelated and alike and its output as important as any other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sparse_onnx.analysis.forecast import Choice
from sparse_onnx.analysis.sensitivity import Loss
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask, resolve_sparsity, structure_reason
from sparse_onnx.search.plans import SPARSITIES, LossOf

__all__ = ["measured_losses", "weight_losses"]


def measured_losses(losses: Mapping[str, Loss]) -> LossOf:
    """From errors on real inputs; a layer without them cannot be judged, and stays dense."""

    def loss(name: str, choice: Choice) -> float | None:
        known = losses.get(name)
        error = None if known is None else known.error(choice)
        return None if error is None else error**2

    return loss


def weight_losses(
    weights: Sequence[Weight], structures: Sequence[str], progress: Callable[[str], None]
) -> LossOf:
    """‖W − W′‖² / ‖W‖² of pruning by magnitude; between the shares that are looked at, on straight lines."""
    tables: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for index, weight in enumerate(weights):
        W = np.abs(weight.matrix())
        energy = float(np.square(W, dtype=np.float64).sum())
        for structure in map(MaskStructure.parse, structures):
            if structure_reason(weight.shape, structure) is not None:
                continue
            fixed = structure.kind == "n:m"
            shares = [resolve_sparsity(None, structure)] if fixed else list(SPARSITIES)
            lost = []
            for share in shares:
                keep = keep_mask(W, None if fixed else share, structure)
                lost.append(float(np.square(W[~keep], dtype=np.float64).sum()) / energy if energy else 0.0)
            tables[weight.name, str(structure)] = [0.0, *shares], [0.0, *lost]
        del W
        weight.release()
        progress(f"loss of layers: {index + 1}/{len(weights)}")

    def loss(name: str, choice: Choice) -> float | None:
        table = tables.get((name, choice.structure))
        return None if table is None else float(np.interp(choice.sparsity, *table))

    return loss
