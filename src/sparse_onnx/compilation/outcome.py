"""What a compilation reached of its goals, and the exit code that says so."""

from __future__ import annotations

import dataclasses

from sparse_onnx.compilation.goals import Gate, gates
from sparse_onnx.compilation.inputs import Inputs
from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.compilation.ship import Shipped
from sparse_onnx.compilation.verify import Verified
from sparse_onnx.compilation.whole_model import exit_code
from sparse_onnx.compilation.write import judged
from sparse_onnx.errors import GoalNotMetError
from sparse_onnx.model import model_io
from sparse_onnx.verification.metrics import Metric, MetricResult

__all__ = ["Outcome", "conclude"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The ``metric`` before and after, if the goal names one, the ``size`` of the files in bytes, the ``gates`` that
    the goal asks for, and the exit code."""

    metric: MetricResult | None
    size: int
    gates: tuple[Gate, ...]
    exit_code: int


def conclude(
    job: Job,
    source: Source,
    inputs: Inputs,
    shipped: Shipped,
    verified: Verified,
    metric: Metric | None,
) -> Outcome:
    """Measure what was written by the ``metric`` of the goal, which was opened on the original, and hold it against all
    goals."""
    measured = None
    if metric is not None:
        with job.clock("measure the metric"):
            measured = metric.compare(job.written, threads=job.threads)
    size = source.nbytes  # the same model has the same size, however its file was laid out
    if shipped.what != "original":
        size = model_io.file_bytes(job.written, model_io.load_model(job.written))
    timing = judged(inputs.weights, shipped.timings) if shipped.timings else None
    found = gates(
        job.recipe.goal,
        drop=1 - verified.loss.cosine if measured is None else measured.drop,
        metric=measured,
        speedup=None if timing is None else timing.median,
        bytes_before=source.nbytes,
        bytes_after=size,
    )
    met = all(gate.met for gate in found)
    code = exit_code(timing, gained=shipped.gained) if met else GoalNotMetError.exit_code
    return Outcome(measured, size, found, code)
