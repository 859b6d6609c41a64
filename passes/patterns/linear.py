"""Recognise a linear layer with what can be fused into it: ``act(X · W + bias)``.

Patterns, h being the linear's result and every value in between having a single user::

    MatMul(X, W)                         Add(MatMul(X, W), bias [N])        Gemm(X, W, bias [N] or [1, N])
    Relu(h)                              Gelu(h), approximate none or tanh (opset 20, or com.microsoft)
    Mul(h, Sigmoid(h))                   Mul(h, Sigmoid(Mul(h, 1.702))), the GELU of CLIP
                                         Mul(Mul(h, Add(Erf(Div(h, √2)), 1)), 0.5), and its other associations
    Mul(Mul(h, Add(Tanh(√(2/π) · (h + 0.044715 h³)), 1)), 0.5), and its other associations

An Add whose other operand is no constant [N], or [1, ..., 1, N] with no more axes than h, is not a bias and stays
outside. Constants are initializers or Constant nodes; a number has one element and no more axes than h, or it would
add some.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx.model.constants import is_constant
from sparse_onnx.model.encodings import Dense
from sparse_onnx.model.graph import input_at, is_read_outside, is_standard, producer
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.patterns.layer import Layer, place_reason, storage_reason
from sparse_onnx.passes.patterns.match import (
    gate_of,
    is_bias,
    is_scalar,
    is_scaled,
    only_user,
    other_operand,
    users_of,
)
from sparse_onnx.sparse_ops.ops.sparse_matmul import OP_TYPES

__all__ = ["Linear", "match_activation", "match_linear", "match_relu", "match_silu"]


@dataclasses.dataclass(frozen=True)
class Linear(Layer):
    """A linear layer of the graph."""

    @property
    def op_type(self) -> str:
        return OP_TYPES[self.activation]

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        x = self.nodes[0].inputs[0]
        assert x is not None
        return (x,)

    def products(self, x_shape: tuple[int, ...]) -> int:
        return math.prod(x_shape[:-1])


def match_linear(weight: Weight, node: ir.Node, main_graph: ir.Graph, shapes: Shapes) -> Linear | str:
    """The linear that ``node`` (a user of ``weight``) is part of, or the reason why it cannot be replaced."""
    if reason := place_reason(node, main_graph) or storage_reason(weight):
        return reason
    x, output = node.inputs[0], node.outputs[0]
    if x is None or is_constant(x):
        return "has a constant activation"
    if not isinstance(weight.encoding, Dense) and producer(x, "DequantizeLinear") is not None:
        return "its input is rounded, too: only products of integers take it"
    nodes = [node]
    bias: ir.Value | None = None
    N = weight.shape[1]
    if node.op_type == "Gemm":
        if is_scaled(node):
            return "is a Gemm with alpha or beta other than 1"
        bias = input_at(node, 2)
        if bias is not None and not is_bias(bias, N):
            return "is a Gemm whose C is no constant bias"
    elif (add := only_user(output, "Add")) is not None:
        other = other_operand(add, output)
        if is_bias(other, N) and not shapes.may_add_axes(other, output):
            bias, output = other, add.outputs[0]
            nodes.append(add)
    activation, behind = match_activation(output, shapes)
    if behind:
        output = behind[-1].outputs[0]
    return Linear(weight, (*nodes, *behind), bias, activation, output)


def match_activation(h: ir.Value, shapes: Shapes) -> tuple[str, list[ir.Node]]:
    """The activation of ``h``, a key of :data:`OP_TYPES`, and its nodes, the one that gives the result last."""
    for activation, matcher in _ACTIVATIONS.items():
        if (matched := matcher(h, shapes)) is not None:
            return activation, matched
    return "none", []


def match_relu(h: ir.Value) -> list[ir.Node] | None:
    """The node of ``Relu(h)``, if nothing else reads h."""
    node = only_user(h, "Relu")
    return [node] if node is not None else None


def _gelu_node(h: ir.Value, approximate: str) -> list[ir.Node] | None:
    node = only_user(h, "Gelu")
    if node is not None and node.attributes.get_string("approximate", "none") == approximate:
        return [node]
    contrib = only_user(h, "Gelu" if approximate == "none" else "FastGelu", "com.microsoft")
    if contrib is not None and len([value for value in contrib.inputs if value is not None]) == 1:
        return [contrib]
    return None


def match_silu(h: ir.Value) -> list[ir.Node] | None:
    """The nodes of ``Mul(h, Sigmoid(h))``, if nothing else reads h."""
    found = gate_of(h, "Sigmoid")
    return list(found) if found is not None else None


def _quick_gelu(h: ir.Value, shapes: Shapes) -> list[ir.Node] | None:
    for scale in users_of(h):
        if not is_standard(scale, "Mul") or not is_scalar(other_operand(scale, h), 1.702, h, shapes):
            continue
        sigmoid = only_user(scale.outputs[0], "Sigmoid")
        product = only_user(sigmoid.outputs[0], "Mul") if sigmoid is not None else None
        if sigmoid is None or product is None or other_operand(product, sigmoid.outputs[0]) is not h:
            continue
        return _covered(h, [scale, sigmoid, product])
    return None


def _gate(h: ir.Value, inner: list[ir.Node], gate: ir.Value, shapes: Shapes) -> list[ir.Node] | None:
    """``0.5 · h · (1 + gate)`` in any association; ``inner`` are the nodes that make ``gate`` from h."""
    shift = only_user(gate, "Add")
    if shift is None or not is_scalar(other_operand(shift, gate), 1.0, h, shapes):
        return None
    first = only_user(shift.outputs[0], "Mul")
    if first is None:
        return None
    other = other_operand(first, shift.outputs[0])
    if other is h:  # (h · (1 + gate)) · 0.5
        last = only_user(first.outputs[0], "Mul")
        if last is None or not is_scalar(other_operand(last, first.outputs[0]), 0.5, h, shapes):
            return None
        return [*inner, shift, first, last]
    if is_scalar(other, 0.5, h, shapes):  # h · (0.5 · (1 + gate))
        last = only_user(first.outputs[0], "Mul")
        if last is None or other_operand(last, first.outputs[0]) is not h:
            return None
        return [*inner, shift, first, last]
    half = producer(other, "Mul")  # (0.5 · h) · (1 + gate)
    if half is None or h not in half.inputs or not is_scalar(other_operand(half, h), 0.5, h, shapes):
        return None
    if only_user(half.outputs[0], "Mul") is not first:
        return None
    return [*inner, half, shift, first]


def _covered(h: ir.Value, nodes: list[ir.Node] | None) -> list[ir.Node] | None:
    """``nodes`` if they are all that reads h: nothing outside the pattern may need it."""
    return None if nodes is None or is_read_outside(h, nodes) else nodes


def _gelu_erf(h: ir.Value, shapes: Shapes) -> list[ir.Node] | None:
    def is_number(value: ir.Value | None, expected: float) -> bool:
        return is_scalar(value, expected, h, shapes)

    for scale in users_of(h):
        if not (
            (is_standard(scale, "Div") and scale.inputs[0] is h and is_number(scale.inputs[1], math.sqrt(2)))
            or (is_standard(scale, "Mul") and is_number(other_operand(scale, h), math.sqrt(0.5)))
        ):
            continue
        erf = only_user(scale.outputs[0], "Erf")
        if erf is not None:
            return _covered(h, _gate(h, [scale, erf], erf.outputs[0], shapes))
    return None


def _gelu_tanh(h: ir.Value, shapes: Shapes) -> list[ir.Node] | None:
    def is_number(value: ir.Value | None, expected: float) -> bool:
        return is_scalar(value, expected, h, shapes)

    for cube in users_of(h):
        cubes = [cube]
        if is_standard(cube, "Mul") and list(cube.inputs) == [h, h]:
            second = only_user(cube.outputs[0], "Mul")
            if second is None or other_operand(second, cube.outputs[0]) is not h:
                continue
            cubes.append(second)
        elif not (is_standard(cube, "Pow") and cube.inputs[0] is h and is_number(cube.inputs[1], 3.0)):
            continue
        small = only_user(cubes[-1].outputs[0], "Mul")
        if small is None or not is_number(other_operand(small, cubes[-1].outputs[0]), 0.044715):
            continue
        total = only_user(small.outputs[0], "Add")
        if total is None or other_operand(total, small.outputs[0]) is not h:
            continue
        scale = only_user(total.outputs[0], "Mul")
        if scale is None or not is_number(other_operand(scale, total.outputs[0]), math.sqrt(2 / math.pi)):
            continue
        tanh = only_user(scale.outputs[0], "Tanh")
        if tanh is not None:
            return _covered(h, _gate(h, [*cubes, small, total, scale, tanh], tanh.outputs[0], shapes))
    return None


_ACTIVATIONS: dict[str, Callable[[ir.Value, Shapes], list[ir.Node] | None]] = {
    "relu": lambda h, _: match_relu(h),
    "silu": lambda h, _: match_silu(h),
    "quick_gelu": _quick_gelu,
    "gelu": lambda h, shapes: _gelu_node(h, "none") or _gelu_erf(h, shapes),
    "gelu_tanh": lambda h, shapes: _gelu_node(h, "tanh") or _gelu_tanh(h, shapes),
}
