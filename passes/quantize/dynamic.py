"""``quant.dynamic``: int8 weights, and activations rounded to 8 bits in every run, with a scale for every token.

Before: ``Y = MatMul(X, W)`` or ``Gemm(X, W, b)``. After, once for all linears that read X [..., K]::

    low, high = min(X, 0), max(X, 0) over the last axis, [..., 1]
    d = (high - low) / 255, at least 1e-30            the token's scale
    z = Round(-low / d)                               its zero point, a whole number from 0 to 255, float32
    Q = Clip(Round(X / d) + z, 0, 255)                uint8

and for each linear, V int8 [K, N], its scale v [N] float32, and the sums c [N] of V's columns, float32::

    Y = (MatMulInteger(Q, V) - z · c) · (d · v)

`Round` is to the nearest, ties to even. All operators are standard (opset 13), so stock ONNX Runtime runs it; its own
DynamicQuantizeLinear has one scale for the whole tensor, which the loudest token decides. A kernel that takes the place
of these nodes must give the same integers; the sums are exact. A Gemm gives up its bias to an Add.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import drop_if_unused
from sparse_onnx.model.weights import DEFAULT_IGNORE, LINEARS, Selection, Weight
from sparse_onnx.options import require
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.quantize.layers import (
    Builder,
    chosen_layers,
    layers_by_input,
    quantized_weight,
    resolved_bits,
)
from sparse_onnx.passes.solvers.ranges import LEVELS

__all__ = ["Dynamic"]

_AXES_ARE_INPUTS = 18  # the opset from which on reductions take their axes as an input
_SMALLEST = 1e-30  # a scale: of tokens that are all 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(Pass):
    """Quantize weights of linears to int8 and their inputs by token, in every run; needs no data.

    Attributes:
        weight_bits: 8, or 7 for processors that add products of bytes with saturation (AVX2, AVX-512 without VNNI);
            None: what this machine needs.
        targets, ignore: The weights, see :class:`~sparse_onnx.model.weights.Selection`.
    """

    name: ClassVar[str] = "quant.dynamic"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    weight_bits: int | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def check(self) -> None:
        require(self.weight_bits in (None, 7, 8), "weight_bits", self.weight_bits, "7 or 8")
        _ = self.selection

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        weights, left = chosen_layers(model, self.selection, LINEARS)
        bits = resolved_bits(self.weight_bits)
        builder = Builder.of(model, context)
        groups = layers_by_input(weights)
        for value, group in groups:
            _write(builder, value, group, bits)
            context.progress(f"{value.name}: {len(group)} linears with a scale for every token")
        statistics: dict[str, int | float] = {
            "weights": len(weights),
            "inputs": len(groups),
            "weight_bits": bits,
        }
        declined = tuple(self.declined(place, reason) for place, reason in left)
        return PassResult(model, bool(weights), statistics, declined)


def _write(builder: Builder, value: ir.Value, group: tuple[Weight, ...], bits: int) -> None:
    first = builder.first(node for weight in group for node in weight.nodes)
    stem = value.name or "input"
    column = builder.column(value)

    def node(op_type: str, inputs: list[ir.Value], what: str, like: ir.Value | None = column) -> ir.Value:
        dtype = ir.DataType.UINT8 if op_type == "Cast" else ir.DataType.FLOAT
        attributes = {"to": int(dtype)} if op_type == "Cast" else {}
        return builder.node(op_type, inputs, f"{stem}.{what}", first, dtype, like, **attributes)

    def number(what: str, element: float) -> ir.Value:
        return builder.constant(f"{stem}.{what}", np.asarray(element, np.float32))

    zero, top = number("zero", 0), number("top", LEVELS - 1)
    low = node("Min", [_reduced(builder, "ReduceMin", value, first, column), zero], "low")
    high = node("Max", [_reduced(builder, "ReduceMax", value, first, column), zero], "high")
    step = node("Div", [node("Sub", [high, low], "width"), top], "step")
    scale = node("Max", [step, number("smallest", _SMALLEST)], "scale")
    below = node("Div", [low, scale], "below")
    point = node("Neg", [node("Round", [below], "steps_below")], "zero_point")
    steps = node("Round", [node("Div", [value, scale], "ratio", value)], "steps", value)
    moved = node("Add", [steps, point], "moved", value)
    clipped = node("Clip", [moved, zero, top], "clipped", value)
    integers = node("Cast", [clipped], "integers", value)
    for weight in group:
        _write_linear(builder, weight, integers, point, scale, bits)


def _reduced(
    builder: Builder, op_type: str, value: ir.Value, before: ir.Node, column: ir.Value | None
) -> ir.Value:
    name, dtype = f"{value.name}.{op_type}", ir.DataType.FLOAT
    if builder.model.opset_imports[""] < _AXES_ARE_INPUTS:
        return builder.node(op_type, [value], name, before, dtype, column, axes=[-1])
    axes = builder.constant(f"{value.name}.last_axis", np.array([-1], np.int64))
    return builder.node(op_type, [value, axes], name, before, dtype, column)


def _write_linear(
    builder: Builder, weight: Weight, integers: ir.Value, point: ir.Value, scale: ir.Value, bits: int
) -> None:
    quantized = quantized_weight(np.asarray(weight.matrix(), np.float32), bits)
    weight.release()
    name = weight.name
    sums = quantized.integers.sum(axis=0, dtype=np.int64).astype(np.float32)
    total = builder.constant(f"{name}.sums", sums)
    steps = builder.constant(f"{name}.scale", quantized.scale[0])
    matrix = builder.constant(f"{name}.int8", quantized.integers)
    for user in weight.nodes:
        builder.part_bias(user)
        result = user.outputs[0]

        def node(op_type: str, inputs: list[ir.Value], what: str, user: ir.Node = user) -> ir.Value:
            dtype = ir.DataType.INT32 if op_type == "MatMulInteger" else ir.DataType.FLOAT
            attributes = {"to": int(dtype)} if op_type == "Cast" else {}
            return builder.node(op_type, inputs, f"{name}.{what}", user, dtype, user.outputs[0], **attributes)

        product = node("Cast", [node("MatMulInteger", [integers, matrix], "products")], "sum")
        exact = node("Sub", [product, node("Mul", [point, total], "shift")], "moved")
        builder.replace(user, result, node("Mul", [exact, node("Mul", [scale, steps], "steps")], "result"))
    drop_if_unused(weight.value)
