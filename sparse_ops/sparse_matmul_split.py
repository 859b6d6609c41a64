"""Linears that share their input, as one product that is split: ``SparseMatMulSplit*`` and ``SparseMatMul*Gate``.

Signatures (domain ``sparse_onnx``, version 1)::

    SparseMatMulSplit2<K, N, chunk, block, width, format, mask_structure, split>(X, values, .., bias) -> Y0, Y1
    SparseMatMulSplit3<K, N, chunk, block, width, format, mask_structure, split>(X, values, .., bias) -> Y0, Y1, Y2
    SparseMatMulSiluGate<K, N, chunk, block, width, format, mask_structure>(X, values, .., bias) -> Y
    SparseMatMulGeluTanhGate<K, N, chunk, block, width, format, mask_structure>(X, values, .., bias) -> Y

Inputs and attributes are those of :mod:`.sparse_matmul`; the stored weight W is [K, N] and bias [N], all linears
side by side. With H = X · W + bias:

- ``SparseMatMulSplit*`` (query, key and value of attention): Y0, Y1, .. are the columns of H in order, ``split`` of
  them each: Yi is float32 [..., split[i]]. The sizes add up to N, and all but the last are multiples of ``block``.
- ``SparseMatMul*Gate`` (gate and up projection of a gated MLP): Y = act(G) · U, element by element, with [G, U] the
  halves of H: Y is float32 [..., N / 2]. N is a multiple of 2 · ``block``.

So no block has columns of two linears, and the stored tensors of linears with equal K, ``chunk``, ``block`` and
``width`` lie behind one another: :func:`concatenate`. The kernels transpose X once for all of them, and a gated
result is multiplied while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser

from sparse_onnx.sparse_ops import sparse_matmul
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN, SIZES, STORED, PackedWeight, activation_body, decoder

__all__ = ["GATES", "OP_TYPES", "SPLITS", "concatenate", "function_body", "gate_body", "reference"]

SPLITS = {2: "SparseMatMulSplit2", 3: "SparseMatMulSplit3"}
"""Op types by the number of outputs."""

GATES = {"gelu_tanh": "SparseMatMulGeluTanhGate", "silu": "SparseMatMulSiluGate"}
"""Op types by the activation of the gate."""

OP_TYPES = (*SPLITS.values(), *GATES.values())


def concatenate(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The weights [K, Ni] side by side, as one [K, sum of Ni].

    Raises ValueError unless K, chunk, block and width are equal and every Ni but the last is a multiple of block.
    """
    first = parts[0]
    sizes = (first.K, first.chunk, first.block, first.width)
    if any((part.K, part.chunk, part.block, part.width) != sizes for part in parts):
        raise ValueError("concatenate() takes weights with equal K, chunk, block and width")
    if any(part.N % first.block for part in parts[:-1]):
        raise ValueError(
            f"concatenate() takes weights of whole blocks of {first.block} outputs, not {[p.N for p in parts]}"
        )
    arrays = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in STORED}
    K, chunk, block, width = sizes
    return PackedWeight(K, sum(part.N for part in parts), chunk, block, width, **arrays)


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


# Each linear has its own part of W, made when the session is created: what runs is what the linears were.
_PARTS = """
    {sizes}
    {weights} = Split<axis = 1>(W, sizes)
    {biases} = Split<axis = 0>(bias, sizes)
    {products}
"""
_HALVES = """
    two = Constant<value = int64[1] {2}>()
    half_n = Div(n_1, two)
    sizes = Concat<axis = 0>(half_n, half_n)"""
_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{op_type} <{attributes}> (X, values, offsets, counts, rows, bias) => ({outputs})
{{
    {decoder}
    {steps}
}}
"""


def _linears_body(sizes: str, results: Sequence[str]) -> str:
    """Lines that make the ``results`` from X, W and bias; the line ``sizes`` makes their numbers of outputs."""
    products = [
        f"product{i} = MatMul(X, W{i})\n {result} = Add(product{i}, bias{i})"
        for i, result in enumerate(results)
    ]
    return _PARTS.format(
        sizes=sizes,
        weights=", ".join(f"W{i}" for i in range(len(results))),
        biases=", ".join(f"bias{i}" for i in range(len(results))),
        products="\n".join(products),
    )


def gate_body(op_type: str, y: str = "Y") -> str:
    """Lines of a function body that make the value ``y`` of a gate from X, W and bias, behind the decoder."""
    (activation,) = (name for name, gate in GATES.items() if gate == op_type)
    halves = _linears_body(_HALVES, ["h", "up"])
    return f"{halves}\n{activation_body(activation, 'activated')}\n {y} = Mul(activated, up)"


def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
    """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
    attributes, outputs = list(SIZES), ["Y"]
    if op_type in GATES.values():
        steps = gate_body(op_type)
    else:
        (count,) = (number for number, split in SPLITS.items() if split == op_type)
        attributes.append("split")
        outputs = [f"Y{i}" for i in range(count)]
        steps = _linears_body("sizes = Constant<value_ints: ints = @split>()", outputs)
    text = _BODY.format(
        domain=DOMAIN,
        opset=opset,
        op_type=op_type,
        attributes=", ".join(attributes),
        outputs=", ".join(outputs),
        decoder=decoder(),
        steps=steps,
    )
    proto: onnx.FunctionProto = onnx.parser.parse_function(text)
    return proto
