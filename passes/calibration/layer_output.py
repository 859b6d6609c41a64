"""What the output of a layer is aimed at: where it goes, its bias, and the residual that is added to it.

Patterns, h being the layer's result with its bias, every value in between having a single user::

    h = Add(MatMul(X, W), bias)      h = Gemm(X, W, bias)      h = Conv(X, W, bias)      h = MatMul(X, W)
    t = Add(h, R)                    R computed: a residual. The sum is what the model reads, so h is aimed at what
                                     makes the sum that of the dense model, errors that R has already included
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx.model.graph import input_at
from sparse_onnx.model.integer_operators import integer_operator
from sparse_onnx.model.weights import RECURRENT, Weight
from sparse_onnx.passes.patterns.match import is_bias, is_scaled, only_user, other_operand

__all__ = ["LayerOutput", "find_output"]


@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """``output`` is t, or h where ``residual`` (R) is None. ``bias`` is a constant of N elements or None; input
    ``bias_index`` of ``bias_node`` reads it."""

    output: ir.Value
    residual: ir.Value | None
    bias: ir.Value | None = None
    bias_node: ir.Node | None = None
    bias_index: int = 0


def find_output(weight: Weight, usable: Callable[[ir.Value], bool]) -> LayerOutput | None:
    """The output of a weight that a single node uses; None where its product is scaled, is integers or goes on into a
    recurrence, or several nodes use it.

    A residual counts only if it is ``usable``.
    """
    if len(weight.nodes) != 1 or weight.nodes[0].op_type in RECURRENT:
        return None
    (node,) = weight.nodes
    operator = integer_operator(node)
    if operator is not None and (operator.adds is None or input_at(node, operator.adds) is not None):
        return None
    h = node.outputs[0]
    N = weight.shape[1]
    bias: ir.Value | None = None
    bias_node, index = node, 2
    if node.op_type == "Gemm" and is_scaled(node):
        return None
    if node.op_type in ("Gemm", "Conv"):
        bias = input_at(node, 2)
        if bias is not None and not is_bias(bias, N):
            return None
    elif (add := only_user(h, "Add")) is not None:
        other = other_operand(add, h)
        if other is not None and is_bias(other, N):
            bias, h = other, add.outputs[0]
            bias_node, index = add, list(add.inputs).index(other)
    output, residual = h, None
    if (add := only_user(h, "Add")) is not None:
        other = other_operand(add, h)
        if other is not None and other is not h and usable(other):
            output, residual = add.outputs[0], other
    return LayerOutput(output, residual, bias, bias_node if bias is not None else None, index)
