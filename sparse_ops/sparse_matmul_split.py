"""Linears that share their input, as one product that is split: ``SparseMatMulSplit*`` and ``SparseMatMul*Gate``.

Signatures (domain ``sparse_onnx``, version 1)::

    SparseMatMulSplit2<K, N, chunk, block, width, format, mask_structure, split>(X, values, .., bias) -> Y0, Y1
    SparseMatMulSplit3<K, N, chunk, block, width, format, mask_structure, split>(X, values, .., bias) -> Y0, Y1, Y2
    SparseMatMulSiluGate<K, N, chunk, block, width, format, mask_structure>(X, values, .., bias) -> Y
    SparseMatMulGeluTanhGate<K, N, chunk, block, width, format, mask_structure>(X, values, .., bias) -> Y

Inputs and attributes are those of :mod:`.sparse_matmul`; the stored weight W is [K, N] and bias [N], all linears
side by side. With H = X · W + bias:

- ``SparseMatMulSplit*`` (query, key and value of attention): Y0, Y1, .. are the columns of H in order, ``split`` of
  them each: Yi is float32 [..., split[i]]. The sizes add up to N.
- ``SparseMatMul*Gate`` (gate and up projection of a gated MLP): Y = act(G) · U, element by element, with [G, U] the
  halves of H: Y is float32 [..., N / 2]. N is even.

Each linear begins a block of its own, so that no block has columns of two, and the stored tensors of linears with equal
K, ``chunk``, ``block`` and ``width`` lie behind one another: :func:`concatenate`. Where a linear that is not the last
has no whole blocks, padding channels fill its last one, which W and bias do not have. ``format`` then is
``chunked_csc_parts``, else ``chunked_csc``: a library that knows the latter only refuses the former. The kernels
transpose X once for all linears, and a gated result is multiplied while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops import sparse_matmul
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN, SIZES, STORED, PackedWeight, activation_body, decoder

__all__ = [
    "GATES",
    "OP_TYPES",
    "SPLITS",
    "concatenate",
    "function_body",
    "gate_body",
    "gate_decoder",
    "parts_of",
    "reference",
]

SPLITS = {2: "SparseMatMulSplit2", 3: "SparseMatMulSplit3"}
"""Op types by the number of outputs."""

GATES = {"gelu_tanh": "SparseMatMulGeluTanhGate", "silu": "SparseMatMulSiluGate"}
"""Op types by the activation of the gate."""

OP_TYPES = (*SPLITS.values(), *GATES.values())


def parts_of(op_type: str, N: int, split: Sequence[int]) -> tuple[int, ...]:
    """Outputs of each linear of an operator with these attributes; () for one that has a single linear."""
    if op_type in GATES.values():
        return (N // 2, N - N // 2)
    return tuple(split) if op_type in SPLITS.values() else ()


def concatenate(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The weights [K, Ni] side by side, as one [K, sum of Ni].

    Raises ValueError unless K, chunk, block and width are equal.
    """
    first = parts[0]
    sizes = (first.K, first.chunk, first.block, first.width)
    if any((part.K, part.chunk, part.block, part.width) != sizes for part in parts):
        raise ValueError("concatenate() takes weights with equal K, chunk, block and width")
    arrays = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in STORED}
    K, chunk, block, width = sizes
    split = tuple(part.N for part in parts)
    return PackedWeight(
        K,
        sum(split),
        chunk,
        block,
        width,
        arrays["values"],
        arrays["offsets"],
        arrays["counts"],
        arrays["rows"],
        split,
    )


def reference(
    op_type: str, x: np.ndarray, packed: PackedWeight, bias: np.ndarray, split: Sequence[int] = ()
) -> list[np.ndarray]:
    """What the operator computes, in float64: the oracle of the tests. ``split`` is the attribute, () for a gate."""
    h = sparse_matmul.reference(x, packed, bias)
    if op_type in SPLITS.values():
        return np.split(h, np.cumsum(split)[:-1], axis=-1)
    (activation,) = (name for name, gate in GATES.items() if gate == op_type)
    gate, up = np.split(h, 2, axis=-1)
    return [sparse_matmul.activated(activation, gate) * up]


