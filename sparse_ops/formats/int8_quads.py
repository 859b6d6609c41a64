"""``int8_quads`` and ``int8_dense``: integers of 8 bits with a scale for each output, four inputs together.

A weight [K, N] is V · scales, V int8. A *quad* is what one output has of four neighbouring inputs, the last ones padded
with zeros: what one instruction multiplies. ``int8_quads`` stores the quads with an integer other than 0, and lies as
:mod:`.chunked_csc` lies, with quads in the place of weights and of inputs:

=======  =======  ============  =====================================================================
part     dtype    shape         meaning
=======  =======  ============  =====================================================================
values   int8     [entries·4]   stored quads
offsets  uint8    [entries]     quad of inputs of each entry, relative to the first of its chunk
counts   uint8    [segments]    entries of each segment, at least 1
rows     uint8    [segments]    output of each segment, relative to the block
scales   float32  [N]
=======  =======  ============  =====================================================================

Sizes: K (at most 32764, so that sums fit 32 bits), N, ``chunk`` (1..255 quads) and ``block`` (1..256 outputs).
``int8_dense`` stores all quads and needs no places: ``values`` [blocks, chunks, block, chunk, 4] with whole chunks and
blocks, padded with zeros, and ``scales``; ``block`` is a multiple of 4. Integers beyond -64..64 make the products
slower on processors that add pairs of them in 16 bits, never wrong.

Cost: 5 bytes a quad that is stored, and 2 bytes a segment; or 1 byte a weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sparse_onnx.sparse_ops.formats.base import FormatError, Part
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, ENTRY_STARTS, GROUP_STARTS, PackedWeight

__all__ = [
    "DENSE",
    "MAX_INPUTS",
    "QUADS",
    "SIZES",
    "Int8Weight",
    "decoder",
    "join",
    "pack_dense",
    "pack_maps",
    "pack_quads",
    "parts",
    "read",
    "whole_block",
]

MAX_INPUTS = 32764
SIZES = ("K", "N", "chunk", "block")

QUADS, DENSE = "int8_quads", "int8_dense"
"""The formats, by their names."""

_QUAD = 4
_FULL_ROWS = 4  # outputs that a kernel computes together where no quad is missing

# Chosen on measurements: the activations of one chunk, 64 or 128 tokens, stay in the first-level cache, and segments
# are long enough at 90 % sparsity.
_CHUNK, _BLOCK = 96, 64
_WHOLE = 16
_MAP_CHUNK = 64  # the same of convolutions, whose tiles are the widest


def parts(dense: bool) -> tuple[Part, ...]:
    """In the order of the operator's inputs."""
    places = (Part("offsets", np.uint8), Part("counts", np.uint8), Part("rows", np.uint8))
    return (Part("values", np.int8), *(() if dense else places), Part("scales", np.float32))


