"""``Int8MatMul`` and ``SparseInt8MatMul``: ``Y = act(round(X) · W + bias)``, X rounded to 8 bits token by token.

Signatures (domain ``sparse_onnx``, version 1). Of every operator of :mod:`.sparse_matmul` and
:mod:`.sparse_matmul_split` there are two op types, with a word in the place of ``Sparse``::

    Int8MatMul*<K, N, ..., format>(X, ..., bias) -> Y              all weights are stored
    SparseInt8MatMul*<K, N, ..., format>(X, ..., bias) -> Y        quads of inputs without a weight are not

    Int8MatMulSplit3<K, N, ..., format, split>(X, ..., bias) -> Y0, Y1, Y2         and so on

===========  =========  ==============  =====================================================================
name         dtype      shape           meaning
===========  =========  ==============  =====================================================================
X            float32    [..., K]        activations, rank >= 1
...                                     the parts and sizes of W, see :mod:`..formats.int8_quads`
bias         float32    [N]             zeros where the layer has none
Y            float32    [..., N]        as those of the operator on floats; several linears in one weight have whole
                                        blocks of outputs, but for the last
===========  =========  ==============  =====================================================================

Each token, a vector of K activations, has steps of its own::

    low, high = min(X, 0), max(X, 0)            over the last axis
    d = max((high - low) / 255, 1e-30)          the size of a step
    z = Round(-low · (1 / d))                   the zero point
    Q = min(Round(X · (1 / d)) + z, 255)        uint8
    H = ((Q · V) - z · sum(V)) · d · scales + bias

`Round` is to the nearest, ties to even; the difference in the inner brackets is exact. All kernels and the body in
standard operators give the same integers, whatever the processor. Of a token with NaN or Inf all outputs are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN, EXACT_DOMAIN
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.formats.int8_quads import Int8Weight
from sparse_onnx.sparse_ops.ops import sparse_matmul, sparse_matmul_split
from sparse_onnx.sparse_ops.ops.base import BIAS, Body, Operator

__all__ = [
    "BASES",
    "CORRECTED",
    "OPERATOR",
    "OP_TYPES",
    "PRODUCTS",
    "Ending",
    "OfBytes",
    "ending",
    "exact_body",
    "function_body",
    "op_type_of",
    "reference",
]


class OfBytes(NamedTuple):
    """What an op type is: the operator ``base`` of floats, with all weights stored or not."""

    base: str
    dense: bool


BASES = (*sparse_matmul.ACTIVATIONS, *sparse_matmul_split.OP_TYPES)
"""The operators of floats that there are for products of bytes."""


def op_type_of(base: str, dense: bool) -> str:
    """The op type that does what ``base``, one of :data:`BASES`, does."""
    return base.replace("Sparse", "Int8" if dense else "SparseInt8", 1)


OP_TYPES = {op_type_of(base, dense): OfBytes(base, dense) for dense in (True, False) for base in BASES}


def reference(x: np.ndarray, weight: Int8Weight, bias: np.ndarray, activation: str = "none") -> np.ndarray:
    """What the operator of one linear computes, float64 [..., N] of finite ``x``: the oracle of the tests."""
    one = np.float32(1)
    low, high = (np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0))
    size = np.maximum((high - low) / np.float32(255), np.float32(1e-30))
    inverse = one / size
    zero = np.rint(-(low * inverse))
    rounded = np.clip(np.rint(x * inverse) + zero, 0, 255).astype(np.int64) - zero.astype(np.int64)
    exact = rounded @ weight.integers().astype(np.int64)
    return sparse_matmul.activated(activation, exact * size.astype(np.float64) * weight.scales + bias)


class Ending(NamedTuple):
    """How a body ends: lines ``before`` all others that have only constants behind them, and ``body``, what it makes
    of the value ``h`` [..., N], the sums with the bias."""

    before: str
    h: str
    body: Body


def ending(base: str) -> Ending:
    """That of the operator ``base``, behind a decoder of the weight."""
    if base in sparse_matmul.ACTIVATIONS:
        activation = sparse_matmul.ACTIVATIONS[base]
        return Ending("", "h", Body(sparse_matmul.activation_body(activation)))
    return Ending(
        sparse_matmul_split.sizes_body(base), "all_h", sparse_matmul_split.divided_body(base, "all_h")
    )


# Both factors are unsigned: kernels of ORT for unsigned by signed bytes add pairs of products in 16 bits on processors
# without VNNI, where they may saturate.
PRODUCTS = """
    V_32 = Cast<to = 6>(V)
    middle_32 = Constant<value = int32 {128}>()
    lifted_32 = Add(V_32, middle_32)
    lifted = Cast<to = 2>(lifted_32)
    no_point = Constant<value = uint8 {0}>()
    middle = Constant<value = uint8 {128}>()
    products = MatMulInteger(Q, lifted, no_point, middle)
    total = ReduceSum<keepdims = 0>(V_32, axis0)
