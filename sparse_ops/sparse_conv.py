"""``SparseConv``: ``Y = act(Conv(X, W) + bias [+ R])`` with W stored compressed. The whole contract of the operator.

Signature (domain ``sparse_onnx``, version 1; one op type per activation and residual, see :data:`OP_TYPES`)::

    SparseConv<kernel_shape, strides, pads, dilations, group, K, N, chunk, block, width, format, mask_structure>(
        X, values, offsets, counts, rows, bias) -> Y
    SparseConvAdd<...>(X, values, offsets, counts, rows, bias, R) -> Y

===========  =========  ==================  =================================================================
name         dtype      shape               meaning
===========  =========  ==================  =================================================================
X            float32    [B, C, H, W]        images; or [B, C, W], and so R and Y: a convolution of one axis
values ...                                  the weight [K, N], stored as for ``SparseMatMul``
bias         float32    [N]                 zeros where the layer has none
R            float32    as Y                residual, added before the activation; no broadcasting
Y            float32    [B, N, H', W']      feature maps
===========  =========  ==================  =================================================================

The weight of a convolution, [N, C / group, kernel height, kernel width], is stored as the matrix [K, N] with
K = C / group · kernel height · kernel width: transposed, and with its last three axes as one. Output channel n reads
the input channels of group ``n // (N / group)``; with more than one group ``block`` divides N / group, so that no block
of output channels has two.

Attributes are those of ``Conv``, all of them required and explicit: ``kernel_shape``, ``strides`` and
``dilations`` have two integers, at least 1, ``pads`` has four (top, left, bottom, right), at least 0. With one axis
they have one, and ``pads`` two (left, right); to the kernel that is an image of one row.
``SparseConvClip`` and ``SparseConvAddClip`` have two more, the floats ``min`` and ``max``.

A depthwise convolution (group = C = N) has blocks of one output channel; the kernel computes it without gathering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.sparse_matmul import (
    DEFAULT_BLOCK,
    DOMAIN,
    SIZES,
    STORED,
    PackedWeight,
    decoder,
    pack,
    unpack,
)

__all__ = [
    "ACTIVATIONS",
    "OP_TYPES",
    "Window",
    "activation_body",
    "block_size",
    "function_body",
    "operator_name",
    "pack_filters",
    "reference",
    "unpack_filters",
]

ACTIVATIONS = {
    "none": "",
    "relu": "Relu",
    "clip": "Clip",
    "silu": "Silu",
    "hard_swish": "HardSwish",
}
"""The activations, and how each ends the name of an op type."""


def operator_name(activation: str, residual: bool) -> str:
    """The operator with this activation, a key of :data:`ACTIVATIONS`, with or without R."""
    return f"SparseConv{'Add' if residual else ''}{ACTIVATIONS[activation]}"


OP_TYPES = {
    operator_name(activation, residual): (activation, residual)
    for residual in (False, True)
    for activation in ACTIVATIONS
}
"""(activation, residual) of every operator."""


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; the attributes of ``Conv``."""

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, ...] = (1, 1)
    group: int = 1

    def __post_init__(self) -> None:
        axes = len(self.kernel_shape)
        if axes not in (1, 2) or (len(self.strides), len(self.dilations), len(self.pads)) != (
            axes,
            axes,
            2 * axes,
        ):
            raise ValueError(f"a window has one axis or two, and pads before and after each: {self}")

    def attributes(self) -> dict[str, int | tuple[int, ...]]:
        return {
            "kernel_shape": self.kernel_shape,
            "strides": self.strides,
            "pads": self.pads,
            "dilations": self.dilations,
            "group": self.group,
        }

    def output_size(self, *sizes: int) -> tuple[int, ...]:
        """The sizes of Y for an input with these; 0 where the window does not fit."""
        axes, found = len(self.kernel_shape), []
        for axis, size in enumerate(sizes):
            reach = (self.kernel_shape[axis] - 1) * self.dilations[axis] + 1
            room = size + self.pads[axis] + self.pads[axis + axes] - reach
            found.append(room // self.strides[axis] + 1 if room >= 0 else 0)
        return tuple(found)


def pack_filters(
    filters: np.ndarray, *, group: int = 1, chunk: int | None = None, block: int = DEFAULT_BLOCK
) -> PackedWeight:
    """Compress ``filters`` [N, C / group, window...] float32; see :func:`.sparse_matmul.pack`.

    ``block`` is an upper bound: with several groups the largest divisor of N / group below it is taken.
    """
    N = filters.shape[0]
    if group < 1 or N % group:
        raise ValueError(f"{N} output channels cannot be cut into {group} groups")
    return pack(filters.reshape(N, -1).T, chunk=chunk, block=block_size(N, group, block))


def block_size(N: int, group: int, block: int = DEFAULT_BLOCK) -> int:
    """Output channels of a block: ``block``, or with several groups the largest divisor of N / group up to it."""
    if group == 1:
        return block
    channels = N // group
    return max(size for size in range(1, min(block, channels) + 1) if channels % size == 0)


def unpack_filters(packed: PackedWeight, window: Window) -> np.ndarray:
    """The dense weight [N, C / group, window...]."""
    return np.ascontiguousarray(unpack(packed).T).reshape(packed.N, -1, *window.kernel_shape)


_FLOAT64: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "none": lambda y, _low, _high: y,
    "relu": lambda y, _low, _high: np.maximum(y, 0),
    "clip": lambda y, low, high: np.clip(y, low, high),
    "silu": lambda y, _low, _high: y / (1 + np.exp(-y)),
    "hard_swish": lambda y, _low, _high: y * np.clip(y / 6 + 0.5, 0, 1),
}


