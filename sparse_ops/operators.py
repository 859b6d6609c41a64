"""The operators of the kernel library."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx

from sparse_onnx.sparse_ops import (
    attention,
    skip_layer_norm,
    sparse_conv,
    sparse_conv_depthwise,
    sparse_feed_forward,
    sparse_matmul,
    sparse_matmul_split,
    sparse_recurrent,
)

__all__ = ["CONTRACTS"]

CONTRACTS: Mapping[str, Callable[[str, int], onnx.FunctionProto]] = {
    op_type: contract.function_body
    for contract in (
        sparse_matmul,
        sparse_matmul_split,
        sparse_feed_forward,
        sparse_conv,
        sparse_conv_depthwise,
        sparse_recurrent,
        attention,
        skip_layer_norm,
    )
    for op_type in (sparse_matmul.ACTIVATIONS if contract is sparse_matmul else contract.OP_TYPES)
}
"""The body of every operator by its op type."""
