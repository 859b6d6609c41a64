"""The weights that operators of ours have stored: how many, where, and what they are.

An operator has its weight behind its activations: the parts of the stored format and the bias as inputs, the sizes as
attributes. One with a second weight has these once more, with a prefix before all names.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats.base import FormatError, Packed, StoredFormat
from sparse_onnx.sparse_ops.ops.base import SparseOperator
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = [
    "MERGED_FROM",
    "SPARSE_OP_TYPES",
    "JoinedWeight",
    "NodeWeight",
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


class JoinedWeight(Protocol):
    """Several weights as one: its parts in the order of the operator's inputs, and its attributes."""

    def arrays(self) -> dict[str, np.ndarray]: ...

    def attributes(self) -> dict[str, int | str]: ...


@dataclasses.dataclass(frozen=True)
class NodeWeight(abc.ABC):
    """One compressed weight of ``node``, an operator of ours: ``prefix`` is before the names of its attributes, and
    ``first`` is the place of its first part among the inputs."""

    node: ir.Node
    prefix: str
    first: int

    @property
    @abc.abstractmethod
    def base(self) -> str:
        """The operator that ``node`` would be with a weight of floats in the format that adds no word to it."""

    @abc.abstractmethod
    def op_type(self, base: str) -> str:
        """The op type of the operator ``base`` with a weight stored as this one."""

    @property
    @abc.abstractmethod
    def part_names(self) -> tuple[str, ...]:
        """In the order of the inputs."""

    @property
    @abc.abstractmethod
    def size_names(self) -> tuple[str, ...]:
        """Of the attributes, K and N first."""

    @property
    @abc.abstractmethod
    def elements(self) -> str:
        """What its elements are."""

    @abc.abstractmethod
    def unpack(self) -> np.ndarray:
        """The dense weight [K, N]. Raises FormatError if it is damaged."""

    @property
    @abc.abstractmethod
    def apart(self) -> str:
        """Why it cannot become a part of a weight of several linears; empty if it can."""

    @abc.abstractmethod
    def joins(self, widest: NodeWeight) -> bool:
        """Whether it may become one with others and the ``widest`` of these."""

    @abc.abstractmethod
    def join(self, others: Sequence[NodeWeight]) -> JoinedWeight:
        """It and ``others`` behind it as one."""

    @property
    def parts(self) -> tuple[ir.Value | None, ...]:
        """The inputs that hold it, in the order of the format's parts."""
        return tuple(self.node.inputs[self.first : self.first + len(self.part_names)])

    @property
    def bias(self) -> ir.Value | None:
        """The input behind the parts."""
        return self.node.inputs[self.first + len(self.part_names)]

    @property
    def operands(self) -> tuple[ir.Value | None, ...]:
        """The inputs behind the bias."""
        return tuple(self.node.inputs[self.first + len(self.part_names) + 1 :])

    @property
    def tensors(self) -> list[ir.TensorProtocol]:
        """Those of :attr:`parts` that are constant: all of them, unless the file is damaged."""
        return [part.const_value for part in self.parts if part is not None and part.const_value is not None]

    @property
    def name(self) -> str:
        """That of the weight that was packed."""
        first = self.parts[0]
        return "" if first is None else (first.name or "").removesuffix(f".{self.part_names[0]}")

    @property
    def variant(self) -> str:
        """The attribute ``format``: how the parts lie."""
        return self.node.attributes.get_string("format", "")

    @property
    def made_of(self) -> tuple[str, ...]:
        """The names of the weights in it: of linears that were merged since the model was read those of all."""
        first = self.parts[0]
        return (self.name,) if first is None else first.meta.get(MERGED_FROM, (self.name,))

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the format; 0 where the node does not say."""
        return {name: self.node.attributes.get_int(self.prefix + name, 0) for name in self.size_names}

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)"""
        return self.sizes["K"], self.sizes["N"]

    @property
    def mask_structure(self) -> str:
        """The pattern of the zeros, as passes name it."""
        return self.node.attributes.get_string(f"{self.prefix}mask_structure", "unstructured")


@dataclasses.dataclass(frozen=True)
class StoredWeight(NodeWeight):
    """One of floats, in the format ``stored``."""

    stored: StoredFormat

    @property
    def base(self) -> str:
        return OP_TYPES[self.node.op_type].base

    def op_type(self, base: str) -> str:
        return self.stored.op_type(base)

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.stored.parts)

    @property
    def size_names(self) -> tuple[str, ...]:
        return self.stored.sizes

    @property
    def elements(self) -> str:
        values = self.values
        assert values is not None
        assert values.const_value is not None
        return values.const_value.dtype.name

    @property
    def apart(self) -> str:
        if self.variant != self.stored.name or min(self.sizes.values()) < 1:
            return f"does not have its weight in the format {self.stored.name}"
        return ""

    def joins(self, widest: NodeWeight) -> bool:
        return (
            isinstance(widest, StoredWeight)
            and (self.stored, self.variant, self.mask_structure)
            == (widest.stored, widest.variant, widest.mask_structure)
            and self.stored.may_join(self.sizes, widest.sizes)
        )

    def join(self, others: Sequence[NodeWeight]) -> JoinedWeight:
        packed = [weight.packed() for weight in (self, *others) if isinstance(weight, StoredWeight)]
        return self.stored.join(packed)

    def reads_alike(self, other: NodeWeight) -> bool:
        """Whether an operator with this weight first may have ``other``, of one linear, as its second."""
        if not isinstance(other, StoredWeight) or self.stored is not other.stored:
            return False
        return self.stored.reads_alike(self.variant, other.variant)

    @property
    def values(self) -> ir.Value | None:
        """The part that holds the values of the weights that are stored."""
        return self.parts[0]

    @property
    def split(self) -> tuple[int, ...]:
        """Outputs of each of several linears that are one weight, else ()."""
        if self.prefix:
            return ()
        base = OP_TYPES[self.node.op_type].base
        return _operator(self.node).linears(base, self.sizes["N"], _attributes(self.node))

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
        return self.packed().unpack()


def stored_weights(node: ir.Node) -> tuple[StoredWeight, ...]:
    """The stored weights of ``node`` in the order of its inputs; none of a node that is no operator of ours."""
    op_type = OP_TYPES.get(node.op_type) if node.domain == DOMAIN else None
    if op_type is None or op_type.stored is None:
        return ()
    step = len(op_type.stored.parts) + 1
    return tuple(
        StoredWeight(node, prefix, 1 + index * step, op_type.stored)
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
