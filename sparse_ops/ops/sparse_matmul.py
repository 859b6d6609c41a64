"""``SparseMatMul``: ``Y = act(X · W + bias)`` with W stored compressed.

Signature (domain ``sparse_onnx``, version 1; one op type per activation, see :data:`OP_TYPES`)::

    SparseMatMul<K, N, ..., format, mask_structure>(X, ..., bias) -> Y

===========  =========  ==============  =====================================================================
name         dtype      shape           meaning
===========  =========  ==============  =====================================================================
X            float32    [..., K]        activations, rank >= 1
...                                     the parts and sizes of W [K, N], see :mod:`sparse_onnx.sparse_ops.formats`
bias         float32    [N]             zeros where the layer has none
Y            float32    [..., N]
===========  =========  ==============  =====================================================================

NaN and Inf: a product with a weight that is not stored is never formed. Where an input is NaN or Inf and a weight
is zero, a dense product gives NaN and this one leaves the sum as it is; stored weights propagate them as dense does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from sparse_onnx.sparse_ops.formats.base import Packed, StoredFormat
from sparse_onnx.sparse_ops.ops.base import Body, SparseOperator

__all__ = ["ACTIVATIONS", "OPERATOR", "OP_TYPES", "activated", "activation_body", "linear_body", "reference"]

# One op type per activation, not an attribute: a body of standard ops cannot branch on an attribute without
# `If`, and a library that does not know a newer activation then falls back to the body instead of failing.
OP_TYPES = {
    "none": "SparseMatMul",
    "relu": "SparseMatMulRelu",
    "gelu": "SparseMatMulGelu",
    "gelu_tanh": "SparseMatMulGeluTanh",
    "silu": "SparseMatMulSilu",
    "quick_gelu": "SparseMatMulQuickGelu",
}
ACTIVATIONS = {op_type: activation for activation, op_type in OP_TYPES.items()}


_FLOAT64: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: 0.5 * y * (1 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2))),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "quick_gelu": lambda y: y / (1 + np.exp(-1.702 * y)),
}


def activated(activation: str, h: np.ndarray) -> np.ndarray:
    """``activation``, a key of OP_TYPES, of the float64 numbers ``h``."""
    return _FLOAT64[activation](h)


def reference(x: np.ndarray, packed: Packed, bias: np.ndarray, activation: str = "none") -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests. ``activation`` is a key of OP_TYPES."""
    return activated(activation, x.astype(np.float64) @ packed.unpack().astype(np.float64) + bias)


# From `h` to `Y`. The forms are those that ORT's own fusions look for.
_ACTIVATION_BODIES = {
    "none": "Y = Identity(h)",
    "relu": "Y = Relu(h)",
    "gelu": """
        root = Constant<value = float {1.41421356}>()
        one_f = Constant<value = float {1.0}>()
        half = Constant<value = float {0.5}>()
        scaled = Div(h, root)
        erf = Erf(scaled)
        shifted = Add(erf, one_f)
        product = Mul(h, shifted)
        Y = Mul(product, half)""",
    "gelu_tanh": """
        three = Constant<value = float {3.0}>()
        a = Constant<value = float {0.044715}>()
        b_ = Constant<value = float {0.79788456}>()
        one_f = Constant<value = float {1.0}>()
        half = Constant<value = float {0.5}>()
        cube = Pow(h, three)
        small = Mul(cube, a)
        inner = Add(h, small)
        outer = Mul(inner, b_)
        tanh = Tanh(outer)
        shifted = Add(tanh, one_f)
        product = Mul(h, shifted)
        Y = Mul(product, half)""",
    "silu": """
        gate = Sigmoid(h)
        Y = Mul(h, gate)""",
    "quick_gelu": """
        slope = Constant<value = float {1.702}>()
        steep = Mul(h, slope)
        gate = Sigmoid(steep)
        Y = Mul(h, gate)""",
}


def activation_body(activation: str, y: str = "Y") -> str:
    """Lines of a function body that make the value ``y`` from ``h``. ``activation`` is a key of OP_TYPES."""
    return _ACTIVATION_BODIES[activation].replace("Y = ", f"{y} = ")


def linear_body(op_type: str, y: str = "Y", x: str = "X") -> str:
    """Lines of a function body that make the value ``y`` of the operator from ``x``, W and bias, behind the decoder."""
    activation = activation_body(ACTIVATIONS[op_type], y)
    return f"product_xw = MatMul({x}, W)\n h = Add(product_xw, bias)\n {activation}"


def _body(op_type: str, stored: StoredFormat) -> Body:
    return Body(f"{stored.decoder()}\n{linear_body(op_type)}")


OPERATOR = SparseOperator(tuple(ACTIVATIONS), _body)
