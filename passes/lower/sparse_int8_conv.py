"""Lower convolutions of integers, as quantizers write them, to ``SparseInt8Conv``: the arithmetic of the graph itself.

::

    Before                                          After

    x = DequantizeLinear(q)                         p = sparse_onnx.SparseInt8Conv<kernel_shape, ..., K, N, ..., grids>(
    W = DequantizeLinear(v)                                 q, stored parts of v, bias)
    h = Conv<...>(x, W, bias)
    p = QuantizeLinear(Relu(h))

The result is what ONNX Runtime's own convolution of integers makes of it, integer by integer: sums are exact, and
rounded once. Four neighbouring channels whose weights for an output are all zero at a place of the window are neither
stored nor multiplied. Against ONNX Runtime's, the guard measures it.

See :mod:`sparse_onnx.sparse_ops.ops.int8_conv`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import add_function
from sparse_onnx.model.integer_grid import IntegerGrid, read_grid
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import CONVOLUTIONS, Weight
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.encoded_linear import LowerEncoded
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.int8_matmul import SparseInt8Form
from sparse_onnx.passes.lower.lowering import Candidate, Lowerer, PackedTensors, Packer
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY, Layer
from sparse_onnx.passes.patterns.q_conv import QConvolution, match_q_conv
from sparse_onnx.progress import Progress
from sparse_onnx.sparse_ops.domain import VERSION
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.ops import int8_conv

__all__ = ["LowerSparseInt8Conv"]

_MIDDLE = 128


@dataclasses.dataclass(frozen=True)
class LowerSparseInt8Conv(LowerEncoded):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-int8-conv"
    kind: ClassVar[str] = "convolution"
    op_types: ClassVar[tuple[str, ...]] = CONVOLUTIONS

    @classmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        candidates, declined = super().find_candidates(model)
        alike = []
        for candidate in candidates:
            if len({_group(layer) for layer in candidate.layers}) > 1:  # blocks are cut to fit the groups
                declined.append((candidate.weight.name, "shared by convolutions with different groups"))
            else:
                alike.append(candidate)
        return alike, declined

    @classmethod
    def match(cls, weight: Weight, node: ir.Node, graph: ir.Graph, shapes: Shapes) -> Layer | str:
        return match_q_conv(weight, node, graph, shapes)

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        matrix = int8_conv.matrix_of(_filters(weight, grid))
        inputs = len(matrix)
        if inputs > int8_quads.MAX_INPUTS:
            return f"has {inputs} inputs; sums are exact up to {int8_quads.MAX_INPUTS}"
        kept = float(matrix.reshape(inputs // 4, 4, -1).any(axis=1).mean())
        return SparseInt8Form("int8-given-quads", cls, least_zeros=MIN_SPARSITY, kept=kept)

    @classmethod
    def exact_twin(cls, model: ir.Model, node: ir.Node) -> None:
        """Nothing: the graph itself rounds the input."""

    @classmethod
    def layout(cls, candidate: Candidate, form: Form, packer: Packer) -> Mapping[str, int | str]:
        """Equal shares of zeros leave more or fewer quads, by their pattern."""
        assert isinstance(form, SparseInt8Form)
        return {**super().layout(candidate, form, packer), "quads": f"{form.kept:.2f}"}

    def put(
        self, model: ir.Model, candidates: Sequence[Candidate], packer: Packer, context: PassContext
    ) -> None:
        packing = Progress(context.progress, f"packing for {self.name}", len(candidates))
        lowerer = Lowerer(model, context)
        for candidate in candidates:
            lowerer.lower(candidate, _packed(candidate, context))
            packing.step()
        for op_type in sorted(lowerer.op_types):
            add_function(model, int8_conv.function_body(op_type, model.opset_imports[""]), VERSION)


def _group(layer: Layer) -> int:
    assert isinstance(layer, QConvolution)
    return layer.window.group


def _filters(weight: Weight, grid: IntegerGrid) -> np.ndarray:
    """int8 [N, C / group, window...]"""
    integers = (grid.integers.astype(np.int16) - _MIDDLE).astype(np.int8)
    return np.ascontiguousarray(integers.T).reshape(weight.dims)


def _packed(candidate: Candidate, context: PassContext) -> PackedTensors:
    weight = candidate.weight
    grid = read_grid(weight)
    assert isinstance(grid, IntegerGrid)
    scales = np.ascontiguousarray(grid.scale[0])
    packed = int8_conv.pack(_filters(weight, grid), scales, _group(candidate.layers[0]))
    weight.release()
    tensors = {name: context.store(array, f"{weight.name}.{name}") for name, array in packed.arrays().items()}
    return PackedTensors(lambda op_type: op_type, tuple(tensors), tensors, packed.attributes())
