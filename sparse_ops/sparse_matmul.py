"""``SparseMatMul``: ``Y = act(X · W + bias)`` with W stored compressed. The whole contract of the operator.

Signature (domain ``sparse_onnx``, version 1; one op type per activation, see :data:`OP_TYPES`)::

    SparseMatMul<K, N, chunk, block, width, format, mask_structure>(X, values, offsets, counts, rows, bias) -> Y

===========  =========  ==============  =====================================================================
name         dtype      shape           meaning
===========  =========  ==============  =====================================================================
X            float32    [..., K]        activations, rank >= 1
values       float32    [entries·width] stored weights: of each entry those of ``width`` neighbouring outputs
offsets      uint8      [entries]       input channel of each entry, relative to the first of its chunk
counts       uint8      [segments]      entries of each segment, at least 1
rows         uint8      [segments]      outputs of each segment: row·width is the first, relative to the block
bias         float32    [N]             zeros where the layer has none
Y            float32    [..., N]
===========  =========  ==============  =====================================================================

Storage format ``chunked_csc``. The K input channels are cut into chunks of ``chunk`` (1..255), the N output
channels into blocks of ``block`` (1..256); both are padded up at the end. A *segment* holds what one output
channel keeps of one chunk; with ``width`` 4 or 8, what that many neighbouring output channels keep together
(structured sparsity ``block:4x1`` and ``block:8x1``; ``block`` is a multiple of ``width``). Segments are stored
block by block, inside a block chunk by chunk, and inside a (block, chunk) group by falling count, so that the trip
count of the kernel's inner loop rarely changes; ``rows`` says which output channel each one is, a permutation of
0..block/width-1 in every group. Entries follow segment by segment, with strictly rising offsets. A segment
with nothing to store keeps one explicit zero at offset 0: that lets standard operators find the segment of an entry
by ``CumSum`` (see :func:`function_body`) and spares the kernel the empty case. Padding output channels are such
segments too. In ``chunked_csc_parts`` the outputs are those of several linears, each of which begins a block of its
own: the last block of each has padding channels, see :mod:`.sparse_matmul_split`.

Cost: 4·width + 1 bytes an entry and 2 bytes a segment, against 4 bytes a weight in dense form.

NaN and Inf: a product with a weight that is not stored is never formed. Where an input is NaN or Inf and a weight
is zero, a dense product gives NaN and this one leaves the sum as it is; stored weights propagate them as dense does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser

__all__ = [
    "ACTIVATIONS",
    "DOMAIN",
    "FORMAT",
    "MAX_ELEMENTS",
    "OP_TYPES",
    "PARTS_FORMAT",
    "SIZES",
    "STORED",
    "VERSION",
    "WIDTHS",
    "FormatError",
    "PackedWeight",
    "activated",
    "activation_body",
    "best_block",
    "decoder",
    "expected_nbytes",
    "function_body",
    "linear_body",
    "pack",
    "reference",
    "unpack",
]

DOMAIN = "sparse_onnx"
VERSION = 1
FORMAT = "chunked_csc"
PARTS_FORMAT = "chunked_csc_parts"

# One op type per activation, not an attribute: a body of standard ops cannot branch on an attribute without
# `If`, and a library that does not know a newer activation then falls back to the body instead of failing.
OP_TYPES = {
    "none": "SparseMatMul",
    "relu": "SparseMatMulRelu",
    "gelu": "SparseMatMulGelu",
    "gelu_tanh": "SparseMatMulGeluTanh",
    "silu": "SparseMatMulSilu",
    "quick_gelu": "SparseMatMulQuickGelu",
}
ACTIVATIONS = {op_type: activation for activation, op_type in OP_TYPES.items()}

SIZES = ("K", "N", "chunk", "block", "width")
"""The attributes that say how a weight is stored."""

STORED = ("values", "offsets", "counts", "rows")
"""The inputs that hold a weight, in order; its bias follows."""

MAX_ELEMENTS = 2**31 - 2**24
"""Largest weight: positions in the dense form, padding included, must fit the function body's int32."""

