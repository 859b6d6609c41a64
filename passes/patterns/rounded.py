"""Recognise values that a graph rounds to a grid of few bits: what ``QuantizeLinear`` and ``DequantizeLinear`` say.

::

    q ── DequantizeLinear(scale, zero_point) ── x                     x is integers of 8 bits
    h ── QuantizeLinear(scale, zero_point) ── q                       h becomes such
    h ── QuantizeLinear ── DequantizeLinear ── g                      h is rounded in passing

with one constant, positive scale for all of the value, and a constant zero point or none.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_tensor
from sparse_onnx.model.graph import input_at, is_standard, producer
from sparse_onnx.passes.patterns.match import only_user

__all__ = ["BYTES", "Rounded", "dequantized", "quantized", "rounded_dtype", "rounded_in_passing"]

BYTES = (ir.DataType.UINT8, ir.DataType.INT8)

_SMALLEST_SCALE = 1e-30


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """A value on a grid: an integer q of ``dtype`` stands for (q - ``zero_point``) · ``scale``.

    ``integers`` are the value that holds them, ``nodes`` what makes and takes them, and ``output`` what they stand
    for, float32.
    """

    integers: ir.Value
    dtype: ir.DataType
    scale: float
    zero_point: int
    nodes: tuple[ir.Node, ...]
    output: ir.Value

    @property
    def lowest(self) -> int:
        """The lowest integer that there is."""
        return int(self.dtype.min)

    @property
    def steps(self) -> tuple[int, int]:
        """The lowest and the highest number of steps from 0."""
        return int(self.dtype.min) - self.zero_point, int(self.dtype.max) - self.zero_point


def dequantized(x: ir.Value | None) -> Rounded | str:
    """The integers of 8 bits that ``x`` is made of, or why it is made of none."""
    node = producer(x, "DequantizeLinear")
    if x is None or node is None:
        return "its input is not rounded"
    grid = _grid(node)
    if isinstance(grid, str):
        return f"its input {grid}"
    scale, zero_point, dtype = grid
    if dtype not in BYTES:
        return f"its input has integers of {dtype.name}, not of 8 bits"
    integers = node.inputs[0]
    assert integers is not None
    return Rounded(integers, dtype, scale, zero_point, (node,), x)


def quantized(h: ir.Value) -> Rounded | str:
    """The integers of 8 bits that alone are made of ``h``, with ``h`` as ``output``; or why there are none."""
    node = only_user(h, "QuantizeLinear")
    if node is None or node.inputs[0] is not h or node.attributes.get_int("saturate", 1) != 1:
        return "its result is not rounded, or is read as it is, too"
    grid = _grid(node)
    if isinstance(grid, str):
        return f"its result {grid}"
    scale, zero_point, dtype = grid
    if dtype not in BYTES:
        return f"its result has integers of {dtype.name}, not of 8 bits"
    return Rounded(node.outputs[0], dtype, scale, zero_point, (node,), h)


def rounded_in_passing(h: ir.Value) -> Rounded | None:
    """What rounds ``h``, if nothing else reads it or its integers."""
    down = only_user(h, "QuantizeLinear")
    if down is None or down.inputs[0] is not h:
        return None
    up = only_user(down.outputs[0], "DequantizeLinear")
    if up is None or up.inputs[0] is not down.outputs[0]:
        return None
    before, after = _grid(down), _grid(up)
    if isinstance(before, str) or before != after or down.attributes.get_int("saturate", 1) != 1:
        return None
    scale, zero_point, dtype = before
    return Rounded(down.outputs[0], dtype, scale, zero_point, (down, up), up.outputs[0])


def rounded_dtype(value: ir.Value) -> ir.DataType:
    """The type of the integers of 8 bits that ``value`` has; FLOAT if nothing makes or reads it as such."""
    if (maker := producer(value, "QuantizeLinear")) is not None:
        grid = _grid(maker)
        if not isinstance(grid, str) and grid[2] in BYTES:
            return grid[2]
    for user, index in value.uses():
        if index == 0 and is_standard(user, "DequantizeLinear"):
            found = dequantized(user.outputs[0])
            if isinstance(found, Rounded):
                return found.dtype
    return ir.DataType.FLOAT


def _grid(node: ir.Node) -> tuple[float, int, ir.DataType] | str:
    """Scale, zero point and type of integers of a QuantizeLinear or DequantizeLinear, or what is wrong with them."""
    scale = constant_tensor(input_at(node, 1))
    given = input_at(node, 2)
    zero_point = constant_tensor(given)
    if scale is None or (given is not None and zero_point is None):
        return "has a scale or zero point that is no constant"
    if scale.size != 1 or (zero_point is not None and zero_point.size != 1):
        return "has more than one scale"
    if scale.dtype != ir.DataType.FLOAT:
        return f"has a scale of {scale.dtype.name}, not FLOAT"
    step = float(np.asarray(scale.numpy()).reshape(()))
    if not _SMALLEST_SCALE <= step < math.inf:
        return f"has a scale of {step:g}"
    if zero_point is None:
        dtype = _without_zero_point(node)
        return "has integers of a type that is not known" if dtype is None else (step, 0, dtype)
    if not zero_point.dtype.is_integer():
        return f"has integers of {zero_point.dtype.name}"
    return step, int(np.asarray(constant_array(given)).reshape(())), zero_point.dtype


def _without_zero_point(node: ir.Node) -> ir.DataType | None:
    """The type of the integers of a node that has no zero point: uint8 where nothing else is said."""
    if node.op_type == "QuantizeLinear":
        dtype = node.attributes.get_int("output_dtype", 0)
        return ir.DataType(dtype) if dtype else ir.DataType.UINT8
    integers = node.inputs[0]
    maker = producer(integers, "QuantizeLinear")
    if maker is not None:
        grid = _grid(maker)
        return None if isinstance(grid, str) else grid[2]
    return None if integers is None else integers.dtype
