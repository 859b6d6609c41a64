"""``SparseMatMulInt*``: what ``SparseMatMul*`` do, W in 4 or 8 bits without its zeros, X rounded to 8 bits: for few
tokens.

Signatures (domain ``sparse_onnx``, version 1). Of every operator of :mod:`.sparse_matmul` and
:mod:`.sparse_matmul_split` there is an op type for each layout, with a word behind ``SparseMatMul``::

    SparseMatMulInt4*<K, N, group, format>(X, masks, values, scales, bias) -> Y            format "bitmap4"
    SparseMatMulInt4WithZeros*<...>(..., zeros, bias) -> Y                                 format "bitmap4"
    SparseMatMulInt8*<K, N, group, format>(X, masks, values, scales, bias) -> Y            format "bitmap8"
    SparseMatMulInt4Of16*<K, N, group, kept, format>(X, values, scales, bias) -> Y         format "n_of_16"
    SparseMatMulInt4Of16WithZeros*<...>(..., zeros, bias) -> Y                             format "n_of_16"

    SparseMatMulInt4Split3<K, N, group, format, split>(X, ..., bias) -> Y0, Y1, Y2         and so on

===========  =========  ==============  =====================================================================
name         dtype      shape           meaning
===========  =========  ==============  =====================================================================
X            float32    [..., K]        activations, rank >= 1
...                                     the parts and sizes of W [K, N], see :mod:`sparse_onnx.sparse_ops.formats.nbits`
bias         float32    [N]             zeros where the layer has none
Y            float32    [..., N]        as those of the operator on floats; several linears in one weight have whole
                                        blocks of 16 outputs, but for the last
===========  =========  ==============  =====================================================================

Every token is rounded by itself, each ``group`` of inputs (the last may be shorter) with a scale of its own::

    s = max |x| / 127, or 1 where that is 0        q = round(x / s), halves to even        H = Σ (s · q) · W

The kernels add the products of integers exactly, group by group. A token with NaN or Inf gives NaN in every output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN, EXACT_DOMAIN
from sparse_onnx.sparse_ops.formats.nbits import LAYOUTS, Layout, PackedLevels, decoder
from sparse_onnx.sparse_ops.ops import sparse_matmul, sparse_matmul_split
from sparse_onnx.sparse_ops.ops.base import BIAS, Body, Operator

__all__ = [
    "OPERATOR",
    "OP_TYPES",
    "Integers",
    "exact_body",
    "function_body",
    "op_type_of",
    "reference",
    "rounded",
]


class Integers(NamedTuple):
    """What an op type is: the operator ``base`` of floats, with weights in ``layout``."""

    base: str
    layout: Layout


_PRODUCT = sparse_matmul.OP_TYPES["none"]
_BASES = (*sparse_matmul.ACTIVATIONS, *sparse_matmul_split.OP_TYPES)
_WORDS = {
    "bitmap4": "Int4",
    "bitmap4_zeros": "Int4WithZeros",
    "bitmap8": "Int8",
    "n_of_16": "Int4Of16",
    "n_of_16_zeros": "Int4Of16WithZeros",
}

OP_TYPES = {
    base.replace(_PRODUCT, _PRODUCT + _WORDS[key]): Integers(base, layout)
    for key, layout in LAYOUTS.items()
    for base in _BASES
}

_HIGHEST = 127


def op_type_of(base: str, layout: Layout) -> str:
    """The op type that does what ``base`` does, with weights in that layout."""
    (found,) = (op_type for op_type, own in OP_TYPES.items() if own == (base, layout))
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


def reference(
    op_type: str, x: np.ndarray, packed: PackedLevels, bias: np.ndarray, split: Sequence[int] = ()
) -> list[np.ndarray]:
    """What the operator computes, in float64: the oracle of the tests. ``split`` is the attribute, () where there is
    none."""
    base, _ = OP_TYPES[op_type]
    h = rounded(x, packed.group) @ packed.unpack().astype(np.float64) + bias
    if base in sparse_matmul.ACTIVATIONS:
        return [sparse_matmul.activated(sparse_matmul.ACTIVATIONS[base], h)]
    return sparse_matmul_split.divided(base, h, split)


_ROUNDING = """
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
    x_rounded = Slice(back_filled, axis0, k_1, last_1)"""
_LARGEST_BEFORE_18 = "largest = ReduceMax<axes = [-1]>(magnitude)"
_LARGEST = "largest = ReduceMax(magnitude, last_1)"


def _function(op_type: str, opset: int, domain: str, rounding: str, x: str) -> onnx.FunctionProto:
    base, layout = OP_TYPES[op_type]
    if base in sparse_matmul.ACTIVATIONS:
        sizes, body = "", Body(sparse_matmul.linear_body(base, x=x))
    else:
        sizes, body = sparse_matmul_split.sizes_body(base), sparse_matmul_split.steps_body(base, x)
    text = f"""<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{", ".join((*layout.sizes, "format", *body.attributes))}>
    ({", ".join(("X", *layout.parts, BIAS))}) => ({", ".join(body.outputs)})
{{
    {decoder(layout)}
    {sizes}
    {rounding}
    {body.steps}
}}"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    largest = _LARGEST if opset >= 18 else _LARGEST_BEFORE_18
    return _function(op_type, opset, DOMAIN, _ROUNDING.replace("@largest", largest), "x_rounded")


def exact_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The same in the domain :data:`.EXACT_DOMAIN`, of X as it is."""
    return _function(op_type, opset, EXACT_DOMAIN, "", "X")


OPERATOR = Operator(tuple(OP_TYPES), function_body, exact_body)
