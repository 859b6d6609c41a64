"""Recognise layer and RMS normalization over the last axis, as one operator or as the steps that exporters write.

Operators::

    LayerNormalization(s, gamma, beta)       RMSNormalization(s, gamma)      SimplifiedLayerNormalization(s, gamma)

Steps, every value in between having no other user; m, d and v are [..., 1], [..., C] and [..., 1]::

    m = ReduceMean[-1](s)    d = Sub(s, m)     (layer normalization; for RMS normalization d is s)
    v = ReduceMean[-1](Pow(d, 2))              or of Mul(d, d)
    r = Sqrt(Add(v, epsilon))
    n = Div(d, r)                              or Mul(d, Reciprocal(r)), Mul(d, Div(1, r))
    Y = Add(Mul(n, gamma), beta)               without beta, Y = Mul(n, gamma)

gamma and beta are constants [C]; epsilon, the exponent and 1 are constants of at most one axis.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.model.constants import constant_integers, constant_number
from sparse_onnx.model.graph import input_at, is_read, is_read_outside, is_standard, producer
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.passes.patterns.match import (
    both_ways,
    float32_constant,
    is_last_axis,
    is_vector,
    only_user,
    other_operand,
)

__all__ = ["Normalization", "match_normalization"]

_OPERATORS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@dataclasses.dataclass(frozen=True)
class Normalization:
    """``output = normalize(source) · gamma + beta``. ``nodes`` are what a fused op replaces; the last one
    gives ``output``.

    ``rms``: RMS normalization, without beta. ``beta`` None: zeros.
    """

    source: ir.Value
    gamma: ir.Value
    beta: ir.Value | None
    rms: bool
    epsilon: float
    nodes: tuple[ir.Node, ...]
    output: ir.Value


def match_normalization(node: ir.Node, shapes: Shapes) -> Normalization | str | None:
    """The normalization that ``node`` is or, if it is the Sqrt of one, that it is part of; None if it is neither.

    A reason instead if it is a normalization of another kind.
    """
    if is_standard(node, *_OPERATORS):
        return _match_operator(node, shapes)
    if is_standard(node, "Sqrt"):
        return _match_steps(node, shapes)
    return None


def _match_operator(node: ir.Node, shapes: Shapes) -> Normalization | str:
    source, gamma = node.inputs[:2]
    beta = input_at(node, 2)
    if source is None or not is_last_axis(node.attributes.get_int("axis", -1), source, shapes):
        return "is not known to normalize over the last axis alone"
    if node.attributes.get_int("stash_type", 1) != 1:
        return "computes in another type than float32"
    if any(map(is_read, node.outputs[1:])):
        return "gives out its mean or deviation"
    if not is_vector(gamma) or not (beta is None or is_vector(beta)):
        return "has a gamma or beta that is no constant float32 [C]"
    assert gamma is not None
    rms = node.op_type != "LayerNormalization"
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return Normalization(source, gamma, beta, rms, epsilon, (node,), node.outputs[0])


def _match_steps(root: ir.Node, shapes: Shapes) -> Normalization | str | None:
    raised = producer(root.inputs[0], "Add")
    if raised is None:
        return None
    for variance, constant in both_ways(raised):
        epsilon, mean = _scalar(constant), producer(variance, "ReduceMean")
        if epsilon is None or mean is None or not _is_mean_of_last(mean, shapes):
            continue
        square = producer(mean.inputs[0], "Pow") or producer(mean.inputs[0], "Mul")
        if square is None or (deviation := _squared(square)) is None:
            continue
        steps = (square, mean, raised, root)
        return _match_result(deviation, epsilon, steps, shapes)
    return None


def _match_result(
    deviation: ir.Value, epsilon: float, steps: tuple[ir.Node, ...], shapes: Shapes
) -> Normalization | str | None:
    normalized = _divided(deviation, steps[-1].outputs[0])
    if normalized is None:
        return None
    scale = only_user(normalized[-1].outputs[0], "Mul")
    gamma = other_operand(scale, normalized[-1].outputs[0]) if scale is not None else None
    if scale is None or gamma is None or not is_vector(gamma):
        return "has no gamma that is a constant float32 [C]"
    nodes = [*steps, *normalized, scale]
    source, rms, beta = deviation, True, None
    subtract = producer(deviation, "Sub")
    if subtract is not None and (mean := _mean_subtracted(subtract, shapes)) is not None:
        source, rms = subtract.inputs[0] or source, False
        nodes[:0] = [mean, subtract]
        shift = only_user(scale.outputs[0], "Add")
        offset = other_operand(shift, scale.outputs[0]) if shift is not None else None
        if shift is not None and offset is not None and is_vector(offset):
            beta = offset
            nodes.append(shift)
    if any(is_read_outside(node.outputs[0], nodes) for node in nodes[:-1]):
        return "has a step whose result is used elsewhere"
    return Normalization(source, gamma, beta, rms, epsilon, tuple(nodes), nodes[-1].outputs[0])


def _scalar(value: ir.Value | None) -> float | None:
    """A number float32 that adds no axes to [..., 1] or [..., C]."""
    return constant_number(value, rank=1) if float32_constant(value) is not None else None


def _is_mean_of_last(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a ReduceMean goes over the last axis alone and keeps it, with size 1."""
    source = node.inputs[0]
    if source is None or not node.attributes.get_int("keepdims", 1):
        return False
    axes = constant_integers(node, "axes", 1)
    return axes is not None and len(axes) == 1 and is_last_axis(axes[0], source, shapes)


def _squared(node: ir.Node) -> ir.Value | None:
    """d of ``Pow(d, 2)`` or ``Mul(d, d)``."""
    first, second = node.inputs
    is_square = first is second if node.op_type == "Mul" else _scalar(second) == 2
    return first if is_square else None


def _divided(deviation: ir.Value, root: ir.Value) -> list[ir.Node] | None:
    """The nodes of ``deviation / root``, the last one giving it."""
    divide = only_user(root, "Div")
    if divide is not None and divide.inputs[0] is deviation:
        return [divide]
    if divide is not None and _scalar(divide.inputs[0]) == 1:
        inverse = divide
    elif (reciprocal := only_user(root, "Reciprocal")) is not None:
        inverse = reciprocal
    else:
        return None
    multiply = only_user(inverse.outputs[0], "Mul")
    if multiply is None or other_operand(multiply, inverse.outputs[0]) is not deviation:
        return None
    return [inverse, multiply]


def _mean_subtracted(node: ir.Node, shapes: Shapes) -> ir.Node | None:
    """The ReduceMean of ``Sub(s, ReduceMean[-1](s))``."""
    source, mean = node.inputs[0], producer(node.inputs[1], "ReduceMean")
    if mean is None or mean.inputs[0] is not source or not _is_mean_of_last(mean, shapes):
        return None
    return mean
