"""Integers of few bits in bytes, and the functions of standard operators that make a weight of them.

A matrix [K, N] of integers below 2^bits is stored in planes [units, rows, N] of bytes, so that neighbours in memory
stay neighbours and unpacking needs no interleaving:

====  =====  =============================================================================================
bits  units  byte [0, r, n], R being the number of rows
====  =====  =============================================================================================
8     1      q[r, n]
4     1      q[r, n] + 16 · q[R + r, n]
2     1      q[r, n] + 4 · q[R + r, n] + 16 · q[2R + r, n] + 64 · q[3R + r, n]
3     3      units 0 and 1 have the two low bits of q as above with 2 bits, unit 2 the high bits, eight to a byte
====  =====  =============================================================================================

What lies behind K is 0. The weight is ``(q - zero point) · scale``, scales [groups, 1, N] (float32 or float16) and zero
points, packed in the same way, for every group of inputs; without zero points, zero is 2^(bits - 1) everywhere.

The graph computes that by one node ``sparse_onnx.weights::Unpack4`` (or 2, 3, 8; ``..WithZeros`` has zero points),
whose body is a model-local function of operators of opset 13: ONNX Runtime from 1.17 on folds it into floats when it
loads the model. No kernel belongs to it.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.parser

__all__ = [
    "STORED_BITS",
    "UNPACK_DOMAIN",
    "UNPACK_VERSION",
    "pack",
    "packed_bytes",
    "packed_shape",
    "stored_bits",
    "unpack",
    "unpack_function",
    "unpack_name",
]

UNPACK_DOMAIN, UNPACK_VERSION = "sparse_onnx.weights", 1
STORED_BITS = (2, 3, 4, 8)


def stored_bits(bits: int) -> int:
    """How many bits an integer of ``bits`` (2 to 8) takes: 5 to 7 take a byte."""
    return bits if bits in STORED_BITS else 8


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """``integers`` [K, N] uint8 below 2^bits as bytes [units, rows, N]; ``bits`` is 2, 3, 4 or 8."""
    if bits == 8:
        return integers[None]
    per_byte = 8 if bits == 3 else 8 // bits
    K, N = integers.shape
    padded = np.zeros((-(-K // per_byte) * per_byte, N), np.uint8)
    padded[:K] = integers
    if bits != 3:
        return _planes(padded, bits)[None]
    low = _planes(padded & np.uint8(3), 2).reshape(2, -1, N)
    return np.concatenate([low, _planes(padded >> np.uint8(2), 1)[None]])


def _planes(integers: np.ndarray, bits: int) -> np.ndarray:
    """[K, N] of ``bits`` (1, 2 or 4), K a multiple of 8 / bits, as bytes [K · bits / 8, N]."""
    planes = integers.reshape(8 // bits, -1, integers.shape[1])
    packed = np.array(planes[0])
    for index in range(1, len(planes)):
        packed |= planes[index] << np.uint8(bits * index)
    return packed


def unpack(packed: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """What :func:`pack` packed, [K, N] uint8 with K = ``inputs``."""
    if bits == 8:
        return packed[0, :inputs]
    if bits != 3:
        return _integers(packed[0], bits)[:inputs]
    low = _integers(packed[:2].reshape(-1, packed.shape[2]), 2)
    integers: np.ndarray = low | _integers(packed[2], 1) << np.uint8(2)
    return integers[:inputs]


def _integers(packed: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
    planes: np.ndarray = packed >> shifts & np.uint8(2**bits - 1)
    return planes.reshape(-1, packed.shape[1])


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int, int]:
    """The shape of the bytes of so many integers [rows, columns]."""
    per_byte = 8 if bits == 3 else 8 // bits
    return 3 if bits == 3 else 1, -(-rows // per_byte), columns


def packed_bytes(
    inputs: int, outputs: int, bits: int, group_size: int, *, zeros: bool, scale_bytes: int
) -> int:
    """What a weight [inputs, outputs] takes in the file: its integers, a scale of ``scale_bytes`` for every
    ``group_size`` inputs (0: all) of an output and, with ``zeros``, a zero point."""
    span = min(group_size, inputs) or inputs
    groups = -(-inputs // span)
    integers = math.prod(packed_shape(groups * span, outputs, bits))
    zero_points = math.prod(packed_shape(groups, outputs, bits)) if zeros else 0
    return integers + zero_points + groups * outputs * scale_bytes


def unpack_name(bits: int, zeros: bool) -> str:
    """The name of the function for ``bits`` and with or without zero points."""
    return f"Unpack{bits}WithZeros" if zeros else f"Unpack{bits}"


def unpack_function(bits: int, zeros: bool, opset: int) -> onnx.FunctionProto:
    """The body in operators of ``opset``, 13 to 26.

    Inputs ``packed``, ``scale`` and, with ``zeros``, ``zero_point``; attributes ``rows`` [groups · size], ``grid``
    [groups, size, -1], ``channels`` [K] and ``to``, the float type of the result [K, N].
    """
    inputs = "packed, scale, zero_point" if zeros else "packed, scale"
    if zeros:
        zero = [
            *_lines("zero_point", "zeros", bits),
            "groups = Shape(scale)",
            "one = Constant<value = int64[1] {1}>()",
        ]
        zero += [
            "count = Slice(groups, start, one)",
            "some_zeros = Slice(zeros, start, count, start)",
            "wide_zeros = Cast<to = 1>(some_zeros)",
            "zero = Unsqueeze(wide_zeros, one)",
        ]
    else:
        zero = [f"zero = Constant<value = float {{{2 ** (bits - 1)}.0}}>()"]
    lines = [
        "start = Constant<value = int64[1] {0}>()",
        *_lines("packed", "integers", bits),
        "row_count = Constant<value_ints: ints = @rows>()",
        "grid_shape = Constant<value_ints: ints = @grid>()",
        "input_count = Constant<value_ints: ints = @channels>()",
        *zero,
        "whole = Slice(integers, start, row_count, start)",
        "wide = Cast<to = 1>(whole)",
        "grouped = Reshape(wide, grid_shape)",
        "steps = Sub(grouped, zero)",
        "wide_scale = Cast<to = 1>(scale)",
        "values = Mul(steps, wide_scale)",
        "flat = Flatten<axis = 2>(values)",
        "matrix = Slice(flat, start, input_count, start)",
        "W = Cast<to: int = @to>(matrix)",
    ]
    body = "\n".join(lines)
    head = f'<domain: "{UNPACK_DOMAIN}", opset_import: ["" : {opset}]>'
    proto: onnx.FunctionProto = onnx.parser.parse_function(
        f"{head} {unpack_name(bits, zeros)} <rows, grid, channels, to> ({inputs}) => (W) {{\n{body}\n}}"
    )
    return proto


def _lines(name: str, result: str, bits: int) -> list[str]:
    """Operators that unpack the planes ``name`` to ``result`` [K', N], uint8 or, of 3 bits, float32."""
    if bits == 8:
        return [f"{result} = Flatten<axis = 2>({name})"]
    if bits != 3:
        return _shifted(name, result, bits, rank=3)
    return [
        f"{name}_two = Constant<value = int64[1] {{2}}>()",
        f"{name}_three = Constant<value = int64[1] {{3}}>()",
        f"{name}_low_bits = Slice({name}, start, {name}_two, start)",
        f"{name}_high_bits = Slice({name}, {name}_two, {name}_three, start)",
        *_shifted(f"{name}_low_bits", f"{name}_low", 2, rank=4),
        *_shifted(f"{name}_high_bits", f"{name}_high", 1, rank=3),
        f"{name}_low_floats = Cast<to = 1>({name}_low)",
        f"{name}_high_floats = Cast<to = 1>({name}_high)",
        f"{name}_four = Constant<value = float {{4.0}}>()",
        f"{name}_raised = Mul({name}_high_floats, {name}_four)",
        f"{result} = Add({name}_low_floats, {name}_raised)",
    ]


def _shifted(name: str, result: str, bits: int, rank: int) -> list[str]:
    shifts = list(range(0, 8, bits))
    shape = [len(shifts), *[1] * (rank - 1)]
    return [
        f"{name}_shifts = Constant<value = uint8{shape} {{{', '.join(map(str, shifts))}}}>()",
        f"{name}_modulus = Constant<value = uint8 {{{2**bits}}}>()",
        f'{name}_shifted = BitShift<direction = "RIGHT">({name}, {name}_shifts)',
        f"{name}_planes = Mod({name}_shifted, {name}_modulus)",
        f"{result} = Flatten<axis = {rank - 1}>({name}_planes)",
    ]
