"""``quant.open-blocks``: products with weights in packed blocks become products with weights that nodes unpack.

::

    Before                                             After

    Y = com.microsoft.MatMulNBits<bits = 4, ...>(      W = Unpack4(q, scale)
        X, B, scales, zero_points, , bias)             h = MatMul(X, W)
                                                       Y = Add(h, bias)

onnxruntime-genai's model builder and ONNX Runtime's quantizer write weights of 4 and 8 bits like this. Behind it they
are weights like all others: pruned on their grid, and lowered to whatever form is fastest, ``MatMulNBits`` among them.
The compiler runs it only where other arithmetic than that of floats is allowed, since the operator rounds activations.

The integers stay. Scales become positive (x = (q - z) · s = ((m - q) - (m - z)) · -s, m being the largest integer) and
float16, as our formats have them, which moves a weight by at most 2^-11 of itself; where that does not hold they stay
float32. Weights that are to be stored with other ``bits``, of those that ``targets`` and ``ignore`` choose, become
floats.

Conditions: nothing but such products reads the weight, its scales are finite, and it has 4 or 8 bits.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import drop_if_unused, input_at, name_of, new_name
from sparse_onnx.model.nbits import PackedBlocks
from sparse_onnx.model.weights import DEFAULT_IGNORE, Selection, Weight, find_weights
from sparse_onnx.options import require
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.quantize.encode import write_quantized
from sparse_onnx.passes.solvers.grid import GridOptions, QuantizedMatrix, ScaleType

__all__ = ["OpenBlocks"]

_BITS = (4, 8)
_LONGEST = 256
"""Inputs that may share a scale behind this pass."""
_BIAS = 5
_HALF = 2.0**-11


@dataclasses.dataclass(frozen=True)
class OpenBlocks(Pass):
    """See the module's docstring. ``bits`` are those that the chosen weights are to be stored with; 0: as many as they
    have."""

    name: ClassVar[str] = "quant.open-blocks"
    stage: ClassVar[Stage] = Stage.SCALE  # the grid is written anew, so it comes before pruning

    bits: int = 0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def check(self) -> None:
        require(0 <= self.bits <= 8, "bits", self.bits, "0 to 8")
        _ = self.selection

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        declined: list[Declined] = []
        opened = floats = 0
        for weight in find_weights(model, encoded=True)[0]:
            if not isinstance(weight.encoding, PackedBlocks):
                continue
            found = _read(weight, weight.encoding)
            weight.release()
            if isinstance(found, str):
                declined.append(self.declined(weight.name, found))
                continue
            other = self.bits not in (0, found.options.bits)
            anew = other and self.selection.reason_against(weight) is None
            dense = _as_products(model, weight, found)
            write_quantized(model, dense, found, "float" if anew else "unpack", context.store)
            opened += 1
            floats += anew
        return PassResult(model, opened > 0, {"weights": opened, "floats": floats}, tuple(declined))


def _read(weight: Weight, blocks: PackedBlocks) -> QuantizedMatrix | str:
    """The integers of ``weight`` [K, N] with positive scales, or the reason why it stays as it is."""
    if blocks.bits not in _BITS:
        return f"has {blocks.bits} bits; what is made of products here has 4 or 8"
    scale, zero_point = blocks.by_block()
    scale = np.asarray(scale, np.float32)
    if not np.isfinite(scale).all():
        return "has a scale that is NaN or Inf"
    integers, most, size = blocks.integers(weight.tensor.numpy()), (1 << blocks.bits) - 1, blocks.block_size
    by_input = np.arange(blocks.inputs) // size
    # Where the scale is 0 all values are, whatever the integers.
    integers = np.where((scale == 0)[:, by_input], zero_point[:, by_input], integers)
    turned = scale < 0
    integers = np.where(turned[:, by_input], most - integers, integers)
    zero_point = np.where(turned, most - zero_point, zero_point)
    scale = np.where(scale == 0, np.float32(1), abs(scale))
    if size > _LONGEST:
        parts = np.arange(0, blocks.inputs, _LONGEST) // size
        scale, zero_point, size = scale[:, parts], zero_point[:, parts], _LONGEST
    middle = 1 << blocks.bits - 1
    symmetric = bool((zero_point == middle).all())
    shift, dtype = (middle, np.int8) if symmetric else (0, np.uint8)
    integers, zero_point = (
        np.ascontiguousarray((part.astype(np.int16) - shift).astype(dtype).T)
        for part in (integers, zero_point)
    )
    scale_type, scale = _stored(scale)
    options = GridOptions(blocks.bits, size, symmetric, scale_type)
    return QuantizedMatrix(integers, np.ascontiguousarray(scale.T), zero_point, options)


def _stored(scale: np.ndarray) -> tuple[ScaleType, np.ndarray]:
    """The type that scales are stored in, and what they then are."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16).astype(np.float32)
    fits = bool((abs(half - scale) <= _HALF * scale).all())
    return ("float16", half) if fits else ("float32", scale)


def _as_products(model: ir.Model, weight: Weight, found: QuantizedMatrix) -> Weight:
    """``weight`` as one of floats, which are not computed yet, of products that take the place of those of
    ``model``."""
    value, dtype, shape = weight.value, weight.dtype, ir.Shape(weight.shape)
    grids = [other for node in weight.nodes for other in node.inputs[2:4] if other is not None]
    value.const_value = ir.LazyTensor(lambda: ir.tensor(found.matrix().astype(dtype.numpy())), dtype, shape)
    value.type, value.shape = ir.TensorType(dtype), shape
    nodes = tuple(_as_product(model, node, value) for node in weight.nodes)
    for grid in grids:
        drop_if_unused(grid)
    return Weight(value, nodes, transposed=False)


def _as_product(model: ir.Model, node: ir.Node, value: ir.Value) -> ir.Node:
    output, bias = node.outputs[0], input_at(node, _BIAS)
    product = ir.node("MatMul", [node.inputs[0], value], name=node.name)
    made = [product]
    if bias is not None:
        product.outputs[0].name = new_name(model, f"{output.name}.product")
        made.append(ir.node("Add", [product.outputs[0], bias], name=f"{name_of(node)}.bias"))
    for one in made:
        one.metadata_props.update(node.metadata_props)
    new = made[-1].outputs[0]
    new.type, new.shape, new.doc_string = output.type, output.shape, output.doc_string
    new.metadata_props.update(output.metadata_props)
    assert node.graph is not None
    node.graph.insert_before(node, made)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    output.name, new.name = None, output.name
    node.graph.remove(node, safe=True)
    return product
