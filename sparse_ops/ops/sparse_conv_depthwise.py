"""A convolution and the depthwise one behind it, as one operator: ``SparseConvDepthwise*``.

``Y = act(DepthwiseConv(act(Conv(X, W) + bias), filters) + filter_bias)``, W stored compressed: the first two
convolutions of an inverted residual block. The maps between them are the largest of such models; the kernel computes
a band of rows at a time, so that they stay in the cache.

Signature (domain ``sparse_onnx``, version 1; one op type per activation, see :data:`OP_TYPES`)::

    SparseConvDepthwise*<kernel_shape, strides, pads, dilations, K, N, ..., format, mask_structure,
                         depthwise_kernel_shape, depthwise_strides, depthwise_pads, depthwise_dilations>(
        X, ..., bias, filters, filter_bias) -> Y

===========  =========  ==================  =================================================================
name         dtype      shape               meaning
===========  =========  ==================  =================================================================
X            float32    [B, C, H, W]        images; or [B, C, W], and so Y: both windows have one axis
...                                         the weight [K, N] and its bias [N], as for ``SparseConv``
filters      float32    [N · taps]          of the depthwise convolution: [N, window...] flat
filter_bias  float32    [N]
Y            float32    [B, N, H', W']      feature maps
===========  =========  ==================  =================================================================

The windows are those of two ``Conv`` nodes, all attributes explicit; the first has one group.
``SparseConvDepthwiseClip`` has two more attributes, the floats ``min`` and ``max``, for both activations.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparse_onnx.sparse_ops.formats.base import Packed, StoredFormat
from sparse_onnx.sparse_ops.ops import sparse_conv
from sparse_onnx.sparse_ops.ops.base import Attributes, Body, Shape, SparseOperator
from sparse_onnx.sparse_ops.ops.sparse_conv import ACTIVATIONS, WINDOW, Window, activation_body, positions

__all__ = ["OPERATOR", "OP_TYPES", "PREFIX", "operator_name", "reference"]

PREFIX = "depthwise_"
"""Of the attributes of the depthwise window."""


def operator_name(activation: str) -> str:
    """The operator with this activation, a key of :data:`.sparse_conv.ACTIVATIONS` but "none"."""
    return f"SparseConvDepthwise{ACTIVATIONS[activation]}"


OP_TYPES = {operator_name(activation): activation for activation in ACTIVATIONS if activation != "none"}
"""The activation of every operator."""


def reference(
    x: np.ndarray,
    packed: Packed,
    bias: np.ndarray,
    window: Window,
    filters: np.ndarray,
    filter_bias: np.ndarray,
    depthwise: Window,
    activation: str,
    *,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests. ``filters`` are [N, taps]."""
    between = sparse_conv.reference(x, packed, bias, window, activation, limits=limits)
    stacked = np.reshape(filters, (packed.shape[1], 1, *depthwise.kernel_shape))
    second = dataclasses.replace(depthwise, group=packed.shape[1])
    return sparse_conv.reference_of_filters(between, stacked, filter_bias, second, activation, limits=limits)


def _body(op_type: str, stored: StoredFormat) -> Body:
    activation = OP_TYPES[op_type]
    depthwise = tuple(PREFIX + name for name in WINDOW)
    steps = f"""{stored.decoder()}
    window = Constant<value_ints: ints = @kernel_shape>()
    transposed = Transpose<perm = [1, 0]>(W)
    filter_shape = Concat<axis = 0>(n_1, flat_shape, window)
    first_filters = Reshape(transposed, filter_shape)
    h = Conv<{", ".join(f"{name}: ints = @{name}" for name in WINDOW)}>(X, first_filters, bias)
    {activation_body(activation, "h", "between")}
    depthwise_window = Constant<value_ints: ints = @depthwise_kernel_shape>()
    one_channel = Constant<value_ints: ints = [1]>()
    depthwise_shape = Concat<axis = 0>(n_1, one_channel, depthwise_window)
    depthwise_filters = Reshape(filters, depthwise_shape)
    depthwise_h = Conv<{", ".join(f"{name}: ints = @{PREFIX}{name}" for name in WINDOW)}, group: int = @N>(
        between, depthwise_filters, filter_bias)
    {activation_body(activation, "depthwise_h", "Y")}"""
    limits = ("min", "max") if activation == "clip" else ()
    return Body(steps, (*WINDOW, *depthwise, *limits), ("filters", "filter_bias"))


def _positions_of_an_image(attributes: Attributes, x_shape: Shape) -> tuple[int, ...]:
    return (positions(attributes, x_shape) // max(1, x_shape[0]),)


OPERATOR = SparseOperator(tuple(OP_TYPES), _body, rows=positions, at_once=_positions_of_an_image)
