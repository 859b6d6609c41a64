"""Merge linears of ours that share their input into one operator: of floats, of few bits for few tokens, or of bytes.

Query, key and value of attention (two or three linears; more are merged by threes and twos)::

    Before                                         After

    q = SparseMatMul(X, Wq, bq)                    q, k, v = SparseMatMulSplit3<split = [Nq, Nk, Nv]>(
    k = SparseMatMul(X, Wk, bk)                        X, [Wq, Wk, Wv], [bq, bk, bv])
    v = SparseMatMul(X, Wv, bv)

Gate and up projection of a gated MLP, with SiLU or GELU (tanh)::

    g = SparseMatMulSilu(X, Wg, bg)                Y = SparseMatMulSiluGate(X, [Wg, Wu], [bg, bu])
    u = SparseMatMul(X, Wu, bu)
    Y = Mul(g, u)

Conditions: the weights are stored so that their format joins them
(:meth:`sparse_onnx.sparse_ops.formats.base.StoredFormat.join`), and no other node uses them. See
:mod:`sparse_onnx.sparse_ops.ops.sparse_matmul_split` for the operators.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.byte_weights import ByteWeight, byte_weight
from sparse_onnx.model.graph import Names, add_initializer, is_read_once, is_standard, name_of, producer
from sparse_onnx.model.level_weights import node_weights
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.model.own_operators import drop_unused_functions, joined, put_in_place
from sparse_onnx.model.stored_weights import MERGED_FROM, NodeWeight
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.lower.guard import Guard
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.ops import sparse_matmul
from sparse_onnx.sparse_ops.ops.base import BIAS
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES
from sparse_onnx.sparse_ops.ops.sparse_matmul_split import GATES, SPLITS

__all__ = ["MergeLinears"]

_PLAIN = sparse_matmul.OP_TYPES["none"]
_GATE_OF = {sparse_matmul.OP_TYPES[activation]: op_type for activation, op_type in GATES.items()}


@dataclasses.dataclass(frozen=True)
class _Merge:
    """The linears that become one node, all nodes that it replaces, and the one behind which it stands. ``base`` is
    the operator that it is with weights of floats."""

    base: str
    linears: tuple[NodeWeight, ...]
    nodes: tuple[ir.Node, ...]
    place: ir.Node
    outputs: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True)
class MergeLinears(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.merge-linears"
    stage: ClassVar[Stage] = Stage.LOWER
    in_recipes: ClassVar[bool] = False

    guard: Guard | None = dataclasses.field(default=None, repr=False, compare=False)
    """Asked of linears of bytes; None: all are merged."""

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        declined: list[Declined] = []
        statistics: dict[str, int | float] = {"gates": 0, "splits": 0}
        # Gates first: what they leave may be split.
        for kind, find in (("gates", _find_gates), ("splits", _find_splits)):
            for found in tuple(find(model.graph)):
                if isinstance(found, _Merge):
                    if reason := self._slower(model, found):
                        declined.append(self.declined(name_of(found.place), reason))
                        continue
                    _replace(model, found, context)
                    statistics[kind] += 1
                else:
                    declined.append(self.declined(*found))
        modified = any(statistics.values())
        if modified:
            drop_unused_functions(model)
        return PassResult(model, modified, statistics, tuple(declined))

    def _slower(self, model: ir.Model, merge: _Merge) -> str:
        """Why the linears stay apart."""
        if self.guard is None or not isinstance(merge.linears[0], ByteWeight):
            return ""
        return self.guard(model, merge.nodes, merge.outputs, MergeLinears())


def _linear(node: ir.Node | None, *bases: str) -> NodeWeight | None:
    """The one weight of ``node``, if it is one of these operators with weights of any kind."""
    if node is None:
        return None
    weights = (*node_weights(node), byte_weight(node))
    return next((weight for weight in weights if weight is not None and weight.base in bases), None)


def _find_gates(graph: ir.Graph) -> Iterator[_Merge | tuple[str, str]]:
    """What to merge, or (place, reason) of what looks like a gate."""
    for node in graph:
        if not is_standard(node, "Mul"):
            continue
        producers = [producer(value) for value in node.inputs]
        gates = [found for one in producers if (found := _linear(one, *_GATE_OF)) is not None]
        ups = [found for one in producers if (found := _linear(one, _PLAIN)) is not None]
        if len(gates) != 1 or len(ups) != 1:
            continue
        (gate,), (up,) = gates, ups
        if gate.node.inputs[0] is not up.node.inputs[0]:
            continue
        if problem := _gate_problem(gate, up):
            yield name_of(node), problem
        else:
            nodes = (gate.node, up.node, node)
            yield _Merge(_GATE_OF[gate.base], (gate, up), nodes, node, (node.outputs[0],))


def _gate_problem(gate: NodeWeight, up: NodeWeight) -> str | None:
    for linear in (gate, up):
        if not is_read_once(linear.node.outputs[0]):
            return f"the output of {name_of(linear.node)} is used elsewhere, too"
        if problem := _weight_problem(linear):
            return f"{name_of(linear.node)} {problem}"
    if _storage(gate) != _storage(up):
        return f"{name_of(gate.node)} and {name_of(up.node)} are stored differently"
    return None


def _find_splits(graph: ir.Graph) -> Iterator[_Merge | tuple[str, str]]:
    """What to merge, or (place, reason) of linears that share their input with others and stay alone."""
    readers: dict[ir.Value | None, list[NodeWeight]] = defaultdict(list)
    for node in graph:
        if (linear := _linear(node, _PLAIN)) is not None:
            readers[node.inputs[0]].append(linear)
    for linears in readers.values():
        if len(linears) < 2:
            continue
        able: list[NodeWeight] = []
        for linear in linears:
            if problem := _weight_problem(linear):
                yield name_of(linear.node), problem
            else:
                able.append(linear)
        groups = tuple(_stored_alike(able))
        for group in groups:
            if len(group) == 1 and len(groups) > 1:
                yield name_of(group[0].node), "is stored differently from the other linears of its input"
            for part in _threes_and_twos(group):
                nodes = tuple(linear.node for linear in part)
                outputs = tuple(node.outputs[0] for node in nodes)
                # Behind the first one: there X is known, and nothing reads an output yet.
                yield _Merge(SPLITS[len(part)], part, nodes, nodes[0], outputs)


def _stored_alike(linears: Sequence[NodeWeight]) -> Iterator[list[NodeWeight]]:
    """The linears in groups whose weights may become one with that of the widest."""
    left = list(linears)
    while left:
        widest = max(left, key=lambda linear: linear.shape[1])
        group = [linear for linear in left if linear.joins(widest)]
        yield group
        left = [linear for linear in left if linear not in group]


def _threes_and_twos(linears: Sequence[NodeWeight]) -> Iterator[tuple[NodeWeight, ...]]:
    left = list(linears)
    while len(left) > 1:
        size = 2 if len(left) in (2, 4) else 3
        yield tuple(left[:size])
        del left[:size]


def _storage(linear: NodeWeight) -> tuple[object, ...]:
    """How the weight is stored, and what it is used with."""
    attributes = ((name, a.value) for name, a in linear.node.attributes.items())
    return linear.op_type(_PLAIN), tuple(sorted(attributes)), linear.operands


def _weight_problem(linear: NodeWeight) -> str | None:
    """Why the stored weight of ``linear`` cannot become a part of another."""
    for value in (*linear.parts, linear.bias):
        if value is None or value.const_value is None or value.is_graph_input():
            return "has a weight that is no constant"
    if any(len(value.uses()) > 1 for value in linear.parts if value is not None):
        return "shares its weight with another node"
    return linear.apart or None


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _replace(model: ir.Model, merge: _Merge, context: PassContext) -> None:
    graph, (first, *others) = model.graph, merge.linears
    name = joined([linear.name for linear in merge.linears])
    context.progress(f"merging {name}")
    packed = first.join(others)
    bias = np.concatenate([_tensor(linear.bias).numpy() for linear in merge.linears])
    for linear in merge.linears:
        for value in (*linear.parts, linear.bias):
            release_mapping(_tensor(value))
    stored = []
    parts = {**packed.arrays(), BIAS: bias}
    name = Names(model).stem(name, [f".{key}" for key in parts])
    for key, array in parts.items():
        stored.append(add_initializer(graph, f"{name}.{key}", context.store(array, f"{name}.{key}")))
    stored[0].meta[MERGED_FROM] = tuple(part for linear in merge.linears for part in linear.made_of)
    attributes: dict[str, int | str | float | list[int]] = {**packed.attributes()}
    for key, attribute in first.node.attributes.items():
        attributes.setdefault(key, attribute.value)
    if merge.base in SPLITS.values():
        attributes["split"] = [linear.shape[1] for linear in merge.linears]
    op_type = first.op_type(merge.base)
    node = ir.node(
        op_type,
        [first.node.inputs[0], *stored, *first.operands],
        attributes,
        domain=DOMAIN,
        num_outputs=len(merge.outputs),
    )
    body = OP_TYPES[op_type].function_body(model.opset_imports[""])
    linears = [linear.node for linear in merge.linears]
    put_in_place(
        model, node, body, linears=linears, nodes=merge.nodes, place=merge.place, outputs=merge.outputs
    )
