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
from collections.abc import Iterator

import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_number, constant_tensor
from sparse_onnx.model.graph import is_standard
from sparse_onnx.model.shapes import Shapes

__all__ = ["Normalization", "is_vector", "match_normalization"]

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


def is_vector(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant float32 [C]."""
    tensor = constant_tensor(value)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1


def _match_operator(node: ir.Node, shapes: Shapes) -> Normalization | str:
    source, gamma = node.inputs[:2]
    beta = node.inputs[2] if len(node.inputs) > 2 else None
    if source is None or not _is_last(node.attributes.get_int("axis", -1), source, shapes):
        return "is not known to normalize over the last axis alone"
    if node.attributes.get_int("stash_type", 1) != 1:
        return "computes in another type than float32"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "gives out its mean or deviation"
    if not is_vector(gamma) or not (beta is None or is_vector(beta)):
        return "has a gamma or beta that is no constant float32 [C]"
    assert gamma is not None
    rms = node.op_type != "LayerNormalization"
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return Normalization(source, gamma, beta, rms, epsilon, (node,), node.outputs[0])


def _match_steps(root: ir.Node, shapes: Shapes) -> Normalization | str | None:
    raised = _producer(root.inputs[0], "Add")
    if raised is None:
        return None
    for variance, constant in _both_ways(raised):
        epsilon, mean = _scalar(constant), _producer(variance, "ReduceMean")
        if epsilon is None or mean is None or not _is_mean_of_last(mean, shapes):
            continue
        square = _producer(mean.inputs[0], "Pow") or _producer(mean.inputs[0], "Mul")
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
    scale = _only_user(normalized[-1].outputs[0], "Mul")
    gamma = _other(scale, normalized[-1].outputs[0]) if scale is not None else None
    if scale is None or gamma is None or not is_vector(gamma):
        return "has no gamma that is a constant float32 [C]"
    nodes = [*steps, *normalized, scale]
    source, rms, beta = deviation, True, None
    subtract = _producer(deviation, "Sub")
    if subtract is not None and (mean := _mean_subtracted(subtract, shapes)) is not None:
        source, rms = subtract.inputs[0] or source, False
        nodes[:0] = [mean, subtract]
        shift = _only_user(scale.outputs[0], "Add")
        offset = _other(shift, scale.outputs[0]) if shift is not None else None
        if shift is not None and offset is not None and is_vector(offset):
            beta = offset
            nodes.append(shift)
    for value in (node.outputs[0] for node in nodes[:-1]):
        if value.is_graph_output() or any(use.node not in nodes for use in value.uses()):
            return "has a step whose result is used elsewhere"
    return Normalization(source, gamma, beta, rms, epsilon, tuple(nodes), nodes[-1].outputs[0])


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and is_standard(node, op_type) else None


def _users(value: ir.Value, op_type: str) -> Iterator[ir.Node]:
    return (
        use.node for use in value.uses() if is_standard(use.node, op_type) and use.node.graph is value.graph
    )


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    return next(_users(value, op_type), None)


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    first, second = node.inputs
    return second if first is value else first


def _both_ways(node: ir.Node) -> tuple[tuple[ir.Value | None, ir.Value | None], ...]:
    first, second = node.inputs
    return (first, second), (second, first)


def _scalar(value: ir.Value | None) -> float | None:
    """A number float32 that adds no axes to [..., 1] or [..., C]."""
    tensor = constant_tensor(value)
    return (
        constant_number(value, rank=1) if tensor is not None and tensor.dtype == ir.DataType.FLOAT else None
    )


def _is_last(axis: int, value: ir.Value, shapes: Shapes) -> bool:
    return axis == -1 or (axis >= 0 and axis + 1 == shapes.rank(value))


def _is_mean_of_last(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a ReduceMean goes over the last axis alone and keeps it, with size 1."""
    source = node.inputs[0]
    if source is None or not node.attributes.get_int("keepdims", 1):
        return False
    axes = list(node.attributes.get_ints("axes", []))
    if len(node.inputs) > 1 and (given := node.inputs[1]) is not None:
        array = constant_array(given)
        axes = [] if array is None else array.reshape(-1).tolist()
    return len(axes) == 1 and _is_last(axes[0], source, shapes)


def _squared(node: ir.Node) -> ir.Value | None:
    """d of ``Pow(d, 2)`` or ``Mul(d, d)``."""
    first, second = node.inputs
    is_square = first is second if node.op_type == "Mul" else _scalar(second) == 2
    return first if is_square else None


def _divided(deviation: ir.Value, root: ir.Value) -> list[ir.Node] | None:
    """The nodes of ``deviation / root``, the last one giving it."""
    divide = _only_user(root, "Div")
    if divide is not None and divide.inputs[0] is deviation:
        return [divide]
    if divide is not None and _scalar(divide.inputs[0]) == 1:
        inverse = divide
    elif (reciprocal := _only_user(root, "Reciprocal")) is not None:
        inverse = reciprocal
    else:
        return None
    multiply = _only_user(inverse.outputs[0], "Mul")
    if multiply is None or _other(multiply, inverse.outputs[0]) is not deviation:
        return None
    return [inverse, multiply]


def _mean_subtracted(node: ir.Node, shapes: Shapes) -> ir.Node | None:
    """The ReduceMean of ``Sub(s, ReduceMean[-1](s))``."""
    source, mean = node.inputs[0], _producer(node.inputs[1], "ReduceMean")
    if mean is None or mean.inputs[0] is not source or not _is_mean_of_last(mean, shapes):
        return None
    return mean
