"""Lower linears with weights of 4 or 8 bits and zeros among them to ``SparseMatMulInt*``: for few tokens.

::

    Before                                  After

    W = Unpack4(q, scale)                   h = sparse_onnx.SparseMatMulInt4<K, N, group, format>(
    h = MatMul(X, W)                            X, masks, values, scales)

Zeros are not stored, the weight keeps its numbers, and the operator rounds each group of inputs of every token to 8
bits. The masks are bitmaps, which take any pattern of zeros, or positions within 16 inputs where the weight was pruned
to keep some of these (``4:16``, ``2:8``). Scales must be float16, as ``quant.weight`` has them.

See :mod:`sparse_onnx.sparse_ops.formats.nbits` and :mod:`sparse_onnx.sparse_ops.ops.sparse_matmul_nbits`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import add_function
from sparse_onnx.model.integer_grid import IntegerGrid
from sparse_onnx.model.metadata_keys import LOWERED_KEY, STRUCTURE_KEY
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.encoded_linear import LowerProduct
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.sparse_ops.formats.nbits import LAYOUTS, Layout, fits_half, kept_of, most_of_16, pack
from sparse_onnx.sparse_ops.ops.sparse_matmul_nbits import exact_body, function_body, op_type_of

__all__ = ["LowerPositions", "LowerSparseIntegers"]

_FEW_ZEROS = 0.25
"""Below, a bitmap of 4 bits saves nothing."""
_MOST_OF_16 = 8
"""With more, positions take more than all integers."""
_LARGEST_GROUP = 128


@dataclasses.dataclass(frozen=True)
class SparseIntegerForm(Form):
    """Integers that are not zero, in a ``layout``; ``group`` inputs share a float16 scale. Where positions are stored,
    ``kept`` of 16 are."""

    layout: Layout = LAYOUTS["bitmap4"]
    group: int = _LARGEST_GROUP
    kept: int = 0

    def expected_nbytes(
        self, shape: tuple[int, int], sparsity: float, structure: str, outputs: Outputs
    ) -> float:
        """Without scales."""
        size = shape[0] * shape[1]
        if self.layout.masks:
            return size * (1 / 8 + (1 - sparsity) * self.layout.bits / 8)
        return size * (_of_16(structure) or 16) / 16

    def scale_nbytes(self, shape: tuple[int, int]) -> float:
        return 2.0 * -(-shape[0] // self.group) * shape[1]


@dataclasses.dataclass(frozen=True)
class _LowerNBits(LowerProduct):
    """What both have in common."""

    @classmethod
    @abc.abstractmethod
    def layout_of(cls, grid: IntegerGrid) -> Layout | None:
        """How the integers of a grid are stored; None: they are not."""

    @classmethod
    def arrays(cls, grid: IntegerGrid) -> Mapping[str, np.ndarray]:
        group, layout = _group(grid), cls._layout(grid)
        groups = np.arange(0, grid.inputs, group) // grid.group_size
        zero_point = grid.zero_point[groups]
        levels = grid.integers.astype(np.int16) - zero_point[np.arange(grid.inputs) // group]
        return pack(levels, grid.scale[groups], group, layout, zero_point).arrays()

    @classmethod
    def _layout(cls, grid: IntegerGrid) -> Layout:
        layout = cls.layout_of(grid)
        assert layout is not None
        return layout

    @classmethod
    def product(
        cls,
        node: Callable[..., list[ir.Value]],
        x: ir.Value,
        grid: IntegerGrid,
        stored: Mapping[str, ir.Value],
    ) -> ir.Value:
        layout, group = cls._layout(grid), _group(grid)
        values = stored["values"].const_value
        assert values is not None
        sizes = {"K": grid.inputs, "N": grid.scale.shape[1], "group": group}
        if not layout.masks:
            sizes["kept"] = kept_of(sizes["K"], sizes["N"], values.size)
        (y,) = node(op_type_of(layout), x, *stored.values(), domain=DOMAIN, **sizes, format=layout.name)
        return y

    def put(
        self, model: ir.Model, candidates: Sequence[Candidate], packer: Packer, context: PassContext
    ) -> None:
        super().put(model, candidates, packer, context)
        if not candidates:
            return
        lowered = [node for node in model.graph if node.metadata_props.get(LOWERED_KEY) == self.name]
        made = {
            node.op_type for node in lowered if node.domain == DOMAIN
        }  # a bias is added by a standard one
        for op_type in sorted(made):
            add_function(model, function_body(op_type, model.opset_imports[""]), VERSION)

    @classmethod
    def exact_twin(cls, model: ir.Model, node: ir.Node) -> None:
        if node.domain != DOMAIN:
            return
        body = exact_body(node.op_type, model.opset_imports[""])
        add_function(model, body, VERSION)
        node.op_type = body.name


@dataclasses.dataclass(frozen=True)
class LowerSparseIntegers(_LowerNBits):
    """See the module's docstring: bitmaps."""

    name: ClassVar[str] = "lower.sparse-integers"

    @classmethod
    def layout_of(cls, grid: IntegerGrid) -> Layout | None:
        four = LAYOUTS["bitmap4" if grid.symmetric else "bitmap4_zeros"]
        return {4: four, 8: LAYOUTS["bitmap8"]}.get(grid.bits)

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        layout = cls.layout_of(grid)
        if layout is None:
            return f"has {grid.bits} bits, not 4 or 8"
        return _unfit(grid, layout) or SparseIntegerForm(
            f"int{grid.bits}-bitmap",
            cls,
            exact=False,
            least_zeros=_FEW_ZEROS,
            bits=grid.bits,
            layout=layout,
            group=_group(grid),
        )


