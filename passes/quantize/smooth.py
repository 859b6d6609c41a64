"""``quant.smooth``: loud inputs of linears become quieter where they are made; the model stays the same.

Their inputs are divided by scales s [K] in what makes them, see :mod:`~sparse_onnx.passes.quantize.scales`. In exact
arithmetic nothing changes. What rounds activations with few ranges afterwards loses less: s is that of
:mod:`~sparse_onnx.passes.solvers.smoothing`. Where an input cannot have scales ``quant.static`` puts a Mul there.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.weights import DEFAULT_IGNORE, LINEARS, Selection
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.calibration import Calibrator
from sparse_onnx.passes.quantize.layers import Builder, chosen_layers
from sparse_onnx.passes.quantize.scales import scaled_inputs
from sparse_onnx.passes.solvers.smoothing import rounding_errors, smoothing_scale

__all__ = ["Smooth"]

_WORTH = 0.95  # of the squared error that rounding would make: what changes less is not worth a change of the weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """See the module's docstring. ``targets`` and ``ignore`` choose the linears that read, see
    :class:`~sparse_onnx.model.weights.Selection`."""

    name: ClassVar[str] = "quant.smooth"
    stage: ClassVar[Stage] = Stage.SCALE
    needs_calibration: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def check(self) -> None:
        _ = self.selection

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        weights, left = chosen_layers(model, self.selection, LINEARS)
        declined = [self.declined(place, reason) for place, reason in left]
        found, without = scaled_inputs(model, weights)
        declined += [self.declined(place, reason) for place, reason in without]
        if not found:
            return PassResult(model, False, {"weights": 0, "inputs": 0}, tuple(declined))
        data = context.calibration_for(self.name)
        readers = [weight for place in found for weight in place.weights]
        calibrator = Calibrator(
            model, readers, data.samples, data.options, work=data.work, progress=context.progress
        )
        ranges = calibrator.ranges()
        builder = Builder.of(model, context)
        statistics: dict[str, int | float] = {"weights": 0, "inputs": 0}
        for place in found:
            W, channels = place.matrix(), ranges[place.value.name or ""].channels
            scale = smoothing_scale(W, channels)
            before = sum(rounding_errors(W, channels, np.ones(len(W))))
            after = sum(rounding_errors(W, channels, scale.astype(np.float64)))
            if not after < _WORTH * before:
                declined += [
                    self.declined(weight.name, "its input is smooth already") for weight in place.weights
                ]
                continue
            place.divide(builder, scale)
            statistics["weights"] += len(place.weights)
            statistics["inputs"] += 1
            context.progress(
                f"{place.value.name}: smoothed, rounding would lose {np.sqrt(after / before):.0%} of before"
            )
        return PassResult(model, statistics["weights"] > 0, statistics, tuple(declined))
