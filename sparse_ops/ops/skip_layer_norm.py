"""``SkipLayerNormalization`` and ``SkipRMSNormalization``: residual addition and normalization in one operator.

Signatures (domain ``sparse_onnx``, version 1; one op type per signature)::

    SkipLayerNormalization<epsilon>(X, skip, gamma, beta) -> Y        SkipLayerNormalizationSum(...) -> Y, sum
    SkipRMSNormalization<epsilon>(X, skip, gamma) -> Y                SkipRMSNormalizationSum(...) -> Y, sum

With s = X + skip, broadcast as ``Add`` does, mean and variance over the last axis::

    layer normalization   Y = (s - mean(s)) / sqrt(mean((s - mean(s))²) + epsilon) · gamma + beta
    RMS normalization     Y = s / sqrt(mean(s²) + epsilon) · gamma

===========  =========  ==============  =====================================================================
name         dtype      shape           meaning
===========  =========  ==============  =====================================================================
X            float32    [..., C]        activations, rank >= 1
skip         float32    [..., C]        the residual; fastest where its shape is that of X
gamma        float32    [C]
beta         float32    [C]             zeros where the layer has none
epsilon      float      attribute       at least 0
Y            float32    [..., C]
sum          float32    [..., C]        X + skip, for the next residual
===========  =========  ==============  =====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.ops.base import Operator

__all__ = ["OPERATOR", "OP_TYPES", "Signature", "function_body", "reference"]


@dataclass(frozen=True)
class Signature:
    """What sets the op types apart: ``rms`` has no beta and subtracts no mean; ``sum`` is a second output."""

    rms: bool
    sum: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("X", "skip", "gamma") if self.rms else ("X", "skip", "gamma", "beta")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("Y", "sum") if self.sum else ("Y",)


OP_TYPES = {
    "SkipLayerNormalization": Signature(rms=False, sum=False),
    "SkipLayerNormalizationSum": Signature(rms=False, sum=True),
    "SkipRMSNormalization": Signature(rms=True, sum=False),
    "SkipRMSNormalizationSum": Signature(rms=True, sum=True),
}


def reference(
    x: np.ndarray, skip: np.ndarray, gamma: np.ndarray, beta: np.ndarray | None, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """(Y, sum) float64 from the operator's inputs; without ``beta``, RMS normalization. The tests' oracle."""
    total = x.astype(np.float64) + skip
    centred = total if beta is None else total - total.mean(-1, keepdims=True)
    normalized = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
    return normalized * gamma + (0 if beta is None else beta), total


# The forms that ORT's own fusions look for. A mean takes its axes as an attribute before opset 18.
_LAYER_NORMALIZATION = "Y = LayerNormalization<axis = -1, epsilon: float = @epsilon>(s, gamma, beta)"
_LAYER_NORMALIZATION_BEFORE_17 = """
    two = Constant<value = float {2.0}>()
    small = Constant<value_float: float = @epsilon>()
    mean = ReduceMean<axes = [-1]>(s)
    centred = Sub(s, mean)
    square = Pow(centred, two)
    variance = ReduceMean<axes = [-1]>(square)
    raised = Add(variance, small)
    root = Sqrt(raised)
    normalized = Div(centred, root)
    scaled = Mul(normalized, gamma)
    Y = Add(scaled, beta)"""
_RMS_NORMALIZATION = "Y = RMSNormalization<axis = -1, epsilon: float = @epsilon>(s, gamma)"
_RMS_NORMALIZATION_BEFORE_23 = """
    two = Constant<value = float {{2.0}}>()
    small = Constant<value_float: float = @epsilon>()
    square = Pow(s, two)
    {mean}
    raised = Add(variance, small)
    root = Sqrt(raised)
    normalized = Div(s, root)
    Y = Mul(normalized, gamma)"""
_MEAN_BEFORE_18 = "variance = ReduceMean<axes = [-1]>(square)"
_MEAN = """last = Constant<value = int64[1] {-1}>()
    variance = ReduceMean(square, last)"""


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    signature = OP_TYPES[op_type]
    if not signature.rms:
        normalization = _LAYER_NORMALIZATION if opset >= 17 else _LAYER_NORMALIZATION_BEFORE_17
    elif opset >= 23:
        normalization = _RMS_NORMALIZATION
    else:
        mean = _MEAN if opset >= 18 else _MEAN_BEFORE_18
        normalization = _RMS_NORMALIZATION_BEFORE_23.format(mean=mean)
    text = f"""
<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
{op_type} <epsilon> ({", ".join(signature.inputs)}) => ({", ".join(signature.outputs)})
{{
    s = Add(X, skip)
    {normalization}
    {"sum = Identity(s)" if signature.sum else ""}
}}
"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


OPERATOR = Operator(tuple(OP_TYPES), function_body)
