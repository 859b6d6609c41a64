"""``awq`` of ``quant.weight``: scales of the inputs of linears, found on data, put where inputs are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.weights import LINEARS, Weight
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.calibration.calibrator import Calibrator
from sparse_onnx.passes.quantize.layers import Builder, reason_against_integers
from sparse_onnx.passes.quantize.scales import scaled_inputs
from sparse_onnx.passes.solvers.awq import awq
from sparse_onnx.passes.solvers.grid import GridOptions

__all__ = ["scale_inputs"]


def scale_inputs(
    model: ir.Model,
    weights: Sequence[Weight],
    grid: Callable[[Weight], GridOptions],
    calibrated: Callable[[Sequence[Weight]], Calibrator],
    context: PassContext,
) -> list[tuple[str, str]]:
    """Scale inputs of those of ``weights`` that are linears, by :func:`~sparse_onnx.passes.solvers.awq.awq` on the grid
    of each, all readers of an input alike. ``calibrated`` makes the calibrator of some weights.

    Returns the (name, reason) of weights whose inputs keep their scale.
    """
    against = {weight.name: _reason_against(model, weight) for weight in weights}
    declined = [(name, f"rounded without scales: {reason}") for name, reason in against.items() if reason]
    found, without = scaled_inputs(model, [weight for weight in weights if not against[weight.name]])
    declined += [(name, f"rounded without scales: {reason}") for name, reason in without]
    if not found:
        return declined
    statistics = calibrated([weight for place in found for weight in place.weights]).oneshot()
    builder = Builder.of(model, context)
    for place in found:
        first, *_ = place.weights
        if first.name not in statistics:  # the calibrator has said why
            continue
        scales = awq(place.matrix(), statistics[first.name][0], grid(first))
        if np.ptp(scales.scale) == 0:
            declined += [(weight.name, "rounded without scales: none lose less") for weight in place.weights]
            continue
        place.divide(builder, scales.scale)
        context.progress(f"{place.value.name}: scaled by its loudness to the power of {scales.exponent:g}")
    return declined


def _reason_against(model: ir.Model, weight: Weight) -> str | None:
    if weight.nodes[0].op_type not in LINEARS:
        return f"a {weight.nodes[0].op_type} is no linear"
    return reason_against_integers(model, weight)
