"""Lower the layers that were chosen, and join those that go together."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.passes.base import Declined, PassContext
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.guard import Guard
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.lower.merge_linears import MergeLinears

__all__ = ["lower_layers"]


def lower_layers(
    model: ir.Model,
    chosen: Sequence[tuple[Candidate, Form]],
    packer: Packer,
    context: PassContext,
    guard: Guard | None = None,
) -> tuple[ir.Model, tuple[Declined, ...]]:
    """A copy of ``model`` with the ``chosen`` candidates in their forms, those that share an input merged and those in
    a row fused unless the ``guard`` says that this is slower, and the places where that was not done."""
    lowered = model.clone()
    for form in dict.fromkeys(form for _, form in chosen):
        names = tuple(candidate.weight.name for candidate, own in chosen if own == form)
        form.lowering(layers=names, packer=packer)(lowered, context)
    together = (MergeLinears(guard), FuseFeedForward(guard))
    return lowered, tuple(place for step in together for place in step(lowered, context).declined)
