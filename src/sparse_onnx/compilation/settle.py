"""Settle what the layers that stay dense ship with: zeros that no kernel uses, or their original weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.compilation.give_back import exchange, keeping_zeros, without_zeros
from sparse_onnx.compilation.inputs import Inputs
from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.compilation.prepare import Prepared
from sparse_onnx.compilation.runs import DenseRun, OriginalRun, run_all, run_original
from sparse_onnx.data.inputs import Feeds
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.timing.choose import Decision
from sparse_onnx.units import format_error
from sparse_onnx.verification.comparison import compare

__all__ = ["Settled", "settle"]


@dataclasses.dataclass(frozen=True)
class Settled:
    """What is to ship.

    Attributes:
        decisions: The form of every layer.
        given_back: The weights that are as they were before they were pruned, by name.
        outputs: Of the dense model that has the same weights, on every sample; empty in a plan.
        original: The run of the original, if it took one to tell.
    """

    decisions: tuple[Decision, ...]
    given_back: frozenset[str] = frozenset()
    outputs: tuple[Feeds, ...] = ()
    original: OriginalRun | None = None


def settle(
    job: Job,
    source: Source,
    inputs: Inputs,
    models: Sequence[ir.Model],
    decisions: Sequence[Decision],
    prepared: Prepared,
    dense: DenseRun,
) -> Settled:
    """Give weights that stay dense their originals back, in ``models``, copies of one another, if the outputs are
    nearer to the original's then. ``dense`` is the run of the last of them before."""
    with job.clock("give back"):
        kept = {name for decision in decisions if decision.lowered for name in decision.candidate.names}
        states = prepared.originals.changed(models[0], prepared.pruned.layers, kept)
        if job.recipe.goal.keep_pruned or not states:
            return Settled(tuple(decisions), outputs=dense.outputs)
        names = {state.name for state in states}
        zeros = exchange(models, states)
        with open_runner(models[-1], source.bench, library=False) as runner:
            outputs = run_all(runner, inputs.samples, "with original weights where dense", job.say)
        original = None
        if (kept or prepared.removed.modified) and not inputs.generated:
            original = run_original(source, inputs.samples)
            before, after = (compare(original.outputs, x).relative_error for x in (dense.outputs, outputs))
            if before < after:  # later layers were solved for the pruned ones before them
                exchange(models, zeros)
                why = (
                    f"the whole is nearer to the original with them ({format_error(before)} instead of "
                    f"{format_error(after)})"
                )
                job.say(f"note: layers that stay dense keep their zeros: {why}")
                kept_zeros = tuple(keeping_zeros(decisions, names, why))
                return Settled(kept_zeros, outputs=dense.outputs, original=original)
        return Settled(tuple(without_zeros(decisions, names)), frozenset(names), tuple(outputs), original)
