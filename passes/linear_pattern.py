"""Recognise a linear layer with what can be fused into it: ``act(X · W + bias)``.

Patterns, h being the linear's result and every value in between having a single user::

    MatMul(X, W)                         Add(MatMul(X, W), bias [N])        Gemm(X, W, bias [N] or [1, N])
    Relu(h)                              Gelu(h), approximate none or tanh (opset 20, or com.microsoft)
    Mul(h, Sigmoid(h))                   Mul(Mul(h, Add(Erf(Div(h, √2)), 1)), 0.5), and its other associations
    Mul(Mul(h, Add(Tanh(√(2/π) · (h + 0.044715 h³)), 1)), 0.5), and its other associations

An Add whose other operand is no constant of rank 1 (a residual) is not a bias and stays outside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sparse_onnx.passes.weights import Weight
from sparse_onnx.sparse_ops.sparse_matmul import MAX_ELEMENTS

__all__ = ["Linear", "match_linear"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear layer of the graph, from ``x`` to ``output``; ``nodes`` are what a fused op replaces, the
    MatMul or Gemm first. ``bias`` is a constant of N elements, or None."""

    weight: Weight
    nodes: tuple[ir.Node, ...]
    x: ir.Value
    bias: ir.Value | None
    activation: str
    output: ir.Value

    @property
    def name(self) -> str:
        return self.nodes[0].name or self.nodes[0].outputs[0].name or "?"


def match_linear(weight: Weight, node: ir.Node, main_graph: ir.Graph) -> Linear | str:
    """The linear that ``node`` (a user of ``weight``) is part of, or the reason why it cannot be replaced."""
    if node.graph is not main_graph:
        return "lies in the body of If, Loop or Scan, where it cannot be timed"
    if weight.tensor.dtype != ir.DataType.FLOAT:
        return f"has dtype {weight.tensor.dtype}; the sparse kernels take FLOAT"
    if weight.tensor.size > MAX_ELEMENTS:
        return f"has {weight.tensor.size} elements; the storage format takes at most {MAX_ELEMENTS}"
    x, output = node.inputs[0], node.outputs[0]
    if x is None or (x.const_value is not None and not x.is_graph_input()):
        return "has a constant activation"
    nodes = [node]
    bias: ir.Value | None = None
    N = weight.shape[1]
    if node.op_type == "Gemm":
        if node.attributes.get_float("alpha", 1.0) != 1 or node.attributes.get_float("beta", 1.0) != 1:
            return "is a Gemm with alpha or beta other than 1"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not _is_bias(bias, N):
            return "is a Gemm whose C is no constant bias"
    elif (add := _only_user(output, "Add")) is not None:
        other = _other(add, output)
        if other is not None and _is_bias(other, N):
            bias, output = other, add.outputs[0]
            nodes.append(add)
    for activation, matcher in _ACTIVATIONS.items():
        matched = matcher(output)
        if matched is not None:
            return Linear(weight, (*nodes, *matched), x, bias, activation, matched[-1].outputs[0])
    return Linear(weight, tuple(nodes), x, bias, "none", output)


def _is_bias(value: ir.Value, n: int) -> bool:
    tensor = value.const_value
    if tensor is None or value.is_graph_input() or tensor.dtype != ir.DataType.FLOAT:
        return False
    shape = tuple(tensor.shape)
    return shape in ((n,), (1, n))


