"""Lower linears whose weights have 8 bits and a scale for each output to products of integers.

::

    Before                                  After

    W = Unpack8(q, scale)                   a, a_scale, a_zero = DynamicQuantizeLinear(X)
    h = MatMul(X, W)                        h = Cast(MatMulInteger(a, q, a_zero)) · (a_scale · scale)

ONNX Runtime makes one operator of these. The weight keeps its numbers; X is rounded to 8 bits with one scale for all of
it, in every run, as by its dynamic quantization: a channel with large values costs the others their accuracy.

Its kernels for processors without VNNI add two products in 16 bits, which saturate if weights use all 8 bits: there,
quantize to 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.integer_grid import IntegerGrid
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.lower.encoded_linear import EncodedForm, LowerProduct, reason_against_bytes
from sparse_onnx.passes.lower.forms import Form

__all__ = ["LowerDynamicInt8"]

_MIDDLE = 128


@dataclasses.dataclass(frozen=True)
class LowerDynamicInt8(LowerProduct):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.dynamic-int8"

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        form = EncodedForm("int8-dynamic", cls, exact=False, activations=8)
        return reason_against_bytes(grid) or form

    @classmethod
    def arrays(cls, grid: IntegerGrid) -> Mapping[str, np.ndarray]:
        """``integers`` int8 [K, N] and ``scales`` float32 [N]."""
        return {
            "integers": (grid.integers.astype(np.int16) - _MIDDLE).astype(np.int8),
            "scales": grid.scale[0],
        }

    @classmethod
    def product(
        cls,
        node: Callable[..., list[ir.Value]],
        x: ir.Value,
        grid: IntegerGrid,
        stored: Mapping[str, ir.Value],
    ) -> ir.Value:
        rounded, scale, zero_point = node("DynamicQuantizeLinear", x, outputs=3)
        (sums,) = node("MatMulInteger", rounded, stored["integers"], zero_point)
        (floats,) = node("Cast", sums, to=int(ir.DataType.FLOAT))
        (factor,) = node("Mul", scale, stored["scales"])
        (y,) = node("Mul", floats, factor)
        return y

    @classmethod
    def exact_twin(cls, model: ir.Model, node: ir.Node) -> None:
        """The integers of X become X itself, with a scale of 1; those of W floats, exactly."""
        graph = node.graph
        if node.op_type != "MatMulInteger" or graph is None:
            return
        rounded, integers, _ = node.inputs
        assert rounded is not None
        maker = rounded.producer()
        assert maker is not None
        widened = ir.node("Cast", [integers], {"to": int(ir.DataType.FLOAT)})
        product = ir.node("MatMul", [maker.inputs[0], widened.outputs[0]])
        graph.insert_before(node, [widened, product])
        node.outputs[0].replace_all_uses_with(product.outputs[0])
        graph.remove(node, safe=True)
        one = ir.node("Constant", [], {"value_float": 1.0})
        graph.insert_before(maker, one)
        maker.outputs[1].replace_all_uses_with(one.outputs[0])
        graph.remove(maker, safe=True)
