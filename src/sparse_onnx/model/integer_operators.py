"""Operators that multiply by integers: where their weight lies, what its integers stand for, and what their input does.

===================================  =====  =================================================================
operator                             layer  scale of the weight
===================================  =====  =================================================================
``QLinearMatMul``, ``QLinearConv``   all    an input of the operator, as is the zero point
``com.microsoft::QGemm``
``com.microsoft::MatMulNBits``       MatMul an input, see :mod:`sparse_onnx.model.nbits`
``com.microsoft::MatMulInteger-``    MatMul an input
``ToFloat``, ``Dynamic-``
``QuantizeMatMul``
``MatMulInteger``, ``ConvInteger``   both   a factor behind the operator, where it is found
===================================  =====  =================================================================

Behind the last two stand, each read by the next alone::

    y ── Add(integers) ── Cast ── Mul(scale of X · scale of W) ── Mul(...)

of which the Add may be missing, and a Mul may have both scales or one. The scale of X is that of the QuantizeLinear or
DynamicQuantizeLinear that makes the input. Where the scale of W cannot be told, the weight stands for its integers less
the zero point: zeros and their order within a layer are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_tensor, tensor_shape
from sparse_onnx.model.encodings import Affine
from sparse_onnx.model.graph import STANDARD_DOMAINS, input_at, is_read_once, is_standard, producer
from sparse_onnx.model.nbits import PackedBlocks, read_packed_blocks

__all__ = ["InputGrid", "IntegerOperator", "Unscaled", "input_grid", "integer_operator", "read_integers"]

Shape = tuple[int, ...]

_MICROSOFT = "com.microsoft"
_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_MOVES = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_ONE = ir.tensor(np.float32(1), name="one")


@dataclasses.dataclass(frozen=True)
class IntegerOperator:
    """Which inputs of an operator are what; None: it has no such input.

    ``layer`` is the operator on floats that does the same; ``packed`` says that the weight is no plain tensor;
    ``adds`` is the input for a bias of operators that give floats; of others the result is integers.
    """

    layer: str
    weight: int
    scale: int | None = None
    zero_point: int | None = None
    input_scale: int | None = None
    input_zero_point: int | None = None
    packed: bool = False
    adds: int | None = None


_QLINEAR = (3, 4, 5, 1, 2)

_OPERATORS: Mapping[tuple[str, str], IntegerOperator] = {
    ("", "QLinearMatMul"): IntegerOperator("MatMul", *_QLINEAR),
    ("", "QLinearConv"): IntegerOperator("Conv", *_QLINEAR),
    (_MICROSOFT, "QGemm"): IntegerOperator("Gemm", *_QLINEAR),
    ("", "MatMulInteger"): IntegerOperator("MatMul", 1, zero_point=3, input_zero_point=2),
    ("", "ConvInteger"): IntegerOperator("Conv", 1, zero_point=3, input_zero_point=2),
    (_MICROSOFT, "MatMulIntegerToFloat"): IntegerOperator("MatMul", 1, 3, 5, 2, 4, adds=6),
    (_MICROSOFT, "DynamicQuantizeMatMul"): IntegerOperator("MatMul", 1, 2, 3, adds=4),
    (_MICROSOFT, "MatMulNBits"): IntegerOperator("MatMul", 1, packed=True, adds=5),
}


def integer_operator(node: ir.Node) -> IntegerOperator | None:
    """What ``node`` is, if it multiplies by integers."""
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    return _OPERATORS.get((domain, node.op_type))


@dataclasses.dataclass(frozen=True)
class Unscaled(Affine):
    """Integers whose scale is not known: they stand for their distance from the zero point."""

    def __str__(self) -> str:
        return f"{self.dtype.name} with a scale that is not known"


@dataclasses.dataclass(frozen=True)
class InputGrid:
    """What the integers that a node reads stand for: (integer - ``zero_point``) · ``scale``; None: 0 and 1."""

    scale: ir.Value | None
    zero_point: ir.Value | None


def input_grid(node: ir.Node) -> InputGrid | None:
    """The grid of the first input of an operator that multiplies by integers; None: that input is floats."""
    operator = integer_operator(node)
    if operator is None or (operator.input_scale is None and operator.input_zero_point is None):
        return None
    zero_point = _input(node, operator.input_zero_point)
    if operator.input_scale is not None:
        return InputGrid(input_at(node, operator.input_scale), zero_point)
    return InputGrid(_scale_before(node.inputs[0]), zero_point)


def read_integers(value: ir.Value) -> Affine | PackedBlocks | str:
    """What the integers of an initializer stand for that only operators of the table read, all alike, or the reason why
    that cannot be said."""
    tensor = value.const_value
    if tensor is None:
        return "has no value"
    uses = list(value.uses())
    encodings = []
    for use in uses:
        operator = integer_operator(use.node)
        if operator is None or use.idx != operator.weight:
            return f"also used by {use.node.op_type}"
        read = read_packed_blocks(use.node, tensor) if operator.packed else _plain(use.node, operator, tensor)
        if isinstance(read, str):
            return read
        encodings.append(read)
    first = encodings[0]
    if any(not _equal(first, other) for other in encodings[1:]):
        return "shared by layers that read its integers on different grids"
    return first


def _plain(node: ir.Node, operator: IntegerOperator, tensor: ir.TensorProtocol) -> Affine | str:
    """The integers of a tensor that is not packed."""
    shape = tensor_shape(tensor)
    if tensor.dtype not in _INTEGERS:
        return f"has dtype {tensor.dtype.name}, not INT8 or UINT8"
    if len(shape) < 2:
        return f"has rank {len(shape)}"
    by_rows = operator.layer == "Conv" or bool(node.attributes.get_int("transB", 0))
    axis = 0 if by_rows else len(shape) - 1
    zero_point = None
    if (given := _input(node, operator.zero_point)) is not None:
        zero_point = constant_tensor(given)
        if zero_point is None:
            return "has a zero point that is no constant"
        if zero_point.dtype != tensor.dtype:
            return f"has dtype {tensor.dtype.name} and a zero point of {zero_point.dtype.name}"
        if not _fits(zero_point, shape[axis]):
            return f"has zero points of shape {tensor_shape(zero_point)} for {shape[axis]} outputs"
    scale: ir.TensorProtocol | None
    if operator.scale is None:
        scale = _scale_behind(node, operator, shape[axis], len(shape))
    else:
        scale = constant_tensor(_input(node, operator.scale))
        if scale is None:
            return "has a scale that is no constant"
        if scale.dtype not in _FLOATS or not _fits(scale, shape[axis]):
            return f"has scales {scale.dtype.name} of shape {tensor_shape(scale)} for {shape[axis]} outputs"
    kind = Affine if scale is not None else Unscaled
    scale = scale or _ONE
    alike = scale.size == 1 and (zero_point is None or zero_point.size == 1)
    return kind(tensor.dtype, scale, zero_point, None if alike else axis, 0, ir.DataType.FLOAT)


def _equal(one: Affine | PackedBlocks, two: Affine | PackedBlocks) -> bool:
    """Whether both read integers alike."""

    def same(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
        if a is None or b is None:
            return a is b
        return a is b or (a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy()))

    rest = dataclasses.replace(two, scale=one.scale, zero_point=one.zero_point)
    return (
        type(one) is type(two)
        and rest == one
        and same(one.scale, two.scale)
        and same(one.zero_point, two.zero_point)
    )


def _scale_before(value: ir.Value | None) -> ir.Value | None:
    """The scale by which the integers ``value`` were made, in any order."""
    while value is not None and (node := value.producer()) is not None and is_standard(node, *_MOVES):
        value = node.inputs[0]
    if (node := producer(value, "DynamicQuantizeLinear")) is not None and value is node.outputs[0]:
        return node.outputs[1]
    node = producer(value, "QuantizeLinear")
    return None if node is None else input_at(node, 1)


def _scale_behind(
    node: ir.Node, operator: IntegerOperator, outputs: int, rank: int
) -> ir.TensorProtocol | None:
    """The scale of the weight, from what the sums of ``node`` are multiplied by; None if it is not found."""
    of_input = _scale_before(node.inputs[0])
    if of_input is None:
        return None
    value, known, found = node.outputs[0], False, None
    while is_read_once(value) and found is None:
        user = next(iter(value.uses())).node
        if is_standard(user, "Add", "Mul"):
            first, second = user.inputs
            other = second if first is value else first
            if is_standard(user, "Mul"):
                if other is of_input:
                    known = True
                elif (array := _factor(other, operator, outputs, rank)) is not None:
                    found = array
                elif (array := _factor_of(other, of_input, operator, outputs, rank)) is not None:
                    known, found = True, array
                else:
                    return None
        elif not is_standard(user, "Cast"):
            return None
        value = user.outputs[0]
    if found is None:
        return None
    if not known and not _is_multiplied_by(value, of_input):
        divisor = constant_array(of_input)
        if divisor is None or divisor.size != 1:
            return None
        with np.errstate(all="ignore"):
            found = found / divisor.reshape(()).astype(np.float32)
    return ir.tensor(found) if np.isfinite(found).all() else None


def _is_multiplied_by(value: ir.Value, factor: ir.Value) -> bool:
    """Whether all that is read of ``value`` is its product with ``factor``."""
    if not is_read_once(value):
        return False
    user = next(iter(value.uses())).node
    return is_standard(user, "Mul") and factor in user.inputs


def _factor_of(
    value: ir.Value | None, scale: ir.Value, operator: IntegerOperator, outputs: int, rank: int
) -> np.ndarray | None:
    """The other factor of a product ``value`` of ``scale`` and a constant."""
    if (node := producer(value, "Mul")) is None or scale not in node.inputs:
        return None
    other = node.inputs[1] if node.inputs[0] is scale else node.inputs[0]
    return _factor(other, operator, outputs, rank)


def _factor(value: ir.Value | None, operator: IntegerOperator, outputs: int, rank: int) -> np.ndarray | None:
    """A constant factor of all outputs, or one for each of them: [1] or [outputs] float32."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype not in _FLOATS:
        return None
    shape = tensor_shape(tensor)
    place = rank - 1 if operator.layer == "Conv" else 1  # of the outputs, from the end
    each = len(shape) >= place and shape[len(shape) - place] == outputs == tensor.size
    if tensor.size != 1 and not each:
        return None
    return tensor.numpy().reshape(-1).astype(np.float32)


def _fits(tensor: ir.TensorProtocol, outputs: int) -> bool:
    """Whether there is one number for all outputs, or one for each."""
    return tensor.size == 1 or (tensor.size == outputs and tensor_shape(tensor)[-1] == outputs)


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return None if index is None else input_at(node, index)
