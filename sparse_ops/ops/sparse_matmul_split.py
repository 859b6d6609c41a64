"""Linears that share their input, as one product that is split: ``SparseMatMulSplit*`` and ``SparseMatMul*Gate``.

Signatures (domain ``sparse_onnx``, version 1)::

    SparseMatMulSplit2<K, N, ..., format, mask_structure, split>(X, ..., bias) -> Y0, Y1
    SparseMatMulSplit3<K, N, ..., format, mask_structure, split>(X, ..., bias) -> Y0, Y1, Y2
    SparseMatMulSiluGate<K, N, ..., format, mask_structure>(X, ..., bias) -> Y
    SparseMatMulGeluTanhGate<K, N, ..., format, mask_structure>(X, ..., bias) -> Y

Inputs and attributes are those of :mod:`.sparse_matmul`; the stored weight W is [K, N] and bias [N], all linears
side by side. With H = X · W + bias:

- ``SparseMatMulSplit*`` (query, key and value of attention): Y0, Y1, .. are the columns of H in order, ``split`` of
  them each: Yi is float32 [..., split[i]]. The sizes add up to N.
- ``SparseMatMul*Gate`` (gate and up projection of a gated MLP): Y = act(G) · U, element by element, with [G, U] the
  halves of H: Y is float32 [..., N / 2]. N is even.

How the linears of one stored weight lie is the format's business; joining their stored forms is, too. The kernels
transpose X once for all linears, and a gated result is multiplied while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparse_onnx.sparse_ops.formats.base import Packed, StoredFormat
from sparse_onnx.sparse_ops.ops import sparse_matmul
from sparse_onnx.sparse_ops.ops.base import Attributes, Body, SparseOperator
from sparse_onnx.sparse_ops.ops.sparse_matmul import activation_body

__all__ = [
    "GATES",
    "OPERATOR",
    "OP_TYPES",
    "SPLITS",
    "divided",
    "divided_body",
    "gate_body",
    "gate_decoder",
    "linears_of",
    "reference",
    "sizes_body",
    "steps_body",
]

SPLITS = {2: "SparseMatMulSplit2", 3: "SparseMatMulSplit3"}
"""Op types by the number of outputs."""

GATES = {"gelu_tanh": "SparseMatMulGeluTanhGate", "silu": "SparseMatMulSiluGate"}
"""Op types by the activation of the gate."""

OP_TYPES = (*SPLITS.values(), *GATES.values())


def linears_of(op_type: str, N: int, attributes: Attributes) -> tuple[int, ...]:
    """Outputs of each linear of an operator with these attributes; () for one that has a single linear."""
    if op_type in GATES.values():
        return (N // 2, N - N // 2)
    return tuple(attributes.get("split", ())) if op_type in SPLITS.values() else ()


def divided(op_type: str, h: np.ndarray, split: Sequence[int] = ()) -> list[np.ndarray]:
    """What the operator makes of H [..., N] float64; ``split`` is the attribute, () for a gate."""
    if op_type in SPLITS.values():
        return np.split(h, np.cumsum(split)[:-1], axis=-1)
    (activation,) = (name for name, gate in GATES.items() if gate == op_type)
    gate, up = np.split(h, 2, axis=-1)
    return [sparse_matmul.activated(activation, gate) * up]


def reference(
    op_type: str, x: np.ndarray, packed: Packed, bias: np.ndarray, split: Sequence[int] = ()
) -> list[np.ndarray]:
    """What the operator computes, in float64: the oracle of the tests. ``split`` is the attribute, () for a gate."""
    return divided(op_type, sparse_matmul.reference(x, packed, bias), split)


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


def _linears_body(results: Sequence[str], x: str) -> str:
    """Lines that make the ``results`` from ``x``, W and bias, behind the decoder."""
    products = [
        f"product{i} = MatMul({x}, W{i})\n {result} = Add(product{i}, bias{i})"
        for i, result in enumerate(results)
    ]
    return _PARTS.format(
        weights=", ".join(f"W{i}" for i in range(len(results))),
        biases=", ".join(f"bias{i}" for i in range(len(results))),
        products="\n".join(products),
    )


def gate_decoder(stored: StoredFormat) -> str:
    """Lines of a function body that make the weight W [K, N] of a gate and what :func:`gate_body` needs."""
    return stored.decoder(count=2, linears=_HALVES)


def gate_body(op_type: str, y: str = "Y", x: str = "X") -> str:
    """Lines of a function body that make the value ``y`` of a gate from ``x``, W and bias, behind its decoder."""
    (activation,) = (name for name, gate in GATES.items() if gate == op_type)
    halves = _linears_body(["h", "up"], x)
    return f"{halves}\n{activation_body(activation, 'activated')}\n {y} = Mul(activated, up)"


def sizes_body(op_type: str) -> str:
    """Lines that make ``sizes`` [count] int64, the outputs of each linear, from ``n`` and ``axis0``: N and [0]."""
    return _HALVES if op_type in GATES.values() else _SPLIT


def divided_body(op_type: str, h: str) -> Body:
    """What an operator makes of the value ``h`` [..., N] and ``sizes``: as :func:`divided`."""
    if op_type in GATES.values():
        (activation,) = (name for name, gate in GATES.items() if gate == op_type)
        return Body(f"""
    h, up = Split<axis = -1>({h}, sizes)
    {activation_body(activation, "activated")}
    Y = Mul(activated, up)""")
    outputs = _outputs(op_type)
    return Body(f"{', '.join(outputs)} = Split<axis = -1>({h}, sizes)", ("split",), outputs=outputs)


def _outputs(op_type: str) -> tuple[str, ...]:
    (count,) = (number for number, split in SPLITS.items() if split == op_type)
    return tuple(f"Y{i}" for i in range(count))


def steps_body(op_type: str, x: str = "X") -> Body:
    """What an operator does with ``x``, W, bias and ``sizes``, behind its decoder."""
    if op_type in GATES.values():
        return Body(gate_body(op_type, x=x))
    outputs = _outputs(op_type)
    return Body(_linears_body(outputs, x), ("split",), outputs=outputs)


def _body(op_type: str, stored: StoredFormat) -> Body:
    body = steps_body(op_type)
    decoder = stored.decoder(count=max(2, len(body.outputs)), linears=sizes_body(op_type))
    return body._replace(steps=f"{decoder}\n{body.steps}")


OPERATOR = SparseOperator(OP_TYPES, _body, linears=linears_of)
