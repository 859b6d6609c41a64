"""``chunked_csc``: the weights that are not zero, output by output in chunks of the inputs.

=======  =======  ===============  =====================================================================
part     dtype    shape            meaning
=======  =======  ===============  =====================================================================
values   float32  [entries·width]  stored weights: of each entry those of ``width`` neighbouring outputs
offsets  uint8    [entries]        input channel of each entry, relative to the first of its chunk
counts   uint8    [segments]       entries of each segment, at least 1
rows     uint8    [segments]       outputs of each segment: row·width is the first, relative to the block
=======  =======  ===============  =====================================================================

Sizes: K, N, ``chunk``, ``block``, ``width``. The K input channels are cut into chunks of ``chunk`` (1..255), the N
output channels into blocks of ``block`` (1..256); both are padded up at the end. A *segment* holds what one output
channel keeps of one chunk; with ``width`` 4 or 8, what that many neighbouring output channels keep together
(structured sparsity ``block:4x1`` and ``block:8x1``; ``block`` is a multiple of ``width``). Segments are stored
block by block, inside a block chunk by chunk, and inside a (block, chunk) group by falling count, so that the trip
count of the kernel's inner loop rarely changes; ``rows`` says which output channel each one is, a permutation of
0..block/width-1 in every group. Entries follow segment by segment, with strictly rising offsets. A segment
with nothing to store keeps one explicit zero at offset 0: that lets standard operators find the segment of an entry
by ``CumSum`` (see :meth:`ChunkedCsc.decoder`) and spares the kernel the empty case. Padding output channels are such
segments too.

Of several linears side by side each begins a block of its own, so that no block has outputs of two: their parts lie
behind one another as they are. Where a linear that is not the last has no whole blocks, padding channels fill its last
one, which W and bias do not have. ``format`` then is ``chunked_csc_parts``: a library that knows ``chunked_csc`` only
refuses it.

Cost: 4·width + 1 bytes an entry and 2 bytes a segment, against 4 bytes a weight in dense form.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_onnx.sparse_ops.formats.base import ONE_RUN, FormatError, Outputs, Packed, Part, StoredFormat

__all__ = [
    "CHUNKED_CSC",
    "ENTRY_STARTS",
    "GROUP_STARTS",
    "WIDTHS",
    "ChunkedCsc",
    "PackedWeight",
    "block_size",
    "concatenate",
]

_ONE, _SEVERAL = "chunked_csc", "chunked_csc_parts"

_MAX_ELEMENTS = 2**31 - 2**24
"""Largest weight: positions in the dense form, padding included, must fit the function body's int32."""

# Chosen on measurements: the activations of one chunk stay in the first-level cache (32 KiB), segments are long enough
# at 95 % sparsity, and the blocks of a small layer still keep half a dozen threads busy: large ones where they fit,
# since each reads all activations. Where many weights are left, half a chunk is long enough and leaves room for twice
# the tokens, as long as their panel stays in the second-level cache.
_CHUNK = 128
_SHORT_CHUNK, _SHORT_CHUNK_DENSITY, _SHORT_CHUNK_MAX_K = 64, 0.25, 3072
_BLOCK, _LARGE_BLOCK = 64, 128
_SMALLEST_BLOCK = 16  # below, only where outputs must not mix
# Outputs of zeros, at least and of all: more would cost more than reading the activations once saves.
_FEW_OUTPUTS, _FEW_OF_ALL = 8, 1 / 8

WIDTHS = (1, 4, 8)
"""Numbers of neighbouring outputs that one entry may hold."""
# A wider entry loads an activation once for several outputs, which is faster than 1.3 times the entries.
_MAX_FILL = 1.25


