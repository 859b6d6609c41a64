"""Recognise a convolution of integers, as quantizers write it, from integers of 8 bits to integers of 8 bits.

Patterns, x being ``DequantizeLinear`` of integers of 8 bits, and every value in between having a single user::

    Conv(x, W)    Conv(x, W, bias)               W ``DequantizeLinear`` of integers with a scale for each output
    Relu(h)       Clip(h, min, max)              or neither; constant limits
    QuantizeLinear(h)                            to integers of 8 bits

The bias is ``DequantizeLinear`` of integers of 32 bits on the grid of the sums: its scale is that of x times that of
the output. Then all of it is integers, and the activation is a limit of theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_tensor
from sparse_onnx.model.graph import input_at, producer
from sparse_onnx.model.integer_grid import read_grid
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.patterns.conv import Windowed, match_clip, window_of
from sparse_onnx.passes.patterns.layer import Part, place_reason, storage_reason
from sparse_onnx.passes.patterns.linear import match_relu
from sparse_onnx.passes.patterns.match import only_user
from sparse_onnx.passes.patterns.rounded import BYTES, grid_of
from sparse_onnx.sparse_ops.ops.int8_conv import MAX_BIAS, ByteGrids, op_type_of

__all__ = ["QConvolution", "match_q_conv"]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """An integer q of ``dtype``, of 8 bits, stands for (q - ``zero_point``) · ``scale``."""

    scale: float
    zero_point: int
    dtype: ir.DataType

    @property
    def lowest(self) -> int:
        """The lowest integer that there is."""
        return int(self.dtype.min)


@dataclasses.dataclass(frozen=True)
class QConvolution(Windowed):
    """A convolution of integers on the grid ``x``, of which ``decoder`` makes floats, to others on ``y``; ``limits``
    are the lowest and the highest of these, and ``added`` is its bias, int32 [N]."""

    decoder: ir.Node
    x: _Grid
    y: _Grid
    limits: tuple[int, int]
    added: np.ndarray

    @property
    def op_type(self) -> str:
        return op_type_of(self.y.lowest < 0)

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        integers = self.decoder.inputs[0]
        assert integers is not None
        return (integers,)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(self.weight, self.stored_outputs, bias=self.added),)

    @property
    def attributes(self) -> Mapping[str, int | float | Sequence[int]]:
        """What the time depends on; all others are :attr:`numbers`."""
        return {**self.window.attributes(), "channels": self.weight.dims[1], "x_lowest": self.x.lowest}

    @property
    def numbers(self) -> Mapping[str, int | float]:
        low, high = self.limits
        return ByteGrids(
            self.x.scale, self.x.zero_point, self.x.lowest, self.y.scale, self.y.zero_point, low, high
        ).attributes()


def match_q_conv(weight: Weight, node: ir.Node, main_graph: ir.Graph, shapes: Shapes) -> QConvolution | str:
    """The convolution that ``node`` (a user of ``weight``) is part of, or the reason why it cannot be replaced."""
    if reason := place_reason(node, main_graph) or storage_reason(weight):
        return reason
    if len(weight.dims) not in (3, 4):
        return f"has rank {len(weight.dims)}; the sparse kernels take one axis or images: rank 3 or 4"
    decoder = producer(node.inputs[0], "DequantizeLinear")
    if decoder is None:
        return "its input is not rounded"
    x = _grid(decoder, "input")
    if isinstance(x, str):
        return x
    if constant_tensor(decoder.inputs[0]) is not None:
        return "has a constant activation"
    window = window_of(node, weight, shapes)
    if isinstance(window, str):
        return window
    output, nodes = node.outputs[0], [node]
    low, high = -math.inf, math.inf
    if (relu := match_relu(output)) is not None:
        low, activation = 0.0, relu
    elif (clipped := match_clip(output)) is not None:
        activation, (low, high) = [clipped[0]], clipped[1]
    else:
        activation = []
    if activation:
        nodes += activation
        output = activation[-1].outputs[0]
    rounds = only_user(output, "QuantizeLinear")
    if rounds is None or rounds.inputs[0] is not output or rounds.attributes.get_int("saturate", 1) != 1:
        return "its result is not rounded, or is read as it is, too"
    y = _grid(rounds, "result")
    if isinstance(y, str):
        return y
    scales = _scales(weight)
    if isinstance(scales, str):
        return scales
    factors = np.float32(x.scale) * scales / np.float32(y.scale)
    if not np.all((factors > 0) & np.isfinite(factors)):
        return "has scales that are not above 0, or as far apart as no floats are"
    added = _bias(node, np.float32(x.scale) * scales)
    if isinstance(added, str):
        return added
    limits = (_step(low, y), _step(high, y))
    return QConvolution(
        weight,
        (*nodes, rounds),
        None,
        "none",
        rounds.outputs[0],
        window,
        decoder,
        x,
        y,
        limits,
        added,
    )


def _grid(node: ir.Node, what: str) -> _Grid | str:
    """That of ``node``, or what is wrong with what it takes or makes."""
    found = grid_of(node)
    if isinstance(found, str):
        return f"its {what} {found}"
    if found[2] not in BYTES:
        return f"its {what} has integers of {found[2].name}, not of 8 bits"
    return _Grid(*found)


def _step(limit: float, y: _Grid) -> int:
    """The integer that a limit of an activation becomes: what rounds does not change the order."""
    lowest, highest = y.lowest, y.lowest + 255
    if not math.isfinite(limit):
        return lowest if limit < 0 else highest
    return int(np.clip(np.rint(np.float32(limit) / np.float32(y.scale)) + y.zero_point, lowest, highest))


def _scales(weight: Weight) -> np.ndarray | str:
    """The scale of every output of a weight of 8 bits without zero points, or why it has none."""
    grid = read_grid(weight)
    if isinstance(grid, str):
        return grid
    if grid.bits != 8 or len(grid.scale) != 1 or not grid.symmetric:
        return "has more than one scale for an output, zero points, or not 8 bits"
    scale: np.ndarray = grid.scale[0]
    return scale


def _bias(node: ir.Node, scales: np.ndarray) -> np.ndarray | str:
    """The bias of a Conv in integers on the grid of the sums, whose ``scales`` are [N], or why there is none."""
    value = input_at(node, 2)
    if value is None:
        return np.zeros(len(scales), np.int32)
    maker = producer(value, "DequantizeLinear")
    stored = None if maker is None else constant_tensor(maker.inputs[0])
    scale = None if maker is None else constant_tensor(input_at(maker, 1))
    if maker is None or stored is None or scale is None or stored.dtype != ir.DataType.INT32:
        return "has a bias that is not of constant integers of 32 bits"
    if stored.size != len(scales) or scale.size not in (1, len(scales)):
        return "has a bias of another length"
    zero_point = constant_tensor(input_at(maker, 2))
    if input_at(maker, 2) is not None and (zero_point is None or np.any(zero_point.numpy())):
        return "has a bias with a zero point"
    # As float32 to the last digits: quantizers multiply the two in other precisions.
    if not np.allclose(np.broadcast_to(scale.numpy().reshape(-1), scales.shape), scales, rtol=1e-5, atol=0):
        return "has a bias whose scale is not that of the input times that of the weight"
    bias = stored.numpy().reshape(-1)
    if np.any(np.abs(bias.astype(np.int64)) > MAX_BIAS):
        return f"has a bias beyond {MAX_BIAS}"
    return np.ascontiguousarray(bias)
