"""Lower convolutions with enough zeros to ``SparseConv``.

Before::                                       After::

    h = Conv<...>(X, W, bias)                      Y = sparse_onnx.SparseConvAddRelu<kernel_shape, ..., K, N, ...>(
    s = Add(h, R)                                      X, stored parts of W, bias, R)
    Y = Relu(s)

A convolution and the depthwise one behind it become one operator, ``SparseConvDepthwise``, see
:mod:`sparse_onnx.passes.patterns.depthwise`. Other depthwise convolutions go along where others are lowered, whatever
their zeros: the operator computes them without a panel.

See :mod:`sparse_onnx.passes.lower.lowering` for what is the same for all operators.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import CONVOLUTIONS, find_weights
from sparse_onnx.passes.lower.forms import sparse_form
from sparse_onnx.passes.lower.lowering import Candidate, Lowering, match_layers
from sparse_onnx.passes.patterns.conv import match_conv
from sparse_onnx.passes.patterns.depthwise import join_depthwise

__all__ = ["LowerSparseConv"]


@dataclasses.dataclass(frozen=True)
class LowerSparseConv(Lowering):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-conv"
    kind: ClassVar[str] = "convolution"

    @classmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        weights, declined = find_weights(model, CONVOLUTIONS, depthwise=True)
        shapes = Shapes(model)
        found = match_layers(
            weights, lambda weight, node: match_conv(weight, node, model.graph, shapes), declined
        )
        alike = []
        for weight, layers in found:
            if len({layer.window.group for layer in layers}) > 1:  # blocks are cut to fit the groups
                declined.append((weight.name, "shared by convolutions with different groups"))
            else:
                alike.append((weight, layers))
        forms = (sparse_form(cls),)
        return [
            Candidate(weight, layers, cls.kind, forms) for weight, layers in join_depthwise(alike)
        ], declined
