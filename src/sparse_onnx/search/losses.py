"""What each layer loses with zeros and few bits, in units that add up: squares of relative errors of the outputs.

On real inputs as :mod:`sparse_onnx.analysis.sensitivity` measures them. Without, every layer counts as much as the
share of its weight that goes, as if its inputs were uncorrelated and alike and its output as important as any other's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.sensitivity import Loss
from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.lower.forms import FLOAT_BITS
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.solvers import RtnQuantizer
from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask, resolve_sparsity, structure_reason
from sparse_onnx.search.plans import SPARSITIES, LossOf

__all__ = ["measured_losses", "weight_losses"]

_ROUNDED_ACTIVATIONS = 6e-4
"""What a layer loses where its activations are rounded to 8 bits with one scale: on the sentence encoder, whose 36
linears lose .15 so."""


def measured_losses(losses: Mapping[str, Loss]) -> LossOf:
    """From errors on real inputs; a layer without them cannot be judged, and stays dense."""

    def loss(name: str, choice: Choice) -> float | None:
        known = losses.get(name)
        error = None if known is None else known.error(choice)
        return None if error is None else error**2

    return loss


def weight_losses(
    weights: Sequence[Weight],
    structures: Sequence[str],
    progress: Callable[[str], None],
    quantizer: QuantizeWeights | None = None,
    bits: Collection[int] = (),
) -> LossOf:
    """‖W − W′‖² / ‖W‖² of pruning by magnitude, between the shares that are looked at on straight lines, and of
    rounding to the nearest on ``quantizer``'s grids of these ``bits``; of both the sum."""
    tables: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    rounded: dict[tuple[str, int], float] = {}
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
        for own in bits if quantizer is not None else ():
            assert quantizer is not None
            error = _rounding(weight, quantizer.with_bits({weight.name: own}))
            if error is not None:
                rounded[weight.name, own] = error / energy if energy else 0.0
        weight.release()
        progress(f"loss of layers: {index + 1}/{len(weights)}")

    def loss(name: str, choice: Choice) -> float | None:
        total = 0.0
        if choice.sparsity:
            if (name, choice.structure) not in tables:
                return None
            total += float(np.interp(choice.sparsity, *tables[name, choice.structure]))
        if choice.bits < FLOAT_BITS:
            if (name, choice.bits) not in rounded:
                return None
            total += rounded[name, choice.bits]
        if choice.activations < FLOAT_BITS:
            total += _ROUNDED_ACTIVATIONS
        return total

    return loss


def _rounding(weight: Weight, step: QuantizeWeights) -> float | None:
    """‖W − W′‖² with the grid of ``step``; None where a weight cannot have it."""
    if step.reason_against(weight) is not None:
        return None
    W = np.ascontiguousarray(weight.matrix(), np.float32)
    try:
        after = RtnQuantizer(grid=step.grid_for(weight), clip=True).solve(W).matrix()
    except UsageError:  # a scale that is too large for its type
        return None
    return float(np.square(W - after, dtype=np.float64).sum())
