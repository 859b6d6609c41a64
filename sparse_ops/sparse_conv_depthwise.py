"""A convolution and the depthwise one behind it, as one operator: ``SparseConvDepthwise*``.

``Y = act(DepthwiseConv(act(Conv(X, W) + bias), filters) + filter_bias)``, W stored compressed: the first two
convolutions of an inverted residual block. The maps between them are the largest of such models; the kernel computes
a band of rows at a time, so that they stay in the cache.

Signature (domain ``sparse_onnx``, version 1; one op type per activation, see :data:`OP_TYPES`)::

    SparseConvDepthwise*<kernel_shape, strides, pads, dilations, K, N, chunk, block, width, format, mask_structure,
                         depthwise_kernel_shape, depthwise_strides, depthwise_pads, depthwise_dilations>(
        X, values, offsets, counts, rows, bias, filters, filter_bias) -> Y

===========  =========  ==================  =================================================================
name         dtype      shape               meaning
===========  =========  ==================  =================================================================
X            float32    [B, C, H, W]        images; or [B, C, W], and so Y: both windows have one axis
values ...                                  the weight [K, N] and its bias [N], as for ``SparseConv``
filters      float32    [N · taps]          of the depthwise convolution: [N, window...] flat
filter_bias  float32    [N]
Y            float32    [B, N, H', W']      feature maps
===========  =========  ==================  =================================================================

The windows are those of two ``Conv`` nodes, all attributes explicit; the first has one group.
``SparseConvDepthwiseClip`` has two more attributes, the floats ``min`` and ``max``, for both activations.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops import sparse_conv
from sparse_onnx.sparse_ops.sparse_conv import ACTIVATIONS, Window, activation_body
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN, SIZES, PackedWeight, decoder

__all__ = ["OP_TYPES", "PREFIX", "function_body", "operator_name", "reference"]

PREFIX = "depthwise_"
"""Of the attributes of the depthwise window."""


def operator_name(activation: str) -> str:
    """The operator with this activation, a key of :data:`.sparse_conv.ACTIVATIONS` but "none"."""
    return f"SparseConvDepthwise{ACTIVATIONS[activation]}"


OP_TYPES = {operator_name(activation): activation for activation in ACTIVATIONS if activation != "none"}
"""The activation of every operator."""


def reference(
    x: np.ndarray,
    packed: PackedWeight,
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
    stacked = np.reshape(filters, (packed.N, 1, *depthwise.kernel_shape))
    second = sparse_conv.pack_filters(np.asarray(stacked, np.float32), group=packed.N, block=1)
    return sparse_conv.reference(between, second, filter_bias, depthwise, activation, limits=limits)


_WINDOW = ("kernel_shape", "strides", "pads", "dilations")
_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{attributes}> (X, values, offsets, counts, rows, bias, filters, filter_bias) => (Y)
{{
    {decoder}
    window = Constant<value_ints: ints = @kernel_shape>()
    transposed = Transpose<perm = [1, 0]>(W)
    filter_shape = Concat<axis = 0>(n_1, flat_shape, window)
    first_filters = Reshape(transposed, filter_shape)
    h = Conv<{window}>(X, first_filters, bias)
    {first}
    depthwise_window = Constant<value_ints: ints = @depthwise_kernel_shape>()
    one_channel = Constant<value_ints: ints = [1]>()
    depthwise_shape = Concat<axis = 0>(n_1, one_channel, depthwise_window)
    depthwise_filters = Reshape(filters, depthwise_shape)
    depthwise_h = Conv<{depthwise}, group: int = @N>(between, depthwise_filters, filter_bias)
    {second}
}}
"""


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    activation = OP_TYPES[op_type]
    attributes = [*SIZES, *_WINDOW, *(PREFIX + name for name in _WINDOW)]
    text = _BODY.format(
        domain=DOMAIN,
        opset=opset,
        op_type=op_type,
        attributes=", ".join([*attributes, *(["min", "max"] if activation == "clip" else [])]),
        decoder=decoder(),
        window=", ".join(f"{name}: ints = @{name}" for name in _WINDOW),
        depthwise=", ".join(f"{name}: ints = @{PREFIX}{name}" for name in _WINDOW),
        first=activation_body(activation, "h", "between"),
        second=activation_body(activation, "depthwise_h", "Y"),
    )
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto
