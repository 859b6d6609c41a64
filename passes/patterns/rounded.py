"""Recognise values that a graph rounds to a grid of few bits: what ``QuantizeLinear`` and ``DequantizeLinear`` say.

::

    q ── DequantizeLinear(scale, zero_point) ── x                     x is integers of 8 bits
    h ── QuantizeLinear ── DequantizeLinear ── g                      h is rounded in passing

with one constant, positive scale for all of the value, and a constant zero point or none.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_tensor
from sparse_onnx.model.graph import input_at, is_standard, producer
from sparse_onnx.passes.patterns.match import only_user

__all__ = [
    "BYTES",
    "RoundedInPassing",
    "RoundedInput",
    "decoded_alone",
    "dequantized",
    "grid_of",
    "quantized",
    "read_input",
    "rounded_dtype",
    "rounded_in_passing",
]

BYTES = (ir.DataType.UINT8, ir.DataType.INT8)

_SMALLEST_SCALE = 1e-30


@dataclasses.dataclass(frozen=True, eq=False)
class RoundedInPassing:
    """A value that becomes integers of ``dtype``, of which q stands for (q - ``zero_point``) · ``scale``, and floats
    again, ``output``, by ``nodes``."""

    dtype: ir.DataType
    scale: float
    zero_point: int
    nodes: tuple[ir.Node, ...]
    output: ir.Value

    @property
    def steps(self) -> tuple[int, int]:
        """The lowest and the highest number of steps from 0."""
        return int(self.dtype.min) - self.zero_point, int(self.dtype.max) - self.zero_point


@dataclasses.dataclass(frozen=True, eq=False)
class RoundedInput:
    """What a layer reads: ``integers`` of 8 bits, their ``scale`` and ``zero_point`` as values of the graph, of one
    element each; None: 0."""

    integers: ir.Value
    dtype: ir.DataType
    scale: ir.Value
    zero_point: ir.Value | None

    @property
    def lowest(self) -> int:
        """The lowest integer that there is."""
        return int(self.dtype.min)


def read_input(
    integers: ir.Value | None,
    scale: ir.Value | None,
    zero_point: ir.Value | None,
    dtype: ir.DataType | None = None,
) -> RoundedInput | str:
    """``integers`` on a constant grid, or what is wrong with it. ``dtype`` is theirs where no zero point says so."""
    grid = _grid_of(scale, zero_point, dtype)
    if isinstance(grid, str):
        return f"its input {grid}"
    if grid[2] not in BYTES:
        return f"its input has integers of {grid[2].name}, not of 8 bits"
    assert integers is not None
    assert scale is not None
    return RoundedInput(integers, grid[2], scale, zero_point)


def quantized(node: ir.Node) -> RoundedInput | str:
    """What a QuantizeLinear makes."""
    return read_input(node.outputs[0], input_at(node, 1), input_at(node, 2), _dtype(node))


def dequantized(x: ir.Value | None) -> RoundedInput | str:
    """The integers of 8 bits that ``x`` is made of, or why it is made of none."""
    node = producer(x, "DequantizeLinear")
    if node is None:
        return "its input is not rounded"
    return read_input(node.inputs[0], input_at(node, 1), input_at(node, 2), _dtype(node))


def rounded_in_passing(h: ir.Value) -> RoundedInPassing | None:
    """What rounds ``h``, if nothing else reads it or its integers."""
    down = only_user(h, "QuantizeLinear")
    if down is None or down.inputs[0] is not h:
        return None
    up = only_user(down.outputs[0], "DequantizeLinear")
    if up is None or up.inputs[0] is not down.outputs[0]:
        return None
    before, after = grid_of(down), grid_of(up)
    if isinstance(before, str) or before != after or down.attributes.get_int("saturate", 1) != 1:
        return None
    scale, zero_point, dtype = before
    return RoundedInPassing(dtype, scale, zero_point, (down, up), up.outputs[0])


def decoded_alone(integers: ir.Value) -> RoundedInPassing | None:
    """What makes floats of ``integers``, if nothing else reads them."""
    up = only_user(integers, "DequantizeLinear")
    if up is None or up.inputs[0] is not integers or isinstance(grid := grid_of(up), str):
        return None
    scale, zero_point, dtype = grid
    return RoundedInPassing(dtype, scale, zero_point, (up,), up.outputs[0])


def rounded_dtype(value: ir.Value) -> ir.DataType:
    """The type of the integers of 8 bits that ``value`` has; FLOAT if nothing makes or reads it as such."""
    if (maker := producer(value, "QuantizeLinear")) is not None:
        grid = grid_of(maker)
        if not isinstance(grid, str) and grid[2] in BYTES:
            return grid[2]
    for user, index in value.uses():
        if index != 0:
            continue
        if is_standard(user, "DequantizeLinear"):
            found = dequantized(user.outputs[0])
        elif is_standard(user, "QLinearMatMul"):
            found = read_input(value, input_at(user, 1), input_at(user, 2))
        else:
            continue
        if isinstance(found, RoundedInput):
            return found.dtype
    return ir.DataType.FLOAT


def grid_of(node: ir.Node) -> tuple[float, int, ir.DataType] | str:
    """Scale, zero point and type of integers of a QuantizeLinear or DequantizeLinear, or what is wrong with them."""
    return _grid_of(input_at(node, 1), input_at(node, 2), _dtype(node))


def _grid_of(
    scale_value: ir.Value | None, zero_value: ir.Value | None, dtype: ir.DataType | None
) -> tuple[float, int, ir.DataType] | str:
    """Scale, zero point and type of integers, or what is wrong with them."""
    scale, zero_point = constant_tensor(scale_value), constant_tensor(zero_value)
    if scale is None or (zero_value is not None and zero_point is None):
        return "has a scale or zero point that is no constant"
    if scale.size != 1 or (zero_point is not None and zero_point.size != 1):
        return "has more than one scale"
    if scale.dtype != ir.DataType.FLOAT:
        return f"has a scale of {scale.dtype.name}, not FLOAT"
    step = float(np.asarray(scale.numpy()).reshape(()))
    if not _SMALLEST_SCALE <= step < math.inf:
        return f"has a scale of {step:g}"
    if zero_point is None:
        return "has integers of a type that is not known" if dtype is None else (step, 0, dtype)
    if not zero_point.dtype.is_integer():
        return f"has integers of {zero_point.dtype.name}"
    return step, int(np.asarray(zero_point.numpy()).reshape(())), zero_point.dtype


def _dtype(node: ir.Node) -> ir.DataType | None:
    """The type of the integers of a QuantizeLinear or DequantizeLinear without a zero point: of the former uint8 where
    nothing else is said."""
    if node.op_type == "QuantizeLinear":
        dtype = node.attributes.get_int("output_dtype", 0)
        return ir.DataType(dtype) if dtype else ir.DataType.UINT8
    integers = node.inputs[0]
    maker = producer(integers, "QuantizeLinear")
    if maker is not None:
        grid = grid_of(maker)
        return None if isinstance(grid, str) else grid[2]
    return None if integers is None else integers.dtype
