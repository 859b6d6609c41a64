"""``clean.idle-nodes``: remove what gives back what it was given.

========================  ==========================================================================
node                      gives back x if
========================  ==========================================================================
``Cast(x)``               x has the type already
``Mul(x, c)``, ``Div``    c is a constant 1 that adds no axes
``And(x, c)``, ``Or``     c is a constant of nothing but true, or false, and does not enlarge x
``Expand(x, shape)``      no axis of x grows, and none is added
``Reshape(x, shape)``     x has the shape already
``Transpose(x)``          the axes stay where they are
``Concat(x)``             there is nothing else
========================  ==========================================================================

Exporters write them where a model could have another type or size; between the steps of a normalization or an
attention they hide it. Types and shapes are those that :mod:`sparse_onnx.model.shapes` knows, for all sizes that inputs
may have. A node that gives the model an output stays, since names would change; so do those in subgraphs and functions.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_number, constant_tensor
from sparse_onnx.model.graph import is_standard
from sparse_onnx.model.shapes import Shapes, agree, keeps
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.patterns.match import both_ways

__all__ = ["IdleNodes"]

_CANDIDATES = ("And", "Cast", "Concat", "Div", "Expand", "Mul", "Or", "Reshape", "Transpose")
_MAX_READ = 2**20


@dataclasses.dataclass(frozen=True)
class IdleNodes(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "clean.idle-nodes"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        removed = 0
        shapes = Shapes(model)
        for node in tuple(model.graph):
            if not is_standard(node, *_CANDIDATES) or node.outputs[0].is_graph_output():
                continue
            source = _given_back(node, shapes)
            if source is None:
                continue
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            removed += 1
        return PassResult(model, removed > 0, {"nodes": removed})


def _given_back(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """The input that ``node`` gives back as it is."""
    x = node.inputs[0] if node.inputs else None
    if x is None:
        return None
    match node.op_type:
        case "Cast":
            idle = shapes.element_type(x) == node.attributes.get_int("to", 0)
        case "Concat":
            idle = len(node.inputs) == 1
        case "Transpose":
            axes = node.attributes.get_ints("perm", ())
            idle = len(axes) > 0 and list(axes) == list(range(len(axes)))
        case "Reshape":
            dims = shapes.dims(x)
            idle = len(dims) > 0 and agree(dims, shapes.dims(node.outputs[0]))
        case "Expand":
            sizes = constant_array(node.inputs[1])
            idle = sizes is not None and keeps(shapes.dims(x), tuple(sizes.tolist()))
        case "Div":
            idle = constant_number(node.inputs[1], shapes.rank(x) or 0) == 1
        case _:
            return _other_operand(node, shapes)
    return x if idle else None


def _other_operand(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """What a Mul, And or Or gives back because its other operand is neutral."""
    for x, other in both_ways(node):
        if x is None or other is None:
            continue
        if node.op_type == "Mul":
            neutral = constant_number(other, shapes.rank(x) or 0) == 1
        else:
            neutral = _is_all(other, node.op_type == "And") and keeps(shapes.dims(x), shapes.dims(other))
        if neutral:
            return x
    return None


def _is_all(value: ir.Value, wanted: bool) -> bool:
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > _MAX_READ:
        return False
    return bool((tensor.numpy() == wanted).all())
