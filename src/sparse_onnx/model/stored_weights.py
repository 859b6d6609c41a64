"""The weights that operators of ours have stored: how many, where, and what they are.

An operator has its weight behind its activations: the inputs ``values, offsets, counts, rows, bias`` and the attributes
that say how it is stored. One with a second weight has these once more, with a prefix before all names.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from sparse_onnx.sparse_ops import (
    sparse_conv,
    sparse_conv_depthwise,
    sparse_feed_forward,
    sparse_matmul,
    sparse_matmul_split,
    sparse_recurrent,
)
from sparse_onnx.sparse_ops.sparse_matmul import (
    DOMAIN,
    FORMAT,
    PARTS_FORMAT,
    SIZES,
    STORED,
    FormatError,
    PackedWeight,
)

__all__ = [
    "MERGED_FROM",
    "SPARSE_OP_TYPES",
    "StoredWeight",
    "sparse_nodes",
    "sparsity_of",
    "stored_weights",
    "weight_prefixes",
]

SPARSE_OP_TYPES = (
    *sparse_matmul.ACTIVATIONS,
    *sparse_matmul_split.OP_TYPES,
    *sparse_feed_forward.OP_TYPES,
    *sparse_conv.OP_TYPES,
    *sparse_conv_depthwise.OP_TYPES,
    *sparse_recurrent.OP_TYPES,
)
"""The operators with compressed weights."""


def weight_prefixes(op_type: str) -> tuple[str, ...]:
    """What is before the names of inputs and attributes, for each stored weight of the operator."""
    if op_type in sparse_feed_forward.OP_TYPES:
        return ("", sparse_feed_forward.PREFIX)
    if op_type in sparse_recurrent.OP_TYPES:
        return ("", sparse_recurrent.PREFIX)
    return ("",) if op_type in SPARSE_OP_TYPES else ()


MERGED_FROM = "sparse_onnx.merged_from"
"""Key of the metadata in memory of the first stored tensor of a weight: the names of those that it was merged from."""


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """One weight of ``node``: ``prefix`` is before the names of its attributes, and ``first`` is the place of its
    values among the inputs."""

    node: ir.Node
    prefix: str
    first: int

    @property
    def parts(self) -> tuple[ir.Value | None, ...]:
        """Values, offsets, counts and rows."""
        return tuple(self.node.inputs[self.first : self.first + len(STORED)])

    @property
    def tensors(self) -> list[ir.TensorProtocol]:
        """Those of :attr:`parts` that are constant: four, unless the file is damaged."""
        return [part.const_value for part in self.parts if part is not None and part.const_value is not None]

    @property
    def name(self) -> str:
        """That of the weight that was packed."""
        values = self.parts[0]
        return "" if values is None else (values.name or "").removesuffix(".values")

    @property
    def made_of(self) -> tuple[str, ...]:
        """The names of the weights in it: of linears that were merged since the model was read those of all."""
        values = self.parts[0]
        return (self.name,) if values is None else values.meta.get(MERGED_FROM, (self.name,))

    @property
    def sizes(self) -> dict[str, int]:
        """K, N, chunk, block and width; 0 where the node does not say."""
        return {name: self.node.attributes.get_int(self.prefix + name, 0) for name in SIZES}

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)"""
        return self.sizes["K"], self.sizes["N"]

    @property
    def split(self) -> tuple[int, ...]:
        """Outputs of each of several linears that are one weight, else ()."""
        if self.prefix:
            return ()
        op_type = sparse_feed_forward.OP_TYPES.get(self.node.op_type, self.node.op_type)
        sizes = self.node.attributes.get_ints("split", ())
        return sparse_matmul_split.parts_of(op_type, self.sizes["N"], sizes)

    @property
    def mask_structure(self) -> str:
        """The pattern of the zeros, as passes name it."""
        return self.node.attributes.get_string(f"{self.prefix}mask_structure", "unstructured")

    @property
    def sparsity(self) -> float:
        """The share of weights that are not stored (an empty segment stores one zero)."""
        values, size = self.parts[0], math.prod(self.shape)
        assert values is not None
        assert values.const_value is not None
        return max(0.0, 1 - values.const_value.size / size)

    def packed(self) -> PackedWeight:
        """The stored tensors as one weight; those of a file stay mapped. Raises FormatError if something is missing."""
        tensors, sizes, stored = self.tensors, self.sizes, self.node.attributes.get_string("format", "")
        if len(tensors) < len(STORED) or stored not in (FORMAT, PARTS_FORMAT):
            raise FormatError(f"no constant in the format {FORMAT}")
        if min(sizes.values()) < 1:
            raise FormatError(f"{', '.join(self.prefix + name for name in SIZES)} must be positive")
        values, offsets, counts, rows = (tensor.numpy() for tensor in tensors)
        packed = PackedWeight(
            **sizes, values=values, offsets=offsets, counts=counts, rows=rows, split=self.split
        )
        if packed.format == PARTS_FORMAT and stored == FORMAT:
            raise FormatError(
                f"linears of {list(packed.split)} outputs have no whole blocks of {packed.block}"
            )
        return packed


def stored_weights(node: ir.Node) -> tuple[StoredWeight, ...]:
    """The stored weights of ``node`` in the order of its inputs; none of a node that is no operator of ours."""
    prefixes = weight_prefixes(node.op_type) if node.domain == DOMAIN else ()
    return tuple(
        StoredWeight(node, prefix, 1 + index * (len(STORED) + 1)) for index, prefix in enumerate(prefixes)
    )


def sparse_nodes(model: ir.Model) -> list[ir.Node]:
    """The operators of the main graph that have compressed weights, in its order."""
    return [node for node in model.graph if stored_weights(node)]


def sparsity_of(node: ir.Node) -> float:
    """The share of weights that a sparse operator does not store."""
    weights = stored_weights(node)
    sizes = [math.prod(weight.shape) for weight in weights]
    return sum(weight.sparsity * size for weight, size in zip(weights, sizes, strict=True)) / sum(sizes)
