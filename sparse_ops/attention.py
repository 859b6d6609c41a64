"""``Attention``: the softmax of scores, times values, for all heads in one operator that never stores the scores.

Signatures (domain ``sparse_onnx``, version 1; one op type per signature)::

    Attention<num_heads, scale>(q, k, v) -> Y          AttentionMasked<num_heads, scale>(q, k, v, mask) -> Y
    AttentionSplit<num_heads, scale>(q, k, v) -> Y     AttentionSplitMasked<num_heads, scale>(q, k, v, mask) -> Y
    AttentionHeads<num_heads, scale>(q, k, v) -> Y     AttentionHeadsMasked<num_heads, scale>(q, k, v, mask) -> Y

and, inputs and attributes as with ``Masked``, ``AttentionMaskedNanToZero``, ``AttentionSplitMaskedNanToZero`` and
``AttentionHeadsMaskedNanToZero``. For each batch and head, with the Q, K and V of that head::

    P = softmax(scale · Q · Kᵀ + mask)            softmax over the keys
    P = Where(IsNaN(P), 0, P)                     where it says NanToZero
    Y = P · V

===========  =========  =================  ==================================================================
name         dtype      shape              meaning
===========  =========  =================  ==================================================================
q            float32    [B, Sq, H·D]       queries, head by head; [B, H, Sq, D] where it says ``Heads`` (rotary)
k            float32    [B, Sk, H·D]       keys; [B, H, Sk, D] where it says ``Split`` (a cache) or ``Heads``
v            float32    [B, Sk, H·Dv]      values; [B, H, Sk, Dv] where it says ``Split`` or ``Heads``
mask         float32    up to 4 axes       added to the scores; broadcasts with [B, H, Sq, Sk]
num_heads    int        attribute          H, at least 1
scale        float      attribute          finite
Y            float32    [B, Sq, H·Dv]
===========  =========  =================  ==================================================================

Everything is broadcast as the formula says: q, k, v or the mask may have one batch, which then serves those of the
others; so do one query and one key where the mask is for more. A row of scores that are all -Inf, or one of which is
NaN or +Inf, has weights of NaN, as ``Softmax`` says, and of 0 where it says ``NanToZero``. A weight of 0 times a value
that is NaN or infinite is NaN, as in any product. Any of B, Sq and Sk may be 0; without keys, Y is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser

__all__ = ["DOMAIN", "OP_TYPES", "VERSION", "Signature", "function_body", "reference"]

DOMAIN = "sparse_onnx"
VERSION = 1


@dataclass(frozen=True)
class Signature:
    """What sets the op types apart: ``split`` has keys and values per head, ``heads`` queries, too, ``masked`` a fourth
    input, and with ``nan_to_zero`` a weight that is NaN becomes 0."""

    split: bool
    masked: bool
    heads: bool = False
    nan_to_zero: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("q", "k", "v", "mask") if self.masked else ("q", "k", "v")


OP_TYPES = {
    "Attention": Signature(split=False, masked=False),
    "AttentionMasked": Signature(split=False, masked=True),
    "AttentionMaskedNanToZero": Signature(split=False, masked=True, nan_to_zero=True),
    "AttentionSplit": Signature(split=True, masked=False),
    "AttentionSplitMasked": Signature(split=True, masked=True),
    "AttentionSplitMaskedNanToZero": Signature(split=True, masked=True, nan_to_zero=True),
    "AttentionHeads": Signature(split=True, masked=False, heads=True),
    "AttentionHeadsMasked": Signature(split=True, masked=True, heads=True),
    "AttentionHeadsMaskedNanToZero": Signature(split=True, masked=True, heads=True, nan_to_zero=True),
}


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    *,
    num_heads: int,
    scale: float,
    nan_to_zero: bool = False,
) -> np.ndarray:
    """Y float64 from the operator's inputs, q, k and v of either form. The tests' oracle."""

    def heads(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x if x.ndim == 4 else x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)

    scores = heads(q) @ heads(k).swapaxes(2, 3) * scale + (0 if mask is None else mask)
    with np.errstate(invalid="ignore"):  # Inf minus Inf
        weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    weights /= weights.sum(-1, keepdims=True)
    if nan_to_zero:
        weights[np.isnan(weights)] = 0
    y: np.ndarray = (weights @ heads(v)).swapaxes(1, 2)
    return y.reshape(*y.shape[:2], -1)


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes.

    Shapes are written out: Reshape cannot tell the size behind a -1 where another one is 0.
    """
    signature = OP_TYPES[op_type]
    text = f"""
<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
{op_type} <num_heads, scale> ({", ".join(signature.inputs)}) => (Y)
{{
    same = Constant<value = int64[2] {{0, 0}}>()
    flat = Constant<value = int64[1] {{-1}}>()
    number = Constant<value_int: int = @num_heads>()
    heads = Reshape(number, flat)
    factor = Constant<value_float: float = @scale>()
    {"q_heads = Identity(q)" if signature.heads else _merged_queries(opset)}
    {_dimension("v", 3 if signature.split else 2, opset)}
    {_SPLIT_KEYS if signature.split else _MERGED_KEYS}
    product = MatMul(q_heads, k_heads)
    scores = Mul(product, factor)
    {"masked = Add(scores, mask)" if signature.masked else ""}
    weights = Softmax<axis = -1>({"masked" if signature.masked else "scores"})
    {_NAN_TO_ZERO if signature.nan_to_zero else ""}
    y_heads = MatMul({"kept" if signature.nan_to_zero else "weights"}, {"v" if signature.split else "v_heads"})
    y_split = Transpose<perm = [0, 2, 1, 3]>(y_heads)
    y_shape = Concat<axis = 0>(same, y_channels)
    Y = Reshape(y_split, y_shape)
}}
"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


def _merged_queries(opset: int) -> str:
    return f"""{_dimension("q", 2, opset)}
    q_size = Div(q_channels, heads)
    q_shape = Concat<axis = 0>(same, heads, q_size)
    q_split = Reshape(q, q_shape)
    q_heads = Transpose<perm = [0, 2, 1, 3]>(q_split)"""


def _dimension(name: str, axis: int, opset: int) -> str:
    """Lines that make ``{name}_channels`` [1], the dimension of ``name`` at ``axis``; a runtime that knows it from
    shape inference folds them from opset 15 on."""
    if opset >= 15:
        return f"{name}_channels = Shape<start = {axis}, end = {axis + 1}>({name})"
    return f"""{name}_sizes = Shape({name})
    {name}_start = Constant<value = int64[1] {{{axis}}}>()
    {name}_end = Constant<value = int64[1] {{{axis + 1}}}>()
    {name}_channels = Slice({name}_sizes, {name}_start, {name}_end)"""


_NAN_TO_ZERO = """nan = IsNaN(weights)
    zero = Constant<value_float: float = 0.0>()
    kept = Where(nan, zero, weights)"""
_SPLIT_KEYS = """k_heads = Transpose<perm = [0, 1, 3, 2]>(k)
    y_channels = Mul(heads, v_channels)"""
_MERGED_KEYS = """k_split = Reshape(k, q_shape)
    k_heads = Transpose<perm = [0, 2, 3, 1]>(k_split)
    v_size = Div(v_channels, heads)
    v_shape = Concat<axis = 0>(same, heads, v_size)
    v_split = Reshape(v, v_shape)
    v_heads = Transpose<perm = [0, 2, 1, 3]>(v_split)
    y_channels = Identity(v_channels)"""
