"""Recognise a linear of integers, as quantizers write it: ``act(grid(X · W) + bias)`` with X and W on grids of 8 bits.

Patterns, every value in between having a single user::

    h = MatMul(DequantizeLinear(q), W)                     h = Gemm(DequantizeLinear(q), W, bias)
    g = DequantizeLinear(QuantizeLinear(h))                g = DequantizeLinear(QLinearMatMul(q, ..., V, ...))
    h = Mul(Cast(Add(MatMulInteger(q, V), bias)), scale · scales of W)

Behind them stands what stands behind a linear of floats: ``Add`` of a bias, behind a MatMul, and an activation. The
second line may be missing; nor is it part of the layer where nothing of these follows. The Add of integers may be
missing, and there may be a Mul for each scale. q of the last one are made by ``QuantizeLinear`` or
``DynamicQuantizeLinear``, whose scale stands in the product. A bias is a constant [N], or ``DequantizeLinear`` of one
of int32. What is rounded behind all that stays outside: other layers read those integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import (
    constant_array,
    constant_number,
    constant_tensor,
    is_constant,
    tensor_shape,
)
from sparse_onnx.model.encodings import Affine, spread
from sparse_onnx.model.graph import input_at, is_standard, producer
from sparse_onnx.model.integer_operators import Unscaled
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.patterns.layer import Part, place_reason, storage_reason
from sparse_onnx.passes.patterns.linear import Linear, match_activation
from sparse_onnx.passes.patterns.match import is_bias, is_scaled, only_user, other_operand
from sparse_onnx.passes.patterns.rounded import (
    RoundedInPassing,
    RoundedInput,
    decoded_alone,
    dequantized,
    quantized,
    read_input,
    rounded_in_passing,
)
from sparse_onnx.sparse_ops.ops.q_matmul import X_ZERO_POINT, Grids

__all__ = ["QLinear", "match_q_linear", "reads_integers"]


@dataclasses.dataclass(frozen=True)
class QLinear(Linear):
    """A linear of integers ``x``. ``source`` is what it is timed from, ``grid`` what its products are rounded to before
    ``added``, its bias [N] or None, is added."""

    x: RoundedInput
    source: ir.Value
    grid: RoundedInPassing | None
    added: np.ndarray | None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        return (self.source,)

    @property
    def operands(self) -> tuple[ir.Value, ...]:
        x = self.x
        return (x.integers, x.scale) if x.zero_point is None else (x.integers, x.scale, x.zero_point)

    @property
    def constants(self) -> Mapping[str, np.ndarray]:
        if self.x.zero_point is not None:
            return {}
        return {f"{self.x.integers.name}.{X_ZERO_POINT}": np.zeros((), self.x.dtype.numpy())}

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(self.weight, self.stored_outputs, bias=self.added),)

    @property
    def attributes(self) -> Mapping[str, int | float | str]:
        """What the time depends on; all others are :attr:`numbers`."""
        return {"x_lowest": self.x.lowest}

    @property
    def numbers(self) -> Mapping[str, int | float]:
        grids = Grids(self.x.lowest)
        if self.grid is not None:
            low, high = self.grid.steps
            grids = Grids(self.x.lowest, self.grid.scale, low, high)
        return grids.attributes()


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of integers as it was found: float32 ``output`` of the last of ``nodes``, and as in `QLinear`."""

    x: RoundedInput
    source: ir.Value
    nodes: tuple[ir.Node, ...]
    output: ir.Value
    grid: RoundedInPassing | None = None
    added: np.ndarray | None = None
    takes_bias: bool = True


def reads_integers(node: ir.Node) -> bool:
    """Whether ``node``, which multiplies by a weight, may be a linear of integers of 8 bits."""
    if is_standard(node, "MatMulInteger"):
        return producer(node.inputs[0], "QuantizeLinear", "DynamicQuantizeLinear") is not None
    decoded = is_standard(node, "MatMul", "Gemm") and producer(node.inputs[0], "DequantizeLinear") is not None
    return decoded or is_standard(node, "QLinearMatMul")


