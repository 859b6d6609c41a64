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

Conditions: the weights are stored alike (K, chunk, block, width), have whole blocks of outputs, and no other node uses
them. The stored tensors then lie behind one another as they are: nothing is packed again. See
:mod:`sparse_onnx.sparse_ops.sparse_matmul_split` for the operators.
"""

from __future__ import annotations

import dataclasses
import os.path
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph import add_function, add_initializer, all_graphs, drop_if_unused, is_standard
from sparse_onnx.metadata_keys import MODULE_KEY
from sparse_onnx.model_io import release_mapping
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.sparse_ops import sparse_matmul, sparse_matmul_split
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN, PackedWeight
from sparse_onnx.sparse_ops.sparse_matmul_split import GATES, SPLITS

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
            _drop_unused_functions(model)
        return PassResult(model, modified, statistics, tuple(declined))


def _find_gates(graph: ir.Graph) -> Iterator[_Merge | tuple[str, str]]:
    """What to merge, or (place, reason) of what looks like a gate."""
    for node in graph:
        if not is_standard(node, "Mul"):
            continue
        producers = [value.producer() if value is not None else None for value in node.inputs]
        gate, up = sorted(producers, key=lambda p: p is not None and _is_ours(p, _PLAIN))
        if gate is None or up is None or not _is_ours(gate, *_GATE_OF) or not _is_ours(up, _PLAIN):
            continue
        if gate.inputs[0] is not up.inputs[0]:
            continue
        if problem := _gate_problem(gate, up):
            yield _name(node), problem
        else:
            yield _Merge(_GATE_OF[gate.op_type], (gate, up), (gate, up, node), node, (node.outputs[0],))


def _gate_problem(gate: ir.Node, up: ir.Node) -> str | None:
    for linear in (gate, up):
        output = linear.outputs[0]
        if output.is_graph_output() or len(output.uses()) != 1:
            return f"the output of {_name(linear)} is used elsewhere, too"
        if problem := _weight_problem(linear):
            return f"{_name(linear)} {problem}"
    if _storage(gate) != _storage(up) or _channels(gate) != _channels(up):
        return f"{_name(gate)} and {_name(up)} are stored differently"
    return None


def _find_splits(graph: ir.Graph) -> Iterator[_Merge | tuple[str, str]]:
    """What to merge, or (place, reason) of linears that share their input with others and stay alone."""
    readers: dict[ir.Value | None, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if _is_ours(node, _PLAIN):
            readers[node.inputs[0]].append(node)
    for linears in readers.values():
        if len(linears) < 2:
            continue
        alike: dict[object, list[ir.Node]] = defaultdict(list)
        for linear in linears:
            if problem := _weight_problem(linear):
                yield _name(linear), problem
            else:
                alike[_storage(linear)].append(linear)
        for group in alike.values():
            if len(group) == 1 and len(alike) > 1:
                yield _name(group[0]), "is stored differently from the other linears of its input"
            for part in _threes_and_twos(group):
                outputs = tuple(linear.outputs[0] for linear in part)
                # Behind the first one: there X is known, and nothing reads an output yet.
                yield _Merge(SPLITS[len(part)], part, part, part[0], outputs)


def _threes_and_twos(linears: Sequence[ir.Node]) -> Iterator[tuple[ir.Node, ...]]:
    left = list(linears)
    while len(left) > 1:
        size = 2 if len(left) in (2, 4) else 3
        yield tuple(left[:size])
        del left[:size]


def _is_ours(node: ir.Node, *op_types: str) -> bool:
    return node.domain == DOMAIN and node.op_type in op_types


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or "?"


def _channels(linear: ir.Node) -> int:
    return linear.attributes.get_int("N", 0)


def _storage(linear: ir.Node) -> tuple[tuple[str, object], ...]:
    """All attributes but N: how the weight is stored."""
    return tuple(sorted((name, a.value) for name, a in linear.attributes.items() if name != "N"))


def _weight_problem(linear: ir.Node) -> str | None:
    """Why the stored weight of ``linear`` cannot become a part of another."""
    for value in linear.inputs[1:]:
        if value is None or value.const_value is None or value.is_graph_input():
            return "has a weight that is no constant"
    if any(len(value.uses()) > 1 for value in linear.inputs[1:5] if value is not None):
        return "shares its weight with another node"
    N, block = _channels(linear), linear.attributes.get_int("block", 1)
    if N % block:
        return f"has {N} outputs, which are not whole blocks of {block}"
    return None


def _packed(linear: ir.Node) -> PackedWeight:
    K, N, chunk, block, width = (
        linear.attributes.get_int(name, 0) for name in ("K", "N", "chunk", "block", "width")
    )
    values, offsets, counts, rows = (_tensor(linear, index).numpy() for index in range(1, 5))
    return PackedWeight(K, N, chunk, block, width, values, offsets, counts, rows)


def _tensor(linear: ir.Node, index: int) -> ir.TensorProtocol:
    value = linear.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _replace(model: ir.Model, merge: _Merge, context: PassContext) -> None:
    graph, linears = model.graph, merge.linears
    names = [(linear.inputs[1].name or "").removesuffix(".values") for linear in linears if linear.inputs[1]]
    name = _joined(names)
    context.progress(f"merging {name}")
    packed = sparse_matmul_split.concatenate([_packed(linear) for linear in linears])
    bias = np.concatenate([_tensor(linear, 5).numpy() for linear in linears])
    for linear in linears:
        for index in range(1, 6):
            release_mapping(_tensor(linear, index))
    stored = []
    for key, array in {**packed.arrays(), "bias": bias}.items():
        stored.append(add_initializer(graph, f"{name}.{key}", context.store(array, f"{name}.{key}")))
    attributes: dict[str, int | str | list[int]] = {
        **packed.attributes(),
        "mask_structure": linears[0].attributes.get_string("mask_structure", "unstructured"),
    }
    if merge.op_type in SPLITS.values():
        attributes["split"] = [_channels(linear) for linear in linears]
    node = ir.node(
        merge.op_type,
        [linears[0].inputs[0], *stored],
        attributes,
        domain=DOMAIN,
        num_outputs=len(merge.outputs),
        name=_joined([_name(linear) for linear in linears]),
    )
    if all(modules := [linear.metadata_props.get(MODULE_KEY, "") for linear in linears]):
        node.metadata_props[MODULE_KEY] = _joined(modules)
    for old, new in zip(merge.outputs, node.outputs, strict=True):
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
    before = [value for linear in linears for value in linear.inputs[1:]]
    ir.convenience.replace_nodes_and_values(
        graph, merge.place, merge.nodes, [node], list(merge.outputs), node.outputs
    )
    for old_input in dict.fromkeys(before):
        if old_input is not None:
            drop_if_unused(old_input)
    body = sparse_matmul_split.function_body(merge.op_type, model.opset_imports[""])
    add_function(model, body, sparse_matmul.VERSION)


def _joined(names: Sequence[str]) -> str:
    """One name for things with these: ``a.b.q``, ``a.b.k`` are ``a.b.q+k``."""
    prefix = os.path.commonprefix(names)  # noqa: RUF071  # of characters: names are no paths of files
    start = max(prefix.rfind("."), prefix.rfind("/")) + 1
    return "+".join([names[0], *(name[start:] for name in names[1:])])


def _drop_unused_functions(model: ir.Model) -> None:
    """Bodies of linears that were all merged."""
    used = {(node.domain, node.op_type) for graph in all_graphs(model) for node in graph}
    for identifier in list(model.functions):
        domain, op_type, _ = identifier
        if domain == DOMAIN and op_type in sparse_matmul.ACTIVATIONS and (domain, op_type) not in used:
            del model.functions[identifier]
