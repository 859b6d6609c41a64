"""Two linears in a row, the MLP of a transformer, as one operator: ``SparseFeedForward*``.

``Y = act(X · W + bias) · W_down + down_bias``, both weights stored compressed. The activations between them are the
largest of a transformer, four times as wide as X; the kernel computes a tile of tokens through both linears, so that
they are neither transposed nor written to memory.

Signature (domain ``sparse_onnx``, version 1; one op type per operator that the first linear alone would be, see
:data:`PAIRS`)::

    SparseFeedForward*<K, N, chunk, block, width, format, mask_structure,
                       down_K, down_N, down_chunk, down_block, down_width, down_mask_structure>(
        X, values, offsets, counts, rows, bias,
        down_values, down_offsets, down_counts, down_rows, down_bias) -> Y

===============  =========  ==============  =================================================================
name             dtype      shape           meaning
===============  =========  ==============  =================================================================
X                float32    [..., K]        activations, rank >= 1
values ...                                  the first weight [K, N] and its bias [N], as for ``SparseMatMul*``
down_values ...                             the second, [down_K, down_N] and [down_N]
Y                float32    [..., down_N]
===============  =========  ==============  =================================================================

Between them is H = act(X · W + bias), float32 [..., N], and ``down_K`` is N. In ``SparseFeedForward*Gate`` it is
H = act(G) · U, element by element, with [G, U] the halves of X · W + bias: float32 [..., N / 2]; ``down_K`` is N / 2,
and ``format`` says how the first weight lies, see :mod:`.sparse_matmul_split`. ``SparseFeedForward`` has no activation:
a weight of low rank as its two factors.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops import sparse_matmul, sparse_matmul_split
from sparse_onnx.sparse_ops.sparse_matmul import ACTIVATIONS, DOMAIN, SIZES, STORED, PackedWeight, decoder
from sparse_onnx.sparse_ops.sparse_matmul_split import GATES

__all__ = ["OP_TYPES", "PAIRS", "PREFIX", "function_body", "reference"]

PREFIX = "down_"
"""Of the attributes and inputs of the second weight."""

PAIRS = {
    first: first.replace("SparseMatMul", "SparseFeedForward") for first in (*ACTIVATIONS, *GATES.values())
}
"""The operator by that of the first linear."""

OP_TYPES = {op_type: first for first, op_type in PAIRS.items()}
"""The operator of the first linear by that of both."""


def reference(
    op_type: str,
    x: np.ndarray,
    packed: PackedWeight,
    bias: np.ndarray,
    down: PackedWeight,
    down_bias: np.ndarray,
) -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests."""
    first = OP_TYPES[op_type]
    if first in ACTIVATIONS:
        between = sparse_matmul.reference(x, packed, bias, ACTIVATIONS[first])
    else:
        (between,) = sparse_matmul_split.reference(first, x, packed, bias)
    return sparse_matmul.reference(between, down, down_bias)


_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{attributes}> (X, {inputs}) => (Y)
{{
    {decoder}
    {first}
    {down_decoder}
    product_down = MatMul(between, {prefix}W)
    Y = Add(product_down, {prefix}bias)
}}
"""


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    first = OP_TYPES[op_type]
    if first in ACTIVATIONS:
        decoded, body = decoder(), sparse_matmul.linear_body(first, "between")
    else:
        decoded, body = sparse_matmul_split.gate_decoder(), sparse_matmul_split.gate_body(first, "between")
    text = _BODY.format(
        domain=DOMAIN,
        opset=opset,
        op_type=op_type,
        attributes=", ".join(prefix + name for prefix in ("", PREFIX) for name in SIZES),
        inputs=", ".join(prefix + name for prefix in ("", PREFIX) for name in (*STORED, "bias")),
        prefix=PREFIX,
        decoder=decoded,
        first=body,
        down_decoder=decoder(PREFIX),
    )
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto
