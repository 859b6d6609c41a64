"""Weights of few bits without their zeros: ``bitmap4`` and ``n_of_16``, with zero points or without, and ``bitmap8``.

A weight W [K, N] is ``levels · scale``: whole numbers of 4 or 8 bits, 0 among them, and a positive float16 scale for
each output and each ``group`` of inputs. Outputs are stored in blocks of 16, the last one filled up with zeros.

======  =======  =====================  =====================================================================
part    dtype    shape                  meaning
======  =======  =====================  =====================================================================
masks   uint8    [blocks · quads · 8]   bitmaps only: for each four inputs (a quad) 64 bits, the lowest first;
                                        bit 4j + i is set if output j keeps input i
values  uint8    [bytes]                the levels that are kept, block by block
scales  float16  [blocks · groups · 16]
zeros   uint8    [blocks · groups · 16] only with zero points, 0 to 15: what is stored for the level 0
======  =======  =====================  =====================================================================

Sizes: K, N, ``group`` (16, 32, 64 or 128) and, of ``n_of_16``, ``kept`` (1 to 15).

- ``bitmap8``: a byte for each bit that is set, in their order: level + 128.
- ``bitmap4``: half a byte for each, the low half first: level + 8, or level + zero point. Each quad begins a byte.
- ``n_of_16``: every output keeps ``kept`` of every 16 inputs; where fewer are not zero, zeros fill up. A byte is
  position + 16 · (level modulo 16), or 16 · (level + zero point), the position within its 16 inputs; these rise
  strictly. For every 64 inputs of a block come ``kept`` pieces [16 outputs, 4]: the 4 · ``kept`` bytes of an output,
  four in each piece. ``group`` is 64 or 128.

Cost: 1/8 byte a weight and 1/2 or 1 byte for each that is kept, or ``kept`` / 16 of a byte a weight; scales 2 bytes for
each ``group``. ``bitmap4`` takes any mask, and less than ``n_of_16`` where more than a quarter is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sparse_onnx.sparse_ops.formats.base import FormatError

__all__ = [
    "LAYOUTS",
    "Layout",
    "PackedLevels",
    "decoder",
    "fits_half",
    "join",
    "most_of_16",
    "pack",
    "read",
]

_BLOCK, _QUAD, _SPAN, _SIXTEEN = 16, 4, 64, 16
_PIECE = _BLOCK * _QUAD
_AT_ONCE = 1 << 22  # weights: bounds the scratch


@dataclasses.dataclass(frozen=True)
class Layout:
    """How levels lie: ``name`` is the value of the attribute ``format``, ``bits`` those of a level, ``masks`` and
    ``zeros`` whether the parts of these names are there, ``groups`` the sizes that a group may have."""

    name: str
    bits: int
    masks: bool
    groups: tuple[int, ...]
    zeros: bool = False

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the attributes."""
        return ("K", "N", "group") if self.masks else ("K", "N", "group", "kept")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return ("masks",) * self.masks + ("values", "scales") + ("zeros",) * self.zeros

    @property
    def middle(self) -> int:
        """What is added to the levels of a bitmap."""
        return 1 << self.bits - 1

    def whole_blocks(self, N: int) -> bool:
        """Whether so many outputs of one linear may have those of another behind them."""
        return N % _BLOCK == 0


LAYOUTS = {
    layout.name + "_zeros" * layout.zeros: layout
    for layout in (
        Layout("bitmap4", 4, True, (16, 32, 64, 128)),
        Layout("bitmap4", 4, True, (16, 32, 64, 128), zeros=True),
        Layout("bitmap8", 8, True, (16, 32, 64, 128)),
        Layout("n_of_16", 4, False, (64, 128)),
        Layout("n_of_16", 4, False, (64, 128), zeros=True),
    )
}


