"""Recognise a convolution with what can be fused into it: ``act(Conv(X, W) + bias [+ R])``.

Patterns, h being the convolution's result or its sum with R, and every value in between having a single user::

    Conv(X, W, bias [N])                 Add(Conv(X, W, ...), R), R computed and of the same shape: a residual
    Relu(h)                              Clip(h, min, max), constant limits
    Mul(h, Sigmoid(h))                   HardSwish(h), or Mul(h, HardSigmoid(h)) with alpha 1/6 and beta 1/2

Where R is a convolution's result too that nothing else reads, the sum belongs to the first operand of the Add.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.model.constants import constant_number, is_constant
from sparse_onnx.model.graph import input_at, producer
from sparse_onnx.model.shapes import Shapes, agree
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.patterns.conv_window import ConvWindow
from sparse_onnx.passes.patterns.layer import Layer, place_reason, storage_reason
from sparse_onnx.passes.patterns.linear import match_relu, match_silu
from sparse_onnx.passes.patterns.match import gate_of, is_bias, only_user, users_of
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.sparse_ops.ops.sparse_conv import Window, operator_name, outputs_of

__all__ = ["Convolution", "Windowed", "match_clip", "match_conv", "window_of"]


@dataclasses.dataclass(frozen=True)
class Windowed(Layer):
    """A convolution, of floats or of integers."""

    window: Window

    @property
    def stored_outputs(self) -> Outputs:
        return outputs_of(self.weight.shape[1], self.window.group)

    def products(self, x_shape: tuple[int, ...]) -> int:
        batch, _, *sizes = x_shape
        return batch * math.prod(self.window.output_size(*sizes))


@dataclasses.dataclass(frozen=True)
class Convolution(Windowed):
    """A convolution of the graph. ``limits`` are those of a clip; ``add`` is the node that adds the residual, and
    ``residual`` the index of R among its inputs."""

    limits: tuple[float, float] | None
    add: ir.Node | None
    residual: int

    @property
    def op_type(self) -> str:
        return operator_name(self.activation, self.add is not None)

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        values = [self.nodes[0].inputs[0]]
        if self.add is not None:
            values.append(self.add.inputs[self.residual])
        return tuple(value for value in values if value is not None)

    @property
    def attributes(self) -> Mapping[str, int | float | Sequence[int]]:
        attributes: dict[str, int | float | Sequence[int]] = {**self.window.attributes()}
        if self.limits is not None:
            attributes["min"], attributes["max"] = self.limits
        return attributes

    @property
    def companion(self) -> bool:
        """A depthwise convolution. The runtime's own works in blocks of channels: next to sparse ones, which do not,
        it would have to reorder its input and output."""
        return self.window.group > 1 and self.weight.tensor.shape[1] == 1


def match_conv(weight: Weight, node: ir.Node, main_graph: ir.Graph, shapes: Shapes) -> Convolution | str:
    """The convolution that ``node`` (a user of ``weight``) is part of, or the reason why it cannot be replaced."""
    if reason := place_reason(node, main_graph) or storage_reason(weight):
        return reason
    if len(weight.tensor.shape) not in (3, 4):
        return f"has rank {len(weight.tensor.shape)}; the sparse kernels take one axis or images: rank 3 or 4"
    x, output = node.inputs[0], node.outputs[0]
    if x is None or is_constant(x):
        return "has a constant activation"
    bias = input_at(node, 2)
    if bias is not None and not is_bias(bias, weight.shape[1]):
        return "is a Conv whose bias is no constant"
    window = window_of(node, weight, shapes)
    if isinstance(window, str):
        return window
    nodes = [node]
    residual = _residual(output, shapes)
    add = None
    if residual is not None:
        add, index = residual
        nodes.append(add)
        output = add.outputs[0]
    else:
        index = 0
    activation, limits = "none", None
    if (clipped := match_clip(output)) is not None:
        clip, limits = clipped
        activation, matched = "clip", [clip]
    else:
        matched = []
        for name, matcher in _ACTIVATIONS.items():
            if (found := matcher(output)) is not None:
                activation, matched = name, found
                break
    if matched:
        output = matched[-1].outputs[0]
    return Convolution(weight, (*nodes, *matched), bias, activation, output, window, limits, add, index)


def window_of(node: ir.Node, weight: Weight, shapes: Shapes) -> Window | str:
    """The attributes of a Conv with its padding made explicit, or why that cannot be done."""
    found = ConvWindow.of(node, tuple(int(size) for size in weight.tensor.shape.numpy()[2:]))
    if not found.fits or weight.shape[1] % found.groups:
        return "is a Conv with attributes that do not fit its weight"
    sizes: list[int] = []
    if found.needs_size:
        dims = shapes.dims(node.inputs[0])
        sizes = [size for size in dims[2:] if isinstance(size, int)]
        if len(dims) != 2 + len(found.kernel) or len(sizes) != len(found.kernel):
            return f"is a Conv with auto_pad {found.auto_pad} whose input has no fixed size"
    pads = found.explicit_pads(sizes)
    if min(pads) < 0:
        return "is a Conv with attributes that do not fit its weight"
    return Window(found.kernel, found.strides, pads, found.dilations, found.groups)


def _residual(output: ir.Value, shapes: Shapes) -> tuple[ir.Node, int] | None:
    """The Add of a residual to ``output``, and which of its inputs that is."""
    add = only_user(output, "Add")
    if add is None:
        return None
    index = 1 if add.inputs[0] is output else 0
    other = add.inputs[index]
    if other is None or is_constant(other):
        return None
    if index == 0 and _is_free_convolution(other):
        return None
    dims = shapes.dims(output)  # known to have four
    return (add, index) if dims and agree(dims, shapes.dims(other)) else None


def _is_free_convolution(value: ir.Value) -> bool:
    return producer(value, "Conv") is not None and len(users_of(value)) == 1


def match_clip(h: ir.Value) -> tuple[ir.Node, tuple[float, float]] | None:
    """The Clip of ``h`` with constant limits, and these."""
    node = only_user(h, "Clip")
    if node is None or node.inputs[0] is not h:
        return None
    limits = [-math.inf, math.inf]
    for index, value in enumerate(node.inputs[1:]):
        if value is None:
            continue
        number = constant_number(value)
        if number is None:
            return None
        limits[index] = number
    low, high = limits
    return (node, (low, high)) if low <= high else None


def _hard_swish(h: ir.Value) -> list[ir.Node] | None:
    if (node := only_user(h, "HardSwish")) is not None:
        return [node]
    if (found := gate_of(h, "HardSigmoid")) is None:
        return None
    gate, product = found
    alpha, beta = gate.attributes.get_float("alpha", 0.2), gate.attributes.get_float("beta", 0.5)
    return [gate, product] if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5 else None


_ACTIVATIONS: dict[str, Callable[[ir.Value], list[ir.Node] | None]] = {
    "relu": match_relu,
    "silu": match_silu,
    "hard_swish": _hard_swish,
}
