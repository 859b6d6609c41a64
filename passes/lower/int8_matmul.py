"""Lower linears whose weights have 8 bits and a scale for each output to our products of integers.

::

    Before                                  After

    W = Unpack8(q, scale)                   Y = sparse_onnx.Int8MatMulGelu<K, N, ...>(X, stored parts of W, bias)
    h = MatMul(X, W)
    b = Add(h, bias)
    Y = Gelu(b)

The weight keeps its numbers; X is rounded to 8 bits in every run, token by token, see
:mod:`sparse_onnx.sparse_ops.ops.int8_matmul`. With ``SparseInt8MatMul`` four neighbouring inputs whose weights for an
output are all zero are neither stored nor multiplied. Which of the two is faster, the guard measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import add_function
from sparse_onnx.model.integer_grid import IntegerGrid, read_grid
from sparse_onnx.model.metadata_keys import LOWERED_KEY
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.encoded_linear import EncodedForm, LowerEncoded, reason_against_bytes
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.lowering import Candidate, Lowerer, PackedTensors, Packer
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.progress import Progress
from sparse_onnx.sparse_ops.domain import VERSION
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.sparse_ops.ops import int8_matmul, sparse_matmul

__all__ = [
    "LowerInt8MatMul",
    "LowerSparseInt8MatMul",
    "SparseInt8Form",
    "pack_bytes",
    "reason_against_inputs",
    "share_of_quads",
]


def share_of_quads(grid: IntegerGrid) -> float:
    """Of the quads of a weight, how many have an integer other than 0."""
    rows = np.arange(0, grid.inputs, 4)
    return float(np.logical_or.reduceat(grid.integers != grid.zero_point, rows, axis=0).mean())


@dataclasses.dataclass(frozen=True)
class SparseInt8Form(EncodedForm):
    """Integers without quads of zeros. ``kept`` is the share of quads that are left, where it is known."""

    kept: float | None = None

    def expected_nbytes(
        self, shape: tuple[int, int], sparsity: float, structure: str, outputs: Outputs
    ) -> float:
        if self.kept is not None:
            return int8_quads.expected_nbytes(shape, self.kept)
        parsed = MaskStructure.parse(structure)
        if parsed.kind == "n:m":
            return int8_quads.expected_nbytes(shape, 1)  # some of nearly every four are kept
        together = parsed.size[1] if parsed.kind == "block" else 1  # inputs that are kept or not as one
        return int8_quads.expected_nbytes(shape, 1 - sparsity ** max(1, 4 / together))


def pack_bytes(
    weight: Weight,
    grid: IntegerGrid | str,
    context: PassContext,
    op_type_of: Callable[[str, bool], str],
    *,
    dense: bool,
) -> PackedTensors:
    """A weight on a ``grid`` of one scale an output, less its zero points int8, for operators that ``op_type_of`` names
    by activation, and whether all quads are stored."""
    assert isinstance(grid, IntegerGrid)
    integers = (grid.integers.astype(np.int16) - grid.zero_point).astype(np.int8)
    pack = int8_quads.pack_dense if dense else int8_quads.pack_quads
    packed = pack(integers, np.ascontiguousarray(grid.scale[0]))
    weight.release()
    tensors = {name: context.store(array, f"{weight.name}.{name}") for name, array in packed.arrays().items()}

    def op_type(base: str) -> str:
        return op_type_of(sparse_matmul.ACTIVATIONS[base], dense)

    return PackedTensors(op_type, tuple(tensors), tensors, packed.attributes())


def reason_against_inputs(grid: IntegerGrid) -> str:
    """Why our products of bytes cannot take so many inputs as ``grid`` has; empty if they can."""
    if grid.inputs > int8_quads.MAX_INPUTS:
        return f"has {grid.inputs} inputs; sums are exact up to {int8_quads.MAX_INPUTS}"
    return ""


@dataclasses.dataclass(frozen=True)
class LowerInt8MatMul(LowerEncoded):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.int8-matmul"
    dense: ClassVar[bool] = True

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        return reason_against_bytes(grid) or reason_against_inputs(grid) or cls._form()

    @classmethod
    def _form(cls) -> Form:
        return EncodedForm("int8-token", cls, exact=False, activations=8, by_token=True)

    @classmethod
    def exact_twin(cls, model: ir.Model, node: ir.Node) -> None:
        """The same operator in float32, by a function of its own."""
        node.domain = int8_matmul.EXACT_DOMAIN
        add_function(model, int8_matmul.exact_body(node.op_type, model.opset_imports[""]), VERSION)

    def put(
        self, model: ir.Model, candidates: Sequence[Candidate], packer: Packer, context: PassContext
    ) -> None:
        packing = Progress(context.progress, f"packing for {self.name}", len(candidates))
        lowerer = Lowerer(model, context)
        for candidate in candidates:
            weight = candidate.weight
            packed = pack_bytes(weight, self.read(weight), context, int8_matmul.op_type_of, dense=self.dense)
            for node in lowerer.lower(candidate, packed):
                node.metadata_props[LOWERED_KEY] = self.name
            packing.step()
        for op_type in sorted(lowerer.op_types):
            add_function(model, int8_matmul.function_body(op_type, model.opset_imports[""]), VERSION)


@dataclasses.dataclass(frozen=True)
class LowerSparseInt8MatMul(LowerInt8MatMul):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-int8-matmul"
    dense: ClassVar[bool] = False

    @classmethod
    def layout(cls, candidate: Candidate, form: Form, packer: Packer) -> Mapping[str, int | str]:
        """Equal shares of zeros leave more or fewer quads, by their pattern."""
        grid = read_grid(candidate.weight)
        assert isinstance(grid, IntegerGrid)
        share = share_of_quads(grid)
        candidate.weight.release()
        return {**super().layout(candidate, form, packer), "quads": f"{share:.2f}"}

    @classmethod
    def _form(cls) -> Form:
        return SparseInt8Form(
            "int8-quads", cls, exact=False, least_zeros=MIN_SPARSITY, activations=8, by_token=True
        )
