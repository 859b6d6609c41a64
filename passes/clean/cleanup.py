"""Clean-up that keeps the function of a model: what stands in the way of later passes, or is not needed.

===================  ====================================  ============================================
pass                 before                                after
===================  ====================================  ============================================
clean.constants      ``Constant`` nodes with a tensor      initializers
clean.identities     ``b = Identity(a); Y = F(b)``         ``Y = F(a)``
clean.duplicates     equal initializers                    the first of them
clean.unused         nodes, initializers and functions     nothing
                     that no output depends on
===================  ====================================  ============================================

The inputs and outputs of the model keep their names, types and order.

``onnx_ir.passes.common`` has passes for constants, identities and duplicates, too. These are kept beside them: theirs
of duplicates reads both tensors as bytes (a model of gigabytes has none to spare), the one of identities raises where
ranks differ, and none counts what it did.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sparse_onnx.model.graph import all_graphs, drop_if_unused, is_read, is_standard, subgraphs
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage

__all__ = ["Constants", "Duplicates", "Identities", "Unused"]

_GLIMPSE = 256  # bytes at either end that are compared before a whole tensor is read


@dataclasses.dataclass(frozen=True)
class Constants(Pass):
    """Turn ``Constant`` nodes with a tensor of at least 16 elements into initializers, outside functions."""

    name: ClassVar[str] = "clean.constants"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        before = _count_nodes(model)
        result = common.LiftConstantsToInitializersPass()(model)
        return PassResult(model, result.modified, {"nodes": before - _count_nodes(model)})


@dataclasses.dataclass(frozen=True)
class Identities(Pass):
    """Remove ``Identity`` nodes, also in subgraphs and functions.

    Those that give a graph its output stay: a name would change, and a subgraph may not return a value of the
    graph around it directly.
    """

    name: ClassVar[str] = "clean.identities"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        removed = 0
        for graph in all_graphs(model):
            for node in tuple(graph):
                if not is_standard(node, "Identity"):
                    continue
                source, copy = node.inputs[0], node.outputs[0]
                if source is None or copy.is_graph_output():
                    continue
                if not source.is_graph_input():  # what was known only about the copy
                    source.shape = copy.shape if source.shape is None else source.shape
                    source.type = copy.type if source.type is None else source.type
                copy.replace_all_uses_with(source)
                graph.remove(node, safe=True)
                removed += 1
        return PassResult(model, removed > 0, {"nodes": removed})


@dataclasses.dataclass(frozen=True)
class Duplicates(Pass):
    """Keep one of the initializers of a graph that have the same dtype, shape and bytes.

    At most one tensor is mapped at a time, and only tensors that agree at both ends are read as a whole. -0.0
    and 0.0, and NaNs with different bits, are different. Initializers that are inputs or outputs stay.
    """

    name: ClassVar[str] = "clean.duplicates"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        merged = saved = 0
        for graph in model.graphs():
            for twins in _equal_initializers(graph):
                for twin in twins[1:]:
                    tensor = twin.const_value
                    twin.replace_all_uses_with(twins[0])
                    if drop_if_unused(twin) and tensor is not None:
                        merged, saved = merged + 1, saved + tensor.nbytes
        return PassResult(model, merged > 0, {"tensors": merged, "bytes": saved})


@dataclasses.dataclass(frozen=True)
class Unused(Pass):
    """Remove nodes and initializers that no output depends on, and functions that nothing calls."""

    name: ClassVar[str] = "clean.unused"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        functions = len(model.functions)
        outermost = [model.graph, *(function.graph for function in model.functions.values())]
        nodes = sum(_remove_dead_nodes(graph) for graph in outermost)
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        tensors = 0
        for graph in model.graphs():
            tensors += sum(drop_if_unused(value) for value in tuple(graph.initializers.values()))
        removed = {"nodes": nodes, "initializers": tensors, "functions": functions - len(model.functions)}
        return PassResult(model, any(removed.values()), dict(removed))


def _count_nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _equal_initializers(graph: ir.Graph) -> Iterator[list[ir.Value]]:
    """Groups of two and more, each in the graph's order."""
    alike: dict[object, list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if value.is_graph_input() or value.is_graph_output() or tensor is None:
            continue
        if tensor.dtype == ir.DataType.STRING:
            continue
        alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for group in alike.values():
        for similar in _split(group, glimpse=True):
            yield from _split(similar, glimpse=False)


def _split(group: list[ir.Value], *, glimpse: bool) -> Iterator[list[ir.Value]]:
    """Parts of ``group`` that have the same bytes (with ``glimpse``: the same first and last ones)."""
    if len(group) < 2:
        return
    parts: dict[bytes, list[ir.Value]] = {}
    for value in group:
        assert value.const_value is not None
        parts.setdefault(_digest(value.const_value, glimpse), []).append(value)
        release_mapping(value.const_value)
    yield from (part for part in parts.values() if len(part) > 1)


def _digest(tensor: ir.TensorProtocol, glimpse: bool) -> bytes:
    """Of the bytes of ``tensor``; a cryptographic hash, so equal digests mean equal bytes."""
    data = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
    hashed = hashlib.blake2b(data[:_GLIMPSE] if glimpse else data, digest_size=32)
    if glimpse:
        hashed.update(data[-_GLIMPSE:])
    return hashed.digest()


def _remove_dead_nodes(graph: ir.Graph) -> int:
    """Remove what no output of ``graph`` depends on, from the last node to the first; how many went."""
    removed = 0
    for node in reversed(tuple(graph)):
        if any(map(is_read, node.outputs)):
            removed += sum(_remove_dead_nodes(subgraph) for subgraph in subgraphs(node))
            continue
        for subgraph in subgraphs(node):
            for inner in subgraph.all_nodes():  # or they would still count as users of values around them
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
        graph.remove(node, safe=True)
        removed += 1
    return removed
