"""``prune.channels``: remove channels between convolutions, so that those on both sides become smaller.

Before, C channels::                         After, k of them::

    h = act(Conv(X, W1, b1))                     filters of W1 and b1
    Y = Conv(h, W2, b2)                          input channels of W2, fitted anew

In between: elementwise operators, pools, BatchNormalization, depthwise convolutions (their channels go too), gates.
Which channels go and how W2 makes up for them is told in :mod:`sparse_onnx.passes.structured.groups`; a unit is all
of a channel that the window of W2 sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import CONVOLUTIONS, Weight
from sparse_onnx.passes.structured.operators import sources
from sparse_onnx.passes.structured.structured import Seed, StructuredPass

__all__ = ["Channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels(StructuredPass):
    """See the module's docstring."""

    name: ClassVar[str] = "prune.channels"
    unit: ClassVar[str] = "channels"
    op_types: ClassVar[tuple[str, ...]] = CONVOLUTIONS

    def seeds(self, layers: Mapping[ir.Node, Weight], shapes: Shapes) -> Iterator[Seed]:
        for node, weight in layers.items():
            if node.attributes.get_int("group", 1) > 1:
                continue
            if any(source in layers for source in sources(node.inputs[0]) if source is not None):
                shape = weight.tensor.shape.numpy()
                yield Seed(node, 1 - len(shape), shape[1], 1)
