"""Follow a stored tensor to the weight that nodes of the graph make of it in every run.

Before the weight are the nodes that decode it, see :mod:`sparse_onnx.model.encodings`, and behind these any number that
only move its elements::

    integers ── DequantizeLinear(scale, zero point)
    floats ──── QuantizeLinear ── DequantizeLinear                ┐
    indices ─── Gather(codebook)                                  ├── Transpose, Reshape, ... ── MatMul, Conv, ...
    indices ─── Cast ── Gather(codebook)                          │
    integers ── Cast ── Sub(zero point) ── Mul(scale)             │
    bytes ───── Unpack(scale, zero point)                         ┘

Packed bytes may also be looked up: columns of a weight that is tied to a table of embeddings. The Sub and the Mul
behind a Cast may be missing. Scales, zero points and codebooks must be constant, and nothing else may read what lies
between the stored tensor and the layers: a change would reach it, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.bit_packing import STORED_BITS, UNPACK_DOMAIN, packed_shape, unpack_name
from sparse_onnx.model.constants import constant_tensor, tensor_shape
from sparse_onnx.model.encodings import Affine, Encoding, Packed, Palette
from sparse_onnx.model.graph import is_standard, producer
from sparse_onnx.model.nbits import PackedBlocks

__all__ = ["Decoded", "IsLayer", "Move", "decodes", "follow", "is_lookup", "results"]

Shape = tuple[int, ...]
IsLayer = Callable[[ir.Node, int], bool]
"""Whether the input of that index is the weight of a layer."""

_MOVES = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_WIDER = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_SCALES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BITS = 16
_CAST_BITS = 8  # of integers that a Cast makes floats of: what is wider is no weight
_ONE = ir.tensor(np.float32(1), name="one")
_GIVEN_OUT = "is decoded for layers and also an output of the graph"


class _UnreadableError(Exception):
    """A weight that is not followed; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Move:
    """An array of shape ``before`` in another order of axes (``order``), or in another shape (``order`` None)."""

    before: Shape
    after: Shape
    order: Shape | None = None

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.after) if self.order is None else array.transpose(self.order)

    def back(self, array: np.ndarray) -> np.ndarray:
        if self.order is None:
            return array.reshape(self.before)
        return array.transpose(np.argsort(self.order))


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What the graph makes of a stored tensor: ``operand``, of ``shape``, is what layers read; the decoded elements go
    there by ``moves``."""

    operand: ir.Value
    shape: Shape
    encoding: Encoding | PackedBlocks
    moves: tuple[Move, ...] = ()


def results(value: ir.Value) -> Iterator[ir.Value]:
    """All that is made of an initializer by decoding it and moving its elements, whether it can be followed or not."""
    pending = [node.outputs[0] for user, index in value.uses() for node in _decoders(user, index)]
    seen = set()
    while pending:
        result = pending.pop()
        if result not in seen:
            seen.add(result)
            yield result
            pending += [
                node.outputs[0] for node, index in result.uses() if index == 0 and is_standard(node, *_MOVES)
            ]


def _decoders(node: ir.Node, index: int) -> Iterator[ir.Node]:
    """The last nodes of those that decode the input ``index`` of ``node``."""
    if decodes(node, index):
        yield node
    elif _casts(node):
        yield from _scaled(node)
    elif index == 0 and is_standard(node, "QuantizeLinear", "Cast"):
        yield from (user for user, place in node.outputs[0].uses() if decodes(user, place))


def _casts(node: ir.Node) -> bool:
    """Whether ``node`` makes floats of integers that are stored."""
    tensor = constant_tensor(node.inputs[0]) if is_standard(node, "Cast") else None
    return tensor is not None and _is_small_integer(tensor.dtype) and _dtype(node, "to") in _SCALES


def _is_small_integer(dtype: ir.DataType) -> bool:
    return dtype.is_integer() and dtype.bitwidth <= _CAST_BITS


def _scaled(node: ir.Node) -> Iterator[ir.Node]:
    """``node``, and the Sub and the Mul with a constant that follow it."""
    yield node
    for op_type in ("Sub", "Mul"):
        users = [use.node for use in node.outputs[0].uses() if is_standard(use.node, op_type)]
        if len(users) == 1 and _operand(users[0], node.outputs[0]) is not None:
            node = users[0]
            yield node


def _operand(node: ir.Node, value: ir.Value) -> ir.TensorProtocol | None:
    """The constant that a Sub or Mul combines with ``value``, a Cast of one included."""
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if is_standard(node, "Sub") and other is node.inputs[0]:
        return None
    if (cast := producer(other, "Cast")) is not None:
        other = cast.inputs[0]
    return constant_tensor(other)


def decodes(node: ir.Node, index: int) -> bool:
    """Whether ``node`` computes floats from integers that are stored for them, of which ``index`` is the input."""
    if is_standard(node, "Gather") and index == 1:  # of an activation it is no decoder
        codebook = constant_tensor(node.inputs[0])
        return codebook is not None and codebook.dtype in _SCALES and len(codebook.shape) == 1
    return index == 0 and (is_standard(node, "DequantizeLinear") or node.domain == UNPACK_DOMAIN)


def follow(value: ir.Value, is_layer: IsLayer) -> Decoded | str:
    """What layers read of an initializer that nodes decode, or the reason why that cannot be said."""
    try:
        return _follow(value, is_layer)
    except _UnreadableError as error:
        return str(error)


def _follow(value: ir.Value, is_layer: IsLayer) -> Decoded:
    tensor = value.const_value
    if tensor is None:
        raise _UnreadableError("has no value")
    shape = tensor_shape(tensor)
    node = _only_node(value, [use.node for use in value.uses() if not is_lookup(use.node, use.idx)])
    encoding: Encoding
    if is_standard(node, "QuantizeLinear"):
        rounding, node = node, _only_node(node.outputs[0])
        encoding = _rounded(tensor, rounding, node, shape)
    elif is_standard(node, "DequantizeLinear"):
        encoding = _affine(tensor.dtype, node, shape)
    elif node.domain == UNPACK_DOMAIN:
        encoding = _packed(tensor, node)
    else:
        cast = node
        if is_standard(node, "Cast") and tensor.dtype.bitwidth <= _BITS:
            node = (
                _only_node(node.outputs[0])
                if not any(is_layer(*use) for use in node.outputs[0].uses())
                else node
            )
        if _casts(cast) and not is_standard(node, "Gather"):
            encoding, node = _by_hand(tensor.dtype, cast, shape)
        else:
            encoding = _palette(tensor.dtype, node)
    dtype = encoding.codebook.dtype if isinstance(encoding, Palette) else encoding.result
    operand, moves = node.outputs[0], list[Move]()
    if isinstance(encoding, Packed):
        shape = encoding.dims
    while not any(is_layer(*use) for use in operand.uses()):
        node = _only_node(operand)
        operand = node.outputs[0]
        if is_standard(node, "Cast"):
            to = _dtype(node, "to")
            if to not in _WIDER and to != dtype:
                raise _UnreadableError(f"is rounded by a Cast from {dtype.name} to {to.name}")
            dtype = to
        elif not is_standard(node, "Identity"):
            moves.append(_move(node, moves[-1].after if moves else shape))
    if operand.is_graph_output():
        raise _UnreadableError(_GIVEN_OUT)
    return Decoded(operand, moves[-1].after if moves else shape, encoding, tuple(moves))


def is_lookup(node: ir.Node, index: int) -> bool:
    """Whether ``node`` takes columns of packed integers, its input ``index``, by ids that differ from run to run."""
    packed = node.inputs[index]
    return (
        is_standard(node, "Gather")
        and index == 0
        and node.attributes.get_int("axis", 0) == 2
        and any(use.node.domain == UNPACK_DOMAIN for use in packed.uses())  # type: ignore[union-attr]
    )


def _only_node(value: ir.Value, readers: Sequence[ir.Node] | None = None) -> ir.Node:
    """The node that reads ``value``, which nothing else does; of ``readers``, if they are given."""
    nodes = [use.node for use in value.uses()] if readers is None else readers
    if value.is_graph_output():
        raise _UnreadableError(_GIVEN_OUT)
    if len(nodes) != 1:
        names = " and ".join(sorted(node.op_type for node in nodes))
        raise _UnreadableError(f"is decoded for layers and also read elsewhere: by {names}")
    return nodes[0]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What a QuantizeLinear or DequantizeLinear says of its integers."""

    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None
    axis: int | None
    block_size: int

    def equals(self, other: _Grid) -> bool:
        def same(one: ir.TensorProtocol | None, two: ir.TensorProtocol | None) -> bool:
            if one is None or two is None:
                return one is two
            return one.dtype == two.dtype and np.array_equal(one.numpy(), two.numpy())

        places = (self.axis, self.block_size) == (other.axis, other.block_size)
        return places and same(self.scale, other.scale) and same(self.zero_point, other.zero_point)