@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A stored weight; see the module's table for the arrays. ``places`` are offsets, counts and rows; None where all
    quads are stored."""

    K: int
    N: int
    chunk: int
    block: int
    values: np.ndarray
    scales: np.ndarray
    places: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def dense(self) -> bool:
        return self.places is None

    @property
    def _quads(self) -> int:
        return -(-self.K // _QUAD)

    @property
    def _whole(self) -> tuple[int, int, int, int, int]:
        """The shape of all quads."""
        return -(-self.N // self.block), -(-self._quads // self.chunk), self.block, self.chunk, _QUAD

    def arrays(self) -> dict[str, np.ndarray]:
        """The parts by name, in the order of the operator's inputs."""
        stored = (self.values, *(self.places or ()), self.scales)
        return {part.name: array for part, array in zip(parts(self.dense), stored, strict=True)}

    def attributes(self) -> dict[str, int | str]:
        """The sizes in order, and ``format``."""
        sizes = (self.K, self.N, self.chunk, self.block)
        return {**dict(zip(SIZES, sizes, strict=True)), "format": DENSE if self.dense else QUADS}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def validate(self) -> None:
        """Raise FormatError unless the arrays obey every rule of the format (the kernel checks the same)."""
        if not 1 <= self.K <= MAX_INPUTS or self.N < 1:
            raise FormatError(f"K must lie in 1..{MAX_INPUTS} and N be at least 1, not {self.K} and {self.N}")
        if not 1 <= self.chunk <= 255 or not 1 <= self.block <= 256:
            raise FormatError(
                f"chunk must lie in 1..255 and block in 1..256, not {self.chunk} and {self.block}"
            )
        if self.scales.shape != (self.N,):
            raise FormatError(f"scales must have {self.N} elements")
        if not self.dense:
            if self.values.size % _QUAD:
                raise FormatError("values must have four elements for each offset")
            return self._in_places().validate()
        if self.block % _FULL_ROWS:
            raise FormatError(f"block must be a multiple of {_FULL_ROWS}, not {self.block}")
        if self.values.shape != (int(np.prod(self._whole, dtype=object)),):
            raise FormatError("values must have all quads of whole chunks and blocks")
        return None

    def _in_places(self) -> PackedWeight:
        """The quads as if each were one weight."""
        assert self.places is not None
        words = np.ascontiguousarray(self.values).view(np.int32)
        offsets, counts, rows = self.places
        return PackedWeight(self._quads, self.N, self.chunk, self.block, 1, words, offsets, counts, rows)

    def integers(self) -> np.ndarray:
        """V, int8 [K, N]. Raises FormatError."""
        self.validate()
        columns = self._whole[0] * self.block
        if self.dense:
            turned = self.values.reshape(self._whole).transpose(1, 3, 4, 0, 2)
        else:
            turned = np.zeros((self._quads, _QUAD, columns), np.int8)
            k, n = self._in_places().places()
            turned[k, :, n] = self.values.reshape(-1, _QUAD)
        return np.ascontiguousarray(turned.reshape(-1, columns)[: self.K, : self.N])

    def unpack(self) -> np.ndarray:
        """The weight [K, N] float32. Raises FormatError."""
        dense: np.ndarray = self.integers() * self.scales
        return dense