@dataclass(frozen=True)
class PackedWeight(Packed):
    """A weight in this format; see the module's table for the arrays."""

    K: int
    N: int
    chunk: int
    block: int
    width: int
    values: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    split: tuple[int, ...] = ()

    @property
    def stored_format(self) -> StoredFormat:
        return CHUNKED_CSC

    @property
    def shape(self) -> tuple[int, int]:
        return self.K, self.N

    @property
    def linears(self) -> tuple[int, ...]:
        return self.split or (self.N,)

    @property
    def format(self) -> str:
        return _SEVERAL if any(outputs % self.block for outputs in self.linears[:-1]) else _ONE

    @property
    def chunks(self) -> int:
        return -(-self.K // self.chunk)

    @property
    def blocks(self) -> int:
        return sum(-(-outputs // self.block) for outputs in self.linears)

    @property
    def outputs(self) -> np.ndarray:
        """Where the N outputs are among those of all blocks."""
        starts = np.cumsum([0, *(-(-outputs // self.block) * self.block for outputs in self.linears)])
        return np.concatenate(
            [start + np.arange(size) for start, size in zip(starts, self.linears, strict=False)]
        )

    @property
    def groups(self) -> int:
        """Segments of a block in one chunk."""
        return self.block // self.width

    def arrays(self) -> dict[str, np.ndarray]:
        return {"values": self.values, "offsets": self.offsets, "counts": self.counts, "rows": self.rows}

    def attributes(self) -> dict[str, int | str]:
        sizes = {"K": self.K, "N": self.N, "chunk": self.chunk, "block": self.block, "width": self.width}
        return {**sizes, "format": self.format}

    def _segment_of_entry(self) -> np.ndarray:
        return np.repeat(np.arange(self.counts.size), self.counts)

    def validate(self) -> None:
        if min(self.linears) < 1 or sum(self.linears) != self.N:
            raise FormatError(
                f"{list(self.linears)} are not the sizes of linears with {self.N} outputs together"
            )
        if self.width not in WIDTHS or self.block % self.width:
            raise FormatError(
                f"width must be one of {WIDTHS} and divide block {self.block}, not {self.width}"
            )
        segments = self.chunks * self.blocks * self.groups
        if self.counts.shape != (segments,) or self.rows.shape != (segments,):
            raise FormatError(f"counts and rows must have {segments} elements")
        if (self.counts < 1).any() or (self.counts > self.chunk).any():
            raise FormatError(f"every count must lie in 1..{self.chunk}")
        entries = int(self.counts.sum(dtype=np.int64))
        if self.values.shape != (entries * self.width,):
            raise FormatError(
                f"values must have {entries * self.width} elements, the sum of counts times width"
            )
        if self.offsets.shape != (entries,):
            raise FormatError(f"offsets must have {entries} elements, the sum of counts")
        groups = np.sort(self.rows.reshape(-1, self.groups), axis=1)
        if (groups != np.arange(self.groups, dtype=np.uint8)).any():
            raise FormatError("rows must be a permutation of 0..block/width-1 in every (block, chunk) group")
        segment = self._segment_of_entry()
        chunk_of = segment // self.groups % self.chunks
        if (chunk_of * self.chunk + self.offsets >= self.K).any() or (self.offsets >= self.chunk).any():
            raise FormatError("an offset reaches past its chunk or past K")
        steps = np.diff(self.offsets.astype(np.int16))
        if (steps[np.diff(segment) == 0] <= 0).any():
            raise FormatError("offsets must rise strictly inside a segment")

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every entry its input, and the first of its outputs among those of all blocks; int64."""
        segment = self._segment_of_entry()
        group, row = segment // self.groups, self.rows[segment].astype(np.int64)
        return (
            group % self.chunks * self.chunk + self.offsets,
            group // self.chunks * self.block + row * self.width,
        )

    def unpack(self) -> np.ndarray:
        self.validate()
        k, n = self.places()
        dense = np.zeros((self.K, self.blocks * self.block), np.float32)
        dense[k[:, None], n[:, None] + np.arange(self.width)] = self.values.reshape(-1, self.width)
        return dense[:, : self.N] if self.format == _ONE else dense[:, self.outputs]


def _best_chunk(K: int, density: float, width: int) -> int:
    many = density >= _SHORT_CHUNK_DENSITY
    return _SHORT_CHUNK if width == 1 and many and K <= _SHORT_CHUNK_MAX_K else _CHUNK


def _best_width(weight: np.ndarray, block: int) -> int:
    """The largest of :data:`WIDTHS` that divides ``block`` and fits the zeros of ``weight`` [K, N]: few values more
    to store than with 1."""
    K, N = weight.shape
    mask = weight != 0
    kept = int(np.count_nonzero(mask))
    for width in sorted(WIDTHS, reverse=True):
        if width == 1 or width > N or block % width:
            continue
        whole = N - N % width
        stored = width * int(np.count_nonzero(mask[:, :whole].reshape(K, -1, width).any(-1)))
        if whole < N:
            stored += width * int(np.count_nonzero(mask[:, whole:].any(-1)))
        if stored <= _MAX_FILL * kept:
            return width
    return 1


# A segment's entries lie at its start plus offset times row length; CumSum spreads the differences of those
# starts over the entries. int32 there: ORT keeps every folded intermediate until the session is complete.
# Every line up to W has only constants behind it and a shape that can be inferred, so that ORT folds the
# whole decoder when the session is created. (NonZero and Compress are not folded by ORT >= 1.31.)
GROUP_STARTS = """
    block_index = Range(zero, blocks, one)
    block_column = Unsqueeze(block_index, axis1)
    block_start = Mul(block_column, b)
    chunk_index = Range(zero, chunks, one)
    chunk_stride = Mul(c, columns)
    chunk_start = Mul(chunk_index, chunk_stride)
    group_start = Add(block_start, chunk_start)
    group_column = Reshape(group_start, column_shape)
"""
"""Where the segments of each block and chunk begin, of a stored weight with ``blocks`` blocks of ``b`` outputs and
``chunks`` of ``c`` inputs."""

ENTRY_STARTS = """
    segment_grid = Add(group_column, row_grid)
    segment_start = Reshape(segment_grid, flat_shape)

    origin = Constant<value = int64[1] {0}>()
    but_last = Constant<value = int64[1] {-1}>()
    earlier = Slice(segment_start, axis0, but_last, axis0)
    previous = Concat<axis = 0>(origin, earlier)
    step_64 = Sub(segment_start, previous)
    step = Cast<to = 6>(step_64)
    counts_32 = Cast<to = 6>(counts)
    ends = CumSum(counts_32, zero)
    starts = Sub(ends, counts_32)
    entries = Shape(offsets)
    no_steps = ConstantOfShape<value = int32[1] {0}>(entries)
    steps = ScatterElements<axis = 0>(no_steps, starts, step)
    entry_start = CumSum(steps, zero)
    offsets_32 = Cast<to = 6>(offsets)
    columns_32 = Cast<to = 6>(columns)
    entry_step = Mul(offsets_32, columns_32)
    entry_position = Add(entry_start, entry_step)
"""
"""Where each entry lies; ``row_grid`` are the rows of the segments within their group."""

_DECODER = (
    """
    k = Constant<value_int: int = @K>()
    n = Constant<value_int: int = @N>()
    c = Constant<value_int: int = @chunk>()
    b = Constant<value_int: int = @block>()
    r = Constant<value_int: int = @width>()
    zero = Constant<value = int64 {0}>()
    one = Constant<value = int64 {1}>()
    axis0 = Constant<value = int64[1] {0}>()
    axis1 = Constant<value = int64[1] {1}>()
    flat_shape = Constant<value = int64[1] {-1}>()
    column_shape = Constant<value = int64[2] {-1, 1}>()
    k_less = Sub(k, one)
    k_full = Div(k_less, c)
    chunks = Add(k_full, one)
    @count_blocks
    columns = Mul(blocks, b)
"""
    + GROUP_STARTS
    + """
    groups = Div(b, r)
    groups_1 = Unsqueeze(groups, axis0)
    row_shape = Concat<axis = 0>(flat_shape, groups_1)
    rows_64 = Cast<to = 7>(rows)
    first_rows = Mul(rows_64, r)
    row_grid = Reshape(first_rows, row_shape)
"""
    + ENTRY_STARTS
    + """
    position_column = Reshape(entry_position, column_shape)
    lanes = Range(zero, r, one)
    lanes_32 = Cast<to = 6>(lanes)
    position_grid = Add(position_column, lanes_32)
    position = Reshape(position_grid, flat_shape)
    size = Mul(k, columns)
    size_1 = Unsqueeze(size, axis0)
    zeros = ConstantOfShape(size_1)
    scattered = ScatterElements<axis = 0>(zeros, position, values)
    k_1 = Unsqueeze(k, axis0)
    columns_1 = Unsqueeze(columns, axis0)
    n_1 = Unsqueeze(n, axis0)
    padded_shape = Concat<axis = 0>(k_1, columns_1)
    padded = Reshape(scattered, padded_shape)
    @take_outputs
"""
)
# Of one linear.
_COUNT_BLOCKS = """
    n_less = Sub(n, one)
    n_full = Div(n_less, b)
    blocks = Add(n_full, one)"""
_TAKE_OUTPUTS = "W = Slice(padded, axis0, n_1, axis1)"

# Of several. Right in both variants: where the blocks are whole, there is nothing between what is taken.
_COUNT_BLOCKS_OF_LINEARS = """
    {sizes}
    size_less = Sub(sizes, one)
    part_full = Div(size_less, b)
    part_blocks = Add(part_full, one)
    blocks = ReduceSum<keepdims = 0>(part_blocks)"""
_TAKE_OUTPUTS_OF_LINEARS = """
    part_columns = Mul(part_blocks, b)
    part_ends = CumSum(part_columns, zero)
    part_starts = Sub(part_ends, part_columns)
    taken_ends = Add(part_starts, sizes)
    single = Constant<value_ints = [{ones}]>()
    {starts} = Split(part_starts, single)
    {ends} = Split(taken_ends, single)
    {slices}
    W = Concat<axis = 1>({taken})"""


def _of_linears(count: int, sizes: str) -> tuple[str, str]:
    """How the blocks of ``count`` linears are counted, and how their outputs are taken."""

    def names(name: str) -> str:
        return ", ".join(f"{name}{i}" for i in range(count))

    return _COUNT_BLOCKS_OF_LINEARS.format(sizes=sizes), _TAKE_OUTPUTS_OF_LINEARS.format(
        ones=", ".join("1" * count),
        starts=names("start"),
        ends=names("end"),
        slices="\n".join(f"taken{i} = Slice(padded, start{i}, end{i}, axis1)" for i in range(count)),
        taken=names("taken"),
    )


def block_size(N: int, outputs: Outputs, block: int | None = None) -> int:
    """Output channels in a block of a weight [K, N]: ``block``, or what is best where it is not given. Where outputs
    come in runs, the largest divisor of a run up to that; if these are all small and runs may share a block, the best
    of any."""
    usual = _BLOCK if outputs.maps or N % _LARGE_BLOCK else _LARGE_BLOCK
    if outputs.run is None:
        return usual if block is None else block
    most = min(_BLOCK if block is None else block, outputs.run)
    largest = max(size for size in range(1, most + 1) if outputs.run % size == 0)
    return largest if outputs.apart or largest >= min(_SMALLEST_BLOCK, outputs.run) else usual


def concatenate(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The weights [K, Ni] side by side, as one [K, sum of Ni].

    Raises ValueError unless K, chunk, block and width are equal.
    """
    first = parts[0]
    sizes = (first.K, first.chunk, first.block, first.width)
    if any((part.K, part.chunk, part.block, part.width) != sizes for part in parts):
        raise ValueError("concatenate() takes weights with equal K, chunk, block and width")
    arrays = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in first.arrays()}
    split = tuple(part.N for part in parts)
    return PackedWeight(first.K, sum(split), first.chunk, first.block, first.width, **arrays, split=split)


class ChunkedCsc(StoredFormat):
    """See the module's docstring."""

    def pack(
        self,
        weight: np.ndarray,
        outputs: Outputs = ONE_RUN,
        *,
        chunk: int | None = None,
        block: int | None = None,
        width: int | None = None,
    ) -> PackedWeight:
        """See :meth:`.base.StoredFormat.pack`. Without ``chunk`` it is chosen by the share of zeros, without ``block``
        by N and ``outputs`` (:func:`block_size`); without ``width`` the one is taken that fits the zeros and divides
        ``block``.

        Raises ValueError for a ``chunk``, ``block`` or ``width`` out of range, too.
        """
        if weight.ndim != 2 or weight.dtype != np.float32 or 0 in weight.shape:
            raise ValueError(
                f"pack() takes a non-empty float32 matrix [K, N], not {weight.dtype}{list(weight.shape)}"
            )
        if weight.size > self.max_elements:
            raise ValueError(f"pack() takes at most {self.max_elements} elements, not {weight.size}")
        block = block_size(weight.shape[1], outputs, block)
        if width is None:
            width = _best_width(weight, block)
        if chunk is None:
            chunk = _best_chunk(weight.shape[0], np.count_nonzero(weight) / weight.size, width)
        if not 1 <= chunk <= 255 or not 1 <= block <= 256:
            raise ValueError(f"chunk must lie in 1..255 and block in 1..256, not {chunk} and {block}")
        if width not in WIDTHS or block % width:
            raise ValueError(f"width must be one of {WIDTHS} and divide block {block}, not {width}")
        K, N = weight.shape
        chunk, block = min(chunk, K), min(block, -(-N // width) * width)
        chunks, blocks = -(-K // chunk), -(-N // block)
        parts: dict[str, list[np.ndarray]] = {"values": [], "offsets": [], "counts": [], "rows": []}
        # Block by block: the scratch is one block of the weight, whatever the size of the whole.
        for b in range(blocks):
            columns = weight[:, b * block : (b + 1) * block]
            tile = np.zeros((block, chunks * chunk), np.float32)
            tile[: columns.shape[1], :K] = columns.T
            # [chunks, groups, chunk, width]
            segments = tile.reshape(block // width, width, chunks, chunk).transpose(2, 0, 3, 1)
            keep = (segments != 0).any(-1)
            keep[..., 0] |= ~keep.any(-1)
            counts = keep.sum(-1)
            rows = np.argsort(-counts, axis=-1, kind="stable")
            keep = np.take_along_axis(keep, rows[..., None], 1)
            parts["values"].append(np.take_along_axis(segments, rows[..., None, None], 1)[keep].reshape(-1))
            parts["offsets"].append(np.nonzero(keep)[2].astype(np.uint8))
            parts["counts"].append(np.take_along_axis(counts, rows, 1).astype(np.uint8).reshape(-1))
            parts["rows"].append(rows.astype(np.uint8).reshape(-1))
        arrays = {name: np.concatenate(part) for name, part in parts.items()}
        arrays["values"] += np.float32(0)  # -0.0 stored for an empty segment becomes 0.0
        return PackedWeight(
            K, N, chunk, block, width, arrays["values"], arrays["offsets"], arrays["counts"], arrays["rows"]
        )

    def read(
        self, variant: str, sizes: Mapping[str, int], arrays: Sequence[np.ndarray], split: Sequence[int]
    ) -> PackedWeight:
        values, offsets, counts, rows = arrays
        packed = PackedWeight(
            **sizes, values=values, offsets=offsets, counts=counts, rows=rows, split=tuple(split)
        )
        if packed.format == _SEVERAL and variant == _ONE:
            raise FormatError(
                f"linears of {list(packed.split)} outputs have no whole blocks of {packed.block}"
            )
        return packed

    def may_join(self, sizes: Mapping[str, int], widest: Mapping[str, int]) -> bool:
        """Those in smaller blocks are packed once more, where these are hardly larger together."""
        if any(sizes[name] != widest[name] for name in ("K", "chunk", "width")):
            return False
        N, block = sizes["N"], widest["block"]
        small_rest = -N % block <= max(_FEW_OUTPUTS, N * _FEW_OF_ALL)
        return sizes["block"] == block or (sizes["block"] < block and small_rest)

    def join(self, weights: Sequence[Packed]) -> PackedWeight:
        mine = [weight for weight in weights if isinstance(weight, PackedWeight)]
        block = max(weight.block for weight in mine)
        return concatenate([self._in_blocks(weight, block) for weight in mine])

    def _in_blocks(self, packed: PackedWeight, block: int) -> PackedWeight:
        """The same weight in blocks of that many outputs."""
        if packed.block == block:
            return packed
        dense = packed.unpack()
        room = np.zeros(
            (packed.K, max(0, block - packed.N)), np.float32
        )  # a block is no larger than the weight
        whole = np.concatenate([dense, room], axis=1)
        stored = self.pack(whole, chunk=packed.chunk, block=block, width=packed.width)
        return dataclasses.replace(stored, N=packed.N)

    def decoder(self, prefix: str = "", *, count: int = 1, linears: str = "") -> str:
        count_blocks, take_outputs = (
            _of_linears(count, linears) if linears else (_COUNT_BLOCKS, _TAKE_OUTPUTS)
        )
        text = _DECODER.replace("@count_blocks", count_blocks).replace("@take_outputs", take_outputs)
        parts = (part.name for part in self.parts)
        made = (
            name for names in re.findall(r"^ *([\w, ]+) = ", text, re.MULTILINE) for name in names.split(", ")
        )
        names = "|".join((*parts, *made))
        return re.sub(rf"@|\b(?=(?:{names})\b)", rf"\g<0>{prefix}", text) if prefix else text

    def expected_nbytes(
        self, K: int, N: int, sparsity: float, outputs: Outputs = ONE_RUN, *, together: int = 1
    ) -> float:
        """Only the number of empty segments is left to chance, and there are few."""
        width = max(width for width in WIDTHS if together % width == 0)
        chunk = min(_best_chunk(K, 1 - sparsity, width), K)
        groups = -(-N // width)
        block = min(block_size(N, outputs), groups * width)
        chunks, stored_groups = -(-K // chunk), -(-N // block) * (block // width)
        last = K - (chunks - 1) * chunk
        empty = (chunks - 1) * sparsity**chunk + sparsity**last
        entries = groups * ((1 - sparsity) * K + empty) + (stored_groups - groups) * chunks
        return entries * (4 * width + 1) + 2 * stored_groups * chunks


CHUNKED_CSC = ChunkedCsc(
    variants=(_ONE, _SEVERAL),
    word="",
    parts=(
        Part("values", np.float32),
        Part("offsets", np.uint8),
        Part("counts", np.uint8),
        Part("rows", np.uint8),
    ),
    sizes=("K", "N", "chunk", "block", "width"),
    max_elements=_MAX_ELEMENTS,
)
