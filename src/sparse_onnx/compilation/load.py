"""Load a model, and prove that it is the one in its file where it had to be converted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.compilation.job import Job
from sparse_onnx.data.inputs import Feeds, InputSpec, input_specs
from sparse_onnx.errors import UsageError
from sparse_onnx.exporter.source import source_file
from sparse_onnx.model import model_io
from sparse_onnx.model.opset_conversion import converted_from, refusal
from sparse_onnx.running.fix_inputs import fix_inputs
from sparse_onnx.running.outputs import check_outputs, left_out
from sparse_onnx.running.runtime import open_runner, session_budget
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.verification.comparison import compare
from sparse_onnx.verification.tolerance import MAX_COMPILER_ERROR

__all__ = ["Source", "load", "prove_conversion"]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of the original, which lies unchanged in its file.

    Attributes:
        path: Its file, or the one that a model folder was exported to.
        specs: Its inputs.
        nbytes: What its files take.
        weight_bytes: What its weights take.
        budget: Bytes of weights that one session may hold.
        fixed: Whether inputs became constants.
        converted_from: The opset of the file, if it was converted inside.
        left_out: Outputs that are no tensors: what they are by their name.
        bench: Where it and what is made of it are run.
    """

    path: Path
    specs: tuple[InputSpec, ...]
    nbytes: int
    weight_bytes: int
    budget: int
    fixed: bool
    converted_from: int | None
    left_out: Mapping[str, str]
    bench: Workbench


def load(job: Job) -> tuple[Source, ir.Model]:
    """The original, and a model of it for passes to change."""
    with job.clock("load"):
        target = job.recipe.target
        path = source_file(job.source, job.work, job.say)
        model = model_io.load_model(path)
        opset = converted_from(model, job.say)
        check_outputs(model, job.say)
        others = left_out(model)
        specs = input_specs(model, target.input_values, target.fixed_inputs)
        fixed = bool(fix_inputs(model, specs))
    nbytes, held = model_io.file_bytes(path, model), model_io.weight_bytes(model)
    budget = session_budget(held)
    bench = Workbench(job.threads, job.work, budget, job.say)
    return Source(path, tuple(specs), nbytes, held, budget, fixed, opset, others, bench), model


def prove_conversion(job: Job, source: Source, model: ir.Model, feeds: Feeds) -> None:
    """That ``model``, if it was converted, computes what its file does. Raises ModelFileError if not."""
    if source.converted_from is None:
        return
    with job.clock("prove the conversion"):
        with open_runner(model, source.bench, source.path, library=False) as runner:
            expected = runner.run(feeds)
        try:
            with open_runner(model, source.bench, library=False) as runner:
                found = compare([expected], [runner.run(feeds)])
        except UsageError as error:
            raise refusal(source.path, source.converted_from, str(error)) from error
    if not found.relative_error <= MAX_COMPILER_ERROR:
        reason = (
            f"converted, it computes another {found.worst_output}: relative error {found.relative_error:.2e}"
        )
        raise refusal(source.path, source.converted_from, reason)
