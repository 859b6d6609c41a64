"""``SparseConv``: ``Y = act(Conv(X, W) + bias [+ R])`` with W stored compressed.

Signature (domain ``sparse_onnx``, version 1; one op type per activation and residual, see :data:`OP_TYPES`)::

    SparseConv<kernel_shape, strides, pads, dilations, group, K, N, ..., format, mask_structure>(X, ..., bias) -> Y
    SparseConvAdd<...>(X, ..., bias, R) -> Y

===========  =========  ==================  =================================================================
name         dtype      shape               meaning
===========  =========  ==================  =================================================================
X            float32    [B, C, H, W]        images; or [B, C, W], and so R and Y: a convolution of one axis
...                                         the weight [K, N], stored as for ``SparseMatMul``
bias         float32    [N]                 zeros where the layer has none
R            float32    as Y                residual, added before the activation; no broadcasting
Y            float32    [B, N, H', W']      feature maps
===========  =========  ==================  =================================================================

The weight of a convolution, [N, C / group, kernel height, kernel width], is stored as the matrix [K, N] with
K = C / group · kernel height · kernel width: transposed, and with its last three axes as one. Output channel n reads
the input channels of group ``n // (N / group)``; what is stored together has the outputs of one group:
:func:`outputs_of`.

Attributes are those of ``Conv``, all of them required and explicit: ``kernel_shape``, ``strides`` and
``dilations`` have two integers, at least 1, ``pads`` has four (top, left, bottom, right), at least 0. With one axis
they have one, and ``pads`` two (left, right); to the kernel that is an image of one row.
``SparseConvClip`` and ``SparseConvAddClip`` have two more, the floats ``min`` and ``max``.

A depthwise convolution (group = C = N) is computed without gathering.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparse_onnx.sparse_ops.formats.base import Outputs, Packed, StoredFormat
from sparse_onnx.sparse_ops.ops.base import Attributes, Body, Shape, SparseOperator

__all__ = [
    "ACTIVATIONS",
    "OPERATOR",
    "OP_TYPES",
    "WINDOW",
    "Window",
    "activation_body",
    "matrix_of",
    "operator_name",
    "outputs_of",
    "positions",
    "reference",
    "reference_of_filters",
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


def matrix_of(filters: np.ndarray) -> np.ndarray:
    """The weight [K, N] of ``filters`` [N, C / group, window...]."""
    return filters.reshape(filters.shape[0], -1).T


def outputs_of(N: int, group: int = 1) -> Outputs:
    """How the outputs of a weight with so many groups may be stored. Raises ValueError where there are no such."""
    if group < 1 or N % group:
        raise ValueError(f"{N} output channels cannot be cut into {group} groups")
    return Outputs(None if group == 1 else N // group, apart=True, maps=True)


def unpack_filters(packed: Packed, window: Window) -> np.ndarray:
    """The dense weight [N, C / group, window...]."""
    return np.ascontiguousarray(packed.unpack().T).reshape(packed.shape[1], -1, *window.kernel_shape)


_FLOAT64: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "none": lambda y, _low, _high: y,
    "relu": lambda y, _low, _high: np.maximum(y, 0),
    "clip": lambda y, low, high: np.clip(y, low, high),
    "silu": lambda y, _low, _high: y / (1 + np.exp(-y)),
    "hard_swish": lambda y, _low, _high: y * np.clip(y / 6 + 0.5, 0, 1),
}


def reference(
    x: np.ndarray,
    packed: Packed,
    bias: np.ndarray,
    window: Window,
    activation: str = "none",
    *,
    residual: np.ndarray | None = None,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests. ``limits`` are ``min`` and ``max`` of a clip."""
    filters = unpack_filters(packed, window)
    return reference_of_filters(x, filters, bias, window, activation, residual=residual, limits=limits)


def reference_of_filters(
    x: np.ndarray,
    filters: np.ndarray,
    bias: np.ndarray,
    window: Window,
    activation: str,
    *,
    residual: np.ndarray | None = None,
    limits: tuple[float, float],
) -> np.ndarray:
    """As :func:`reference`, of ``filters`` [N, C / group, window...]."""
    filters = filters.astype(np.float64)
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
    h = y.reshape(batch, len(filters), *outputs) + bias.reshape(-1, *[1] * axes)
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


WINDOW = ("kernel_shape", "strides", "pads", "dilations")
"""The attributes of a window that are lists, ``group`` apart."""


def _body(op_type: str, stored: StoredFormat) -> Body:
    activation, residual = OP_TYPES[op_type]
    window = ", ".join(f"{name}: ints = @{name}" for name in WINDOW)
    steps = f"""{stored.decoder()}
    window = Constant<value_ints: ints = @kernel_shape>()
    transposed = Transpose<perm = [1, 0]>(W)
    filter_shape = Concat<axis = 0>(n_1, flat_shape, window)
    filters = Reshape(transposed, filter_shape)
    {"product" if residual else "h"} = Conv<{window}, group: int = @group>(X, filters, bias)
    {"h = Add(product, R)" if residual else ""}
    {activation_body(activation, "h", "Y")}"""
    limits = ("min", "max") if activation == "clip" else ()
    return Body(steps, (*WINDOW, "group", *limits), ("R",) if residual else ())


def positions(attributes: Attributes, x_shape: Shape) -> int:
    """The positions of the output's maps, of all images."""
    kernel, strides, pads, dilations = (tuple(attributes[name]) for name in WINDOW)
    return x_shape[0] * math.prod(Window(kernel, strides, pads, dilations).output_size(*x_shape[2:]))


OPERATOR = SparseOperator(tuple(OP_TYPES), _body, rows=positions)
