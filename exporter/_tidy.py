"""Readable names and clean metadata for a graph that torch's exporter wrote.

Before: ``MatMul(layer_norm, val_83)`` named ``node_MatMul_82``, with the path of the Python file in its
metadata. After: ``MatMul(layer_norm, encoder.layer.0.attention.self.query.weight)`` named
``encoder.layer.0.attention.self.query/MatMul``, with its module in the metadata and nothing else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.exporter._extras import require
from sparse_onnx.model.metadata_keys import MODULE_KEY

__all__ = ["tidy"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


class _Names:
    """Unique names: a wish that is taken gets ``_1``, ``_2`` and so on."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def unique(self, wish: str) -> str:
        name, count = wish, 0
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._taken.add(name)
        return name

    def rename(self, value: ir.Value, wish: str) -> None:
        self._taken.discard(value.name or "")
        value.name = self.unique(wish)


def tidy(
    model: ir.Model, state: Mapping[str, Any], input_names: Sequence[str], output_names: Sequence[str]
) -> None:
    """Name inputs, outputs, initializers and nodes of ``model`` in place, and strip all other metadata.

    ``state`` holds the torch tensors of the module by name, tied ones under each of their names. Short name
    lists leave the rest as it is. Raises UsageError for names that are too many or not distinct.
    """
    modules = {node: module_path(node) for node in _nodes(model)}
    _name_inputs_and_outputs(model, input_names, output_names)
    _name_initializers(model, state, modules)
    _strip(model)
    names = _Names(())
    for node, module in modules.items():
        node.name = names.unique(f"{module}/{node.op_type}" if module else node.op_type)
        if module:
            node.metadata_props[MODULE_KEY] = module


def module_path(node: ir.Node) -> str:
    """The path of the module that ``node`` was traced in; empty for the outermost one, or if unknown."""
    text = node.metadata_props.get(_SCOPES)
    scopes = ast.literal_eval(text) if text else []
    # The last scope is the traced operation itself. A module that was called again is written `name@1`.
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path == _NO_MODULE else re.sub(r"@\d+", "", path)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in _nodes(model):
        yield from node.outputs


def _name_inputs_and_outputs(
    model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]
) -> None:
    graph = model.graph
    for kind, values, wanted in (
        ("input", graph.inputs, input_names),
        ("output", graph.outputs, output_names),
    ):
        if len(wanted) > len(values):
            raise UsageError(f"{len(wanted)} {kind} names are given, but the model has {len(values)} {kind}s")
    wishes = [*zip(graph.inputs, input_names, strict=False), *zip(graph.outputs, output_names, strict=False)]
    wished = {name for _, name in wishes}
    if len(wished) < len(wishes):
        raise UsageError(f"input and output names must differ: {', '.join(name for _, name in wishes)}")
    holders = {id(value) for value, _ in wishes}
    others = [value for value in _values(model) if id(value) not in holders]
    names = _Names([*wished, *(value.name for value in others if value.name)])
    for value in others:
        if value.name in wished:
            value.name = names.unique(value.name)
    for value, name in wishes:
        value.name = name


def _name_initializers(model: ir.Model, state: Mapping[str, Any], modules: Mapping[ir.Node, str]) -> None:
    graph = model.graph
    names = _Names(value.name for value in _values(model) if value.name)
    origins = {
        id(value): origin for value in graph.initializers.values() if (origin := _origin(value, state))
    }
    absent = set(state) - set(origins.values())
    for value in list(graph.initializers.values()):
        origin = origins.get(id(value))
        if origin is None:
            continue
        owners = {modules[node] for node, _ in value.uses() if node in modules}
        if len(value.uses()) > 1 and any(_equal(state[origin], state[name]) for name in absent):
            # One tensor now serves several parameters that happen to be equal: the name of one would mislead.
            names.rename(value, f"shared.{origin.rpartition('.')[2]}")
            continue
        # A tied tensor has several names: take the one inside the module that uses it.
        tied = (name for name, tensor in state.items() if tensor is state[origin])
        wish = next((name for name in tied if name.rpartition(".")[0] in owners), origin)
        if wish != value.name:
            names.rename(value, wish)


def _origin(value: ir.Value, state: Mapping[str, Any]) -> str | None:
    """The tensor that ``value`` holds, as it was or folded by constant arithmetic: transposed, masked, scaled."""
    if value.name in state:
        return value.name
    text = value.metadata_props.get(_FOLDED_FROM)
    sources = [name for name in ast.literal_eval(text) if name in state] if text else []
    if len(sources) > 1:  # a weight and its mask: the weight gives the name
        parameter = require("torch").nn.Parameter
        sources = [name for name in sources if isinstance(state[name], parameter)]
    return sources[0] if len(sources) == 1 else None


def _equal(one: Any, other: Any) -> bool:
    return (
        one is not other
        and one.shape == other.shape
        and one.dtype == other.dtype
        and bool((one == other).all())
    )


def _strip(model: ir.Model) -> None:
    model.doc_string = None
    parts: list[Any] = [model, *model.graphs(), *model.functions.values(), *_nodes(model), *_values(model)]
    for part in parts:
        part.doc_string = None
        part.metadata_props.clear()
        part.meta.clear()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value.doc_string = None
                value.const_value.metadata_props.clear()
