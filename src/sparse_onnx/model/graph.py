"""Small questions to a graph and small changes of it that several modules need."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
import onnx_ir as ir

from sparse_onnx.sparse_ops.domain import DOMAIN

__all__ = [
    "STANDARD_DOMAINS",
    "Names",
    "add_function",
    "add_initializer",
    "all_graphs",
    "axis_from_end",
    "drop_if_unused",
    "drop_with_makers",
    "initializers",
    "input_at",
    "is_read",
    "is_read_once",
    "is_read_outside",
    "is_standard",
    "name_of",
    "new_name",
    "producer",
    "read_values",
    "remove_if_unread",
    "subgraphs",
    "value_names",
]

STANDARD_DOMAINS = ("", "ai.onnx")
"""The two names of the domain whose operators the ONNX standard defines."""


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether ``node`` is one of these operators of the ONNX standard."""
    return node.domain in STANDARD_DOMAINS and node.op_type in op_types


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value``, in its graph or around it; with ``op_types`` only if it is one of these
    operators of the ONNX standard."""
    node = None if value is None else value.producer()
    return node if node is not None and (not op_types or is_standard(node, *op_types)) else None


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index`` of ``node``; None where it is left out, in the middle or at the end."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_read(value: ir.Value) -> bool:
    """Whether anything needs ``value``: a node, of a subgraph too, or whoever asks for the outputs of its graph."""
    return bool(value.uses()) or value.is_graph_output()


def is_read_once(value: ir.Value) -> bool:
    """Whether one input of one node, of a subgraph maybe, is all that needs ``value``."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def is_read_outside(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether others than ``nodes`` need ``value``."""
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())


def axis_from_end(axis: int, rank: int) -> int:
    """``axis`` of a value with ``rank`` axes as a negative number: -1 is the last one."""
    return axis - rank if axis >= 0 else axis


def name_of(node: ir.Node) -> str:
    """What to call ``node`` in a message or a new name: its name, or that of what it makes."""
    return node.name or node.outputs[0].name or "?"


def all_graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph, the functions' graphs, and all their subgraphs."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.subgraphs()]
    return graphs


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers of the main graph and of its subgraphs, not those inside functions."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.initializers.values()


def value_names(model: ir.Model) -> set[str]:
    """All names of values, in subgraphs and in functions of the model's own as well; a new value needs another one."""
    names: set[str | None] = set()
    functions = [function for function in model.functions.values() if function.domain != DOMAIN]
    for graph in (*model.graphs(), *(graph for f in functions for graph in (f.graph, *f.subgraphs()))):
        names.update(value.name for value in graph.inputs)
        names.update(graph.initializers)
        names.update(value.name for node in graph for value in node.outputs)
    return {name for name in names if name}


def new_name(model: ir.Model, wanted: str) -> str:
    """``wanted``, or with a number behind it where the model has a value of that name already."""
    return Names(model).new(wanted)


class Names:
    """Names for many new values of ``model``, which is looked through once; nothing else may add values meanwhile."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = value_names(model)

    def new(self, wanted: str) -> str:
        """``wanted``, or with a number behind it where that is taken."""
        return self.stem(wanted, ("",))

    def stem(self, wanted: str, endings: Collection[str]) -> str:
        """``wanted``, or with a number behind it where that is taken with one of the ``endings``."""
        name, count = wanted, 1
        while not self._taken.isdisjoint(names := {name + ending for ending in endings}):
            name, count = f"{wanted}.{count}", count + 1
        self._taken |= names
        return name


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of ``graph`` with that tensor."""
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(list(tensor.shape.numpy())),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def add_function(model: ir.Model, body: onnx.FunctionProto, version: int) -> None:
    """Give ``model`` the body of an operator; its domain is imported as ``version``."""
    model.opset_imports[body.domain] = version
    function = ir.serde.deserialize_function(body)
    model.functions[function.identifier()] = function


def drop_if_unused(value: ir.Value) -> bool:
    """Remove an initializer or Constant node that nothing uses and that is no input or output; whether it went."""
    graph, node = value.graph, value.producer()
    if is_read(value) or value.is_graph_input():
        return False
    if node is not None and node.graph is not None and is_standard(node, "Constant"):
        node.graph.remove(node, safe=True)
        return True
    if not isinstance(graph, ir.Graph) or not value.is_initializer():
        return False
    del graph.initializers[value.name or ""]
    return True


def remove_if_unread(node: ir.Node, *, with_makers: bool = False) -> bool:
    """Remove ``node`` if nothing needs what it makes, and the initializers that only it read; whether it went.

    ``with_makers``: and all nodes before it that nothing else needs, Constant nodes among them.
    """
    removed, waiting = False, [node]
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(map(is_read, node.outputs)):
            continue
        operands = dict.fromkeys(value for value in node.inputs if value is not None)
        node.graph.remove(node, safe=True)
        removed = True
        for value in operands:
            maker = value.producer()
            if maker is None:
                drop_if_unused(value)
            elif with_makers:
                waiting.append(maker)
    return removed


def drop_with_makers(value: ir.Value) -> None:
    """Remove what only ``value`` was made for, if nothing needs it: the nodes before it, and their initializers."""
    maker = value.producer()
    if maker is None:
        drop_if_unused(value)
    else:
        remove_if_unread(maker, with_makers=True)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in the attributes of ``node``, without those inside them."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, those that its subgraphs take from outside included."""
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None)
        yield from (value for value in graph.outputs if value is not None)
