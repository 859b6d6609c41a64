"""``fuse.batch-norm``: fold batch normalization into the convolution before it, so that pruning sees the final weight.

Before::                                       After::

    h = Conv(X, W, b)                              Y = Conv(X, W', b')
    Y = BatchNormalization<epsilon>(
        h, gamma, beta, mean, variance)

With s = gamma / √(variance + epsilon), one factor for each output channel: W' = s · W and b' = s · (b − mean) + beta,
computed in float64. Only in inference form, with constant parameters, where nothing else reads h or uses W.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_tensor
from sparse_onnx.model.graph import (
    drop_if_unused,
    input_at,
    is_read_once,
    is_standard,
    name_of,
    new_name,
    producer,
)
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.patterns.match import only_user

__all__ = ["FuseBatchNorm", "fold"]


def fold(
    filters: np.ndarray,
    bias: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(W', b') of the module's formula in the dtype of ``filters`` [N, ...]; all others are [N]."""
    wide = np.float64
    scale = gamma.astype(wide) / np.sqrt(variance.astype(wide) + epsilon)
    scaled = filters * scale.reshape(-1, *[1] * (filters.ndim - 1))
    shifted = scale * (bias.astype(wide) - mean) + beta
    return scaled.astype(filters.dtype), shifted.astype(filters.dtype)


@dataclasses.dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "fuse.batch-norm"
    stage: ClassVar[Stage] = Stage.SCALE  # it scales weights, so it comes before pruning

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        folded = 0
        declined = []
        for graph in model.graphs():
            for node in list(graph):
                conv = producer(input_at(node, 0), "Conv")
                if not is_standard(node, "BatchNormalization") or conv is None:
                    continue
                reason = _obstacle(conv, node)
                if reason is None:
                    _fold(model, conv, node, context)
                    folded += 1
                else:
                    declined.append(self.declined(name_of(node), reason))
        return PassResult(model, folded > 0, {"folded": folded}, tuple(declined))


def _obstacle(conv: ir.Node, norm: ir.Node) -> str | None:
    """Why the two stay as they are, or None."""
    if norm.attributes.get_int("training_mode", 0) or len(norm.outputs) > 1:
        return "is in training form"
    if only_user(conv.outputs[0], "BatchNormalization") is not norm:
        return "is not all that reads the result of its convolution"
    bias = input_at(conv, 2)
    parameters = [conv.inputs[1], *norm.inputs[1:], *([bias] if bias is not None else [])]
    for value in parameters:
        tensor = constant_tensor(value)
        if tensor is None:
            return "has parameters that are not constant"
        if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return f"has dtype {tensor.dtype}"
    weight = conv.inputs[1]
    assert weight is not None
    if not weight.is_initializer():
        return f"follows a convolution whose weight {weight.name} is no initializer"
    if not is_read_once(weight):
        return f"follows a convolution whose weight {weight.name} is used elsewhere too"
    return None


def _fold(model: ir.Model, conv: ir.Node, norm: ir.Node, context: PassContext) -> None:
    weight, bias = conv.inputs[1], input_at(conv, 2)
    assert weight is not None
    filters = _array(weight)
    old = _array(bias) if bias is not None else np.zeros(filters.shape[0], filters.dtype)
    gamma, beta, mean, variance = (_array(value) for value in norm.inputs[1:])
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    scaled, shifted = fold(filters, old, gamma, beta, mean, variance, epsilon)
    assert weight.const_value is not None
    release_mapping(weight.const_value)
    weight.const_value = context.store(scaled, weight.name or "")
    name = new_name(model, f"{weight.name}.bias")
    new = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(shifted.dtype)),
        shape=ir.Shape(shifted.shape),
        const_value=context.store(shifted, name),
    )
    graph = weight.graph
    assert isinstance(graph, ir.Graph)
    graph.register_initializer(new)
    conv.resize_inputs(3)
    conv.replace_input_with(2, new)
    # The convolution now makes the value that the normalization made, under its name.
    h, output = conv.outputs[0], norm.outputs[0]
    h.type, h.shape = output.type, output.shape
    h.metadata_props.update(output.metadata_props)
    output.replace_all_uses_with(h, replace_graph_outputs=True)
    h.name, output.name = output.name, None
    parameters = [bias, *norm.inputs[1:]]
    assert norm.graph is not None
    norm.graph.remove(norm, safe=True)
    for value in parameters:
        if value is not None:
            drop_if_unused(value)


def _array(value: ir.Value | None) -> np.ndarray:
    array = constant_array(value)
    assert array is not None
    return array
