"""The same model with activations that are not rounded: what tells a fault of a lowering from what its form loses."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.model.metadata_keys import LOWERED_KEY
from sparse_onnx.passes.lower.candidates import LOWERINGS
from sparse_onnx.passes.lower.encoded_linear import LowerEncoded

__all__ = ["exact_twin"]


def exact_twin(model: ir.Model) -> ir.Model | None:
    """A copy of ``model`` whose lowered layers have the same weights and float32 activations; None if they all do
    already."""
    lowerings = {cls.name: cls for cls in LOWERINGS if issubclass(cls, LowerEncoded)}
    if not any(LOWERED_KEY in node.metadata_props for node in model.graph):
        return None
    twin = model.clone()
    for node in tuple(twin.graph):
        if (lowering := lowerings.get(node.metadata_props.get(LOWERED_KEY, ""))) is not None:
            lowering.exact_twin(twin, node)
    return twin
