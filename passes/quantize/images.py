"""Integers into convolutions, as ONNX Runtime wants them: what they read, their weights, biases and results.

Before: ``Y = Conv(X, W, b)``, perhaps with ``Relu`` or ``Clip`` behind it. After, X and Y in 8 bits with one scale
each, Y for all its readers, W in int8 with a scale for each output, and b in int32 on the grid of their products::

    Y = DQ(Q(Relu(Conv(DQ(Q(X)), DQ(V), DQ(c)))))

of which ONNX Runtime makes a QLinearConv: between convolutions there are integers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array
from sparse_onnx.model.graph import input_at, name_of
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.calibration.histograms import ChannelHistograms
from sparse_onnx.passes.patterns.match import only_user
from sparse_onnx.passes.quantize.encode import write_quantized
from sparse_onnx.passes.quantize.layers import Builder, quantized_weight
from sparse_onnx.passes.solvers.ranges import Histogram

__all__ = ["Images", "activated"]

_LARGEST = 2.0**30  # of a bias in steps: the sum with the products must stay in 32 bits


def activated(conv: ir.Node) -> ir.Value:
    """The result of a convolution, behind the Relu or Clip that alone reads it."""
    result = conv.outputs[0]
    for op_type in ("Relu", "Clip"):
        user = only_user(result, op_type)
        if user is not None and user.inputs[0] is result:
            return user.outputs[0]
    return result


@dataclasses.dataclass
class Images:
    """Quantizes convolutions one by one, in the order of the graph. ``ranges`` are those of what they read and make;
    ``choose`` finds the range of a histogram."""

    builder: Builder
    ranges: Mapping[str, ChannelHistograms]
    choose: Callable[[Histogram], tuple[float, float]]
    bits: int
    _restored: dict[int, tuple[ir.Value, float]] = dataclasses.field(default_factory=dict)

    def quantize(self, weight: Weight, result: ir.Value) -> str | None:
        """Quantize the convolution of ``weight``, whose (activated) result is ``result``; or say why not."""
        if len(weight.nodes) > 1:
            return "shared by several convolutions"
        (conv,) = weight.nodes
        if result.is_graph_output():
            return "its result is an output of the model"
        if any(user.graph is not conv.graph for user in result.consumers()):
            return "its result is read in the body of an If, Loop or Scan"
        source = conv.inputs[0]
        assert source is not None
        if any(id(value) not in self._restored and self._ends(value) is None for value in (source, result)):
            return "its input or its result is 0 in all calibration data"
        x, step = self._input(source)
        quantized = quantized_weight(np.asarray(weight.matrix(), np.float32), self.bits)
        weight.release()
        write_quantized(self.builder.model, weight, quantized, "dequantize", self.builder.context.store)
        self.builder.say_zero_points(weight)
        conv.replace_input_with(0, x)
        self._bias(conv, quantized.scale[0] * np.float32(step))
        self._result(result)
        return None

    def _ends(self, value: ir.Value) -> tuple[float, float] | None:
        """The range of a value of the model as it was; None where it is always 0."""
        found = self.ranges[value.name or ""]
        ones = np.ones(len(found.low))
        histogram = found.histogram(ones, ones)
        return None if histogram is None else self.choose(histogram)

    def _input(self, value: ir.Value) -> tuple[ir.Value, float]:
        """``value`` rounded, and its scale."""
        if id(value) not in self._restored:
            ends = self._ends(value)
            assert ends is not None
            readers = [user for user in value.consumers() if user.graph is self.builder.model.graph]
            before = self.builder.first(readers)
            self._restored[id(value)] = self.builder.rounded(value, value.name or "input", ends, before)
        return self._restored[id(value)]

    def _bias(self, conv: ir.Node, scale: np.ndarray) -> None:
        array = constant_array(input_at(conv, 2))
        if array is None:
            return
        steps = np.rint(array.astype(np.float64) / scale)
        if not (np.abs(steps) < _LARGEST).all():
            return
        name, builder = f"{name_of(conv)}.bias", self.builder
        parts = [
            builder.constant(name, steps.astype(np.int32)),
            builder.constant(f"{name}.scale", scale.astype(np.float32)),
            builder.constant(f"{name}.zero_point", np.zeros(len(steps), np.int32)),
        ]
        bias = builder.node("DequantizeLinear", parts, f"{name}.restored", conv, ir.DataType.FLOAT, axis=0)
        conv.replace_input_with(2, bias)

    def _result(self, result: ir.Value) -> None:
        """Let all readers of ``result`` see it rounded."""
        ends = self._ends(result)
        assert ends is not None
        uses = [(use.node, use.idx) for use in result.uses()]
        if not uses:
            return
        following = self.builder.first(node for node, _ in uses)
        restored, step = self.builder.rounded(result, result.name or "result", ends, following)
        for node, index in uses:
            node.replace_input_with(index, restored)
        self._restored[id(restored)] = restored, step