def match_q_linear(weight: Weight, node: ir.Node, main_graph: ir.Graph, shapes: Shapes) -> QLinear | str:
    """The linear that ``node`` (a user of ``weight``) is part of, or the reason why it cannot be replaced."""
    if reason := place_reason(node, main_graph) or storage_reason(weight):
        return reason
    match node.op_type:
        case "MatMul" | "Gemm":
            found = _of_floats(weight, node)
        case "QLinearMatMul":
            found = _on_grid(node)
        case "MatMulInteger":
            found = _of_integers(weight, node)
        case _:
            return f"is also used by {node.op_type}"
    if isinstance(found, str):
        return found
    if is_constant(found.x.integers):
        return "has a constant activation"
    return _with_rest(weight, found, shapes)


def _with_rest(weight: Weight, found: _Product, shapes: Shapes) -> QLinear:
    """The layer that begins with a product."""
    added, output = found.added, found.output
    nodes, grid = list(found.nodes), found.grid
    passing = rounded_in_passing(output) if grid is None and found.takes_bias else None
    behind = _behind(weight, passing.output if passing else output, found, shapes)
    if passing is not None and behind[1]:
        nodes += passing.nodes
        grid = passing
    elif passing is not None:
        behind = (None, [], "none")
    bias, last, activation = behind
    if last:
        nodes += last
        output = last[-1].outputs[0]
    return QLinear(
        weight,
        tuple(nodes),
        None,
        activation,
        output,
        found.x,
        found.source,
        grid,
        added if bias is None else bias,
    )


def _behind(
    weight: Weight, output: ir.Value, found: _Product, shapes: Shapes
) -> tuple[np.ndarray | None, list[ir.Node], str]:
    """Bias and activation behind ``output``, and their nodes."""
    N = weight.shape[1]
    bias: np.ndarray | None = None
    nodes: list[ir.Node] = []
    if found.takes_bias and (add := only_user(output, "Add")) is not None:
        other = other_operand(add, output)
        bias = None if other is None or shapes.may_add_axes(other, output) else _bias(other, N)
        if bias is not None:
            nodes.append(add)
            output = add.outputs[0]
    activation, matched = match_activation(output, shapes)
    return bias, [*nodes, *matched], activation


def _of_floats(weight: Weight, node: ir.Node) -> _Product | str:
    """MatMul or Gemm of what is decoded."""
    x = dequantized(node.inputs[0])
    if isinstance(x, str):
        return x
    added: np.ndarray | None = None
    if node.op_type == "Gemm":
        if is_scaled(node):
            return "is a Gemm with alpha or beta other than 1"
        if (given := input_at(node, 2)) is not None and (added := _bias(given, weight.shape[1])) is None:
            return "is a Gemm whose C is no constant bias"
    return _Product(x, x.integers, (node,), node.outputs[0], added=added, takes_bias=node.op_type == "MatMul")


def _on_grid(node: ir.Node) -> _Product | str:
    """QLinearMatMul and the DequantizeLinear behind it."""
    x = read_input(node.inputs[0], input_at(node, 1), input_at(node, 2))
    if isinstance(x, str):
        return x
    grid = decoded_alone(node.outputs[0])
    if grid is None:
        return "other layers read its integers"
    made = read_input(node.outputs[0], input_at(node, 6), input_at(node, 7))
    if isinstance(made, str):
        return f"of its results: {made}"
    scale, zero_point = constant_number(made.scale), constant_number(made.zero_point)
    if (scale, zero_point) != (grid.scale, grid.zero_point):
        return "has results that are decoded with another scale than they have"
    return _Product(x, x.integers, (node, *grid.nodes), grid.output, grid)


def _of_integers(weight: Weight, node: ir.Node) -> _Product | str:
    """MatMulInteger, and what makes floats of its sums."""
    integers = node.inputs[0]
    maker = producer(integers, "QuantizeLinear", "DynamicQuantizeLinear")
    if integers is None or maker is None or integers is not maker.outputs[0] or maker.inputs[0] is None:
        return "its input is not rounded right before MatMulInteger"
    x = (
        quantized(maker)
        if maker.op_type == "QuantizeLinear"
        else RoundedInput(integers, ir.DataType.UINT8, maker.outputs[1], maker.outputs[2])
    )
    if isinstance(x, str):
        return x
    if not _same(input_at(node, 2), x.zero_point):
        return "its zero point is not that of its input"
    if not isinstance(weight.encoding, Affine) or isinstance(weight.encoding, Unscaled):
        return "has a scale that is not known"
    nodes, sums, added = [node], node.outputs[0], None
    if (add := only_user(sums, "Add")) is not None:
        tensor = constant_tensor(other_operand(add, sums))
        N = weight.shape[1]
        if tensor is None or tensor.size != N or tensor_shape(tensor) != (N,):
            return "adds something other than a constant bias to its sums"
        added = tensor.numpy()
        nodes.append(add)
        sums = add.outputs[0]
    cast = only_user(sums, "Cast")
    if cast is None or cast.attributes.get_int("to", 0) != ir.DataType.FLOAT:
        return "its sums become no floats"
    nodes.append(cast)
    scaled = _scaled(cast.outputs[0], x, weight)
    if isinstance(scaled, str):
        return scaled
    factors, steps = scaled
    nodes += factors
    if added is not None:
        if steps is None:
            return "adds a bias to sums of an input whose scale is computed in every run"
        added = (added.astype(np.float64) * steps).astype(np.float32)
    return _Product(x, maker.inputs[0], tuple(nodes), nodes[-1].outputs[0], added=added)


