"""``SparseLSTM*`` and ``SparseGRU*``: the recurrent layers of the ONNX standard with both weights stored compressed.

Signatures (domain ``sparse_onnx``, version 1; one op type per combination of inputs, see :data:`OP_TYPES`)::

    SparseLSTM*<K, N, ..., format, mask_structure, recurrent_K, recurrent_N, ..., recurrent_mask_structure, direction>(
        X, ..., bias, recurrent_..., recurrent_bias [, sequence_lens] [, initial_h, initial_c]) -> Y, Y_h, Y_c

    SparseGRU*<..., linear_before_reset>(X, ..., recurrent_bias [, sequence_lens] [, initial_h]) -> Y, Y_h

====================  =========  ============  ==================================================================
name                  dtype      shape         meaning
====================  =========  ============  ==================================================================
X                     float32    [S, B, K]     S steps of B sequences
...                                            the input weight [K, N] and its bias [N], as for ``SparseMatMul*``
recurrent_...                                  the recurrent weight [H, N] and its bias [N], in the same ``format``
sequence_lens         int32      [B]           steps of each sequence, 0..S; where the op type says ``Lengths``
initial_h, initial_c  float32    [D, B, H]     state before the first step; where the op type says ``State``
direction             string     attribute     forward, reverse or bidirectional, which has D = 2; else D = 1
linear_before_reset   int        attribute     0 or 1, of a GRU: see the ONNX standard
Y                     float32    [S, D, B, H]  every state; zeros behind the end of a sequence
Y_h, Y_c              float32    [D, B, H]     the state behind the last step; zeros for a sequence of no steps
====================  =========  ============  ==================================================================

What is computed is what ``LSTM`` and ``GRU`` of the standard do, with their default activations, no peepholes and no
clip. ``recurrent_K`` is H, and both N are D · gates · H: the columns of a weight are all directions side by side, in
each all gates (i, o, f, c or z, r, h), in each all hidden elements. So one product of S · B rows makes what the input
gives to every gate, step and direction. The recurrent weight is better stored gate by gate: :func:`recurrent_outputs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_onnx.sparse_ops.formats.base import Outputs, Packed, StoredFormat
from sparse_onnx.sparse_ops.ops.base import Attributes, Body, Shape, SparseOperator

__all__ = [
    "CELLS",
    "DIRECTIONS",
    "OPERATOR",
    "OP_TYPES",
    "PREFIX",
    "Signature",
    "operator_name",
    "recurrent_outputs",
    "reference",
]

PREFIX = "recurrent_"
"""Of the attributes and inputs of the recurrent weight."""

CELLS = {"LSTM": 4, "GRU": 3}
"""The operators of the standard, and their gates."""

DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
"""The values of ``direction``, and how many directions they are."""


@dataclass(frozen=True)
class Signature:
    """What sets the op types apart: the cell, and which inputs stand behind the weights."""

    cell: str
    lengths: bool
    state: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """The inputs behind the weights."""
        states = ("initial_h", "initial_c")[: len(self.outputs) - 1] if self.state else ()
        return (("sequence_lens",) if self.lengths else ()) + states

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("Y", "Y_h", "Y_c") if self.cell == "LSTM" else ("Y", "Y_h")


def operator_name(signature: Signature) -> str:
    """The operator with that signature."""
    lengths, state = "Lengths" if signature.lengths else "", "State" if signature.state else ""
    return f"Sparse{signature.cell}{lengths}{state}"


OP_TYPES = {
    operator_name(signature): signature
    for signature in (
        Signature(cell, lengths, state)
        for cell in CELLS
        for lengths in (False, True)
        for state in (False, True)
    )
}


def recurrent_outputs(hidden: int) -> Outputs:
    """How the outputs of a recurrent weight [``hidden``, N] are best stored: the kernel computes gate by gate."""
    return Outputs(hidden)


def reference(
    op_type: str,
    x: np.ndarray,
    packed: Packed,
    bias: np.ndarray,
    recurrent: Packed,
    recurrent_bias: np.ndarray,
    *,
    direction: str = "forward",
    linear_before_reset: int = 0,
    sequence_lens: np.ndarray | None = None,
    initial_h: np.ndarray | None = None,
    initial_c: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Y, Y_h and of an LSTM Y_c, in float64: the oracle of the tests."""
    cell, hidden = OP_TYPES[op_type].cell, recurrent.shape[0]
    (steps, batch, _), directions = x.shape, DIRECTIONS[direction]
    shape = (directions, batch, hidden)
    W, R = packed.unpack().astype(np.float64), recurrent.unpack().astype(np.float64)
    projected = (x.astype(np.float64) @ W + bias).reshape(steps, batch, directions, CELLS[cell], hidden)
    weights = R.reshape(hidden, directions, -1, hidden)
    biases = recurrent_bias.astype(np.float64).reshape(directions, -1, hidden)
    lengths = np.full(batch, steps) if sequence_lens is None else sequence_lens
    y = np.zeros((steps, *shape))
    h_out, c_out = (np.zeros(shape) if v is None else v.astype(np.float64) for v in (initial_h, initial_c))
    for d in range(directions):
        for b in range(batch):
            times = range(lengths[b])
            h, c = h_out[d, b].copy(), c_out[d, b].copy()
            for time in reversed(times) if d == 1 or direction == "reverse" else times:
                state = (projected[time, b, d], weights[:, d], biases[d], h)
                if cell == "LSTM":
                    h, c = _lstm(*state, c)
                else:
                    h = _gru(*state, linear_before_reset)
                y[time, d, b] = h
            h_out[d, b], c_out[d, b] = (h, c) if lengths[b] else (0, 0)
    return [y, h_out, c_out][: len(OP_TYPES[op_type].outputs)]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _lstm(
    x: np.ndarray, R: np.ndarray, bias: np.ndarray, h: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    i, o, f, g = x + np.einsum("k,kgn->gn", h, R) + bias
    c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
    return _sigmoid(o) * np.tanh(c), c


def _gru(
    x: np.ndarray, R: np.ndarray, bias: np.ndarray, h: np.ndarray, linear_before_reset: int
) -> np.ndarray:
    past = np.einsum("k,kgn->gn", h, R) + bias
    z, r = _sigmoid(x[:2] + past[:2])
    n = np.tanh(x[2] + (r * past[2] if linear_before_reset else (r * h) @ R[:, 2] + bias[2]))
    return np.asarray((1 - z) * n + z * h)


# W [K, N] of a decoder as the standard has it: [directions, gates · hidden, K].
_STEPS = """{decoder}
    {recurrent_decoder}
    gates = Constant<value = int64[1] {{{gates}}}>()
    outputs_1 = Mul(gates, {prefix}k_1)
    biases_shape = Concat<axis = 0>(flat_shape, outputs_1)
    bias_2 = Reshape(bias, biases_shape)
    recurrent_bias_2 = Reshape({prefix}bias, biases_shape)
    biases = Concat<axis = 1>(bias_2, recurrent_bias_2)
    rows_of_w = Transpose<perm = [1, 0]>(W)
    w_shape = Concat<axis = 0>(flat_shape, outputs_1, k_1)
    w_3 = Reshape(rows_of_w, w_shape)
    rows_of_r = Transpose<perm = [1, 0]>({prefix}W)
    r_shape = Concat<axis = 0>(flat_shape, outputs_1, {prefix}k_1)
    r_3 = Reshape(rows_of_r, r_shape)
    {outputs} = {cell}<{settings}>({operands})"""


def _body(op_type: str, stored: StoredFormat) -> Body:
    signature = OP_TYPES[op_type]
    skipped = [""] if signature.state and not signature.lengths else []
    own = ("direction", *(["linear_before_reset"] if signature.cell == "GRU" else []))
    settings = {
        "hidden_size": f"int = @{PREFIX}K",
        "direction": "string = @direction",
        "linear_before_reset": "int = @linear_before_reset",
    }
    steps = _STEPS.format(
        decoder=stored.decoder(),
        recurrent_decoder=stored.decoder(PREFIX),
        prefix=PREFIX,
        gates=CELLS[signature.cell],
        outputs=", ".join(signature.outputs),
        cell=signature.cell,
        settings=", ".join(f"{name}: {settings[name]}" for name in ("hidden_size", *own)),
        operands=", ".join(["X", "w_3", "r_3", "biases", *skipped, *signature.operands]),
    )
    return Body(steps, own, signature.operands, signature.outputs)


def _rows_at_once(attributes: Attributes, x_shape: Shape) -> tuple[int, ...]:
    """X meets W whole; each step of the recurrence multiplies the batch."""
    return x_shape[0] * x_shape[1], x_shape[1]


OPERATOR = SparseOperator(tuple(OP_TYPES), _body, ("", PREFIX), at_once=_rows_at_once)
