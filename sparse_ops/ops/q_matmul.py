"""``QMatMul`` and ``SparseQMatMul``: ``Y = act(grid(X · W) + bias)`` of an X that is rounded to 8 bits already.

Signatures (domain ``sparse_onnx``, version 1). Of every operator of :mod:`.sparse_matmul` and
:mod:`.sparse_matmul_split` there are two op types, with a word in the place of ``Sparse``::

    QMatMul*<K, N, ..., format, grids>(X, ..., bias, x_scale, x_zero_point) -> Y        all weights are stored
    SparseQMatMul*<K, N, ..., format, grids>(X, ..., bias, x_scale, x_zero_point) -> Y  quads without a weight are not

    QMatMulSplit3<K, N, ..., format, grids, split>(X, ..., bias, x_scale, x_zero_point) -> Y0, Y1, Y2     and so on

============  =============  ==============  =======================================================================
name          dtype          shape           meaning
============  =============  ==============  =======================================================================
X             uint8 or int8  [..., K]        rank >= 1; an element stands for (element - x_zero_point) · x_scale
...                                          the parts and sizes of W, see :mod:`..formats.int8_quads`
bias          float32        [N]             zeros where the layer has none
x_scale       float32        [] or [1]       constant, or computed in every run, as is
x_zero_point  as X           [] or [1]
Y             float32        [..., N]        as those of the operator on floats; several linears in one weight have
                                             whole blocks of outputs, but for the last
============  =============  ==============  =======================================================================

The attributes ``grids`` are the lowest number that X may have, which tells its type, and a grid for products that are
rounded before the bias is added::

    x_lowest                  int, 0 or -128
    h_scale                   float: 0, or at least 1e-30
    h_low, h_high             ints, -65535 <= h_low <= h_high <= 65535: how many steps of h_scale there are

    h = ((X · V) - x_zero_point · sum(V)) · x_scale · scales
    g = min(max(Round(h · (1 / h_scale)), h_low), h_high) · h_scale, or h itself where h_scale is 0
    H = g + bias

That is what ``QuantizeLinear``, of a zero point z in low..high, and ``DequantizeLinear`` make of h, with z less in both
bounds. `Round` is to the nearest, ties to even; the difference in the outer brackets is exact. All kernels and the body
in standard operators give the same integers, whatever the processor.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.formats.int8_quads import Int8Weight
from sparse_onnx.sparse_ops.ops import sparse_matmul
from sparse_onnx.sparse_ops.ops.base import BIAS, Operator
from sparse_onnx.sparse_ops.ops.int8_matmul import BASES, CORRECTED, PRODUCTS, OfBytes, ending

__all__ = [
    "OPERATOR",
    "OP_TYPES",
    "X_SCALE",
    "X_ZERO_POINT",
    "Grids",
    "function_body",
    "op_type_of",
    "reference",
]

X_SCALE, X_ZERO_POINT = "x_scale", "x_zero_point"
"""The inputs behind the bias."""


@dataclasses.dataclass(frozen=True)
class Grids:
    """The attributes of an operator that describe no weight; see the module's docstring."""

    x_lowest: int = 0
    h_scale: float = 0.0
    h_low: int = 0
    h_high: int = 0

    def attributes(self) -> dict[str, int | float]:
        """By name, in order."""
        return dataclasses.asdict(self)


def op_type_of(base: str, dense: bool) -> str:
    """The op type that does what ``base``, one of :data:`.int8_matmul.BASES`, does."""
    return base.replace("Sparse", "Q" if dense else "SparseQ", 1)


OP_TYPES = {op_type_of(base, dense): OfBytes(base, dense) for dense in (True, False) for base in BASES}


def reference(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    weight: Int8Weight,
    bias: np.ndarray,
    grids: Grids,
    activation: str = "none",
) -> np.ndarray:
    """What the operator of one linear computes of integers ``x``, float64 [..., N]: the oracle of the tests."""
    exact = (x.astype(np.int64) - zero_point.astype(np.int64)) @ weight.integers().astype(np.int64)
    h = exact * scale.astype(np.float64) * weight.scales
    if grids.h_scale:
        step = np.float64(np.float32(grids.h_scale))
        h = np.clip(np.rint(h / step), grids.h_low, grids.h_high) * step
    return sparse_matmul.activated(activation, h + bias)


_BODY = """
    {decoder}
    {before}
    zero_f = Constant<value = float {{0.0}}>()
    unit = Constant<value = float {{1.0}}>()
    smallest = Constant<value = float {{1e-30}}>()
    lowest = Constant<value_int: int = @x_lowest>()
    zero_point_32 = Cast<to = 6>(x_zero_point)
    lowest_32 = Cast<to = 6>(lowest)
    point_32 = Sub(zero_point_32, lowest_32)
    X_32 = Cast<to = 6>(X)
    risen = Sub(X_32, lowest_32)
    Q = Cast<to = 2>(risen)
    {products}
    {corrected}
    stepped = Mul(floats, x_scale)
    sized = Mul(stepped, scales)
    h_size = Constant<value_float: float = @h_scale>()
    h_low = Constant<value_int: int = @h_low>()
    h_high = Constant<value_int: int = @h_high>()
    h_low_f = Cast<to = 1>(h_low)
    h_high_f = Cast<to = 1>(h_high)
    h_step = Max(h_size, smallest)
    h_inverse = Div(unit, h_step)
    h_ratio = Mul(sized, h_inverse)
    h_nearest = Round(h_ratio)
    h_below = Min(h_nearest, h_high_f)
    h_inside = Max(h_below, h_low_f)
    h_on_grid = Mul(h_inside, h_step)
    h_rounded = Greater(h_size, zero_f)
    g = Where(h_rounded, h_on_grid, sized)
    {h} = Add(g, bias)
    {steps}
"""


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    base, dense = OP_TYPES[op_type]
    end = ending(base)
    inputs = ("X", *(part.name for part in int8_quads.parts(dense)), BIAS, X_SCALE, X_ZERO_POINT)
    names = (*int8_quads.SIZES, *(field.name for field in dataclasses.fields(Grids)), *end.body.attributes)
    steps = _BODY.format(
        decoder=int8_quads.decoder(dense),
        before=end.before,
        products=PRODUCTS,
        corrected=CORRECTED,
        h=end.h,
        steps=end.body.steps,
    )
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
{op_type} <{", ".join(names)}> ({", ".join(inputs)}) => ({", ".join(end.body.outputs)})
{{
    {steps}
}}"""
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto


OPERATOR = Operator(tuple(OP_TYPES), function_body)
