"""The vocabulary that the patterns share: users, operands, biases, scalars, pads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.model.constants import constant_number, constant_tensor
from sparse_onnx.model.shapes import Shapes

__all__ = ["is_bias", "is_scalar", "only_user", "other_operand", "same_pads", "users_of"]


def is_bias(value: ir.Value, n: int) -> bool:
    """Whether ``value`` is a constant of ``n`` float32 elements, one for each output channel, along its last axis."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size != n:
        return False
    return tuple(tensor.shape.numpy()[-1:]) == (n,)


def users_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, once for each input, or none at all if it is also a graph output."""
    return [] if value.is_graph_output() else [use.node for use in value.uses()]


def only_user(value: ir.Value, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that alone reads ``value``, if it is this operator and lies in the same graph."""
    users = users_of(value)
    if len(users) != 1 or users[0].op_type != op_type or users[0].graph is not value.graph:
        return None
    return users[0] if users[0].domain in (domain, "ai.onnx" if domain == "" else domain) else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a binary node."""
    first, second = node.inputs
    return second if first is value else first


def is_scalar(value: ir.Value | None, expected: float, h: ir.Value, shapes: Shapes) -> bool:
    """Whether ``value`` is a constant of one element, about ``expected``, and adds no axes to ``h``."""
    number = constant_number(value)
    if number is None or not math.isclose(number, expected, rel_tol=1e-4):
        return False
    return not shapes.may_add_axes(value, h)


def same_pads(
    sizes: Sequence[int],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    upper: bool,
) -> tuple[int, ...]:
    """The pads of SAME_UPPER (``upper``) or SAME_LOWER for an input with these spatial ``sizes``: begins, then ends.

    As the ONNX standard says: the output has size / stride elements, rounded up.
    """
    before, after = [], []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        before.append(small if upper else large)
        after.append(large if upper else small)
    return (*before, *after)
