"""Two linears of bytes in a row, the MLP of a transformer, as one operator: ``Int8FeedForward*`` and
``SparseInt8FeedForward*``.

``Y = round(act(round(X) · W + bias)) · W_down + down_bias``, both weights stored alike. What is between them is rounded
token by token, as X is, where it was computed: it is neither transposed nor written to memory.

Signature (domain ``sparse_onnx``, version 1). Of every operator of :mod:`.sparse_feed_forward` there are two op types,
with a word in the place of ``Sparse``::

    Int8FeedForward*<K, N, ..., format, down_K, down_N, ...>(X, ..., bias, down_..., down_bias) -> Y

===============  =========  ==============  =================================================================
name             dtype      shape           meaning
===============  =========  ==============  =================================================================
X                float32    [..., K]        activations, rank >= 1
...                                         the first weight and its bias, as of the operator of :mod:`.int8_matmul`
down_...                                    the second, [down_K, down_N] and [down_N]
Y                float32    [..., down_N]
===============  =========  ==============  =================================================================

``down_K`` is what the first linear has of outputs: N, or N / 2 of a gate. Every kernel gives, bit for bit, what it
gives in the two operators alone, and the body is their bodies.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from sparse_onnx.sparse_ops.ops import int8_matmul, sparse_feed_forward, sparse_matmul
from sparse_onnx.sparse_ops.ops.base import Operator
from sparse_onnx.sparse_ops.ops.int8_matmul import OfBytes
from sparse_onnx.sparse_ops.ops.sparse_feed_forward import PREFIX

__all__ = ["OPERATOR", "OP_TYPES", "exact_body", "function_body"]

OP_TYPES = {
    int8_matmul.op_type_of(pair, dense): OfBytes(pair, dense)
    for dense in (True, False)
    for pair in sparse_feed_forward.OP_TYPES
}

_BETWEEN = "between"


def _in_a_row(
    op_type: str, opset: int, body_of: Callable[[str, int], onnx.FunctionProto]
) -> onnx.FunctionProto:
    """The body of the first linear, and that of the second with a prefix before all names."""
    pair, dense = OP_TYPES[op_type]
    first = body_of(int8_matmul.op_type_of(sparse_feed_forward.OP_TYPES[pair], dense), opset)
    second = body_of(int8_matmul.op_type_of(sparse_matmul.OP_TYPES["none"], dense), opset)
    first.name = op_type
    for node in first.node:
        node.output[:] = [_BETWEEN if name == "Y" else name for name in node.output]
    here = {"X": _BETWEEN, "Y": "Y", "": ""}
    for node in second.node:
        node.input[:] = [here.get(name, PREFIX + name) for name in node.input]
        node.output[:] = [here.get(name, PREFIX + name) for name in node.output]
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                attribute.ref_attr_name = PREFIX + attribute.ref_attr_name
    first.node.extend(second.node)
    first.input.extend(PREFIX + name for name in second.input if name != "X")
    first.attribute.extend(PREFIX + name for name in second.attribute)
    return first


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    return _in_a_row(op_type, opset, int8_matmul.function_body)


def exact_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The same in the domain :data:`.EXACT_DOMAIN`, with activations that are not rounded."""
    return _in_a_row(op_type, opset, int8_matmul.exact_body)


OPERATOR = Operator(tuple(OP_TYPES), function_body, exact_body)
