"""Which input of a model holds tokens: whole numbers that choose rows of a constant table, such as word embeddings."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.model.constants import constant_tensor
from sparse_onnx.model.graph import is_standard

__all__ = ["TokenInput", "find_tokens"]

_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclasses.dataclass(frozen=True)
class TokenInput:
    """The input ``name`` [B, S] of integers in [0, ``rows``)."""

    name: str
    rows: int


def find_tokens(model: ir.Model) -> TokenInput | None:
    """The input that chooses from the largest table; None if there is none.

    Tables that are decoded on the way (by DequantizeLinear, say) count, too. Positions and types of tokens choose from
    small tables, and are what they are whatever the tokens.
    """
    found = [
        TokenInput(value.name or "", rows)
        for value in model.graph.inputs
        if value.dtype is not None
        and value.dtype.is_integer()
        and value.shape is not None
        and len(value.shape) == 2
        and (rows := max(_tables(value), default=0))
    ]
    return max(found, key=lambda tokens: tokens.rows, default=None)


def _tables(value: ir.Value) -> list[int]:
    """The rows of all tables that ``value`` chooses from."""
    rows, left = [], [value]
    while left:
        for node, index in left.pop().uses():
            if is_standard(node, "Gather") and index == 1 and node.attributes.get_int("axis", 0) == 0:
                rows.append(_rows(node.inputs[0]))
            elif is_standard(node, *_MOVES) and index == 0:
                left += node.outputs
    return rows


def _rows(table: ir.Value | None) -> int:
    """The length of a constant matrix, 0 if ``table`` is none."""
    while table is not None and (node := table.producer()) is not None:
        if not is_standard(node, "Cast", "DequantizeLinear", "Identity"):
            return 0
        table = node.inputs[0]
    tensor = constant_tensor(table)
    return int(tensor.shape.numpy()[0]) if tensor is not None and len(tensor.shape) == 2 else 0