def _scaled(
    value: ir.Value, x: RoundedInput, weight: Weight
) -> tuple[list[ir.Node], np.ndarray | None] | str:
    """The Mul nodes that multiply ``value`` by the scales of X and of the weight, all of them and nothing else; and the
    product of these scales, if it is constant."""
    unclear = "its sums are multiplied by something other than the scales of input and weight"
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    wanted = encoding.scale.numpy().astype(np.float64).reshape(-1)
    own = constant_array(x.scale)
    of_x = None if own is None else float(own.reshape(()))
    nodes: list[ir.Node] = []
    found, known = np.ones(1), False
    while (mul := only_user(value, "Mul")) is not None and len(nodes) < 2:
        other = other_operand(mul, value)
        if other is x.scale:
            if known:
                break
            known = True
        elif is_constant(other):
            if nodes and not known:
                break
            array = constant_array(other)
            assert array is not None
            found = found * array.astype(np.float64).reshape(-1)
        elif (
            (pair := producer(other, "Mul")) is not None
            and x.scale in pair.inputs
            and not known
            and not nodes
        ):
            array = constant_array(other_operand(pair, x.scale))
            if array is None:
                return unclear
            known, found = True, array.astype(np.float64).reshape(-1)
        else:
            break
        nodes.append(mul)
        value = mul.outputs[0]
        if _close(found, wanted) and known:
            break
        if not known and of_x is not None and _close(found, wanted * of_x):
            break
    if known and _close(found, wanted):
        return nodes, None if of_x is None else wanted * of_x
    if not known and of_x is not None and nodes and _close(found, wanted * of_x):
        return nodes, wanted * of_x
    return unclear


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether both are the same scales but for how they were rounded."""
    return found.size in (1, wanted.size) and bool(np.allclose(found, wanted, rtol=1e-6, atol=0))


def _same(one: ir.Value | None, two: ir.Value | None) -> bool:
    """Whether two zero points are the same; none is 0."""
    if one is two:
        return True
    first, second = (0.0 if value is None else constant_number(value) for value in (one, two))
    return first is not None and first == second


def _bias(value: ir.Value, N: int) -> np.ndarray | None:
    """The float32 [N] that ``value`` always is, if it is a bias for N outputs; integers of 32 bits are decoded."""
    if is_bias(value, N):
        array = constant_array(value)
        return None if array is None else np.asarray(array, np.float32).reshape(N)
    node = producer(value, "DequantizeLinear")
    if node is None:
        return None
    stored, scale = constant_tensor(node.inputs[0]), constant_tensor(input_at(node, 1))
    given = input_at(node, 2)
    zero_point = constant_tensor(given)
    if stored is None or scale is None or (given is not None and zero_point is None):
        return None
    if stored.dtype != ir.DataType.INT32 or scale.dtype != ir.DataType.FLOAT or stored.size != N:
        return None
    shape = tensor_shape(stored)
    if shape[-1:] != (N,) or scale.size not in (1, N) or len(scale.shape) > 1:
        return None
    axis = node.attributes.get_int("axis", 1)
    along = None if scale.size == 1 else axis + len(shape) if axis < 0 else min(axis, len(shape) - 1)
    if along not in (None, len(shape) - 1) or "block_size" in node.attributes:
        return None
    if zero_point is not None and np.any(zero_point.numpy()):
        return None
    factor = spread(scale.numpy(), shape, along, 0)
    with np.errstate(all="ignore"):
        bias: np.ndarray = stored.numpy().astype(np.float32) * factor.astype(np.float32)
    return bias.reshape(N)
