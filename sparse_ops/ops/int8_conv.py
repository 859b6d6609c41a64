"""``SparseInt8Conv``: ``Y = bytes(Conv(X, W) + bias)`` of images that are bytes already, with W of int8 without zeros.

Signatures (domain ``sparse_onnx``, version 1; ``SparseInt8ConvSigned`` has a Y of int8)::

    SparseInt8Conv<kernel_shape, strides, pads, dilations, group, channels, K, N, ..., format, x_scale, ...>
        (X, ..., bias) -> Y

===========  ===============  ==================  ===========================================================
name         dtype            shape               meaning
===========  ===============  ==================  ===========================================================
X            uint8 or int8    [B, C, H, W]        or [B, C, W], and so Y: a convolution of one axis
...                                               the weight [K, N], ``int8_quads`` of :mod:`..formats.int8_quads`
bias         int32            [N]                 on the grid of the sums; at most 2^30 on either side of 0
Y            uint8 or int8    [B, N, H', W']
===========  ===============  ==================  ===========================================================

The attributes of the window are those of ``SparseConv``, ``channels`` is C / group. The attributes of the grids::

    x_scale, x_zero_point     float, and an int in the range of X; padding is the zero point
    x_lowest                  int: the lowest number that X may have, 0 or -128, which tells its type
    y_scale, y_zero_point     float, and an int in the range of Y
    y_low, y_high             ints in the range of Y: limits of the result; those of its type, or an activation's

    sum = Conv(X - x_zero_point, V) + bias                                                     int32
    Y = min(max(Round(sum · (x_scale · scales / y_scale)) + y_zero_point, y_low), y_high)

`Round` is to the nearest, ties to even; factors are float32, computed from left to right, finite and above 0. That is
what ONNX Runtime makes of ``QuantizeLinear`` behind such a convolution. All kernels and the body in standard operators
give the same integers.

The rows of W are in the order [channels / 4, window..., 4]: a quad is four neighbouring channels at one place of the
window. Where ``channels`` is no multiple of 4, the rows of the last ones are 0.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.formats.int8_quads import Int8Weight
from sparse_onnx.sparse_ops.ops.base import BIAS, Operator
from sparse_onnx.sparse_ops.ops.sparse_conv import WINDOW, Window

__all__ = [
    "MAX_BIAS",
    "OPERATOR",
    "OP_TYPES",
    "ByteGrids",
    "filters_of",
    "function_body",
    "matrix_of",
    "op_type_of",
    "pack",
    "reference",
]

MAX_BIAS = 2**30

OP_TYPES = {"SparseInt8Conv": np.dtype(np.uint8), "SparseInt8ConvSigned": np.dtype(np.int8)}
"""What Y is made of, by op type."""


def op_type_of(signed: bool) -> str:
    """The op type whose Y is of int8, or of uint8."""
    return "SparseInt8ConvSigned" if signed else "SparseInt8Conv"


@dataclasses.dataclass(frozen=True)
class ByteGrids:
    """The attributes of the grids; see the module's docstring."""

    x_scale: float
    x_zero_point: int
    x_lowest: int
    y_scale: float
    y_zero_point: int
    y_low: int
    y_high: int

    def attributes(self) -> dict[str, int | float]:
        """By name, in order."""
        return dataclasses.asdict(self)

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """From sums to steps of Y, float32 [N]."""
        with np.errstate(all="ignore"):
            factors: np.ndarray = np.float32(self.x_scale) * scales / np.float32(self.y_scale)
        return factors


