"""Operators of ours in a graph: to put one in the place of several."""

from __future__ import annotations

import os.path
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from sparse_onnx.model.bit_packing import UNPACK_DOMAIN
from sparse_onnx.model.graph import add_function, all_graphs, drop_if_unused, name_of
from sparse_onnx.model.metadata_keys import LOWERED_KEY, MODULE_KEY
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION

__all__ = ["drop_unused_functions", "joined", "put_in_place"]


def joined(names: Sequence[str]) -> str:
    """One name for things with these: ``a.b.q``, ``a.b.k`` are ``a.b.q+k``."""
    prefix = os.path.commonprefix(names)  # noqa: RUF071  # of characters: names are no paths of files
    start = max(prefix.rfind("."), prefix.rfind("/")) + 1
    return "+".join([names[0], *(name[start:] for name in names[1:])])


def put_in_place(
    model: ir.Model,
    node: ir.Node,
    body: onnx.FunctionProto,
    *,
    linears: Sequence[ir.Node],
    nodes: Sequence[ir.Node],
    place: ir.Node,
    outputs: Sequence[ir.Value],
) -> None:
    """Replace ``nodes`` of the main graph by ``node``, an operator with this ``body``, where ``place`` stands.

    It is named after the ``linears`` that it computes, and what it makes takes over from ``outputs``, in order.
    Initializers that nothing else uses go.
    """
    node.name = joined([name_of(linear) for linear in linears])
    if all(modules := [linear.metadata_props.get(MODULE_KEY, "") for linear in linears]):
        node.metadata_props[MODULE_KEY] = joined(modules)
    if (
        len(lowered := {linear.metadata_props.get(LOWERED_KEY, "") for linear in linears}) == 1
        and "" not in lowered
    ):
        node.metadata_props[LOWERED_KEY] = lowered.pop()
    for old, new in zip(outputs, node.outputs, strict=True):
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
    before = [value for old in nodes for value in old.inputs if value is not None]
    ir.convenience.replace_nodes_and_values(
        model.graph, place, list(nodes), [node], list(outputs), node.outputs
    )
    for value in dict.fromkeys(before):
        drop_if_unused(value)
    add_function(model, body, VERSION)


def drop_unused_functions(model: ir.Model) -> None:
    """Remove the bodies of operators of ours, and of what unpacks weights, that no node is any more."""
    used = {(node.domain, node.op_type) for graph in all_graphs(model) for node in graph}
    for identifier in list(model.functions):
        if identifier[0] in (DOMAIN, UNPACK_DOMAIN) and identifier[:2] not in used:
            del model.functions[identifier]
