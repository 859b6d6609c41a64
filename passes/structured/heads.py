"""``prune.heads``: remove whole attention heads from query, key, value and output projection.

H heads of size D, E = H·D, become k heads::

    q, k, v = X Wq + bq, ...                     columns of all three
    Reshape to [B, S, H, D], attention           H in the shapes
    Y = Reshape to [B, S, E] · Wo + bo           rows of Wo, fitted anew

Where heads share keys and values (grouped queries), they go together. Which heads go and how Wo makes up for them is
told in :mod:`sparse_onnx.passes.structured.groups`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.graph import producer
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import LINEARS, Weight
from sparse_onnx.passes.structured.structured import Seed, StructuredPass

__all__ = ["Heads"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads(StructuredPass):
    """See the module's docstring."""

    name: ClassVar[str] = "prune.heads"
    unit: ClassVar[str] = "heads"
    op_types: ClassVar[tuple[str, ...]] = LINEARS
    multiple_of: int = 1

    def seeds(self, layers: Mapping[ir.Node, Weight], shapes: Shapes) -> Iterator[Seed]:
        for node, weight in layers.items():
            merge = producer(node.inputs[0], "Reshape")
            if merge is None:
                continue
            dims = shapes.dims(merge.inputs[0])
            count, size = dims[-2:] if len(dims) > 2 else (None, None)
            if (
                isinstance(count, int)
                and isinstance(size, int)
                and count > 1
                and count * size == weight.shape[0]
            ):
                yield Seed(node, -1, count, size)
