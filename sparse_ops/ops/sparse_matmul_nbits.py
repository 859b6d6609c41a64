"""``SparseMatMulInt*``: ``Y = X · W``, W in 4 or 8 bits without its zeros, X rounded to 8 bits: for few tokens.

Signatures (domain ``sparse_onnx``, version 1; one op type per layout, see :data:`OP_TYPES`)::

    SparseMatMulInt4<K, N, group, format>(X, masks, values, scales) -> Y              format "bitmap4"
    SparseMatMulInt4WithZeros<...>(..., zeros) -> Y                                   format "bitmap4"
    SparseMatMulInt8<K, N, group, format>(X, masks, values, scales) -> Y              format "bitmap8"
    SparseMatMulInt4Of16<K, N, group, kept, format>(X, values, scales) -> Y           format "n_of_16"

===========  =========  ==============  =====================================================================
name         dtype      shape           meaning
===========  =========  ==============  =====================================================================
X            float32    [..., K]        activations, rank >= 1
...                                     the parts and sizes of W [K, N], see :mod:`sparse_onnx.sparse_ops.formats.nbits`
Y            float32    [..., N]
===========  =========  ==============  =====================================================================

Every token is rounded by itself, each ``group`` of inputs (the last may be shorter) with a scale of its own::

    s = max |x| / 127, or 1 where that is 0        q = round(x / s), halves to even        Y = Σ (s · q) · W

The kernels add the products of integers exactly, group by group. A token with NaN or Inf gives NaN in every output.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats.nbits import LAYOUTS, Layout, PackedLevels, decoder
from sparse_onnx.sparse_ops.ops.base import Operator

__all__ = [
    "EXACT",
    "OPERATOR",
    "OP_TYPES",
    "exact_body",
    "function_body",
    "op_type_of",
    "reference",
    "rounded",
]

OP_TYPES = {
    "SparseMatMulInt4": LAYOUTS["bitmap4"],
    "SparseMatMulInt4WithZeros": LAYOUTS["bitmap4_zeros"],
    "SparseMatMulInt8": LAYOUTS["bitmap8"],
    "SparseMatMulInt4Of16": LAYOUTS["n_of_16"],
}

EXACT = "Exact"
"""Behind the name of an op type: the function that does not round X."""

_HIGHEST = 127


def op_type_of(layout: Layout) -> str:
    """The op type with weights in that layout."""
    (found,) = (op_type for op_type, own in OP_TYPES.items() if own == layout)
    return found


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """``x`` float32 [..., K] as the operator rounds it: s · q in float64."""
    parts = []
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group]
        scale = np.abs(part).max(-1, keepdims=True) / np.float32(_HIGHEST)
        scale[scale == 0] = 1
        parts.append(np.rint(part / scale) * scale.astype(np.float64))
    return np.concatenate(parts, axis=-1)


def reference(x: np.ndarray, packed: PackedLevels) -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests."""
    product: np.ndarray = rounded(x, packed.group) @ packed.unpack().astype(np.float64)
    return product


_ROUNDED = """
    of_x = Shape(X)
    last_1 = Constant<value = int64[1] {-1}>()
    tokens_shape = Slice(of_x, axis0, last_1, axis0)
    missing_1 = Sub(whole_1, k_1)
    filling_shape = Concat<axis = 0>(tokens_shape, missing_1)
    filling = ConstantOfShape(filling_shape)
    filled = Concat<axis = -1>(X, filling)
    grouped_shape = Concat<axis = 0>(tokens_shape, groups_1, group_1)
    grouped = Reshape(filled, grouped_shape)
    magnitude = Abs(grouped)
    @largest
    highest = Constant<value = float {127.0}>()
    nought = Constant<value = float {0.0}>()
    unit = Constant<value = float {1.0}>()
    exact_step = Div(largest, highest)
    is_nought = Equal(exact_step, nought)
    step = Where(is_nought, unit, exact_step)
    quotient = Div(grouped, step)
    whole_numbers = Round(quotient)
    back = Mul(whole_numbers, step)
    filled_shape = Concat<axis = 0>(tokens_shape, whole_1)
    back_filled = Reshape(back, filled_shape)
    x_rounded = Slice(back_filled, axis0, k_1, last_1)
    Y = MatMul(x_rounded, W)"""
_LARGEST_BEFORE_18 = "largest = ReduceMax<axes = [-1]>(magnitude)"
_LARGEST = "largest = ReduceMax(magnitude, last_1)"


def _function(op_type: str, name: str, opset: int, steps: str) -> onnx.FunctionProto:
    layout = OP_TYPES[op_type]
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
{name} <{", ".join((*layout.sizes, "format"))}> ({", ".join(("X", *layout.parts))}) => (Y)
{{
    {decoder(layout)}
    {steps}
}}"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    largest = _LARGEST if opset >= 18 else _LARGEST_BEFORE_18
    return _function(op_type, op_type, opset, _ROUNDED.replace("@largest", largest))


def exact_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The same of X as it is, named ``op_type`` and :data:`EXACT`. No kernel belongs to it."""
    return _function(op_type, op_type + EXACT, opset, "Y = MatMul(X, W)")


OPERATOR = Operator(tuple(OP_TYPES), function_body)
