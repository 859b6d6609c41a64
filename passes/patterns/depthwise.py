"""Recognise a convolution with the depthwise one behind it: the first two of an inverted residual block.

``act(DepthwiseConv(act(Conv(X, W) + bias), D) + bias of D)``, where the first has one group and no residual, nothing
else reads its result, both have the same activation with the same limits, and the first is pointwise or has few
inputs: rows that two bands of the kernel both see are computed twice, which must cost little. The maps between the two
are the largest of such a model; as one operator (:mod:`sparse_onnx.sparse_ops.ops.sparse_conv_depthwise`) they are
never written to memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_tensor
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.patterns.conv import Convolution
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY, Layer, count_zeros
from sparse_onnx.passes.patterns.match import users_of
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.sparse_ops.ops.sparse_conv_depthwise import PREFIX, operator_name

__all__ = ["DepthwisePair", "join_depthwise"]

_FEW_INPUTS = 32
"""With so few products for each result, a dense convolution by the sparse kernel is about as fast as any."""


@dataclasses.dataclass(frozen=True)
class DepthwisePair(Layer):
    """A convolution, to which the fields belong, and the depthwise one behind it; ``output`` is that one's."""

    first: Convolution
    second: Convolution

    @property
    def op_type(self) -> str:
        return operator_name(self.activation)

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        return self.first.inputs

    @property
    def constants(self) -> Mapping[str, np.ndarray]:
        weight, bias = self.second.weight, self.second.bias
        n = weight.tensor.shape.numpy()[0]
        tensor = constant_tensor(bias)
        return {
            f"{weight.name}.filters": np.ascontiguousarray(weight.tensor.numpy()).reshape(-1),
            f"{weight.name}.filter_bias": np.zeros(n, np.float32)
            if tensor is None
            else tensor.numpy().reshape(n),
        }

    @property
    def attributes(self) -> Mapping[str, int | float | Sequence[int]]:
        first = {name: value for name, value in self.first.attributes.items() if name != "group"}
        window = self.second.window.attributes()
        return {**first, **{PREFIX + name: value for name, value in window.items() if name != "group"}}

    @functools.cached_property
    def companion(self) -> bool:
        """Whether the first has few inputs and few zeros, as the one that reads an image: the runtime's own would have
        to reorder its result for the sparse layers behind it."""
        zeros, _ = count_zeros(self.weight)
        return self.weight.shape[0] <= _FEW_INPUTS and zeros < MIN_SPARSITY * self.weight.tensor.size

    @property
    def stored_outputs(self) -> Outputs:
        return self.first.stored_outputs

    def products(self, x_shape: tuple[int, ...]) -> int:
        return self.first.products(x_shape)


def join_depthwise(
    found: Sequence[tuple[Weight, tuple[Convolution, ...]]],
) -> list[tuple[Weight, tuple[Convolution | DepthwisePair, ...]]]:
    """Convolutions with their weights, pairs in place of what makes a pair; then no weight is left for the second."""
    by_input = {
        layers[0].inputs[0]: layers[0]
        for _, layers in found
        if len(layers) == 1 and layers[0].companion and layers[0].add is None
    }
    pairs: dict[ir.Value, DepthwisePair] = {}
    for _, layers in found:
        for layer in layers:
            second = by_input.get(layer.output)
            if second is not None and _make_a_pair(layer, second):
                pairs[layer.output] = DepthwisePair(
                    layer.weight,
                    (*layer.nodes, *second.nodes),
                    layer.bias,
                    layer.activation,
                    second.output,
                    layer,
                    second,
                )
    seconds = {pair.second.weight.name for pair in pairs.values()}
    return [
        (weight, tuple(pairs.get(layer.output, layer) for layer in layers))
        for weight, layers in found
        if weight.name not in seconds
    ]


def _make_a_pair(first: Convolution, second: Convolution) -> bool:
    if first.companion or first.add is not None or first.window.group != 1 or first.activation == "none":
        return False
    if (first.activation, first.limits) != (second.activation, second.limits):
        return False
    if any(size > 1 for size in first.window.kernel_shape) and first.weight.shape[0] > _FEW_INPUTS:
        return False
    if len(users_of(first.output)) != 1:
        return False
    return second.window.group == first.weight.shape[1] == second.weight.shape[1]
