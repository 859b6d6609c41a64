"""Merge sparse linears that share their input into one operator.

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

from sparse_onnx.model.graph import Names, add_initializer, is_read_once, is_standard, name_of, producer
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.model.own_operators import base_type, drop_unused_functions, is_ours, joined, put_in_place
from sparse_onnx.model.stored_weights import MERGED_FROM, StoredWeight, stored_weights
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
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
    """The linears that become one node, all nodes that it replaces, and the one behind which it stands."""

    op_type: str
    linears: tuple[ir.Node, ...]
    nodes: tuple[ir.Node, ...]
    place: ir.Node
    outputs: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True)
class MergeLinears(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.merge-linears"
    stage: ClassVar[Stage] = Stage.LOWER
    in_recipes: ClassVar[bool] = False

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        declined: list[Declined] = []
        statistics: dict[str, int | float] = {"gates": 0, "splits": 0}
        # Gates first: what they leave may be split.
        for kind, find in (("gates", _find_gates), ("splits", _find_splits)):
            for found in tuple(find(model.graph)):
                if isinstance(found, _Merge):
                    _replace(model, found, context)
                    statistics[kind] += 1
                else:
                    declined.append(self.declined(*found))
        modified = any(statistics.values())
        if modified:
            drop_unused_functions(model)
        return PassResult(model, modified, statistics, tuple(declined))


def _find_gates(graph: ir.Graph) -> Iterator[_Merge | tuple[str, str]]:
    """What to merge, or (place, reason) of what looks like a gate."""
    for node in graph:
        if not is_standard(node, "Mul"):
            continue
        producers = [producer(value) for value in node.inputs]
        gate, up = sorted(producers, key=lambda p: p is not None and is_ours(p, _PLAIN))
        if gate is None or up is None or not is_ours(gate, *_GATE_OF) or not is_ours(up, _PLAIN):
            continue
        if gate.inputs[0] is not up.inputs[0]:
            continue
        if problem := _gate_problem(gate, up):
            yield name_of(node), problem
        else:
            yield _Merge(_GATE_OF[base_type(gate)], (gate, up), (gate, up, node), node, (node.outputs[0],))


def _gate_problem(gate: ir.Node, up: ir.Node) -> str | None:
    for linear in (gate, up):
        if not is_read_once(linear.outputs[0]):
            return f"the output of {name_of(linear)} is used elsewhere, too"
        if problem := _weight_problem(linear):
            return f"{name_of(linear)} {problem}"
    if _storage(gate) != _storage(up) or _channels(gate) != _channels(up):
        return f"{name_of(gate)} and {name_of(up)} are stored differently"
    return None


def _find_splits(graph: ir.Graph) -> Iterator[_Merge | tuple[str, str]]:
    """What to merge, or (place, reason) of linears that share their input with others and stay alone."""
    readers: dict[ir.Value | None, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if is_ours(node, _PLAIN):
            readers[node.inputs[0]].append(node)
    for linears in readers.values():
        if len(linears) < 2:
            continue
        able: list[ir.Node] = []
        for linear in linears:
            if problem := _weight_problem(linear):
                yield name_of(linear), problem
            else:
                able.append(linear)
        groups = tuple(_stored_alike(able))
        for group in groups:
            if len(group) == 1 and len(groups) > 1:
                yield name_of(group[0]), "is stored differently from the other linears of its input"
            for part in _threes_and_twos(group):
                outputs = tuple(linear.outputs[0] for linear in part)
                # Behind the first one: there X is known, and nothing reads an output yet.
                yield _Merge(SPLITS[len(part)], part, part, part[0], outputs)


def _stored_alike(linears: Sequence[ir.Node]) -> Iterator[list[ir.Node]]:
    """The linears in groups whose weights may become one with that of the widest."""
    left = list(linears)
    while left:
        widest = max(left, key=_channels)
        group = [linear for linear in left if _may_join(linear, widest)]
        yield group
        left = [linear for linear in left if linear not in group]


def _may_join(linear: ir.Node, widest: ir.Node) -> bool:
    one, other = _stored(linear), _stored(widest)
    alike = (one.stored, one.variant, one.mask_structure) == (
        other.stored,
        other.variant,
        other.mask_structure,
    )
    return alike and one.stored.may_join(one.sizes, other.sizes)


def _threes_and_twos(linears: Sequence[ir.Node]) -> Iterator[tuple[ir.Node, ...]]:
    left = list(linears)
    while len(left) > 1:
        size = 2 if len(left) in (2, 4) else 3
        yield tuple(left[:size])
        del left[:size]


def _stored(linear: ir.Node) -> StoredWeight:
    (weight,) = stored_weights(linear)
    return weight


def _channels(linear: ir.Node) -> int:
    return _stored(linear).shape[1]


def _storage(linear: ir.Node) -> tuple[tuple[str, object], ...]:
    """All attributes but N: how the weight is stored."""
    return tuple(sorted((name, a.value) for name, a in linear.attributes.items() if name != "N"))


def _weight_problem(linear: ir.Node) -> str | None:
    """Why the stored weight of ``linear`` cannot become a part of another."""
    for value in linear.inputs[1:]:
        if value is None or value.const_value is None or value.is_graph_input():
            return "has a weight that is no constant"
    weight = _stored(linear)
    if any(len(value.uses()) > 1 for value in weight.parts if value is not None):
        return "shares its weight with another node"
    if weight.variant != weight.stored.name or min(weight.sizes.values()) < 1:
        return f"does not have its weight in the format {weight.stored.name}"
    return None


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _replace(model: ir.Model, merge: _Merge, context: PassContext) -> None:
    graph, linears = model.graph, merge.linears
    weights = [_stored(linear) for linear in linears]
    name = joined([weight.name for weight in weights])
    context.progress(f"merging {name}")
    packed = weights[0].stored.join([weight.packed() for weight in weights])
    bias = np.concatenate([_tensor(weight.bias).numpy() for weight in weights])
    for weight in weights:
        for value in (*weight.parts, weight.bias):
            release_mapping(_tensor(value))
    stored = []
    parts = {**packed.arrays(), BIAS: bias}
    name = Names(model).stem(name, [f".{key}" for key in parts])
    for key, array in parts.items():
        stored.append(add_initializer(graph, f"{name}.{key}", context.store(array, f"{name}.{key}")))
    stored[0].meta[MERGED_FROM] = tuple(part for weight in weights for part in weight.made_of)
    attributes: dict[str, int | str | list[int]] = {
        **packed.attributes(),
        "mask_structure": weights[0].mask_structure,
    }
    if merge.op_type in SPLITS.values():
        attributes["split"] = [_channels(linear) for linear in linears]
    op_type = weights[0].stored.op_type(merge.op_type)
    node = ir.node(
        op_type,
        [linears[0].inputs[0], *stored],
        attributes,
        domain=DOMAIN,
        num_outputs=len(merge.outputs),
    )
    body = OP_TYPES[op_type].function_body(model.opset_imports[""])
    put_in_place(
        model, node, body, linears=linears, nodes=merge.nodes, place=merge.place, outputs=merge.outputs
    )