def _affine(dtype: ir.DataType, node: ir.Node, shape: Shape) -> Affine:
    """The encoding of integers of that type and shape that a DequantizeLinear makes floats of."""
    grid = _grid(dtype, node, shape)
    result = _dtype(node, "output_dtype") or grid.scale.dtype
    if result not in _SCALES:
        raise _UnreadableError(f"is decoded to {result.name}")
    return Affine(dtype, grid.scale, grid.zero_point, grid.axis, grid.block_size, result)


def _rounded(tensor: ir.TensorProtocol, rounding: ir.Node, node: ir.Node, shape: Shape) -> Affine:
    """The encoding of floats that a QuantizeLinear makes integers of, and ``node`` floats again."""
    if not is_standard(node, "DequantizeLinear"):
        raise _UnreadableError(f"is quantized in every run, for {node.op_type}")
    zero_point = constant_tensor(rounding.inputs[2]) if len(rounding.inputs) > 2 else None
    dtype = _dtype(rounding, "output_dtype") or ir.DataType.UINT8
    dtype = dtype if zero_point is None else zero_point.dtype
    there, back = _grid(dtype, rounding, shape), _grid(dtype, node, shape)
    if not there.equals(back):
        raise _UnreadableError("is quantized in every run on another grid than it is dequantized")
    precision = _dtype(rounding, "precision") or there.scale.dtype
    if {tensor.dtype, there.scale.dtype, precision} != {ir.DataType.FLOAT}:
        raise _UnreadableError(f"is quantized in every run from {tensor.dtype.name} with {precision.name}")
    return dataclasses.replace(_affine(dtype, node, shape), rounded=True)


