"""Nodes in topological order, as the format asks for and not every writer gives it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from sparse_onnx.errors import ModelFileError
from sparse_onnx.model.check import describe_node, quote, scopes, subgraphs

__all__ = ["sort_nodes"]

_Scope = onnx.GraphProto | onnx.FunctionProto


def sort_nodes(model: onnx.ModelProto, path: Path) -> None:
    """Bring the nodes of every graph and function of ``model``, read from ``path``, into topological order. Nodes keep
    their order where it is one.

    Raises ModelFileError if a node needs its own output.
    """
    for scope in scopes(model):
        needed = _needed_nodes(scope)
        if all(first < index for index, before in enumerate(needed) for first in before):
            continue
        nodes = list(scope.node)
        order = _sorted(needed)
        if len(order) < len(nodes):
            index, value = _in_cycle(scope, needed, set(order))
            raise ModelFileError(
                f"{path}: {describe_node(nodes[index])}: needs {quote(value)}, which is computed from its own "
                "output: the graph goes in a circle; export it again"
            )
        ordered = [nodes[index] for index in order]
        del scope.node[:]
        scope.node.extend(ordered)


def _needed_nodes(scope: _Scope) -> list[set[int]]:
    """For each node of ``scope`` those nodes of it whose outputs it reads."""
    producers = {name: index for index, node in enumerate(scope.node) for name in node.output if name}
    return [{producers[name] for name in _reads(node) if name in producers} for node in scope.node]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that ``node`` and its subgraphs read, without those that are defined in a subgraph."""
    yield from node.input
    for attribute in node.attribute:
        for graph in subgraphs(attribute):
            yield from _free(graph)


def _free(graph: onnx.GraphProto) -> set[str]:
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {sparse.values.name for sparse in graph.sparse_initializer}
    own.update(name for node in graph.node for name in node.output)
    read = {value.name for value in graph.output}
    for node in graph.node:
        read.update(_reads(node))
    return read - own


def _sorted(needed: list[set[int]]) -> list[int]:
    """Topological order, the earliest node that can come first; without the nodes in and behind circles."""
    waiting = [len(before) for before in needed]
    users: list[list[int]] = [[] for _ in needed]
    for index, before in enumerate(needed):
        for first in before:
            users[first].append(index)
    ready = [index for index, count in enumerate(waiting) if not count]
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for user in users[order[-1]]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, user)
    return order


def _in_cycle(scope: _Scope, needed: list[set[int]], sound: set[int]) -> tuple[int, str]:
    """A node of a circle and the value that closes it."""

    def unsound(indices: Iterable[int]) -> int:
        return min(index for index in indices if index not in sound)

    index, seen = unsound(range(len(needed))), set()
    while index not in seen:
        seen.add(index)
        index = unsound(needed[index])
    made = set(scope.node[unsound(needed[index])].output)
    return index, next(name for name in _reads(scope.node[index]) if name in made)
