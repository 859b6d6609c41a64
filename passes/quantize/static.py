"""``quant.static``: integers into linears and convolutions, with ranges of the activations that calibration has found.

Before: ``Y = MatMul(X, W)`` or ``Gemm(X, W, b)``. After, for all linears that read X together::

    A = Mul(X, 1 / s)                                              s [K] > 0, where that makes the error smaller
    Q = DequantizeLinear(QuantizeLinear(A, a, z), a, z)            uint8, one scale a and zero point z
    Y = MatMul(Q, DequantizeLinear(V, b))                          int8 V of s · W, one scale an output

of which ONNX Runtime makes products of integers. The sums are exact, and nothing else is rounded: norms, softmax and
residuals stay as they are. A Gemm gives up its bias to an Add. Convolutions are those of
:mod:`~sparse_onnx.passes.quantize.images`.

One range for a whole tensor is what costs accuracy: few loud channels take it for themselves. s evens channels out
(:mod:`~sparse_onnx.passes.solvers.smoothing`); its exponent, and by default the range, are those with the least error
of the layer's *output*, the squares of W's rows being the weights.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import is_standard
from sparse_onnx.model.weights import CONVOLUTIONS, DEFAULT_IGNORE, LINEARS, Selection, Weight
from sparse_onnx.options import require
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.calibration import Calibrator
from sparse_onnx.passes.calibration.histograms import ChannelHistograms
from sparse_onnx.passes.quantize.encode import write_quantized
from sparse_onnx.passes.quantize.images import Images, activated
from sparse_onnx.passes.quantize.layers import (
    Builder,
    chosen_layers,
    evened_statistics,
    layers_by_input,
    quantized_weight,
    resolved_bits,
)
from sparse_onnx.passes.solvers.ranges import CALIBRATORS
from sparse_onnx.passes.solvers.smoothing import rounding_errors, smoothing_scale
from sparse_onnx.passes.solvers.statistics import InputStatistics
from sparse_onnx.running.host import available_cores

__all__ = ["Static"]

_WORTH = 0.9  # of the squared error: a Mul takes time, so it must bring it down at least to this part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Pass):
    """Quantize weights and inputs of linears and convolutions to 8 bits, of these the results, too.

    Attributes:
        calibrator: How the range of an input is chosen; see :mod:`~sparse_onnx.passes.solvers.ranges`.
        smooth: Even channels out before they are rounded, where that pays.
        weights: How weights are rounded: ``gptq`` makes up for each error by the weights that follow, on the second
            moments of the rounded inputs; ``rtn`` takes the nearest, in a third of the time.
        weight_bits: 8, or 7 for processors that add products of bytes with saturation (AVX2, AVX-512 without VNNI);
            None: what this machine needs.
        max_layer_error: Layers that are expected to lose a larger part of their output than this stay as they are.
        targets, ignore: The weights, see :class:`~sparse_onnx.model.weights.Selection`.
    """

    name: ClassVar[str] = "quant.static"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs_calibration: ClassVar[bool] = True
    calibrator: Literal["mse", "minmax", "percentile", "entropy"] = "mse"
    smooth: bool = True
    weights: Literal["gptq", "rtn"] = "gptq"
    weight_bits: int | None = None
    max_layer_error: float | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def check(self) -> None:
        require(self.weight_bits in (None, 7, 8), "weight_bits", self.weight_bits, "7 or 8")
        if self.max_layer_error is not None:
            require(self.max_layer_error > 0, "max_layer_error", self.max_layer_error, "above 0")
        _ = self.selection

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        weights, left = chosen_layers(model, self.selection, (*LINEARS, *CONVOLUTIONS))
        bits = resolved_bits(self.weight_bits)
        declined = [self.declined(place, reason) for place, reason in left]
        statistics: dict[str, int | float] = {"weights": 0, "inputs": 0, "smoothed": 0, "weight_bits": bits}
        if not weights:
            return PassResult(model, False, statistics, tuple(declined))
        data = context.calibration_for(self.name)
        threads = (None if data.options is None else data.options.threads) or available_cores()
        calibrator = Calibrator(
            model, weights, data.samples, data.options, work=data.work, progress=context.progress
        )
        declined += [self.declined(name, reason) for name, reason in calibrator.declined]
        known = [weight for weight in weights if weight.name in calibrator.captures]
        linears = [weight for weight in known if weight.nodes[0].op_type in LINEARS]
        results = {weight.name: activated(weight.nodes[0]) for weight in known if weight not in linears}
        ranges = calibrator.ranges({name: value.name or "" for name, value in results.items()})
        moments = calibrator.oneshot(weights=linears) if self.weights == "gptq" and linears else None
        builder = Builder.of(model, context)
        groups = layers_by_input(linears)
        images = Images(builder, ranges, CALIBRATORS[self.calibrator], bits)
        for weight in known:
            if weight.name not in results:
                continue
            reason = images.quantize(weight, results[weight.name])
            if reason is not None:
                declined.append(self.declined(weight.name, reason))
                continue
            statistics["weights"] += 1
            statistics["inputs"] += 1
        for value, group in groups:
            found = ranges[value.name or ""]
            plan = self._plan(found, group, bits)
            if isinstance(plan, str):
                declined += [self.declined(weight.name, plan) for weight in group]
                continue
            statistics_of = None if moments is None else moments[group[0].name][0]
            _write(builder, value, group, plan, statistics_of, bits, threads)
            del statistics_of
            statistics["inputs"] += 1
            statistics["smoothed"] += plan.scale is not None
            statistics["weights"] += len(group)
            context.progress(
                f"{value.name}: {plan.low:.3g} to {plan.high:.3g}, expected error {plan.error:.2%}"
            )
        return PassResult(model, statistics["weights"] > 0, statistics, tuple(declined))

    def _plan(self, found: ChannelHistograms, group: tuple[Weight, ...], bits: int) -> _Plan | str:
        """How the input of the linears ``group`` is rounded, or why it is not."""
        W = np.concatenate([weight.matrix() for weight in group], axis=1).astype(np.float64)
        channels = found.channels
        plain = np.ones(len(W))
        best = None
        if self.smooth:
            scale = smoothing_scale(W, channels, bits)
            evened = sum(rounding_errors(W, channels, scale.astype(np.float64), bits))
            if evened < _WORTH * sum(rounding_errors(W, channels, plain, bits)):
                best = scale
        scale = plain if best is None else best.astype(np.float64)
        energy = (W**2).sum(axis=1)
        histogram = found.histogram(scale, scale**2 * energy)
        signal = float(channels.power @ energy)
        if histogram is None or not signal > 0:
            return "its input is 0 in all calibration data"
        low, high = CALIBRATORS[self.calibrator](histogram)
        error = float(np.sqrt(sum(rounding_errors(W, channels, scale, bits)) / signal))
        if self.max_layer_error is not None and error > self.max_layer_error:
            return f"expected to lose {error:.1%} of its output, more than max_layer_error"
        return _Plan(best, low, high, channels.power, error)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """``scale`` s [K] float32 or None; the range of X / s; the mean squares [K] of X; the expected relative error."""

    scale: np.ndarray | None
    low: float
    high: float
    power: np.ndarray
    error: float


def _write(
    builder: Builder,
    value: ir.Value,
    group: tuple[Weight, ...],
    plan: _Plan,
    moments: InputStatistics | None,
    bits: int,
    threads: int,
) -> None:
    first = builder.first(node for weight in group for node in weight.nodes)
    stem = value.name or "input"
    source = value
    if plan.scale is not None:
        inverse = builder.constant(f"{stem}.evening", (1 / plan.scale).astype(np.float32))
        source = builder.node("Mul", [value, inverse], f"{stem}.evened", first, ir.DataType.FLOAT, value)
    restored, step = builder.rounded(source, stem, (plan.low, plan.high), first)
    scale = np.ones(len(plan.power), np.float32) if plan.scale is None else plan.scale
    known = InputStatistics(plan.power, None, 1) if moments is None else moments
    known = evened_statistics(known, scale, step**2 / 12)
    for weight in group:
        W = np.asarray(weight.matrix(), np.float32) * scale[:, None]
        weight.release()
        quantized = quantized_weight(W, bits, known, feedback=moments is not None, threads=threads)
        write_quantized(builder.model, weight, quantized, "dequantize", builder.context.store)
        builder.say_zero_points(weight)
        for node in weight.nodes:
            node.replace_input_with(0, restored)
            builder.part_bias(node)
            if _becomes_a_gemm(node, value):
                node.op_type = "Gemm"


def _becomes_a_gemm(node: ir.Node, value: ir.Value) -> bool:
    """Whether ONNX Runtime would join a product of matrices with the Add behind it to a Gemm with a bias, which it does
    not take integers into. A Gemm without one stays as it is."""
    matrix = value.shape is not None and len(value.shape) == 2
    return (
        matrix
        and node.op_type == "MatMul"
        and any(is_standard(user, "Add") for user in node.outputs[0].consumers())
    )