@dataclasses.dataclass(frozen=True, eq=False)
class PackedLevels:
    """A stored weight; see the module's table. ``masks`` and ``zeros`` are empty and ``kept`` is 0 where the layout
    has none."""

    layout: Layout
    K: int
    N: int
    group: int
    kept: int
    masks: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def _blocks(self) -> int:
        return -(-self.N // _BLOCK)

    @property
    def _groups(self) -> int:
        return -(-self.K // self.group)

    def arrays(self) -> dict[str, np.ndarray]:
        """The parts by name, in the order of the operator's inputs."""
        return {name: getattr(self, name) for name in self.layout.parts}

    def attributes(self) -> dict[str, int | str]:
        """The sizes in order, and ``format``."""
        return {**{name: getattr(self, name) for name in self.layout.sizes}, "format": self.layout.name}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def validate(self) -> None:
        """Raise FormatError unless the arrays obey every rule of the format (the kernel checks the same)."""
        if self.group not in self.layout.groups:
            raise FormatError(f"group must be one of {self.layout.groups}, not {self.group}")
        if not self.layout.masks and not 1 <= self.kept < _SIXTEEN:
            raise FormatError(f"kept must lie in 1..15, not {self.kept}")
        self._expect("scales", self._blocks * self._groups * _BLOCK)
        if not (np.isfinite(self.scales) & ~np.signbit(self.scales)).all():
            raise FormatError("a scale is negative, Inf or NaN")
        if self.layout.zeros:
            self._expect("zeros", self.scales.size)
            if (self.zeros > 15).any():
                raise FormatError("an element of zeros is more than 15")
        if self.layout.masks:
            self._expect("masks", self._blocks * -(-self.K // _QUAD) * 8)
            self._expect("values", int(self._bytes(self._kept().sum(1)).sum()))
        else:
            self._expect("values", self._blocks * -(-self.K // _SPAN) * self.kept * _PIECE)
            if (np.diff(self._entries()[0], axis=-1) <= 0).any():
                raise FormatError(f"positions must rise strictly within {_SIXTEEN} inputs")

    def _expect(self, name: str, elements: int) -> None:
        if getattr(self, name).shape != (elements,):
            raise FormatError(f"{name} must have {elements} elements")

    def _kept(self) -> np.ndarray:
        """bool [blocks · quads, 64]"""
        return np.unpackbits(self.masks.reshape(-1, 8), axis=1, bitorder="little").view(bool)

    def _bytes(self, counts: np.ndarray) -> np.ndarray:
        """How many bytes of values so many levels of a quad are."""
        return counts.astype(np.int64) if self.layout.bits == 8 else (counts.astype(np.int64) + 1) // 2

    def _entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and levels, both [blocks · spans, 16 outputs, 4, kept]."""
        pieces = self.values.reshape(-1, self.kept, _BLOCK, _QUAD).transpose(0, 2, 1, 3)
        entries = pieces.reshape(-1, _BLOCK, _SPAN // _SIXTEEN, self.kept)
        positions = (entries & 15).astype(np.int64)
        if not self.layout.zeros:
            return positions, entries.view(np.int8) >> 4
        zero = self._zero_of(np.arange(0, self.K, _SPAN)).reshape(-1, _BLOCK, 1, 1)
        return positions, (entries >> 4).astype(np.int16) - zero

    def _zero_of_quads(self) -> np.ndarray:
        """What is stored for the level 0, int16 [blocks · quads, 64]."""
        quads = np.arange(0, self.K, _QUAD)
        if not self.layout.zeros:
            return np.full((self._blocks * len(quads), _PIECE), self.layout.middle, np.int16)
        return np.repeat(self._zero_of(quads).reshape(-1, _BLOCK), _QUAD, axis=1)

    def _zero_of(self, inputs: np.ndarray) -> np.ndarray:
        """Zero points of some inputs, int16 [blocks, inputs, 16]."""
        return self.zeros.reshape(self._blocks, -1, _BLOCK)[:, inputs // self.group].astype(np.int16)

    def levels(self) -> np.ndarray:
        """int16 [K, N]. Raises FormatError."""
        self.validate()
        if self.layout.masks:
            kept = self._kept()
            values = self.values
            if self.layout.bits == 4:
                values = np.stack([values & 15, values >> 4], 1).reshape(-1)
            sizes = self._bytes(kept.sum(1)) * (8 // self.layout.bits)
            starts = np.cumsum(sizes) - sizes
            place = (starts[:, None] + np.cumsum(kept, axis=1) - 1)[kept]
            quads = np.zeros(kept.shape, np.int16)
            quads[kept] = values[place].astype(np.int16) - self._zero_of_quads()[kept]
            tiles = quads.reshape(self._blocks, -1, _BLOCK, _QUAD)
        else:
            position, level = self._entries()
            sixteens = np.zeros((*position.shape[:-1], _SIXTEEN), np.int16)
            np.put_along_axis(sixteens, position, level.astype(np.int16), axis=-1)
            tiles = sixteens.reshape(self._blocks, -1, _BLOCK, _SPAN)
        return np.ascontiguousarray(
            tiles.transpose(1, 3, 0, 2).reshape(-1, self._blocks * _BLOCK)[: self.K, : self.N]
        )

    def nonzero(self) -> int:
        """How many levels are not 0; in a bitmap, how many are kept. Raises FormatError."""
        self.validate()
        if self.layout.masks:
            found = np.unpackbits(self.masks).sum(dtype=np.int64)
        elif self.layout.zeros:
            found = np.count_nonzero(self.levels())
        else:
            found = np.count_nonzero(self.values >> 4)
        return min(int(found), self.K * self.N)  # a file may keep what fills up blocks

    def unpack(self) -> np.ndarray:
        """The weight [K, N] float32. Raises FormatError."""
        levels = self.levels()
        scale = self.scales.reshape(self._blocks, self._groups, _BLOCK).transpose(1, 0, 2)
        wide = scale.reshape(self._groups, -1)[:, : self.N].astype(np.float32)
        matrix: np.ndarray = levels.astype(np.float32) * wide[np.arange(self.K) // self.group]
        return matrix


def read(layout: Layout, sizes: Mapping[str, int], arrays: Sequence[np.ndarray]) -> PackedLevels:
    """The weight of a node with these attributes and parts, both in the layout's order. Raises FormatError if they
    cannot be one; what the parts hold is not looked at."""
    if min(sizes.values()) < 1:
        raise FormatError(f"{', '.join(sizes)} must be positive")
    parts = dict(zip(layout.parts, arrays, strict=True))
    for name, array in parts.items():
        dtype = np.float16 if name == "scales" else np.uint8
        if array.dtype != dtype or array.ndim != 1:
            raise FormatError(f"{name} must be a vector of {np.dtype(dtype)}")
    nothing = np.zeros(0, np.uint8)
    masks, values, scales, zeros = (
        parts.get(name, nothing) for name in ("masks", "values", "scales", "zeros")
    )
    K, N, group = sizes["K"], sizes["N"], sizes["group"]
    return PackedLevels(layout, K, N, group, sizes.get("kept", 0), masks, values, scales, zeros)


def join(weights: Sequence[PackedLevels]) -> PackedLevels:
    """The weights [K, Ni] of several linears side by side, as one [K, sum of Ni]. Raises ValueError unless they have
    the same layout and sizes, and all but the last whole blocks."""
    first = weights[0]
    for weight in weights:
        same = dataclasses.replace(weight, N=first.N).attributes() == first.attributes()
        whole = weight is weights[-1] or weight.layout.whole_blocks(weight.N)
        if weight.layout != first.layout or not same or not whole:
            raise ValueError("join() takes weights of one layout and one size of group, in whole blocks")
    masks, values, scales, zeros = (
        np.concatenate(parts)
        for parts in zip(*((w.masks, w.values, w.scales, w.zeros) for w in weights), strict=True)
    )
    N = sum(weight.N for weight in weights)
    return dataclasses.replace(first, N=N, masks=masks, values=values, scales=scales, zeros=zeros)


def fits_half(scale: np.ndarray) -> bool:
    """Whether all of ``scale`` are finite float16 numbers above 0."""
    with np.errstate(over="ignore"):
        halves = scale.astype(np.float16)
    return bool((halves == scale).all() and (np.isfinite(halves) & (halves > 0)).all())


def most_of_16(keep: np.ndarray) -> int:
    """How many of 16 inputs an output keeps at most; ``keep`` is bool [K, N]."""
    starts = np.arange(0, len(keep), _SIXTEEN)
    return int(np.add.reduceat(keep, starts, axis=0, dtype=np.int16).max())


def pack(
    levels: np.ndarray,
    scale: np.ndarray,
    group: int,
    layout: Layout,
    zero_point: np.ndarray | None = None,
) -> PackedLevels:
    """``levels`` [K, N] of any integer type and ``scale`` float32 [groups, N] in ``layout``; ``zero_point`` uint8
    [groups, N] is that of a layout with such. In ``n_of_16`` as many are kept as the output with the most of them has.

    Raises ValueError for what the layout cannot hold: other groups, more bits, more than 15 of 16, scales that are no
    float16.
    """
    (K, N), groups = levels.shape, -(-levels.shape[0] // group)
    if group not in layout.groups or scale.shape != (groups, N):
        raise ValueError(f"pack() takes groups of {layout.groups}, not scales {list(scale.shape)} of {group}")
    if not fits_half(scale):
        raise ValueError("pack() takes scales that are float16 numbers above 0")
    zero: np.ndarray | int = layout.middle
    if layout.zeros:
        if zero_point is None or zero_point.shape != scale.shape:
            raise ValueError("pack() takes a zero point for each scale in this layout")
        zero = zero_point.astype(np.int16)[np.arange(K) // group]
    stored = levels + zero
    if stored.min() < 0 or stored.max() >= 2 * layout.middle or np.max(zero) >= 2 * layout.middle:
        raise ValueError(f"pack() takes levels of {layout.bits} bits")
    kept = 0 if layout.masks else max(1, most_of_16(levels != 0))
    if kept == _SIXTEEN:
        raise ValueError("pack() takes at most 15 of 16 inputs in this layout")
    nothing = np.zeros(0, np.uint8)
    masks, zeros = nothing, nothing
    if layout.masks:
        tiles = zip(_tiles(levels, _QUAD), _tiles(stored, _QUAD), strict=True)
        found = [_pack_bitmap(tile, integers, layout) for tile, integers in tiles]
        masks = np.concatenate([part for part, _ in found])
        values = np.concatenate([part for _, part in found])
    else:
        own = stored if layout.zeros else levels
        pairs = zip(_tiles(levels, _SPAN), _tiles(own, _SPAN), strict=True)
        values = np.concatenate([_pack_positions(tile, integers, kept) for tile, integers in pairs])
    if layout.zeros:
        assert zero_point is not None
        zeros = _by_block(zero_point.astype(np.uint8))
    return PackedLevels(layout, K, N, group, kept, masks, values, _by_block(scale.astype(np.float16)), zeros)


def _by_block(of_groups: np.ndarray) -> np.ndarray:
    """``of_groups`` [groups, N] as a vector, block by block, the last one filled up with zeros."""
    groups, N = of_groups.shape
    padded = np.zeros((groups, -(-N // _BLOCK) * _BLOCK), of_groups.dtype)
    padded[:, :N] = of_groups
    return np.ascontiguousarray(padded.reshape(groups, -1, _BLOCK).transpose(1, 0, 2)).reshape(-1)


def _tiles(levels: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Some blocks after the other, as int16 [blocks, inputs / ``step``, 16, ``step``]."""
    (K, N), rows = levels.shape, -(-len(levels) // step) * step
    width = max(1, _AT_ONCE // (rows * _BLOCK)) * _BLOCK
    for first in range(0, N, width):
        part = levels[:, first : first + width]
        tile = np.zeros((rows, -(-part.shape[1] // _BLOCK) * _BLOCK), np.int16)
        tile[:K, : part.shape[1]] = part
        yield tile.reshape(-1, step, tile.shape[1] // _BLOCK, _BLOCK).transpose(2, 0, 3, 1)


def _pack_bitmap(tile: np.ndarray, integers: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the levels ``tile``, and values, which are those of ``integers``."""
    keep = tile.reshape(-1, _PIECE) != 0
    masks = np.packbits(keep, axis=1, bitorder="little").reshape(-1)
    stored = integers.reshape(-1, _PIECE)[keep].astype(np.uint8)
    if layout.bits == 8:
        return masks, stored
    sizes = (keep.sum(1) + 1) // 2 * 2
    starts = np.cumsum(sizes) - sizes
    halves = np.zeros(int(sizes.sum()), np.uint8)
    halves[(starts[:, None] + np.cumsum(keep, axis=1) - 1)[keep]] = stored
    return masks, halves[::2] | halves[1::2] << 4


def _pack_positions(tile: np.ndarray, integers: np.ndarray, kept: int) -> np.ndarray:
    """Values of the levels ``tile``, as which ``integers`` are stored."""
    sixteens = tile.reshape(*tile.shape[:3], _SPAN // _SIXTEEN, _SIXTEEN)
    first = np.argsort(sixteens == 0, axis=-1, kind="stable")[..., :kept]
    position = np.sort(first, axis=-1)
    level = np.take_along_axis(integers.reshape(sixteens.shape), position, -1)
    entries = (position | (level & 15) << 4).astype(np.uint8).reshape(*tile.shape[:3], kept, _QUAD)
    return np.ascontiguousarray(entries.transpose(0, 1, 3, 2, 4)).reshape(-1)


# Lines of a function body that make W [K, N] of the parts. Every line has only constants behind it and a shape that
# can be inferred, so that ONNX Runtime folds them when it loads the model.
_SIZES = """
    k = Constant<value_int: int = @K>()
    n = Constant<value_int: int = @N>()
    group = Constant<value_int: int = @group>()
    zero = Constant<value = int64 {0}>()
    one = Constant<value = int64 {1}>()
    sixteen = Constant<value = int64 {16}>()
    axis0 = Constant<value = int64[1] {0}>()
    axis1 = Constant<value = int64[1] {1}>()
    flat_shape = Constant<value = int64[1] {-1}>()
    sixteen_1 = Constant<value = int64[1] {16}>()
    k_1 = Unsqueeze(k, axis0)
    n_1 = Unsqueeze(n, axis0)
    group_1 = Unsqueeze(group, axis0)
    n_less = Sub(n, one)
    n_full = Div(n_less, sixteen)
    blocks = Add(n_full, one)
    blocks_1 = Unsqueeze(blocks, axis0)
    outputs_1 = Mul(blocks_1, sixteen_1)
    k_less = Sub(k, one)
    k_full = Div(k_less, group)
    groups = Add(k_full, one)
    groups_1 = Unsqueeze(groups, axis0)
    whole_1 = Mul(groups_1, group_1)"""

# From `tiles` [blocks, .., 16, step], the levels of which are float32.
_MATRIX = """
    by_inputs = Transpose<perm = [1, 3, 0, 2]>(tiles)
    matrix_shape = Concat<axis = 0>(flat_shape, outputs_1)
    padded_levels = Reshape(by_inputs, matrix_shape)
    starts = Constant<value = int64[2] {0, 0}>()
    ends = Concat<axis = 0>(k_1, n_1)
    levels = Slice(padded_levels, starts, ends)
    scales_shape = Concat<axis = 0>(blocks_1, groups_1, sixteen_1)
    scales_32 = Cast<to = 1>(scales)
    scales_3 = Reshape(scales_32, scales_shape)
    scales_by_group = Transpose<perm = [1, 0, 2]>(scales_3)
    scale_shape = Concat<axis = 0>(groups_1, outputs_1)
    padded_scale = Reshape(scales_by_group, scale_shape)
    scale_ends = Concat<axis = 0>(groups_1, n_1)
    group_scale = Slice(padded_scale, starts, scale_ends)
    inputs = Range(zero, k, one)
    group_of = Div(inputs, group)
    scale = Gather<axis = 0>(group_scale, group_of)
    W = Mul(levels, scale)"""

_BITMAP = """
    shifts = Constant<value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}>()
    seven = Constant<value = uint8 {7}>()
    column_shape = Constant<value = int64[2] {-1, 1}>()
    quad_shape = Constant<value = int64[2] {-1, 64}>()
    mask_column = Reshape(masks, column_shape)
    shifted_masks = BitShift<direction = "RIGHT">(mask_column, shifts)
    lowest = BitShift<direction = "LEFT">(shifted_masks, seven)
    bits = BitShift<direction = "RIGHT">(lowest, seven)
    bits_32 = Cast<to = 6>(bits)
    kept = Reshape(bits_32, quad_shape)
    counts = ReduceSum(kept, axis1)
    no_value = Constant<value = uint8[1] {0}>()
    values_and_one = Concat<axis = 0>(values, no_value)
    @sizes_and_stored
    ends_of_quads = CumSum(quad_sizes, zero)
    starts_of_quads = Sub(ends_of_quads, quad_sizes)
    rank = CumSum<exclusive = 1>(kept, one)
    place = Add(starts_of_quads, rank)
    known_place = Mul(place, kept)
    found = Gather(stored, known_place)
    found_32 = Cast<to = 1>(found)
    @centred
    kept_f = Cast<to = 1>(kept)
    quads = Mul(centred, kept_f)
    tile_shape = Constant<value = int64[3] {-1, 16, 4}>()
    tiles_shape = Concat<axis = 0>(blocks_1, tile_shape)
    tiles = Reshape(quads, tiles_shape)"""
_MIDDLE = """
    middle = Constant<value = float {@middle}>()
    centred = Sub(found_32, middle)"""
# For every `step` inputs of a block: [blocks * steps, 16, 1].
_ZERO_COLUMN = """
    inputs_each = Constant<value = int64 {@step}>()
    first_inputs = Range(zero, k, inputs_each)
    group_of_first = Div(first_inputs, group)
    zeros_shape = Concat<axis = 0>(blocks_1, groups_1, sixteen_1)
    zeros_32 = Cast<to = 1>(zeros)
    zeros_3 = Reshape(zeros_32, zeros_shape)
    zeros_of_first = Gather<axis = 1>(zeros_3, group_of_first)
    zero_shape = Constant<value = int64[3] {-1, 16, 1}>()
    zero_column = Reshape(zeros_of_first, zero_shape)"""
_ZEROS = """
    outputs_shape = Constant<value = int64[3] {-1, 16, 4}>()
    found_3 = Reshape(found_32, outputs_shape)
    centred_3 = Sub(found_3, zero_column)
    centred = Reshape(centred_3, quad_shape)"""
_BYTES = """
    quad_sizes = Identity(counts)
    stored = Identity(values_and_one)"""
_HALVES = """
    one_32 = Constant<value = int32 {1}>()
    two_32 = Constant<value = int32 {2}>()
    more = Add(counts, one_32)
    half_counts = Div(more, two_32)
    quad_sizes = Mul(half_counts, two_32)
    @split
    pairs = Concat<axis = 1>(low, high)
    stored = Reshape(pairs, flat_shape)"""
_SPLIT = """
    four = Constant<value = uint8 {4}>()
    value_column = Reshape(@of, column_shape)
    raised = BitShift<direction = "LEFT">(value_column, four)
    low = BitShift<direction = "RIGHT">(raised, four)
    high = BitShift<direction = "RIGHT">(value_column, four)"""

_POSITIONS = """
    column_shape = Constant<value = int64[2] {-1, 1}>()
    @split
    high_f = Cast<to = 1>(high)
    kept = Constant<value_int: int = @kept>()
    kept_1 = Unsqueeze(kept, axis0)
    piece_shape = Constant<value = int64[2] {16, 4}>()
    pieces_shape = Concat<axis = 0>(flat_shape, kept_1, piece_shape)
    four_1 = Constant<value = int64[1] {4}>()
    entries_1 = Mul(kept_1, four_1)
    entries_shape = Concat<axis = 0>(flat_shape, sixteen_1, entries_1)
    level_pieces = Reshape(high_f, pieces_shape)
    level_turned = Transpose<perm = [0, 2, 1, 3]>(level_pieces)
    entry_stored = Reshape(level_turned, entries_shape)
    @levels
    position = Cast<to = 7>(low)
    position_pieces = Reshape(position, pieces_shape)
    position_turned = Transpose<perm = [0, 2, 1, 3]>(position_pieces)
    entry_position = Reshape(position_turned, entries_shape)
    entry_count = Squeeze(entries_1, axis0)
    entry = Range(zero, entry_count, one)
    which = Div(entry, kept)
    first = Mul(which, sixteen)
    entry_input = Add(entry_position, first)
    span_count = Shape(entry_position)
    spans_1 = Slice(span_count, axis0, axis1, axis0)
    one_span = Constant<value = int64[2] {16, 64}>()
    spans_shape = Concat<axis = 0>(spans_1, one_span)
    nothing = ConstantOfShape(spans_shape)
    spans = ScatterElements<axis = 2>(nothing, entry_input, entry_level)
    tile_shape = Constant<value = int64[3] {-1, 16, 64}>()
    tiles_shape = Concat<axis = 0>(blocks_1, tile_shape)
    tiles = Reshape(spans, tiles_shape)"""


_SIGNED = """
    seven_f = Constant<value = float {7}>()
    sixteen_f = Constant<value = float {16}>()
    negative = Greater(entry_stored, seven_f)
    negative_f = Cast<to = 1>(negative)
    less = Mul(negative_f, sixteen_f)
    entry_level = Sub(entry_stored, less)"""
_LESS_ZEROS = "entry_level = Sub(entry_stored, zero_column)"


def decoder(layout: Layout) -> str:
    """Lines of a function body that make W [K, N] float32 from the parts. ``k_1``, ``groups_1``, ``group_1`` and
    ``whole_1`` (groups · group), ``axis0``, ``flat_shape`` may be used behind them."""
    zeros = ""
    if layout.zeros:
        zeros = _ZERO_COLUMN.replace("@step", str(_QUAD if layout.masks else _SPAN))
    if not layout.masks:
        positions = _POSITIONS.replace("@split", _SPLIT.replace("@of", "values"))
        return (
            _SIZES + zeros + positions.replace("@levels", _LESS_ZEROS if layout.zeros else _SIGNED) + _MATRIX
        )
    stored = (
        _BYTES if layout.bits == 8 else _HALVES.replace("@split", _SPLIT.replace("@of", "values_and_one"))
    )
    centred = _ZEROS if layout.zeros else _MIDDLE.replace("@middle", str(layout.middle))
    bitmap = _BITMAP.replace("@sizes_and_stored", stored).replace("@centred", centred)
    return _SIZES + zeros + bitmap + _MATRIX
