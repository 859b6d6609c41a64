"""The operators of the kernel library."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_onnx.sparse_ops.formats.registry import FORMATS
from sparse_onnx.sparse_ops.ops import (
    attention,
    int8_conv,
    int8_feed_forward,
    int8_matmul,
    q_matmul,
    skip_layer_norm,
    sparse_conv,
    sparse_conv_depthwise,
    sparse_feed_forward,
    sparse_matmul,
    sparse_matmul_nbits,
    sparse_matmul_split,
    sparse_recurrent,
)
from sparse_onnx.sparse_ops.ops.base import Operator, OpType, SparseOperator, op_types_of

__all__ = ["OPERATORS", "OP_TYPES"]

OPERATORS: tuple[Operator | SparseOperator, ...] = (
    sparse_matmul.OPERATOR,
    sparse_matmul_nbits.OPERATOR,
    sparse_matmul_split.OPERATOR,
    sparse_feed_forward.OPERATOR,
    sparse_conv.OPERATOR,
    sparse_conv_depthwise.OPERATOR,
    sparse_recurrent.OPERATOR,
    int8_matmul.OPERATOR,
    int8_feed_forward.OPERATOR,
    int8_conv.OPERATOR,
    q_matmul.OPERATOR,
    attention.OPERATOR,
    skip_layer_norm.OPERATOR,
)

OP_TYPES: Mapping[str, OpType] = op_types_of(OPERATORS, FORMATS)
"""Every op type of the domain by its name."""