# Chosen on measurements: the activations of one chunk stay in the first-level cache (32 KiB), segments are long enough
# at 95 % sparsity, and the blocks of a small layer still keep half a dozen threads busy: large ones where they fit,
# since each reads all activations. Where many weights are left, half a chunk is long enough and leaves room for twice
# the tokens, as long as their panel stays in the second-level cache.
DEFAULT_CHUNK = 128
SHORT_CHUNK, _SHORT_CHUNK_DENSITY, _SHORT_CHUNK_MAX_K = 64, 0.25, 3072
DEFAULT_BLOCK, _LARGE_BLOCK = 64, 128

WIDTHS = (1, 4, 8)
"""Numbers of neighbouring outputs that one entry may hold."""
# A wider entry loads an activation once for several outputs, which is faster than 1.3 times the entries.
_MAX_FILL = 1.25


class FormatError(ValueError):
    """Stored tensors that do not describe a weight."""


@dataclass(frozen=True)
class PackedWeight:
    """A [K, N] float32 weight in the ``chunked_csc`` format; see the module's table for the arrays.

    ``split`` has the outputs of each linear where the weight is that of several, side by side, each in blocks of its
    own.
    """

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
    def parts(self) -> tuple[int, ...]:
        """Outputs of each linear."""
        return self.split or (self.N,)

    @property
    def format(self) -> str:
        return PARTS_FORMAT if any(outputs % self.block for outputs in self.parts[:-1]) else FORMAT

    @property
    def chunks(self) -> int:
        return -(-self.K // self.chunk)

    @property
    def blocks(self) -> int:
        return sum(-(-outputs // self.block) for outputs in self.parts)

    @property
    def outputs(self) -> np.ndarray:
        """Where the N outputs are among those of all blocks."""
        starts = np.cumsum([0, *(-(-outputs // self.block) * self.block for outputs in self.parts)])
        return np.concatenate(
            [start + np.arange(size) for start, size in zip(starts, self.parts, strict=False)]
        )

    @property
    def groups(self) -> int:
        """Segments of a block in one chunk."""
        return self.block // self.width

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """The stored tensors, in the order of the operator's inputs."""
        return {"values": self.values, "offsets": self.offsets, "counts": self.counts, "rows": self.rows}

    def attributes(self) -> dict[str, int | str]:
        sizes = {"K": self.K, "N": self.N, "chunk": self.chunk, "block": self.block, "width": self.width}
        return {**sizes, "format": self.format}


def best_block(N: int) -> int:
    """Output channels in a block of a weight [K, N] that no group of them divides."""
    return _LARGE_BLOCK if N % _LARGE_BLOCK == 0 else DEFAULT_BLOCK


def _best_chunk(K: int, density: float, width: int) -> int:
    many = density >= _SHORT_CHUNK_DENSITY
    return SHORT_CHUNK if width == 1 and many and K <= _SHORT_CHUNK_MAX_K else DEFAULT_CHUNK


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


def pack(
    weight: np.ndarray,
    *,
    chunk: int | None = None,
    block: int | None = None,
    width: int | None = None,
) -> PackedWeight:
    """Compress ``weight`` [K, N] float32. NaN and Inf are entries like any other; -0.0 counts as zero.

    Without ``chunk`` it is chosen by the share of zeros, without ``block`` by N (:func:`best_block`); without ``width``
    the one that fits the zeros and divides ``block`` is taken.

    Raises ValueError for another rank or dtype, an empty weight, or a ``chunk``, ``block`` or ``width`` out of range.
    """
    if weight.ndim != 2 or weight.dtype != np.float32 or 0 in weight.shape:
        raise ValueError(
            f"pack() takes a non-empty float32 matrix [K, N], not {weight.dtype}{list(weight.shape)}"
        )
    if weight.size > MAX_ELEMENTS:
        raise ValueError(f"pack() takes at most {MAX_ELEMENTS} elements, not {weight.size}")
    if block is None:
        block = best_block(weight.shape[1])
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


def expected_nbytes(K: int, N: int, sparsity: float, *, width: int = 1, block: int | None = None) -> float:
    """Bytes that :func:`pack` needs for a weight [K, N] of which ``sparsity`` in [0, 1) is zero at random places, in
    groups of ``width`` neighbouring outputs.

    The mean over such weights; only the number of empty segments is left to chance, and there are few.
    """
    chunk = min(_best_chunk(K, 1 - sparsity, width), K)
    groups = -(-N // width)
    block = min(block or best_block(N), groups * width)
    chunks, stored_groups = -(-K // chunk), -(-N // block) * (block // width)
    last = K - (chunks - 1) * chunk
    empty = (chunks - 1) * sparsity**chunk + sparsity**last
    entries = groups * ((1 - sparsity) * K + empty) + (stored_groups - groups) * chunks
    return entries * (4 * width + 1) + 2 * stored_groups * chunks


def _segment_of_entry(packed: PackedWeight) -> np.ndarray:
    return np.repeat(np.arange(packed.counts.size), packed.counts)


def validate(packed: PackedWeight) -> None:
    """Raise FormatError unless the arrays obey every rule of the format (the kernel checks the same)."""
    if min(packed.parts) < 1 or sum(packed.parts) != packed.N:
        raise FormatError(
            f"{list(packed.parts)} are not the sizes of linears with {packed.N} outputs together"
        )
    if packed.width not in WIDTHS or packed.block % packed.width:
        raise FormatError(
            f"width must be one of {WIDTHS} and divide block {packed.block}, not {packed.width}"
        )
    segments = packed.chunks * packed.blocks * packed.groups
    if packed.counts.shape != (segments,) or packed.rows.shape != (segments,):
        raise FormatError(f"counts and rows must have {segments} elements")
    if (packed.counts < 1).any() or (packed.counts > packed.chunk).any():
        raise FormatError(f"every count must lie in 1..{packed.chunk}")
    entries = int(packed.counts.sum(dtype=np.int64))
    if packed.values.shape != (entries * packed.width,):
        raise FormatError(
            f"values must have {entries * packed.width} elements, the sum of counts times width"
        )
    if packed.offsets.shape != (entries,):
        raise FormatError(f"offsets must have {entries} elements, the sum of counts")
    groups = np.sort(packed.rows.reshape(-1, packed.groups), axis=1)
    if (groups != np.arange(packed.groups, dtype=np.uint8)).any():
        raise FormatError("rows must be a permutation of 0..block/width-1 in every (block, chunk) group")
    segment = _segment_of_entry(packed)
    chunk_of = segment // packed.groups % packed.chunks
    if (chunk_of * packed.chunk + packed.offsets >= packed.K).any() or (packed.offsets >= packed.chunk).any():
        raise FormatError("an offset reaches past its chunk or past K")
    steps = np.diff(packed.offsets.astype(np.int16))
    if (steps[np.diff(segment) == 0] <= 0).any():
        raise FormatError("offsets must rise strictly inside a segment")


def unpack(packed: PackedWeight) -> np.ndarray:
    """The dense weight [K, N], exactly (bit for bit, but for the sign of zero)."""
    validate(packed)
    segment = _segment_of_entry(packed)
    group, row = segment // packed.groups, packed.rows[segment].astype(np.int64)
    k = group % packed.chunks * packed.chunk + packed.offsets
    n = group // packed.chunks * packed.block + row * packed.width
    dense = np.zeros((packed.K, packed.blocks * packed.block), np.float32)
    dense[k[:, None], n[:, None] + np.arange(packed.width)] = packed.values.reshape(-1, packed.width)
    return dense[:, : packed.N] if packed.format == FORMAT else dense[:, packed.outputs]


_FLOAT64: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: 0.5 * y * (1 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2))),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "quick_gelu": lambda y: y / (1 + np.exp(-1.702 * y)),
}


def activated(activation: str, h: np.ndarray) -> np.ndarray:
    """``activation``, a key of OP_TYPES, of the float64 numbers ``h``."""
    return _FLOAT64[activation](h)


def reference(x: np.ndarray, packed: PackedWeight, bias: np.ndarray, activation: str = "none") -> np.ndarray:
    """What the operator computes, in float64: the oracle of the tests. ``activation`` is a key of OP_TYPES."""
    return activated(activation, x.astype(np.float64) @ unpack(packed).astype(np.float64) + bias)


# From `h` to `Y`. The forms are those that ORT's own fusions look for.
_ACTIVATION_BODIES = {
    "none": "Y = Identity(h)",
    "relu": "Y = Relu(h)",
    "gelu": """
        root = Constant<value = float {1.41421356}>()
        one_f = Constant<value = float {1.0}>()
        half = Constant<value = float {0.5}>()
        scaled = Div(h, root)
        erf = Erf(scaled)
        shifted = Add(erf, one_f)
        product = Mul(h, shifted)
        Y = Mul(product, half)""",
    "gelu_tanh": """
        three = Constant<value = float {3.0}>()
        a = Constant<value = float {0.044715}>()
        b_ = Constant<value = float {0.79788456}>()
        one_f = Constant<value = float {1.0}>()
        half = Constant<value = float {0.5}>()
        cube = Pow(h, three)
        small = Mul(cube, a)
        inner = Add(h, small)
        outer = Mul(inner, b_)
        tanh = Tanh(outer)
        shifted = Add(tanh, one_f)
        product = Mul(h, shifted)
        Y = Mul(product, half)""",
    "silu": """
        gate = Sigmoid(h)
        Y = Mul(h, gate)""",
    "quick_gelu": """
        slope = Constant<value = float {1.702}>()
        steep = Mul(h, slope)
        gate = Sigmoid(steep)
        Y = Mul(h, gate)""",
}


def activation_body(activation: str, y: str = "Y") -> str:
    """Lines of a function body that make the value ``y`` from ``h``. ``activation`` is a key of OP_TYPES."""
    return _ACTIVATION_BODIES[activation].replace("Y = ", f"{y} = ")


# A segment's entries lie at its start plus offset times row length; CumSum spreads the differences of those
# starts over the entries. int32 there: ORT keeps every folded intermediate until the session is complete.
# Every line up to W has only constants behind it and a shape that can be inferred, so that ORT folds the
# whole decoder when the session is created. (NonZero and Compress are not folded by ORT >= 1.31.)
_DECODER = """
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

    block_index = Range(zero, blocks, one)
    block_column = Unsqueeze(block_index, axis1)
    block_start = Mul(block_column, b)
    chunk_index = Range(zero, chunks, one)
    chunk_stride = Mul(c, columns)
    chunk_start = Mul(chunk_index, chunk_stride)
    group_start = Add(block_start, chunk_start)
    group_column = Reshape(group_start, column_shape)
    groups = Div(b, r)
    groups_1 = Unsqueeze(groups, axis0)
    row_shape = Concat<axis = 0>(flat_shape, groups_1)
    rows_64 = Cast<to = 7>(rows)
    first_rows = Mul(rows_64, r)
    row_grid = Reshape(first_rows, row_shape)
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
# Of one linear.
_COUNT_BLOCKS = """
    n_less = Sub(n, one)
    n_full = Div(n_less, b)
    blocks = Add(n_full, one)"""
_TAKE_OUTPUTS = "W = Slice(padded, axis0, n_1, axis1)"


def decoder(prefix: str = "", *, count_blocks: str = _COUNT_BLOCKS, take_outputs: str = _TAKE_OUTPUTS) -> str:
    """Lines of a function body that make W [K, N] from the stored tensors; every operator with such a weight uses
    them. ``n_1``, ``flat_shape``, ``axis0`` and ``axis1`` may be used behind them: [N], [-1], [0] and [1].

    With ``prefix`` every value and attribute has it before its name, for the second weight of an operator. A weight
    with padding between its outputs has lines of its own that ``count_blocks`` and that ``take_outputs`` from what is
    ``padded``.
    """
    text = _DECODER.replace("@count_blocks", count_blocks).replace("@take_outputs", take_outputs)
    names = "|".join((*STORED, *re.findall(r"^ *(\w+) = ", text, re.MULTILINE)))
    return re.sub(rf"@|\b(?=(?:{names})\b)", rf"\g<0>{prefix}", text) if prefix else text


_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <K, N, chunk, block, width> (X, values, offsets, counts, rows, bias) => (Y)
{{
    {decoder}
    {steps}
}}
"""


def linear_body(op_type: str, y: str = "Y") -> str:
    """Lines of a function body that make the value ``y`` of the operator from X, W and bias, behind the decoder."""
    activation = activation_body(ACTIVATIONS[op_type], y)
    return f"product_xw = MatMul(X, W)\n h = Add(product_xw, bias)\n {activation}"


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    text = _BODY.format(
        domain=DOMAIN,
        opset=opset,
        op_type=op_type,
        decoder=decoder(),
        steps=linear_body(op_type),
    )
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto
