"""The vocabulary that the patterns share: who reads a value, operands, gates, biases, numbers, axes, pads.

What only asks the graph, such as which node makes a value, is in :mod:`sparse_onnx.model.graph`; what is constant in
:mod:`sparse_onnx.model.constants`.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from sparse_onnx.model.constants import constant_number, constant_tensor
from sparse_onnx.model.graph import STANDARD_DOMAINS, axis_from_end, is_standard, producer
from sparse_onnx.model.shapes import Shapes

__all__ = [
    "both_ways",
    "float32_constant",
    "gate_of",
    "is_bias",
    "is_last_axis",
    "is_scalar",
    "is_scaled",
    "is_vector",
    "only_user",
    "other_operand",
    "transposed",
    "users_of",
]


def users_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, once for each input. None at all if others than nodes of its own graph need it:
    whoever asks for the outputs of the graph, or a body of If, Loop or Scan."""
    users = [use.node for use in value.uses()]
    if value.is_graph_output() or any(node.graph is not value.graph for node in users):
        return []
    return users


def only_user(value: ir.Value, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that alone reads ``value``, by one input, if it is this operator and lies in the same graph."""
    users = users_of(value)
    if len(users) != 1 or users[0].op_type != op_type:
        return None
    return users[0] if users[0].domain in (STANDARD_DOMAINS if domain == "" else (domain,)) else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a binary node; ``value`` itself if it is both."""
    first, second = node.inputs
    return second if first is value else first


def both_ways(node: ir.Node) -> tuple[tuple[ir.Value | None, ir.Value | None], ...]:
    """The operands of a binary node in either order."""
    first, second = node.inputs
    return (first, second), (second, first)


def gate_of(h: ir.Value, op_type: str) -> tuple[ir.Node, ir.Node] | None:
    """The two nodes of ``Mul(h, gate(h))``, ``gate`` being this operator of the standard, if nothing else reads h or
    the gate's result."""
    users = users_of(h)
    gate = next((node for node in users if is_standard(node, op_type)), None)
    product = only_user(gate.outputs[0], "Mul") if gate is not None else None
    if gate is None or product is None or len(users) != 2 or product not in users:
        return None
    return gate, product


def transposed(value: ir.Value | None, *perm: int) -> ir.Value | None:
    """What ``value`` is the Transpose of, with this permutation written out."""
    node = producer(value, "Transpose")
    return (
        node.inputs[0] if node is not None and tuple(node.attributes.get_ints("perm", ())) == perm else None
    )


def is_last_axis(axis: int, value: ir.Value | None, shapes: Shapes) -> bool:
    """Whether ``axis`` is known to be the last one of ``value``; -1 is, whatever its rank."""
    return axis_from_end(axis, shapes.rank(value) or 0) == -1


def is_scaled(gemm: ir.Node) -> bool:
    """Whether a Gemm has an alpha or a beta other than 1."""
    return any(gemm.attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta"))


def float32_constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that ``value`` always is, if it is one of FLOAT; its elements are not read."""
    tensor = constant_tensor(value)
    return tensor if tensor is not None and tensor.dtype == ir.DataType.FLOAT else None


def is_vector(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant float32 [C]."""
    tensor = float32_constant(value)
    return tensor is not None and len(tensor.shape) == 1


def is_bias(value: ir.Value | None, n: int) -> bool:
    """Whether ``value`` is a constant of ``n`` float32 elements, one for each output channel, along its last axis."""
    tensor = float32_constant(value)
    return tensor is not None and tensor.size == n and tuple(tensor.shape.numpy()[-1:]) == (n,)


def is_scalar(value: ir.Value | None, expected: float, h: ir.Value, shapes: Shapes) -> bool:
    """Whether ``value`` is a constant of one element, about ``expected``, and adds no axes to ``h``."""
    number = constant_number(value)
    if number is None or not math.isclose(number, expected, rel_tol=1e-4):
        return False
    return not shapes.may_add_axes(value, h)