"""
"""Lines that multiply bytes Q [..., K] by what a decoder made, V: ``products``, and the sum of each output's V."""

CORRECTED = """
    shift = Mul(point_32, total)
    exact = Sub(products, shift)
    floats = Cast<to = 1>(exact)
"""
"""Lines behind these that take off what the zero points ``point_32`` of Q add."""

_BODY = """
    {decoder}
    {before}
    zero_f = Constant<value = float {{0.0}}>()
    unit = Constant<value = float {{1.0}}>()
    top = Constant<value = float {{255.0}}>()
    smallest = Constant<value = float {{1e-30}}>()
    last_axis = Constant<value = int64[1] {{-1}}>()
    {extremes}
    low = Min(lowest, zero_f)
    high = Max(highest, zero_f)
    range = Sub(high, low)
    unlimited = Div(range, top)
    size = Max(unlimited, smallest)
    inverse = Div(unit, size)
    below = Mul(low, inverse)
    above = Neg(below)
    point = Round(above)
    ratio = Mul(X, inverse)
    nearest = Round(ratio)
    moved = Add(nearest, point)
    clipped = Clip(moved, zero_f, top)
    Q = Cast<to = 2>(clipped)
    {products}
    point_32 = Cast<to = 6>(point)
    {corrected}
    none = Mul(X, zero_f)
    poison = ReduceSum(none, last_axis)
    size_or_nan = Add(size, poison)
    stepped = Mul(floats, size_or_nan)
    sized = Mul(stepped, scales)
    {h} = Add(sized, bias)
    {steps}
"""
_EXTREMES_BEFORE_18 = """
    lowest = ReduceMin<axes = [-1]>(X)
    highest = ReduceMax<axes = [-1]>(X)"""
_EXTREMES = """
    lowest = ReduceMin(X, last_axis)
    highest = ReduceMax(X, last_axis)"""
_EXACT_BODY = """
    {decoder}
    {before}
    V_f = Cast<to = 1>(V)
    W = Mul(V_f, scales)
    product_xw = MatMul(X, W)
    {h} = Add(product_xw, bias)
    {steps}
"""


def _function(op_type: str, opset: int, domain: str, body: str) -> onnx.FunctionProto:
    base, dense = OP_TYPES[op_type]
    end = ending(base)
    inputs = ("X", *(part.name for part in int8_quads.parts(dense)), BIAS)
    steps = body.format(
        decoder=int8_quads.decoder(dense),
        before=end.before,
        extremes=_EXTREMES if opset >= 18 else _EXTREMES_BEFORE_18,
        products=PRODUCTS,
        corrected=CORRECTED,
        h=end.h,
        steps=end.body.steps,
    )
    text = f"""<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{", ".join((*int8_quads.SIZES, *end.body.attributes))}>
    ({", ".join(inputs)}) => ({", ".join(end.body.outputs)})
{{
    {steps}
}}"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    return _function(op_type, opset, DOMAIN, _BODY)


def exact_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The same in the domain :data:`.EXACT_DOMAIN`, with the same weight and activations that are not rounded."""
    return _function(op_type, opset, EXACT_DOMAIN, _EXACT_BODY)


OPERATOR = Operator(tuple(OP_TYPES), function_body, exact_body)