def _checked(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The quads [quads, N, 4] of V."""
    if integers.ndim != 2 or integers.dtype != np.int8 or 0 in integers.shape:
        raise ValueError(
            f"a non-empty int8 matrix [K, N] is packed, not {integers.dtype}{list(integers.shape)}"
        )
    K, N = integers.shape
    if K > MAX_INPUTS:
        raise ValueError(f"at most {MAX_INPUTS} inputs are packed, not {K}")
    if scales.shape != (N,) or scales.dtype != np.float32:
        raise ValueError(f"scales must be float32 [{N}], not {scales.dtype}{list(scales.shape)}")
    padded = np.zeros((-(-K // _QUAD) * _QUAD, N), np.int8)
    padded[:K] = integers
    return padded.reshape(-1, _QUAD, N).transpose(0, 2, 1)


def _even(size: int, most: int, step: int = 1) -> int:
    """The smallest multiple of ``step`` that cuts ``size`` into as many parts as ``most`` does."""
    return -(-size // (-(-size // most)) // step) * step


def pack_quads(
    integers: np.ndarray, scales: np.ndarray, *, chunk: int | None = None, block: int | None = None
) -> Int8Weight:
    """V int8 [K, N] and its scales float32 [N] with the quads that are not zero.

    Raises ValueError for other arrays, and for a ``chunk`` or ``block`` out of range.
    """
    quads = _checked(integers, scales)
    count, N, _ = quads.shape
    chunk, block = chunk or _even(count, _CHUNK), block or _even(N, _BLOCK)
    there = np.asarray(quads.any(axis=2), np.float32)
    packed = CHUNKED_CSC.pack(there, chunk=chunk, block=block, width=1)
    k, n = packed.places()
    values = np.zeros((k.size, _QUAD), np.int8)
    inside = n < N
    values[inside] = quads[k[inside], n[inside]]
    places = (packed.offsets, packed.counts, packed.rows)
    return Int8Weight(integers.shape[0], N, packed.chunk, packed.block, values.reshape(-1), scales, places)


def pack_dense(
    integers: np.ndarray, scales: np.ndarray, *, chunk: int | None = None, block: int | None = None
) -> Int8Weight:
    """As :func:`pack_quads`, with all quads; ``block`` must be a multiple of 4."""
    quads = _checked(integers, scales)
    count, N, _ = quads.shape
    chunk, block = chunk or _even(count, _CHUNK), block or _even(N, _BLOCK, _FULL_ROWS)
    chunks, blocks = -(-count // chunk), -(-N // block)
    whole = np.zeros((chunks * chunk, blocks * block, _QUAD), np.int8)
    whole[:count, :N] = quads
    values = whole.reshape(chunks, chunk, blocks, block, _QUAD).transpose(2, 0, 3, 1, 4)
    weight = Int8Weight(integers.shape[0], N, chunk, block, np.ascontiguousarray(values).reshape(-1), scales)
    try:
        weight.validate()
    except FormatError as error:
        raise ValueError(str(error)) from None
    return weight


def pack_maps(integers: np.ndarray, scales: np.ndarray, groups: int = 1) -> Int8Weight:
    """As :func:`pack_quads` for a convolution, whose blocks have outputs of one of its ``groups``. Raises ValueError
    where these are not of equal size, too."""
    quads, N = _checked(integers, scales).shape[:2]
    if groups < 1 or N % groups:
        raise ValueError(f"{N} output channels cannot be cut into {groups} groups")
    own = N // groups
    whole = next(size for size in range(min(own, _BLOCK), 0, -1) if own % size == 0)
    block = _even(N, _BLOCK) if groups == 1 else whole
    return pack_quads(integers, scales, chunk=_even(quads, _MAP_CHUNK), block=block)


def read(dense: bool, sizes: Mapping[str, int], arrays: Sequence[np.ndarray]) -> Int8Weight:
    """The weight of a node with these :data:`SIZES` and :func:`parts`, in their order. Raises FormatError if they
    cannot be one; what the parts hold is not looked at."""
    for part, array in zip(parts(dense), arrays, strict=True):
        if array.dtype != part.dtype or array.ndim != 1:
            raise FormatError(f"{part.name} must be a vector of {np.dtype(part.dtype)}")
    values, *rest, scales = arrays
    places = None if dense else (rest[0], rest[1], rest[2])
    return Int8Weight(**sizes, values=values, scales=scales, places=places)


def whole_block(outputs: Sequence[int]) -> int:
    """The largest size of blocks, a multiple of 16, that cuts linears with so many ``outputs`` each into whole ones; 0
    if there is none."""
    common = math.gcd(*outputs)
    return next((size for size in range(_BLOCK, 0, -_WHOLE) if common % size == 0), 0)


def join(weights: Sequence[Int8Weight]) -> Int8Weight:
    """The weights [K, Ni] of several linears side by side, as one [K, sum of Ni] in blocks of one linear each.

    Raises FormatError if one is damaged, and ValueError unless they have the same format and K, and whole blocks
    (:func:`whole_block`).
    """
    first, block = weights[0], whole_block([weight.N for weight in weights])
    if not block or any((weight.K, weight.dense) != (first.K, first.dense) for weight in weights):
        raise ValueError("join() takes weights of one format, and K, in whole blocks")
    integers = np.concatenate([weight.integers() for weight in weights], axis=1)
    scales = np.concatenate([weight.scales for weight in weights])
    pack = pack_dense if first.dense else pack_quads
    return pack(integers, scales, block=block)


# Every line has only constants behind it and a shape that can be inferred, so that ORT folds the decoder when the
# session is created; the places are found as in chunked_csc.
_SIZES = """
    k = Constant<value_int: int = @K>()
    n = Constant<value_int: int = @N>()
    c = Constant<value_int: int = @chunk>()
    b = Constant<value_int: int = @block>()
    zero = Constant<value = int64 {0}>()
    one = Constant<value = int64 {1}>()
    rest = Constant<value = int64 {3}>()
    four = Constant<value = int64 {4}>()
    axis0 = Constant<value = int64[1] {0}>()
    axis1 = Constant<value = int64[1] {1}>()
    flat_shape = Constant<value = int64[1] {-1}>()
    one_quad = Constant<value = int64[1] {4}>()
    k_padded = Add(k, rest)
    quads = Div(k_padded, four)
    quads_less = Sub(quads, one)
    quads_full = Div(quads_less, c)
    chunks = Add(quads_full, one)
    n_less = Sub(n, one)
    n_full = Div(n_less, b)
    blocks = Add(n_full, one)
    columns = Mul(blocks, b)
    k_1 = Unsqueeze(k, axis0)
    n_1 = Unsqueeze(n, axis0)
    c_1 = Unsqueeze(c, axis0)
    b_1 = Unsqueeze(b, axis0)
    columns_1 = Unsqueeze(columns, axis0)
"""
_FROM_PLACES = (
    """
    column_shape = Constant<value = int64[2] {-1, 1}>()
"""
    + GROUP_STARTS
    + """
    row_shape = Concat<axis = 0>(flat_shape, b_1)
    rows_64 = Cast<to = 7>(rows)
    row_grid = Reshape(rows_64, row_shape)
"""
    + ENTRY_STARTS
    + """
    position_64 = Cast<to = 7>(entry_position)
    position = Reshape(position_64, column_shape)
    all_quads = Mul(quads, columns)
    all_1 = Unsqueeze(all_quads, axis0)
    all_shape = Concat<axis = 0>(all_1, one_quad)
    nothing = ConstantOfShape<value = int8[1] {0}>(all_shape)
    quad_shape = Concat<axis = 0>(flat_shape, one_quad)
    stored = Reshape(values, quad_shape)
    scattered = ScatterND(nothing, position, stored)
    grid_shape = Concat<axis = 0>(flat_shape, columns_1, one_quad)
    grid = Reshape(scattered, grid_shape)
    turned = Transpose<perm = [0, 2, 1]>(grid)
"""
)
_FROM_ALL = """
    blocks_1 = Unsqueeze(blocks, axis0)
    chunks_1 = Unsqueeze(chunks, axis0)
    grid_shape = Concat<axis = 0>(blocks_1, chunks_1, b_1, c_1, one_quad)
    grid = Reshape(values, grid_shape)
    turned = Transpose<perm = [1, 3, 4, 0, 2]>(grid)
"""
_TAKE = """
    padded_shape = Concat<axis = 0>(flat_shape, columns_1)
    padded = Reshape(turned, padded_shape)
    first = Constant<value = int64[2] {0, 0}>()
    last = Concat<axis = 0>(k_1, n_1)
    both = Constant<value = int64[2] {0, 1}>()
    V = Slice(padded, first, last, both)
"""


def decoder(dense: bool) -> str:
    """Lines of a function body that make V int8 [K, N] from the stored tensors. ``axis0`` may be used behind them."""
    return _SIZES + (_FROM_ALL if dense else _FROM_PLACES) + _TAKE


def expected_nbytes(shape: Sequence[int], kept: float) -> float:
    """Bytes of :func:`pack_quads` for a weight of that ``shape`` [K, N] of which a share ``kept`` of all quads is
    stored."""
    K, N = shape
    count = -(-K // _QUAD)
    chunks = -(-count // _CHUNK)
    return (_QUAD + 1) * max(kept * count * N, chunks * N) + 2 * chunks * N + 4 * N
