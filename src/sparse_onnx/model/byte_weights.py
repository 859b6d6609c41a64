"""Weights of 8 bits that our products of bytes have stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.stored_weights import JoinedWeight, NodeWeight
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.ops import int8_matmul, q_matmul

__all__ = ["ByteWeight", "byte_weight"]


@dataclasses.dataclass(frozen=True)
class ByteWeight(NodeWeight):
    """One of an operator of the ``family`` that the function names, with all quads or not."""

    kind: int8_matmul.OfBytes
    family: Callable[[str, bool], str]

    @property
    def base(self) -> str:
        return self.kind.base

    def op_type(self, base: str) -> str:
        return self.family(base, self.kind.dense)

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(part.name for part in int8_quads.parts(self.kind.dense))

    @property
    def size_names(self) -> tuple[str, ...]:
        return int8_quads.SIZES

    @property
    def elements(self) -> str:
        return "int8"

    @property
    def _format(self) -> str:
        return int8_quads.DENSE if self.kind.dense else int8_quads.QUADS

    @property
    def apart(self) -> str:
        if self.variant != self._format or min(self.sizes.values()) < 1:
            return f"does not have its weight in the format {self._format}"
        N = self.shape[1]
        return "" if int8_quads.whole_block([N]) else f"has {N} outputs, which are no whole blocks"

    def joins(self, widest: NodeWeight) -> bool:
        if not isinstance(widest, ByteWeight) or (self.kind, self.family) != (widest.kind, widest.family):
            return False
        return (self.shape[0], self.grids, self.operands) == (widest.shape[0], widest.grids, widest.operands)

    def reads_alike(self, other: NodeWeight) -> bool:
        """Whether an operator with this weight first may have ``other``, of one linear, as its second."""
        same = isinstance(other, ByteWeight) and (self.kind.dense, self.family) == (
            other.kind.dense,
            other.family,
        )
        return same and self.variant == other.variant

    @property
    def grids(self) -> dict[str, object]:
        """The attributes that describe no weight."""
        return {
            name: attribute.value
            for name, attribute in self.node.attributes.items()
            if name not in (*self.size_names, "format")
        }

    def join(self, others: Sequence[NodeWeight]) -> JoinedWeight:
        return int8_quads.join(
            [weight.packed() for weight in (self, *others) if isinstance(weight, ByteWeight)]
        )

    def unpack(self) -> np.ndarray:
        return self.packed().unpack()

    def packed(self) -> int8_quads.Int8Weight:
        """The stored tensors as one weight; those of a file stay mapped. Raises FormatError if something is missing."""
        tensors = self.tensors
        if len(tensors) < len(self.part_names) or self.variant != self._format:
            raise FormatError(f"no constant in the format {self._format}")
        return int8_quads.read(self.kind.dense, self.sizes, [tensor.numpy() for tensor in tensors])


def byte_weight(node: ir.Node) -> ByteWeight | None:
    """The weight of ``node``; None of any other operator."""
    if node.domain == DOMAIN:
        for family in (int8_matmul, q_matmul):
            if (kind := family.OP_TYPES.get(node.op_type)) is not None:
                return ByteWeight(node, "", 1, kind, family.op_type_of)
    return None
