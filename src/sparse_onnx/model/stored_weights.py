"""The weights that operators of ours have stored: how many, where, and what they are.

An operator has its weight behind its activations: the parts of the stored format and the bias as inputs, the sizes as
attributes. One with a second weight has these once more, with a prefix before all names.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats.base import FormatError, Packed, StoredFormat
from sparse_onnx.sparse_ops.ops.base import SparseOperator
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = [
    "MERGED_FROM",
    "SPARSE_OP_TYPES",
    "StoredWeight",
    "rows_at_once",
    "rows_of",
    "sparse_nodes",
    "sparsity_of",
    "stored_weights",
]

SPARSE_OP_TYPES = tuple(name for name, op_type in OP_TYPES.items() if op_type.stored is not None)
"""The operators with compressed weights."""


def _operator(node: ir.Node) -> SparseOperator:
    operator = OP_TYPES[node.op_type].operator
    assert isinstance(operator, SparseOperator)
    return operator


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


MERGED_FROM = "sparse_onnx.merged_from"
"""Key of the metadata in memory of the first stored tensor of a weight: the names of those that it was merged from."""


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """One weight of ``node`` in the format ``stored``: ``prefix`` is before the names of its attributes, and ``first``
    is the place of its first part among the inputs."""

    node: ir.Node
    stored: StoredFormat
    prefix: str
    first: int

    @property
    def parts(self) -> tuple[ir.Value | None, ...]:
        """The inputs that hold it, in the order of the format's parts."""
        return tuple(self.node.inputs[self.first : self.first + len(self.stored.parts)])

    @property
    def bias(self) -> ir.Value | None:
        """The input behind the parts."""
        return self.node.inputs[self.first + len(self.stored.parts)]

    @property
    def values(self) -> ir.Value | None:
        """The part that holds the values of the weights that are stored."""
        return self.parts[0]

    @property
    def tensors(self) -> list[ir.TensorProtocol]:
        """Those of :attr:`parts` that are constant: all of them, unless the file is damaged."""
        return [part.const_value for part in self.parts if part is not None and part.const_value is not None]

    @property
    def name(self) -> str:
        """That of the weight that was packed."""
        values = self.values
        return "" if values is None else (values.name or "").removesuffix(f".{self.stored.parts[0].name}")

    @property
    def variant(self) -> str:
        """The attribute ``format``: how the parts lie."""
        return self.node.attributes.get_string("format", "")

    @property
    def made_of(self) -> tuple[str, ...]:
        """The names of the weights in it: of linears that were merged since the model was read those of all."""
        values = self.values
        return (self.name,) if values is None else values.meta.get(MERGED_FROM, (self.name,))

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the format; 0 where the node does not say."""
        return {name: self.node.attributes.get_int(self.prefix + name, 0) for name in self.stored.sizes}

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)"""
        return self.sizes["K"], self.sizes["N"]

    @property
    def split(self) -> tuple[int, ...]:
        """Outputs of each of several linears that are one weight, else ()."""
        if self.prefix:
            return ()
        base = OP_TYPES[self.node.op_type].base
        return _operator(self.node).linears(base, self.sizes["N"], _attributes(self.node))

    @property
    def mask_structure(self) -> str:
        """The pattern of the zeros, as passes name it."""
        return self.node.attributes.get_string(f"{self.prefix}mask_structure", "unstructured")

    @property
    def sparsity(self) -> float:
        """The share of weights that are not stored (an empty segment stores one zero)."""
        values, size = self.values, math.prod(self.shape)
        assert values is not None
        assert values.const_value is not None
        return max(0.0, 1 - values.const_value.size / size)

    def packed(self) -> Packed:
        """The stored tensors as one weight; those of a file stay mapped. Raises FormatError if something is missing."""
        tensors, sizes = self.tensors, self.sizes
        if len(tensors) < len(self.stored.parts) or self.variant not in self.stored.variants:
            raise FormatError(f"no constant in the format {self.stored.name}")
        if min(sizes.values()) < 1:
            raise FormatError(f"{', '.join(self.prefix + name for name in sizes)} must be positive")
        return self.stored.read(self.variant, sizes, [tensor.numpy() for tensor in tensors], self.split)

    def unpack(self) -> np.ndarray:
        """The dense weight [K, N]. Raises FormatError if it is damaged."""
        return self.packed().unpack()


def stored_weights(node: ir.Node) -> tuple[StoredWeight, ...]:
    """The stored weights of ``node`` in the order of its inputs; none of a node that is no operator of ours."""
    op_type = OP_TYPES.get(node.op_type) if node.domain == DOMAIN else None
    if op_type is None or op_type.stored is None:
        return ()
    step = len(op_type.stored.parts) + 1
    return tuple(
        StoredWeight(node, op_type.stored, prefix, 1 + index * step)
        for index, prefix in enumerate(op_type.prefixes)
    )


def rows_of(node: ir.Node, x_shape: tuple[int, ...]) -> int:
    """The vectors of activations that every weight of a sparse operator multiplies, with X of that shape: tokens, or
    the positions of a convolution's output."""
    return _operator(node).rows(_attributes(node), x_shape)


def rows_at_once(node: ir.Node, x_shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many of them meet a kernel together: one number for all weights, or one for each."""
    operator, attributes = _operator(node), _attributes(node)
    if operator.at_once is None:
        return (operator.rows(attributes, x_shape),)
    return operator.at_once(attributes, x_shape)


def sparse_nodes(model: ir.Model) -> list[ir.Node]:
    """The operators of the main graph that have compressed weights, in its order."""
    return [node for node in model.graph if stored_weights(node)]


def sparsity_of(node: ir.Node) -> float:
    """The share of weights that a sparse operator does not store."""
    weights = stored_weights(node)
    sizes = [math.prod(weight.shape) for weight in weights]
    return sum(weight.sparsity * size for weight, size in zip(weights, sizes, strict=True)) / sum(sizes)
