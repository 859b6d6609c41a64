"""``prune.ffn``: remove hidden neurons between two linears, so that both become smaller.

Before, h neurons::                          After, k of them::

    u = act(X W1 + b1)                           u = act(X W1' + b1')     columns of W1 and b1
    Y = u W2 + b2                                Y = u W2' + b2'          rows of W2, fitted anew

Any elementwise ``act``, gated ones too: u = act(X Wg + bg) · (X W1 + b1). Which neurons go and how W2 makes up for
them is told in :mod:`sparse_onnx.passes.structured.groups`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import LINEARS, Weight
from sparse_onnx.passes.structured.operators import sources
from sparse_onnx.passes.structured.structured import Seed, StructuredPass

__all__ = ["Ffn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ffn(StructuredPass):
    """See the module's docstring."""

    name: ClassVar[str] = "prune.ffn"
    unit: ClassVar[str] = "neurons"
    op_types: ClassVar[tuple[str, ...]] = LINEARS

    def seeds(self, layers: Mapping[ir.Node, Weight], shapes: Shapes) -> Iterator[Seed]:
        for node, weight in layers.items():
            if any(source in layers for source in sources(node.inputs[0]) if source is not None):
                yield Seed(node, -1, weight.shape[0], 1)
