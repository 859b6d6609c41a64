"""What a compilation leaves in its folder: a compiled model, a pruned one, or the original where nothing was gained."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.compilation.prepare import Prepared
from sparse_onnx.compilation.settle import Settled
from sparse_onnx.compilation.write import Lowered, Writer
from sparse_onnx.document import Written
from sparse_onnx.model import model_io
from sparse_onnx.passes.base import Declined
from sparse_onnx.timing.rounds import Ratio

__all__ = ["Shipped", "ship"]


@dataclasses.dataclass(frozen=True)
class Shipped:
    """What lies in the folder.

    Attributes:
        model: As it was written.
        what: "compiled" (layers in other forms, or smaller ones), "pruned" (no faster and no smaller), or "original".
        changed: Whether it is anything else than the original in other forms.
        gained: Whether there is anything that should make it faster.
        timings: Of the original against it at every target; empty where it was not timed.
        not_together: Layers that could not be merged or fused.
        is_packed: Whether it is the original, with weights in packed blocks that were opened in vain: then its
            operators round activations, which no layer of the pruned dense model does.
    """

    model: ir.Model
    what: Written
    changed: bool
    gained: bool
    timings: tuple[Ratio, ...]
    not_together: tuple[Declined, ...]
    is_packed: bool = False


def ship(
    job: Job, source: Source, write: Writer, prepared: Prepared, lowered: Lowered, settled: Settled
) -> Shipped:
    """Write the model anew if weights were given back since it was written, or the original in its place."""
    written = write(settled.decisions) if settled.given_back else lowered.written
    zeros = bool(prepared.originals.changed(write.model))
    smaller = prepared.removed.modified
    gained = any(decision.lowered for decision in settled.decisions) or smaller
    rewritten = source.fixed or prepared.quantized.modified
    changed = zeros or smaller or prepared.cleaned.modified or rewritten
    if gained or zeros or rewritten:
        what: Written = "pruned" if zeros and not gained else "compiled"
        return Shipped(written.model, what, changed, gained, lowered.timings, written.not_together)
    original = model_io.load_model(source.path)  # as it was, not even cleaned
    model_io.save_model(original, job.folder)
    return Shipped(original, "original", changed, gained, (), written.not_together, prepared.opened.modified)
