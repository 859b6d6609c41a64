"""A digest of a model: equal models, equal digests, wherever their files lie."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import all_graphs
from sparse_onnx.model.model_io import release_mapping

__all__ = ["model_digest"]


def model_digest(model: ir.Model) -> str:
    """SHA-256 over the nodes, the names of values and the bytes of all weights, without docstrings and metadata."""
    digest = hashlib.sha256()

    def text(*parts: object) -> None:
        digest.update("\0".join(map(str, parts)).encode() + b"\n")

    text(*sorted(model.opset_imports.items()))
    for graph in all_graphs(model):
        text("graph", *(value.name for value in graph.inputs), "->", *(value.name for value in graph.outputs))
        for name, value in graph.initializers.items():
            text("initializer", name)
            _add_tensor(digest, value.const_value)
        for node in graph:
            text(node.domain, node.op_type, *(v.name if v is not None else "" for v in node.inputs))
            text("->", *(value.name for value in node.outputs))
            for key, attribute in sorted(node.attributes.items()):
                text(key, attribute.type)
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    _add_tensor(digest, attribute.as_tensor())
                elif attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                    text(attribute.ref_attr_name if attribute.is_ref() else attribute.value)
    return digest.hexdigest()


def _add_tensor(digest: hashlib._Hash, tensor: ir.TensorProtocol | None) -> None:
    if tensor is None:
        return
    digest.update(f"{tensor.dtype} {tensor.shape};".encode())
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
        digest.update(repr(tensor.numpy().tolist()).encode())
    else:
        array = np.ascontiguousarray(tensor.numpy()).reshape(-1)
        digest.update(array.view(np.uint8).data)
        del array
    release_mapping(tensor)
