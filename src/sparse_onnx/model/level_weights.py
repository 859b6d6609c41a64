"""Weights of few bits without their zeros that operators of ours for few tokens have stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.stored_weights import JoinedWeight, NodeWeight, stored_weights
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats import nbits
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.ops import sparse_matmul_nbits

__all__ = ["LevelWeight", "level_weight", "node_weights"]


@dataclasses.dataclass(frozen=True)
class LevelWeight(NodeWeight):
    """One in a ``layout``."""

    layout: nbits.Layout

    @property
    def base(self) -> str:
        return sparse_matmul_nbits.OP_TYPES[self.node.op_type].base

    def op_type(self, base: str) -> str:
        return sparse_matmul_nbits.op_type_of(base, self.layout)

    @property
    def part_names(self) -> tuple[str, ...]:
        return self.layout.parts

    @property
    def size_names(self) -> tuple[str, ...]:
        return self.layout.sizes

    @property
    def elements(self) -> str:
        return f"{self.layout.bits} bits by {self.sizes['group']}"

    @property
    def apart(self) -> str:
        if self.variant != self.layout.name or min(self.sizes.values()) < 1:
            return f"does not have its weight in the format {self.layout.name}"
        N = self.shape[1]
        return "" if self.layout.whole_blocks(N) else f"has {N} outputs, which are no whole blocks"

    def joins(self, widest: NodeWeight) -> bool:
        if not isinstance(widest, LevelWeight) or widest.layout != self.layout:
            return False
        return {**self.sizes, "N": 0} == {**widest.sizes, "N": 0}

    def join(self, others: Sequence[NodeWeight]) -> JoinedWeight:
        packed = [weight.packed() for weight in (self, *others) if isinstance(weight, LevelWeight)]
        return nbits.join(packed)

    def unpack(self) -> np.ndarray:
        return self.packed().unpack()

    def packed(self) -> nbits.PackedLevels:
        """The stored tensors as one weight; those of a file stay mapped. Raises FormatError if something is missing."""
        tensors = self.tensors
        if len(tensors) < len(self.layout.parts) or self.variant != self.layout.name:
            raise FormatError(f"no constant in the format {self.layout.name}")
        return nbits.read(self.layout, self.sizes, [tensor.numpy() for tensor in tensors])


def level_weight(node: ir.Node) -> LevelWeight | None:
    """The weight of ``node``; None of any other operator."""
    found = sparse_matmul_nbits.OP_TYPES.get(node.op_type) if node.domain == DOMAIN else None
    return None if found is None else LevelWeight(node, "", 1, found.layout)


def node_weights(node: ir.Node) -> tuple[NodeWeight, ...]:
    """The weights of ``node`` that are stored without their zeros, of floats or of few bits, in the order of its
    inputs; none of any other operator."""
    levels = level_weight(node)
    return stored_weights(node) if levels is None else (levels,)
