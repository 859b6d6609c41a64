"""What passes share that join operators with compressed weights: reading their nodes, and joined nodes' names."""

from __future__ import annotations

import os.path
from collections.abc import Collection, Sequence

import onnx_ir as ir

from sparse_onnx.graph import all_graphs
from sparse_onnx.metadata_keys import MODULE_KEY
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN, PackedWeight

__all__ = [
    "drop_unused_functions",
    "is_sparse",
    "joined",
    "node_name",
    "note_module",
    "outputs_of",
    "stored_tensor",
    "stored_weight",
    "weight_problem",
]


def is_sparse(node: ir.Node, op_types: Collection[str]) -> bool:
    """Whether ``node`` is one of these operators of ours."""
    return node.domain == DOMAIN and node.op_type in op_types


def node_name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or "?"


def outputs_of(node: ir.Node) -> int:
    """N: columns of the stored weight."""
    return node.attributes.get_int("N", 0)


def weight_problem(node: ir.Node) -> str | None:
    """Why the stored weight of ``node`` cannot become a part of another node."""
    for value in node.inputs[1:6]:
        if value is None or value.const_value is None or value.is_graph_input():
            return "has a weight that is no constant"
    if any(len(value.uses()) > 1 for value in node.inputs[1:5] if value is not None):
        return "shares its weight with another node"
    return None


def stored_weight(node: ir.Node) -> PackedWeight:
    K, N, chunk, block, width = (
        node.attributes.get_int(name, 0) for name in ("K", "N", "chunk", "block", "width")
    )
    values, offsets, counts, rows = (stored_tensor(node, index).numpy() for index in range(1, 5))
    return PackedWeight(K, N, chunk, block, width, values, offsets, counts, rows)


def stored_tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    """Constant input ``index``: 1 to 4 are the weight, 5 is the bias."""
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def joined(names: Sequence[str]) -> str:
    """One name for things with these: ``a.b.q``, ``a.b.k`` are ``a.b.q+k``."""
    prefix = os.path.commonprefix(names)  # noqa: RUF071  # of characters: names are no paths of files
    start = max(prefix.rfind("."), prefix.rfind("/")) + 1
    return "+".join([names[0], *(name[start:] for name in names[1:])])


def note_module(node: ir.Node, parts: Sequence[ir.Node]) -> None:
    """Give ``node`` the modules of its ``parts``, where all have one."""
    if all(modules := [part.metadata_props.get(MODULE_KEY, "") for part in parts]):
        node.metadata_props[MODULE_KEY] = joined(modules)


def drop_unused_functions(model: ir.Model, op_types: Collection[str]) -> None:
    """Remove the bodies of those operators of ours that no node is any more."""
    used = {node.op_type for graph in all_graphs(model) for node in graph if node.domain == DOMAIN}
    for identifier in list(model.functions):
        domain, op_type, _ = identifier
        if domain == DOMAIN and op_type in op_types and op_type not in used:
            del model.functions[identifier]