@dataclasses.dataclass(frozen=True)
class LowerPositions(_LowerNBits):
    """See the module's docstring: positions within 16 inputs."""

    name: ClassVar[str] = "lower.sparse-positions"

    @classmethod
    def layout_of(cls, grid: IntegerGrid) -> Layout | None:
        return LAYOUTS["n_of_16"] if grid.bits == 4 else None

    @classmethod
    def layout(cls, candidate: Candidate, form: Form, packer: Packer) -> Mapping[str, int | str]:
        assert isinstance(form, SparseIntegerForm)
        return {**super().layout(candidate, form, packer), "kept": form.kept}

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        layout = cls.layout_of(grid)
        if layout is None:
            return f"has {grid.bits} bits, not 4"
        kept = _of_16(weight.value.metadata_props.get(STRUCTURE_KEY, "unstructured"))
        if kept is None:
            return f"keeps no {_MOST_OF_16} or fewer of 16 inputs by its pattern"
        if reason := _unfit(grid, layout):
            return reason
        if (most := most_of_16(grid.integers != grid.zero_point[0, 0])) > kept:
            return f"keeps {most} of 16 inputs, although its pattern says {kept}"
        return SparseIntegerForm(
            "int4-of-16",
            cls,
            exact=False,
            least_zeros=1 - _MOST_OF_16 / 16,
            bits=grid.bits,
            layout=layout,
            group=_group(grid),
            kept=most,
        )


def _of_16(structure: str) -> int | None:
    """How many of 16 inputs are kept at most by a pattern of zeros; None: it does not say, or too many."""
    parsed = MaskStructure.parse(structure)
    keep, of = parsed.size
    if parsed.kind != "n:m" or 16 % of or keep * 16 > of * _MOST_OF_16:
        return None
    return keep * 16 // of


def _unfit(grid: IntegerGrid, layout: Layout) -> str:
    """Why the layout cannot hold the weight; empty if it can."""
    if not grid.symmetric and not layout.zeros:
        return "has zero points"
    group = _group(grid)
    if group not in layout.groups:
        return (
            f"has groups of {grid.group_size}, which cannot be cut into {min(layout.groups)} inputs or more"
        )
    return "" if fits_half(grid.scale) else "has scales that are no float16"


def _group(grid: IntegerGrid) -> int:
    """The inputs that share a scale in the operator, a power of 2."""
    if grid.group_size >= grid.inputs:
        return _LARGEST_GROUP
    return min(grid.group_size & -grid.group_size, _LARGEST_GROUP)