def _users(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, once for each input, or none at all if it is also a graph output."""
    return [] if value.is_graph_output() else [use.node for use in value.uses()]


def _only_user(value: ir.Value, op_type: str, domain: str = "") -> ir.Node | None:
    users = _users(value)
    if len(users) != 1 or users[0].op_type != op_type or users[0].graph is not value.graph:
        return None
    return users[0] if users[0].domain in (domain, "ai.onnx" if domain == "" else domain) else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a binary node."""
    first, second = node.inputs
    return second if first is value else first


def _is_scalar(value: ir.Value | None, expected: float) -> bool:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return False
    number = float(np.asarray(value.const_value.numpy(), np.float64).reshape(()))
    return math.isclose(number, expected, rel_tol=1e-4)


def _relu(h: ir.Value) -> list[ir.Node] | None:
    node = _only_user(h, "Relu")
    return [node] if node is not None else None


def _gelu_node(approximate: str) -> Callable[[ir.Value], list[ir.Node] | None]:
    def match(h: ir.Value) -> list[ir.Node] | None:
        node = _only_user(h, "Gelu")
        if node is not None and node.attributes.get_string("approximate", "none") == approximate:
            return [node]
        contrib = _only_user(h, "Gelu" if approximate == "none" else "FastGelu", "com.microsoft")
        if contrib is not None and len([value for value in contrib.inputs if value is not None]) == 1:
            return [contrib]
        return None

    return match


def _silu(h: ir.Value) -> list[ir.Node] | None:
    users = _users(h)
    if len(users) != 2 or {node.op_type for node in users} != {"Sigmoid", "Mul"}:
        return None
    sigmoid, mul = sorted(users, key=lambda node: node.op_type == "Mul")
    if _only_user(sigmoid.outputs[0], "Mul") is not mul:
        return None
    return [sigmoid, mul]


def _gate(h: ir.Value, inner: list[ir.Node], gate: ir.Value) -> list[ir.Node] | None:
    """``0.5 · h · (1 + gate)`` in any association; ``inner`` are the nodes that make ``gate`` from h."""
    shift = _only_user(gate, "Add")
    if shift is None or not _is_scalar(_other(shift, gate), 1.0):
        return None
    first = _only_user(shift.outputs[0], "Mul")
    if first is None:
        return None
    other = _other(first, shift.outputs[0])
    if other is h:  # (h · (1 + gate)) · 0.5
        last = _only_user(first.outputs[0], "Mul")
        if last is None or not _is_scalar(_other(last, first.outputs[0]), 0.5):
            return None
        return [*inner, shift, first, last]
    if _is_scalar(other, 0.5):  # h · (0.5 · (1 + gate))
        last = _only_user(first.outputs[0], "Mul")
        if last is None or _other(last, first.outputs[0]) is not h:
            return None
        return [*inner, shift, first, last]
    half = other.producer() if other is not None else None  # (0.5 · h) · (1 + gate)
    if half is None or half.op_type != "Mul" or h not in half.inputs or not _is_scalar(_other(half, h), 0.5):
        return None
    if _only_user(half.outputs[0], "Mul") is not first:
        return None
    return [*inner, half, shift, first]


def _covered(h: ir.Value, nodes: list[ir.Node] | None) -> list[ir.Node] | None:
    """``nodes`` if they are all that reads h: nothing outside the pattern may need it."""
    if nodes is None or any(user not in nodes for user in _users(h)):
        return None
    return nodes


def _gelu_erf(h: ir.Value) -> list[ir.Node] | None:
    for scale in _users(h):
        if not (
            (scale.op_type == "Div" and scale.inputs[0] is h and _is_scalar(scale.inputs[1], math.sqrt(2)))
            or (scale.op_type == "Mul" and _is_scalar(_other(scale, h), math.sqrt(0.5)))
        ):
            continue
        erf = _only_user(scale.outputs[0], "Erf")
        if erf is not None:
            return _covered(h, _gate(h, [scale, erf], erf.outputs[0]))
    return None


def _gelu_tanh(h: ir.Value) -> list[ir.Node] | None:
    for cube in _users(h):
        cubes = [cube]
        if cube.op_type == "Mul" and list(cube.inputs) == [h, h]:
            second = _only_user(cube.outputs[0], "Mul")
            if second is None or _other(second, cube.outputs[0]) is not h:
                continue
            cubes.append(second)
        elif not (cube.op_type == "Pow" and cube.inputs[0] is h and _is_scalar(cube.inputs[1], 3.0)):
            continue
        small = _only_user(cubes[-1].outputs[0], "Mul")
        if small is None or not _is_scalar(_other(small, cubes[-1].outputs[0]), 0.044715):
            continue
        total = _only_user(small.outputs[0], "Add")
        if total is None or _other(total, small.outputs[0]) is not h:
            continue
        scale = _only_user(total.outputs[0], "Mul")
        if scale is None or not _is_scalar(_other(scale, total.outputs[0]), math.sqrt(2 / math.pi)):
            continue
        tanh = _only_user(scale.outputs[0], "Tanh")
        if tanh is not None:
            return _covered(h, _gate(h, [*cubes, small, total, scale, tanh], tanh.outputs[0]))
    return None


_ACTIVATIONS: dict[str, Callable[[ir.Value], list[ir.Node] | None]] = {
    "relu": _relu,
    "silu": _silu,
    "gelu": lambda h: _gelu_node("none")(h) or _gelu_erf(h),
    "gelu_tanh": lambda h: _gelu_node("tanh")(h) or _gelu_tanh(h),
}