def matrix_of(filters: np.ndarray) -> np.ndarray:
    """The weight [K, N] of ``filters`` int8 [N, channels, window...], its rows in the operator's order."""
    N, channels = filters.shape[:2]
    fours = -(-channels // 4)
    padded = np.zeros((N, fours * 4, math.prod(filters.shape[2:])), np.int8)
    padded[:, :channels] = filters.reshape(N, channels, -1)
    turned = padded.reshape(N, fours, 4, -1).transpose(1, 3, 2, 0)
    return np.ascontiguousarray(turned.reshape(-1, N))


def filters_of(weight: Int8Weight, channels: int, window: Window) -> np.ndarray:
    """The inverse of :func:`matrix_of`."""
    taps = math.prod(window.kernel_shape)
    turned = weight.integers().reshape(-1, taps, 4, weight.N).transpose(3, 0, 2, 1)
    padded = turned.reshape(weight.N, -1, *window.kernel_shape)
    return np.ascontiguousarray(padded[:, :channels])


def pack(filters: np.ndarray, scales: np.ndarray, group: int = 1) -> Int8Weight:
    """``filters`` int8 [N, channels, window...] and their scales float32 [N], stored for so many groups.

    Raises ValueError for other arrays, too many inputs, and groups that are not of equal size.
    """
    return int8_quads.pack_maps(matrix_of(filters), scales, group)


def reference(
    x: np.ndarray, weight: Int8Weight, bias: np.ndarray, window: Window, grids: ByteGrids
) -> np.ndarray:
    """What the operator computes of integers ``x``, int64: the oracle of the tests."""
    filters = filters_of(weight, x.shape[1] // window.group, window).astype(np.int64)
    axes, sizes = len(window.kernel_shape), x.shape[2:]
    outputs = window.output_size(*sizes)
    padding = list(zip(window.pads[:axes], window.pads[axes:], strict=True))
    padded = np.pad(x.astype(np.int64) - grids.x_zero_point, [(0, 0), (0, 0), *padding])
    grouped = padded.reshape(len(x), window.group, -1, *padded.shape[2:])
    split = filters.reshape(window.group, -1, *filters.shape[1:])
    sums = np.zeros((len(x), window.group, split.shape[1], *outputs), np.int64)
    for tap in np.ndindex(*window.kernel_shape):
        seen = grouped
        for axis, index in enumerate(tap):
            chosen = index * window.dilations[axis] + window.strides[axis] * np.arange(outputs[axis])
            seen = np.take(seen, chosen, axis=3 + axis)
        sums += np.einsum("bgc...,gnc->bgn...", seen, split[(..., *tap)])
    channel = (-1, *[1] * axes)
    all_sums = sums.reshape(len(x), weight.N, *outputs) + bias.astype(np.int64).reshape(channel)
    with np.errstate(over="ignore"):
        steps = np.rint(all_sums.astype(np.float32) * grids.factors(weight.scales).reshape(channel))
    low, high = grids.y_low - grids.y_zero_point, grids.y_high - grids.y_zero_point
    y: np.ndarray = np.clip(steps, low, high).astype(np.int64) + grids.y_zero_point
    return y


# Both factors are unsigned: see int8_matmul. ConvInteger pads with the zero point of X.
_BODY = """
    {decoder}
    window = Constant<value_ints: ints = @kernel_shape>()
    channels = Constant<value_int: int = @channels>()
    channels_1 = Unsqueeze(channels, axis0)
    first_axis = Constant<value = int64[1] {{1}}>()
    none = Constant<value = int64[1] {{0}}>()
    all_taps = ReduceProd<keepdims = 1>(window)
    fours_shape = Concat<axis = 0>(flat_shape, all_taps, one_quad, n_1)
    in_fours = Reshape(V, fours_shape)
    by_channel = Transpose<perm = [3, 0, 2, 1]>(in_fours)
    padded_filter_shape = Concat<axis = 0>(n_1, flat_shape, window)
    padded_filters = Reshape(by_channel, padded_filter_shape)
    filters = Slice(padded_filters, none, channels_1, first_axis)
    filters_32 = Cast<to = 6>(filters)
    middle_32 = Constant<value = int32 {{128}}>()
    lifted_32 = Add(filters_32, middle_32)
    lifted = Cast<to = 2>(lifted_32)
    middle = Constant<value = uint8 {{128}}>()
    x_lowest = Constant<value_int: int = @x_lowest>()
    x_zero = Constant<value_int: int = @x_zero_point>()
    x_point = Sub(x_zero, x_lowest)
    x_point_8 = Cast<to = 2>(x_point)
    x_lowest_32 = Cast<to = 6>(x_lowest)
    X_32 = Cast<to = 6>(X)
    risen = Sub(X_32, x_lowest_32)
    Q = Cast<to = 2>(risen)
    products = ConvInteger<{window}, group: int = @group>(Q, lifted, x_point_8, middle)
    window_rank = Shape(window)
    ones = ConstantOfShape<value = int64[1] {{1}}>(window_rank)
    bias_shape = Concat<axis = 0>(n_1, ones)
    bias_maps = Reshape(bias, bias_shape)
    sums = Add(products, bias_maps)
    floats = Cast<to = 1>(sums)
    x_size = Constant<value_float: float = @x_scale>()
    y_size = Constant<value_float: float = @y_scale>()
    sized = Mul(x_size, scales)
    factor = Div(sized, y_size)
    factors = Reshape(factor, bias_shape)
    in_steps = Mul(floats, factors)
    nearest = Round(in_steps)
    y_zero = Constant<value_int: int = @y_zero_point>()
    y_low = Constant<value_int: int = @y_low>()
    y_high = Constant<value_int: int = @y_high>()
    y_zero_f = Cast<to = 1>(y_zero)
    y_low_f = Cast<to = 1>(y_low)
    y_high_f = Cast<to = 1>(y_high)
    moved = Add(nearest, y_zero_f)
    above = Max(moved, y_low_f)
    inside = Min(above, y_high_f)
    Y = Cast<to = {dtype}>(inside)
"""


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    inputs = ("X", *(part.name for part in int8_quads.parts(dense=False)), BIAS)
    grids = [field.name for field in dataclasses.fields(ByteGrids)]
    names = (*WINDOW, "group", "channels", *int8_quads.SIZES, *grids)
    body = _BODY.format(
        decoder=int8_quads.decoder(dense=False),
        window=", ".join(f"{name}: ints = @{name}" for name in WINDOW),
        dtype=int(onnx.helper.np_dtype_to_tensor_dtype(OP_TYPES[op_type])),
    )
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
{op_type} <{", ".join(names)}> ({", ".join(inputs)}) => (Y)
{{
    {body}
}}"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


OPERATOR = Operator(tuple(OP_TYPES), function_body)
