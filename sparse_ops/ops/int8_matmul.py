"""``Int8MatMul`` and ``SparseInt8MatMul``: ``Y = act(round(X) · W + bias)``, X rounded to 8 bits token by token.

Signatures (domain ``sparse_onnx``, version 1; one op type per activation, named as those of ``SparseMatMul``)::

    Int8MatMul<K, N, ..., format>(X, ..., bias) -> Y              all weights are stored
    SparseInt8MatMul<K, N, ..., format>(X, ..., bias) -> Y        quads of inputs without a weight are not

===========  =========  ==============  =====================================================================
name         dtype      shape           meaning
===========  =========  ==============  =====================================================================
X            float32    [..., K]        activations, rank >= 1
...                                     the parts and sizes of W, see :mod:`..formats.int8_quads`
bias         float32    [N]             zeros where the layer has none
Y            float32    [..., N]
===========  =========  ==============  =====================================================================

Each token, a vector of K activations, has steps of its own::

    low, high = min(X, 0), max(X, 0)            over the last axis
    d = max((high - low) / 255, 1e-30)          the size of a step
    z = Round(-low · (1 / d))                   the zero point
    Q = min(Round(X · (1 / d)) + z, 255)        uint8
    Y = act(((Q · V) - z · sum(V)) · d · scales + bias)

`Round` is to the nearest, ties to even; the difference in the inner brackets is exact. All kernels and the body in
standard operators give the same integers, whatever the processor. Of a token with NaN or Inf all outputs are NaN.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.formats.int8_quads import Int8Weight
from sparse_onnx.sparse_ops.ops import sparse_matmul
from sparse_onnx.sparse_ops.ops.base import BIAS, Operator

__all__ = [
    "CORRECTED",
    "EXACT_DOMAIN",
    "OPERATOR",
    "OP_TYPES",
    "PRODUCTS",
    "exact_body",
    "function_body",
    "op_type_of",
    "reference",
]

EXACT_DOMAIN = f"{DOMAIN}.exact"
"""Of the same operators with activations that are not rounded."""


def op_type_of(activation: str, dense: bool) -> str:
    """The op type with an ``activation`` (a key of :data:`.sparse_matmul.OP_TYPES`)."""
    word = "Int8" if dense else "SparseInt8"
    return sparse_matmul.OP_TYPES[activation].replace("Sparse", word, 1)


OP_TYPES = {
    op_type_of(activation, dense): (activation, dense)
    for dense in (True, False)
    for activation in sparse_matmul.OP_TYPES
}
"""Activation, and whether all weights are stored, by op type."""


def reference(x: np.ndarray, weight: Int8Weight, bias: np.ndarray, activation: str = "none") -> np.ndarray:
    """What the operator computes, float64 [..., N] of finite ``x``: the oracle of the tests."""
    one = np.float32(1)
    low, high = (np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0))
    size = np.maximum((high - low) / np.float32(255), np.float32(1e-30))
    inverse = one / size
    zero = np.rint(-(low * inverse))
    rounded = np.clip(np.rint(x * inverse) + zero, 0, 255).astype(np.int64) - zero.astype(np.int64)
    exact = rounded @ weight.integers().astype(np.int64)
    return sparse_matmul.activated(activation, exact * size.astype(np.float64) * weight.scales + bias)


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
    h = Add(sized, bias)
    {activation}
"""
_EXTREMES_BEFORE_18 = """
    lowest = ReduceMin<axes = [-1]>(X)
    highest = ReduceMax<axes = [-1]>(X)"""
_EXTREMES = """
    lowest = ReduceMin(X, last_axis)
    highest = ReduceMax(X, last_axis)"""
_EXACT_BODY = """
    {decoder}
    V_f = Cast<to = 1>(V)
    W = Mul(V_f, scales)
    product_xw = MatMul(X, W)
    h = Add(product_xw, bias)
    {activation}
"""


def _function(op_type: str, opset: int, domain: str, body: str) -> onnx.FunctionProto:
    activation, dense = OP_TYPES[op_type]
    inputs = ("X", *(part.name for part in int8_quads.parts(dense)), BIAS)
    steps = body.format(
        decoder=int8_quads.decoder(dense),
        extremes=_EXTREMES if opset >= 18 else _EXTREMES_BEFORE_18,
        products=PRODUCTS,
        corrected=CORRECTED,
        activation=sparse_matmul.activation_body(activation),
    )
    text = f"""<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{", ".join(int8_quads.SIZES)}> ({", ".join(inputs)}) => (Y)
{{
    {steps}
}}"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    return _function(op_type, opset, DOMAIN, _BODY)


def exact_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The same in :data:`EXACT_DOMAIN`, with the same weight and activations that are not rounded."""
    return _function(op_type, opset, EXACT_DOMAIN, _EXACT_BODY)


OPERATOR = Operator(tuple(OP_TYPES), function_body)