def reference(
    x: np.ndarray,
    packed: PackedWeight,
    bias: np.ndarray,
    window: Window,
    activation: str = "none",
    *,
    residual: np.ndarray | None = None,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests. ``limits`` are ``min`` and ``max`` of a clip."""
    filters = unpack_filters(packed, window).astype(np.float64)
    batch, channels, *sizes = x.shape
    axes, outputs = len(sizes), window.output_size(*sizes)
    padding = list(zip(window.pads[:axes], window.pads[axes:], strict=True))
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *padding])
    grouped = padded.reshape(batch, window.group, channels // window.group, *padded.shape[2:])
    split = filters.reshape(window.group, -1, *filters.shape[1:])
    y = np.zeros((batch, window.group, split.shape[1], *outputs))
    for tap in np.ndindex(*window.kernel_shape):
        seen = grouped
        for axis, index in enumerate(tap):
            first, stride = index * window.dilations[axis], window.strides[axis]
            chosen = first + stride * np.arange(outputs[axis])
            seen = np.take(seen, chosen, axis=3 + axis)
        y += np.einsum("bgc...,gnc->bgn...", seen, split[(..., *tap)])
    h = y.reshape(batch, packed.N, *outputs) + bias.reshape(-1, *[1] * axes)
    return _FLOAT64[activation](h if residual is None else h + residual, *limits)


# From {h} to {y}. Opset 13 has no HardSwish.
_ACTIVATION_BODIES = {
    "none": "{y} = Identity({h})",
    "relu": "{y} = Relu({h})",
    "clip": """
        {y}_low = Constant<value_float: float = @min>()
        {y}_high = Constant<value_float: float = @max>()
        {y} = Clip({h}, {y}_low, {y}_high)""",
    "silu": """
        {y}_gate = Sigmoid({h})
        {y} = Mul({h}, {y}_gate)""",
    "hard_swish": """
        {y}_gate = HardSigmoid<alpha = 0.16666667, beta = 0.5>({h})
        {y} = Mul({h}, {y}_gate)""",
}


def activation_body(activation: str, h: str, y: str) -> str:
    """Lines of a function's body that compute ``y`` from ``h``; a clip's limits are the attributes min and max."""
    return _ACTIVATION_BODIES[activation].format(h=h, y=y)


_WINDOW = ("kernel_shape", "strides", "pads", "dilations")
_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{attributes}> ({inputs}) => (Y)
{{
    {decoder}
    window = Constant<value_ints: ints = @kernel_shape>()
    transposed = Transpose<perm = [1, 0]>(W)
    filter_shape = Concat<axis = 0>(n_1, flat_shape, window)
    filters = Reshape(transposed, filter_shape)
    {product} = Conv<{window}, group: int = @group>(X, filters, bias)
    {sum}
    {activation}
}}
"""


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    activation, residual = OP_TYPES[op_type]
    attributes = [*SIZES, *_WINDOW, "group"]
    text = _BODY.format(
        domain=DOMAIN,
        opset=opset,
        op_type=op_type,
        attributes=", ".join([*attributes, *(["min", "max"] if activation == "clip" else [])]),
        inputs=", ".join(["X", *STORED, "bias", *(["R"] if residual else [])]),
        decoder=decoder(),
        window=", ".join(f"{name}: ints = @{name}" for name in _WINDOW),
        product="product" if residual else "h",
        sum="h = Add(product, R)" if residual else "",
        activation=activation_body(activation, "h", "Y"),
    )
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto
