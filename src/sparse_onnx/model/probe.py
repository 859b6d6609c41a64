"""Questions to a graph before it is run: does it need the kernel library, what shapes do its values have in a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import value_names
from sparse_onnx.sparse_ops.domain import DOMAIN

__all__ = ["shapes_in", "uses_library", "with_shape_outputs"]

# In front of a colon and the name of a value: its shape, or an output of the model that begins like one of these.
_SHAPE_OUTPUT = "sparse_onnx.shape"
_OWN_OUTPUT = "sparse_onnx.shape.own"


def uses_library(model: ir.Model) -> bool:
    """True if an operator of the kernel library occurs anywhere in the graph or its subgraphs."""
    return any(node.domain == DOMAIN for node in model.graph.all_nodes())


def with_shape_outputs(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A copy of ``model`` that also tells the shapes of these values of its main graph; see :func:`shapes_in`."""
    probe = model.clone()
    made = [value for node in probe.graph for value in node.outputs]
    values = {value.name: value for value in (*probe.graph.inputs, *made)}
    for value in made:
        if value.is_graph_output() and (value.name or "").startswith(_SHAPE_OUTPUT):
            value.name = f"{_OWN_OUTPUT}:{value.name}"
    kind, taken = _SHAPE_OUTPUT, value_names(probe)
    while any(f"{kind}:{name}" in taken for name in names):
        kind += "_"
    for name in sorted(names):
        node = ir.node("Shape", [values[name]])
        node.outputs[0].name = f"{kind}:{name}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([None])
        probe.graph.append(node)
        probe.graph.outputs.append(node.outputs[0])
    return probe


def shapes_in(outputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """Outputs of a model made by :func:`with_shape_outputs`: those of the model itself, and the shapes by name."""
    own, shapes = dict[str, np.ndarray](), dict[str, tuple[int, ...]]()
    for output, value in outputs.items():
        kind, _, name = output.partition(":")
        if kind.rstrip("_") == _SHAPE_OUTPUT:
            shapes[name] = tuple(int(size) for size in value)
        else:
            own[name if kind == _OWN_OUTPUT else output] = value
    return own, shapes
