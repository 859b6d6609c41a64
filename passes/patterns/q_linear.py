"""Recognise a linear of integers, as quantizers write it: ``act(grid(X · W) + bias)`` with X and W on grids of 8 bits.

Patterns, x being ``DequantizeLinear`` of integers of 8 bits, and every value in between having a single user::

    MatMul(x, W)    Add(MatMul(x, W), bias)    Gemm(x, W, bias)              then an activation as behind a linear of floats
    QuantizeLinear, DequantizeLinear                                         between MatMul and the rest, or neither

The bias is a constant [N], or ``DequantizeLinear`` of one of int32. What is rounded behind bias and activation stays
outside: other layers read those integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_tensor
from sparse_onnx.model.encodings import spread
from sparse_onnx.model.graph import input_at, producer
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.patterns.layer import Part, place_reason, storage_reason
from sparse_onnx.passes.patterns.linear import Linear, match_activation
from sparse_onnx.passes.patterns.match import is_bias, is_scaled, only_user, other_operand
from sparse_onnx.passes.patterns.rounded import Rounded, dequantized, rounded_in_passing
from sparse_onnx.sparse_ops.ops.q_matmul import Grids

__all__ = ["QLinear", "match_q_linear"]


@dataclasses.dataclass(frozen=True)
class QLinear(Linear):
    """A linear of integers. ``x`` is its input, ``grid`` what its products are rounded to before ``added``, its bias
    [N] or None, is added."""

    x: Rounded
    grid: Rounded | None
    added: np.ndarray | None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        return (self.x.integers,)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(self.weight, self.stored_outputs, bias=self.added),)

    @property
    def attributes(self) -> Mapping[str, int | float | str]:
        """What the time depends on; all others are :attr:`numbers`."""
        return {"x_lowest": self.x.lowest}

    @property
    def numbers(self) -> Mapping[str, int | float]:
        grids = Grids(self.x.scale, self.x.zero_point, self.x.lowest)
        if self.grid is not None:
            low, high = self.grid.steps
            grids = dataclasses.replace(grids, h_scale=self.grid.scale, h_low=low, h_high=high)
        return grids.attributes()


def match_q_linear(weight: Weight, node: ir.Node, main_graph: ir.Graph, shapes: Shapes) -> QLinear | str:
    """The linear that ``node`` (a user of ``weight``) is part of, or the reason why it cannot be replaced."""
    if reason := place_reason(node, main_graph) or storage_reason(weight):
        return reason
    x = dequantized(node.inputs[0])
    if isinstance(x, str):
        return x
    if constant_tensor(x.integers) is not None:
        return "has a constant activation"
    output, N = node.outputs[0], weight.shape[1]
    nodes = [node]
    grid: Rounded | None = None
    added: np.ndarray | None = None
    if node.op_type == "Gemm":
        if is_scaled(node):
            return "is a Gemm with alpha or beta other than 1"
        if (given := input_at(node, 2)) is not None and (added := _bias(given, N)) is None:
            return "is a Gemm whose C is no constant bias"
    else:
        grid = rounded_in_passing(output)
        if grid is not None:
            nodes += grid.nodes
            output = grid.output
        if (add := only_user(output, "Add")) is not None:
            other = other_operand(add, output)
            added = None if other is None or shapes.may_add_axes(other, output) else _bias(other, N)
            if added is not None:
                output = add.outputs[0]
                nodes.append(add)
    activation, behind = match_activation(output, shapes)
    if behind:
        nodes += behind
        output = behind[-1].outputs[0]
    return QLinear(weight, tuple(nodes), None, activation, output, x, grid, added)


def _bias(value: ir.Value, N: int) -> np.ndarray | None:
    """The float32 [N] that ``value`` always is, if it is a bias for N outputs; integers of 32 bits are decoded."""
    if is_bias(value, N):
        array = constant_array(value)
        return None if array is None else np.asarray(array, np.float32).reshape(N)
    node = producer(value, "DequantizeLinear")
    if node is None or value.dtype not in (None, ir.DataType.FLOAT):
        return None
    stored, scale = constant_tensor(node.inputs[0]), constant_tensor(input_at(node, 1))
    given = input_at(node, 2)
    zero_point = constant_tensor(given)
    if stored is None or scale is None or (given is not None and zero_point is None):
        return None
    if stored.dtype != ir.DataType.INT32 or scale.dtype != ir.DataType.FLOAT or stored.size != N:
        return None
    shape = tuple(int(size) for size in stored.shape.numpy())
    if shape[-1:] != (N,) or scale.size not in (1, N) or node.attributes.get_int("block_size", 0):
        return None
    axis = None if scale.size == 1 else node.attributes.get_int("axis", 1) % len(shape)
    if axis is not None and axis != len(shape) - 1:
        return None
    if zero_point is not None and np.any(zero_point.numpy()):
        return None
    factor = spread(scale.numpy(), shape, axis, 0)
    with np.errstate(all="ignore"):
        bias: np.ndarray = stored.numpy().astype(np.float32) * factor.astype(np.float32)
    return bias.reshape(N)
