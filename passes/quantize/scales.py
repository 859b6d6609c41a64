"""Scales of the inputs of linears, moved into what makes these inputs; the model computes the same.

For linears that alone read X, whose weights are W [K, N], and s [K] > 0::

    X W = (X / s)(s W)

s W replaces W, and 1 / s goes into constants in front, by what makes X:

    Y = Norm(.., gamma, beta)                gamma / s and beta / s: layer and RMS normalization
    X = h, X = Relu(h), X = Mul(gate, h)     h a linear U with bias b, read by nothing else: U's columns / s and b / s
    X = attention's result                   the same of the linear that makes the values, each channel with its own

Where X has other users the s would reach them, and it stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array
from sparse_onnx.model.graph import drop_if_unused, input_at, is_read_once, is_read_outside, producer
from sparse_onnx.model.metadata_keys import RESCALED_KEY
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import LINEARS, Weight, find_weights
from sparse_onnx.passes.patterns.attention import is_attention, match_attention
from sparse_onnx.passes.patterns.match import is_bias, is_scaled, other_operand
from sparse_onnx.passes.patterns.normalization import Normalization, match_normalization
from sparse_onnx.passes.quantize.layers import Builder, layers_by_input

__all__ = ["ScaledInput", "scaled_inputs"]


def scaled_inputs(
    model: ir.Model, weights: Iterable[Weight]
) -> tuple[list[ScaledInput], list[tuple[str, str]]]:
    """The inputs of the linears ``weights`` (those that :func:`reason_against_integers` has nothing against) that can
    have scales, and (place, reason) of the linears whose input cannot."""
    makers, found, declined = _Makers(model), list[ScaledInput](), list[tuple[str, str]]()
    for value, group in layers_by_input([*weights]):
        source = makers.of(value, group)
        if isinstance(source, str):
            declined += [(weight.name, source) for weight in group]
        else:
            found.append(ScaledInput(value, group, source))
    return found, declined


@dataclasses.dataclass(frozen=True)
class ScaledInput:
    """An input ``value`` [.., K] of linears, all of its readers, whose maker can take scales."""

    value: ir.Value
    weights: tuple[Weight, ...]
    source: Source

    def matrix(self) -> np.ndarray:
        """The weights side by side: [K, all of their outputs], float32."""
        matrix = np.concatenate([weight.matrix() for weight in self.weights], axis=1)
        for weight in self.weights:
            weight.release()
        return matrix

    def divide(self, builder: Builder, scale: np.ndarray) -> None:
        """Divide the input by ``scale`` [K] float32, positive, and multiply the weights by it."""
        for weight in self.weights:
            _multiply(builder, weight, scale[:, None])
        self.source.divide(builder, scale)


@dataclasses.dataclass(frozen=True)
class Source:
    """What makes a value: constants [K], each an input of a node, and the linear whose output channels they are, if
    any. All of them get 1 / s."""

    constants: tuple[tuple[ir.Node, int], ...]
    weight: Weight | None = None

    def divide(self, builder: Builder, scale: np.ndarray) -> None:
        """Divide all of it by ``scale`` [K]."""
        if self.weight is not None:
            _multiply(builder, self.weight, 1 / scale)
        for node, index in self.constants:
            old = node.inputs[index]
            array = constant_array(old)
            assert old is not None
            assert array is not None
            new = builder.constant(f"{old.name}.smoothed", (array / scale).astype(np.float32))
            node.replace_input_with(index, new)
            drop_if_unused(old)


def _multiply(builder: Builder, weight: Weight, factor: np.ndarray) -> None:
    changed = weight.stored((weight.matrix() * factor).astype(np.float32))
    weight.release()
    weight.value.const_value = builder.context.store(changed, weight.name)
    weight.value.metadata_props[RESCALED_KEY] = "true"


class _Makers:
    """What makes the values of ``model``: normalizations, attentions, and linears that one node has."""

    def __init__(self, model: ir.Model) -> None:
        shapes = Shapes(model)
        self._norms: dict[int, Normalization] = {}
        self._values: dict[int, ir.Value] = {}  # of attentions, by the id of their result
        for node in model.graph:
            norm = match_normalization(node, shapes)
            if isinstance(norm, Normalization):
                self._norms[id(norm.output)] = norm
            if not is_attention(node):
                continue
            attention = match_attention(node, shapes)
            if not isinstance(attention, str) and not attention.split and attention.split_to is None:
                self._values[id(attention.output)] = attention.v
        weights, _ = find_weights(model, LINEARS)
        self._linears = {id(weight.nodes[0]): weight for weight in weights if len(weight.nodes) == 1}

    def of(self, value: ir.Value, group: Sequence[Weight]) -> Source | str:
        """What makes ``value``, or why nothing there can take 1 / s."""
        if is_read_outside(value, [node for weight in group for node in weight.nodes]):
            return "its input has other users"
        norm = self._norms.get(id(value))
        if norm is not None:
            return Source(tuple(_uses(norm, constant) for constant in (norm.gamma, norm.beta) if constant))
        h = self._values.get(id(value), value)
        if (relu := producer(h, "Relu")) is not None and relu.inputs[0] is not None:
            h = relu.inputs[0]
        elif (product := producer(h, "Mul")) is not None:
            factors = [self._linear(factor) for factor in product.inputs]
            return next(
                (factor for factor in factors if factor is not None), "no linear is a factor of its input"
            )
        source = self._linear(h)
        return "nothing in front of it can take the scale" if source is None else source

    def _linear(self, h: ir.Value | None) -> Source | None:
        """The linear, with its bias, whose result h is, if nothing else reads that."""
        if h is None or not is_read_once(h):
            return None
        node, constants = producer(h), []
        add = producer(h, "Add")
        if add is not None:
            for operand in add.inputs:
                bias = other_operand(add, operand) if operand is not None else None
                product = producer(operand, *LINEARS)
                if product is not None and operand is not None and is_read_once(operand):
                    weight = self._linears.get(id(product))
                    if weight is not None and is_bias(bias, weight.shape[1]):
                        node = product
                        constants.append((add, list(add.inputs).index(bias)))
                        break
        weight = None if node is None else self._linears.get(id(node))
        if node is None or weight is None or weight.tensor.dtype != ir.DataType.FLOAT:
            return None
        own = input_at(node, 2)
        if node.op_type == "Gemm" and (
            is_scaled(node) or (own is not None and not is_bias(own, weight.shape[1]))
        ):
            return None
        if own is not None:
            constants.append((node, 2))
        return Source(tuple(constants), weight)


def _uses(norm: Normalization, constant: ir.Value) -> tuple[ir.Node, int]:
    return next(
        (node, index) for node in norm.nodes for index, value in enumerate(node.inputs) if value is constant
    )
