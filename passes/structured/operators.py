"""Operators by what they do to units that lie along an axis."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.model.constants import is_constant
from sparse_onnx.model.graph import is_standard, name_of

__all__ = [
    "PER_CHANNEL",
    "POOLS",
    "REDUCTIONS",
    "SHAPE_ARITHMETIC",
    "SUMS",
    "is_elementwise",
    "label",
    "sources",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MAPS = _names(
    "Abs Cast Ceil Celu Clip Cos Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsNaN LeakyRelu Log "
    "Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tanh ThresholdedRelu"
)
_GATES = _names("And Div Equal Greater GreaterOrEqual Less LessOrEqual Mul Or PRelu Pow")
SUMS = _names("Add Max Mean Min Sub Sum Where")
_CONTRIB = _names("BiasGelu FastGelu Gelu QuickGelu")
POOLS = _names("AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool")
PER_CHANNEL = _names("BatchNormalization InstanceNormalization")
_MOVES = _names("Concat Expand Gather Reshape Slice Split Squeeze Transpose Unsqueeze")
REDUCTIONS = _names("ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare")
SHAPE_ARITHMETIC = _names("Add Cast Concat Div Gather Mul Slice Squeeze Sub Unsqueeze")


def sources(value: ir.Value | None) -> set[ir.Node | None]:
    """The nodes that ``value`` is computed from through operators that keep units apart; None stands for inputs."""
    found: set[ir.Node | None] = set()
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value is None or value in seen or is_constant(value):
            continue
        seen.add(value)
        node = value.producer()
        if node is not None and (is_elementwise(node) or is_standard(node, *POOLS, *_MOVES, *PER_CHANNEL)):
            waiting += node.inputs if is_elementwise(node) or node.op_type == "Concat" else node.inputs[:1]
        else:
            found.add(node)
    return found


def is_elementwise(node: ir.Node) -> bool:
    """Whether every element of the result depends on one of each operand, at the same place."""
    return is_standard(node, *_MAPS, *_GATES, *SUMS) or (
        node.domain == "com.microsoft" and node.op_type in _CONTRIB
    )


def label(node: ir.Node) -> str:
    """How messages name ``node``."""
    return f"{node.op_type} {name_of(node)}"