# Right in both formats: where the blocks are whole, there is nothing between what is taken.
_COUNT_BLOCKS = """
    {sizes}
    size_less = Sub(sizes, one)
    part_full = Div(size_less, b)
    part_blocks = Add(part_full, one)
    blocks = ReduceSum<keepdims = 0>(part_blocks)"""
_TAKE_OUTPUTS = """
    part_columns = Mul(part_blocks, b)
    part_ends = CumSum(part_columns, zero)
    part_starts = Sub(part_ends, part_columns)
    taken_ends = Add(part_starts, sizes)
    single = Constant<value_ints = [{ones}]>()
    {starts} = Split(part_starts, single)
    {ends} = Split(taken_ends, single)
    {slices}
    W = Concat<axis = 1>({taken})"""

# Each linear has its own part of W, made when the session is created: what runs is what the linears were.
_PARTS = """
    {weights} = Split<axis = 1>(W, sizes)
    {biases} = Split<axis = 0>(bias, sizes)
    {products}
"""
_HALVES = """
    halves = Constant<value = int64 {2}>()
    half_outputs = Div(n, halves)
    half_n = Unsqueeze(half_outputs, axis0)
    sizes = Concat<axis = 0>(half_n, half_n)"""
_SPLIT = "sizes = Constant<value_ints: ints = @split>()"
_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{attributes}> (X, values, offsets, counts, rows, bias) => ({outputs})
{{
    {decoder}
    {steps}
}}
"""


def _linears_decoder(sizes: str, count: int) -> str:
    """Lines that make W of ``count`` linears, and their numbers of outputs by the lines ``sizes``."""

    def names(name: str) -> str:
        return ", ".join(f"{name}{i}" for i in range(count))

    return decoder(
        count_blocks=_COUNT_BLOCKS.format(sizes=sizes),
        take_outputs=_TAKE_OUTPUTS.format(
            ones=", ".join("1" * count),
            starts=names("start"),
            ends=names("end"),
            slices="\n".join(f"taken{i} = Slice(padded, start{i}, end{i}, axis1)" for i in range(count)),
            taken=names("taken"),
        ),
    )


def _linears_body(results: Sequence[str]) -> str:
    """Lines that make the ``results`` from X, W and bias, behind the decoder."""
    products = [
        f"product{i} = MatMul(X, W{i})\n {result} = Add(product{i}, bias{i})"
        for i, result in enumerate(results)
    ]
    return _PARTS.format(
        weights=", ".join(f"W{i}" for i in range(len(results))),
        biases=", ".join(f"bias{i}" for i in range(len(results))),
        products="\n".join(products),
    )


def gate_decoder() -> str:
    """Lines of a function body that make the weight W [K, N] of a gate and what :func:`gate_body` needs, as
    :func:`.sparse_matmul.decoder` does for one linear."""
    return _linears_decoder(_HALVES, 2)


def gate_body(op_type: str, y: str = "Y") -> str:
    """Lines of a function body that make the value ``y`` of a gate from X, W and bias, behind its decoder."""
    (activation,) = (name for name, gate in GATES.items() if gate == op_type)
    halves = _linears_body(["h", "up"])
    return f"{halves}\n{activation_body(activation, 'activated')}\n {y} = Mul(activated, up)"


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    attributes, outputs = list(SIZES), ["Y"]
    if op_type in GATES.values():
        decoded, steps = gate_decoder(), gate_body(op_type)
    else:
        (count,) = (number for number, split in SPLITS.items() if split == op_type)
        attributes.append("split")
        outputs = [f"Y{i}" for i in range(count)]
        decoded, steps = _linears_decoder(_SPLIT, count), _linears_body(outputs)
    text = _BODY.format(
        domain=DOMAIN,
        opset=opset,
        op_type=op_type,
        attributes=", ".join(attributes),
        outputs=", ".join(outputs),
        decoder=decoded,
        steps=steps,
    )
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto
