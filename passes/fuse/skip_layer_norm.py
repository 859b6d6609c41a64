"""Fuse a residual addition and the normalization of its result.

Before::                                       After::

    s = Add(a, b)                                  Y, s = sparse_onnx.SkipLayerNormalizationSum<epsilon>(
    Y = LayerNormalization(s, gamma, beta)             a, b, gamma, beta)

or, where nothing else reads s, ``Y = sparse_onnx.SkipLayerNormalization<epsilon>(a, b, gamma, beta)``; the same
with RMS normalization, in every form of :mod:`sparse_onnx.passes.patterns.normalization`, and with the fused
nodes of ``com.microsoft`` (``SkipLayerNormalization``, ``SkipSimplifiedLayerNormalization``), whose bias becomes
an ``Add`` of its own, which a linear in front of it can take in.

The operators broadcast as ``Add`` does, so that unknown shapes do no harm. An addition stays if one operand is a
constant of fewer than two axes (a bias), or if they are known to broadcast in another way than that one repeats
along leading axes (as positions do): that would be slow.
The model still runs without our library, since the operators' bodies come along as functions.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_tensor, is_constant
from sparse_onnx.model.graph import (
    add_function,
    add_initializer,
    drop_if_unused,
    is_read,
    is_read_outside,
    name_of,
    new_name,
    producer,
)
from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.model.shapes import Dims, Shapes
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.patterns.match import is_vector
from sparse_onnx.passes.patterns.normalization import Normalization, match_normalization
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.ops import skip_layer_norm
from sparse_onnx.sparse_ops.ops.skip_layer_norm import Signature

__all__ = ["FuseSkipLayerNorm"]

_OP_TYPES = {signature: op_type for op_type, signature in skip_layer_norm.OP_TYPES.items()}
_OPSETS = range(13, 27)  # those that the operators' bodies can be written in
_CONTRIB = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class _Residual:
    """A normalization and the addition in front of it: ``total = a + (b + bias)``.

    ``total`` is None where the sum is only an inner value. ``anchor`` is the node at whose place everything that
    the fused op reads is known, ``nodes`` are those that it replaces.
    """

    norm: Normalization
    a: ir.Value
    b: ir.Value
    bias: ir.Value | None
    total: ir.Value | None
    anchor: ir.Node
    nodes: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class FuseSkipLayerNorm(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "fuse.skip-layer-norm"
    stage: ClassVar[Stage] = Stage.FUSE

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        opset = model.opset_imports.get("", 0)
        fused: list[Signature] = []
        declined: list[Declined] = []
        shapes = Shapes(model)
        for graph in model.graphs():
            zeros: dict[int, ir.Value] = {}
            for node in tuple(graph):
                match = _match(node, shapes)
                if match is None:
                    continue
                if not isinstance(match, str) and opset not in _OPSETS:
                    match = f"opset {opset} is none of {_OPSETS[0]} to {_OPSETS[-1]}"
                if isinstance(match, str):
                    declined.append(self.declined(name_of(node), match))
                else:
                    fused.append(_fuse(model, graph, match, zeros))
        for signature in sorted(set(fused), key=_OP_TYPES.__getitem__):
            body = skip_layer_norm.function_body(_OP_TYPES[signature], opset)
            add_function(model, body, VERSION)
        statistics: dict[str, int | float] = {"normalizations": len(fused)}
        return PassResult(model, bool(fused), statistics, tuple(declined))


def _match(node: ir.Node, shapes: Shapes) -> _Residual | str | None:
    """What to fuse at ``node``, or why not, or None if there is no addition and normalization at all."""
    if node.graph is None:
        return None  # part of what was fused before
    match = _match_contrib(node) if node.domain == _CONTRIB else _match_standard(node, shapes)
    if not isinstance(match, _Residual):
        return match
    if (problem := _type_problem(match) or _shape_problem(match, shapes)) is not None:
        return problem
    return match


def _match_standard(node: ir.Node, shapes: Shapes) -> _Residual | str | None:
    norm = match_normalization(node, shapes)
    if norm is None:
        return None
    source = norm.source if isinstance(norm, Normalization) else node.inputs[0]
    add = producer(source, "Add")
    if source is None or add is None:
        return None
    if isinstance(norm, str) or add.graph is not node.graph:
        return norm if isinstance(norm, str) else "adds in another graph"
    a, b = add.inputs
    if a is None or b is None or any(is_constant(value) and len(shapes.dims(value)) < 2 for value in (a, b)):
        return None  # a bias
    outside = is_read_outside(source, norm.nodes)
    return _Residual(norm, a, b, None, source if outside else None, add, (add, *norm.nodes))


def _match_contrib(node: ir.Node) -> _Residual | str | None:
    if node.op_type not in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
        return None
    rms = node.op_type == "SkipSimplifiedLayerNormalization"
    inputs = [*node.inputs, *[None] * 5]
    a, b, gamma = inputs[:3]
    beta, bias = (None, inputs[3]) if rms else inputs[3:5]
    outputs = [value for value in node.outputs if is_read(value)]
    if any(value in outputs for value in node.outputs[1:3]):
        return "gives out its mean or deviation"
    if not all(is_vector(value) or value is None for value in (gamma, beta, bias)):
        return "has a gamma, beta or bias that is no constant float32 [C]"
    if a is None or b is None or gamma is None:
        return "lacks an input"
    total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] in outputs else None
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    norm = Normalization(a, gamma, beta, rms, epsilon, (node,), node.outputs[0])
    return _Residual(norm, b, a, bias, total, node, (node,))


def _type_problem(residual: _Residual) -> str | None:
    for value in (residual.a, residual.b):
        if value.dtype not in (None, ir.DataType.FLOAT):
            return f"has dtype {value.dtype}; the kernels take FLOAT"
    return None


def _shape_problem(residual: _Residual, shapes: Shapes) -> str | None:
    """Why the operands may have, or have, shapes that the operator is not for."""
    channels = _size(residual.norm.gamma)
    a, b = (shapes.dims(value) if shapes.rank(value) else None for value in (residual.a, residual.b))
    known = [dims[-1] for dims in (a, b) if dims is not None]
    for last in known:
        if isinstance(last, int) and last != channels:
            return f"has channels {last}, gamma {channels}"
    if channels == 1 and 1 not in known:
        return "has one gamma for channels whose number is unknown"
    if residual.norm.beta is not None and _size(residual.norm.beta) != channels:
        return "has gamma and beta of different sizes"
    if a is None or b is None or _may_repeat(a, b) or _may_repeat(b, a):
        return None
    return f"adds shapes {_text(a)} and {_text(b)}, which broadcast"


def _text(dims: Dims) -> str:
    return f"[{','.join('?' if dim is None else str(dim) for dim in dims)}]"


def _may_repeat(part: Dims, whole: Dims) -> bool:
    """Whether, as far as known, ``part`` is as ``whole`` but for leading axes, which it lacks or has with size 1."""
    axes = list(part)
    while len(axes) > 1 and axes[0] == 1:
        axes.pop(0)
    if len(axes) > len(whole):
        return False
    pairs = zip(reversed(axes), reversed(whole), strict=False)
    return all(
        m == n or (1 not in (m, n) and not (isinstance(m, int) and isinstance(n, int))) for m, n in pairs
    )


def _fuse(model: ir.Model, graph: ir.Graph, residual: _Residual, zeros: dict[int, ir.Value]) -> Signature:
    """``zeros`` are those of the graph by their width, which all its normalizations without a beta share."""
    norm = residual.norm
    signature = Signature(norm.rms, residual.total is not None)
    new_nodes = []
    b = residual.b
    if residual.bias is not None:
        name = new_name(model, f"{norm.output.name}.biased")
        biased = ir.Value(name=name, type=b.type, shape=b.shape)
        new_nodes.append(ir.node("Add", [b, residual.bias], outputs=[biased], name=name))
        b = biased
    inputs = [residual.a, b, _initializer(model, norm.gamma)]
    if not norm.rms and norm.beta is not None:
        inputs.append(_initializer(model, norm.beta))
    elif not norm.rms:
        size = _size(norm.gamma)
        if size not in zeros:
            name = new_name(model, f"{DOMAIN}.zeros.{size}")
            zeros[size] = add_initializer(graph, name, ir.tensor(np.zeros(size, np.float32), name=name))
        inputs.append(zeros[size])
    old = [norm.output] + ([residual.total] if residual.total is not None else [])
    node = ir.node(
        _OP_TYPES[signature],
        inputs,
        {"epsilon": norm.epsilon},
        domain=DOMAIN,
        num_outputs=len(old),
        name=norm.nodes[-1].name,
    )
    for before, after in zip(old, node.outputs, strict=True):
        after.doc_string = before.doc_string
        after.metadata_props.update(before.metadata_props)
    if module := norm.nodes[-1].metadata_props.get(MODULE_KEY):
        node.metadata_props[MODULE_KEY] = module
    read = [value for replaced in residual.nodes for value in replaced.inputs if value is not None]
    ir.convenience.replace_nodes_and_values(
        graph, residual.anchor, residual.nodes, [*new_nodes, node], old, node.outputs
    )
    for value in dict.fromkeys(read):
        drop_if_unused(value)
    return signature


def _size(vector: ir.Value) -> int:
    tensor = constant_tensor(vector)
    assert tensor is not None
    return tensor.size


def _initializer(model: ir.Model, value: ir.Value) -> ir.Value:
    """A constant in a form that is known everywhere in its graph; a Constant node may stand behind the fused op."""
    graph, tensor = value.graph, constant_tensor(value)
    if value.is_initializer() or not isinstance(graph, ir.Graph) or tensor is None:
        return value
    return add_initializer(graph, new_name(model, f"{value.name}.value"), tensor)