def _grid(dtype: ir.DataType, node: ir.Node, shape: Shape) -> _Grid:
    """What ``node`` says of integers of that type and shape."""
    if not dtype.is_integer() or dtype.bitwidth > _BITS:
        raise _UnreadableError(f"has dtype {dtype.name}, which is no type of quantized weights")
    scale, zero_point = _parameter(node, 1, "scale"), _parameter(node, 2, "zero point")
    if scale is None or scale.dtype not in _SCALES:
        raise _UnreadableError(f"has scales of {'no type' if scale is None else scale.dtype.name}")
    block_size = node.attributes.get_int("block_size", 0)
    axis = _axis(scale, node.attributes.get_int("axis", 1), block_size, shape)
    if zero_point is not None:
        if zero_point.dtype != dtype:
            raise _UnreadableError(f"has dtype {dtype.name} and a zero point of {zero_point.dtype.name}")
        one = axis is None and zero_point.size == 1 and len(zero_point.shape) <= 1
        if not one and tensor_shape(zero_point) != tensor_shape(scale):
            raise _UnreadableError(
                f"has scales of shape {tensor_shape(scale)} and zero points of shape {tensor_shape(zero_point)}"
            )
    return _Grid(scale, zero_point, axis, block_size)


def _parameter(node: ir.Node, index: int, what: str) -> ir.TensorProtocol | None:
    """A constant input, or None if it is not given."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = constant_tensor(value)
    if value is not None and tensor is None:
        raise _UnreadableError(
            f"is computed in every run, by {node.op_type} with a {what} that is no constant"
        )
    return tensor


def _axis(scale: ir.TensorProtocol, axis: int, block_size: int, shape: Shape) -> int | None:
    """The axis of ``shape`` along which scales differ; None: there is one scale."""
    scales, rank = tensor_shape(scale), len(shape)
    one = scale.size == 1 and len(scales) <= 1
    if one and block_size == 0:
        return None
    place = axis + rank if axis < 0 else axis
    if 0 <= place < rank and not one:
        size = shape[place]
        if block_size == 0 and scales == (size,):
            return place
        if block_size > 0 and scales == (*shape[:place], -(-size // block_size), *shape[place + 1 :]):
            return place
    blocks = f" in blocks of {block_size}" if block_size else ""
    raise _UnreadableError(
        f"has scales of shape {scales}, which does not fit {shape} along axis {axis}{blocks}"
    )


def _palette(dtype: ir.DataType, node: ir.Node) -> Palette:
    """The encoding of indices of that type that a Gather takes values by."""
    codebook = _parameter(node, 0, "codebook")
    if codebook is None or not is_standard(node, "Gather") or not dtype.is_integer():
        raise _UnreadableError(f"has dtype {dtype.name} and is decoded by {node.op_type}")
    return Palette(codebook)


def _by_hand(dtype: ir.DataType, cast: ir.Node, shape: Shape) -> tuple[Affine, ir.Node]:
    """The encoding of integers of that type and shape that ``cast``, and a Sub and a Mul where there are such, make
    floats of, and the last of these nodes."""
    result, last = _dtype(cast, "to"), cast
    parameters: dict[str, ir.TensorProtocol] = {}
    axes: set[int] = set()
    for node in _scaled(cast):
        if node is not cast:
            _only_node(last.outputs[0])
            tensor = _operand(node, last.outputs[0])
            assert tensor is not None
            axis = _broadcast_axis(tensor, shape)
            axes |= set() if axis is None else {axis}
            parameters[node.op_type] = tensor
        last = node
    if len(axes) > 1:
        raise _UnreadableError("has scales along one axis and zero points along another")
    scale = parameters.get("Mul", _ONE)
    if scale.dtype != result and scale is not _ONE:
        raise _UnreadableError(f"is cast to {result.name} and has scales of {scale.dtype.name}")
    zero_point = None
    if (given := parameters.get("Sub")) is not None:
        numbers = np.asarray(given.numpy(), np.float64).reshape(-1)
        if not all(number.is_integer() and dtype.min <= number <= dtype.max for number in numbers):
            raise _UnreadableError(f"has zero points that are no numbers of {dtype.name}")
        zero_point = ir.tensor(numbers.astype(dtype.numpy()))
    flat = scale if len(scale.shape) < 2 else ir.tensor(scale.numpy().reshape(-1))
    return Affine(dtype, flat, zero_point, next(iter(axes), None), 0, result), last


def _broadcast_axis(tensor: ir.TensorProtocol, shape: Shape) -> int | None:
    """The axis of ``shape`` along which the elements of ``tensor`` differ; None: there is one."""
    sizes = tensor_shape(tensor)
    long = [index for index, size in enumerate(sizes) if size != 1]
    axis = len(shape) - len(sizes) + long[0] if long else 0
    fits = len(sizes) <= len(shape) and (not long or (len(long) == 1 and sizes[long[0]] == shape[axis]))
    if not fits:
        raise _UnreadableError(f"has scales or zero points of shape {sizes}, which does not fit {shape}")
    return axis if long else None


def _packed(tensor: ir.TensorProtocol, node: ir.Node) -> Packed:
    """The encoding of bytes that a function unpacks."""
    scale, zero_point = _parameter(node, 1, "scale"), _parameter(node, 2, "zero point")
    names = {unpack_name(bits, zero_point is not None): bits for bits in STORED_BITS}
    bits = names.get(node.op_type)
    shape, grid = tensor_shape(tensor), node.attributes.get_ints("grid", ())
    inputs, rows = (tuple(node.attributes.get_ints(name, ())) for name in ("channels", "rows"))
    result = _dtype(node, "to")
    known = (
        bits is not None and scale is not None and scale.dtype in _SCALES and result in (*_WIDER, *_SCALES)
    )
    if not known or len(grid) != 3 or len(inputs) != 1 or len(shape) != 3 or min(*grid[:2], *inputs) < 1:
        raise _UnreadableError(f"is unpacked by {node.op_type} with attributes that it does not have")
    assert bits is not None
    assert scale is not None
    groups, size, N = grid[0], grid[1], shape[2]
    fits = (
        -(-inputs[0] // size) == groups
        and rows == (groups * size,)
        and tensor_shape(scale) == (groups, 1, N)
        and (tensor.dtype, shape) == (ir.DataType.UINT8, packed_shape(groups * size, N, bits))
    )
    if fits and zero_point is not None:
        fits = (zero_point.dtype, tensor_shape(zero_point)) == (
            ir.DataType.UINT8,
            packed_shape(groups, N, bits),
        )
    if not fits:
        raise _UnreadableError(
            f"has bytes of shape {shape} and scales of shape {tensor_shape(scale)}, which do not fit"
        )
    return Packed(bits, inputs[0], size, scale, zero_point, result)


def _move(node: ir.Node, shape: Shape) -> Move:
    """What ``node`` does to an array of that shape."""
    if is_standard(node, "Transpose"):
        order = tuple(node.attributes.get_ints("perm", tuple(range(len(shape)))[::-1]))
        if sorted(order) == list(range(len(shape))):
            return Move(shape, tuple(shape[axis] for axis in order), order)
    elif is_standard(node, *_MOVES):
        after = _reshaped(node, shape)
        if after is not None and math.prod(after) == math.prod(shape) > 0:
            return Move(shape, after)
    else:
        raise _UnreadableError(f"is decoded for {node.op_type}")
    raise _UnreadableError(f"goes through a {node.op_type} that does not fit shape {shape}")


def _reshaped(node: ir.Node, shape: Shape) -> Shape | None:
    """The shape that a node which keeps the order of elements makes of another; None if it cannot be said."""
    rank = len(shape)
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1)
        fits = -rank <= axis <= rank
        return (math.prod(shape[:axis]), math.prod(shape[axis:])) if fits else None
    numbers = _numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type == "Squeeze":
        gone = [axis for axis in range(rank) if shape[axis] == 1] if len(node.inputs) < 2 else numbers
        if gone is None or not all(-rank <= axis < rank and shape[axis] == 1 for axis in gone):
            return None
        return tuple(np.delete(shape, list(gone)).tolist())
    if numbers is None:
        return None
    if node.op_type == "Unsqueeze":
        full = rank + len(numbers)
        new = {axis % full for axis in numbers if -full <= axis < full}
        if len(new) != len(numbers):
            return None
        old = iter(shape)
        return tuple(1 if axis in new else next(old) for axis in range(full))
    if 0 in numbers and not node.attributes.get_int("allowzero", 0):
        if any(number == 0 and index >= rank for index, number in enumerate(numbers)):
            return None
        numbers = tuple(shape[index] if number == 0 else number for index, number in enumerate(numbers))
    known = math.prod(number for number in numbers if number != -1)
    if numbers.count(-1) == 1 and known > 0:
        return tuple(math.prod(shape) // known if number == -1 else number for number in numbers)
    return numbers if all(number >= 0 for number in numbers) else None


def _numbers(value: ir.Value | None) -> Shape | None:
    """Sizes or axes that are constant."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.INT64:
        return None
    return tuple(int(number) for number in tensor.numpy().reshape(-1))


def _dtype(node: ir.Node, attribute: str) -> ir.DataType:
    """The type that an attribute names; UNDEFINED if it does not."""
    number = node.attributes.get_int(attribute, 0)
    return ir.DataType(number) if number in set(ir.DataType) else ir.DataType.UNDEFINED
