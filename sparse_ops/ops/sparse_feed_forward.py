"""Two linears in a row, the MLP of a transformer, as one operator: ``SparseFeedForward*``.

``Y = act(X · W + bias) · W_down + down_bias``, both weights stored compressed. The activations between them are the
largest of a transformer, four times as wide as X; the kernel computes a tile of tokens through both linears, so that
they are neither transposed nor written to memory.

Signature (domain ``sparse_onnx``, version 1; one op type per operator that the first linear alone would be, see
:data:`PAIRS`)::

    SparseFeedForward*<K, N, ..., format, mask_structure, down_K, down_N, ..., down_mask_structure>(
        X, ..., bias, down_..., down_bias) -> Y

===============  =========  ==============  =================================================================
name             dtype      shape           meaning
===============  =========  ==============  =================================================================
X                float32    [..., K]        activations, rank >= 1
...                                         the first weight [K, N] and its bias [N], as for ``SparseMatMul*``
down_...                                    the second, [down_K, down_N] and [down_N]
Y                float32    [..., down_N]
===============  =========  ==============  =================================================================

Between them is H = act(X · W + bias), float32 [..., N], and ``down_K`` is N. In ``SparseFeedForward*Gate`` it is
H = act(G) · U, element by element, with [G, U] the halves of X · W + bias: float32 [..., N / 2]; ``down_K`` is N / 2,
and ``format`` says how the first weight lies. ``SparseFeedForward`` has no activation:
a weight of low rank as its two factors.
"""

from __future__ import annotations

import numpy as np

from sparse_onnx.sparse_ops.formats.base import Packed, StoredFormat
from sparse_onnx.sparse_ops.ops import sparse_matmul, sparse_matmul_split
from sparse_onnx.sparse_ops.ops.base import Attributes, Body, SparseOperator
from sparse_onnx.sparse_ops.ops.sparse_matmul import ACTIVATIONS
from sparse_onnx.sparse_ops.ops.sparse_matmul_split import GATES

__all__ = ["OPERATOR", "OP_TYPES", "PAIRS", "PREFIX", "reference"]

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
    packed: Packed,
    bias: np.ndarray,
    down: Packed,
    down_bias: np.ndarray,
) -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests."""
    first = OP_TYPES[op_type]
    if first in ACTIVATIONS:
        between = sparse_matmul.reference(x, packed, bias, ACTIVATIONS[first])
    else:
        (between,) = sparse_matmul_split.reference(first, x, packed, bias)
    return sparse_matmul.reference(between, down, down_bias)


def _body(op_type: str, stored: StoredFormat) -> Body:
    first = OP_TYPES[op_type]
    if first in ACTIVATIONS:
        decoder, between = stored.decoder(), sparse_matmul.linear_body(first, "between")
    else:
        decoder, between = (
            sparse_matmul_split.gate_decoder(stored),
            sparse_matmul_split.gate_body(first, "between"),
        )
    return Body(f"""{decoder}
    {between}
    {stored.decoder(PREFIX)}
    product_down = MatMul(between, {PREFIX}W)
    Y = Add(product_down, {PREFIX}bias)""")


def _linears_of(op_type: str, N: int, attributes: Attributes) -> tuple[int, ...]:
    return sparse_matmul_split.linears_of(OP_TYPES[op_type], N, attributes)


OPERATOR = SparseOperator(tuple(OP_TYPES), _body, ("", PREFIX), _linears_of)
