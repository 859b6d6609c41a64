"""Compile a model by a recipe into a folder: the table of contents of this room.

Each step is a function from the values of those before it to its own, which the next ones take: :class:`.load.Source`,
:class:`.inputs.Inputs`, :class:`.prepare.Prepared`, :class:`.runs.DenseRun`, :class:`.decide.Fused`, decisions,
:class:`.write.Lowered`, :class:`.settle.Settled`, :class:`.ship.Shipped`, :class:`.verify.Verified` and
:class:`.outcome.Outcome`. Only the model itself is changed in place, by passes, until it is fused, and where weights
are given back.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_onnx import sparse_ops
from sparse_onnx.compilation.decide import decide, decide_unseen, fuse
from sparse_onnx.compilation.dumps import Dumps
from sparse_onnx.compilation.goals import gates
from sparse_onnx.compilation.inputs import measure_original, open_inputs
from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import load, prove_conversion
from sparse_onnx.compilation.outcome import conclude
from sparse_onnx.compilation.prepare import Prepared, planned, prepare
from sparse_onnx.compilation.recipe import Recipe, dump_recipe
from sparse_onnx.compilation.report import Found, make_report, profile, rows
from sparse_onnx.compilation.report_rows import kernel_names, quantized_rows
from sparse_onnx.compilation.runs import run_dense
from sparse_onnx.compilation.settle import Settled, settle
from sparse_onnx.compilation.ship import ship
from sparse_onnx.compilation.verify import verify
from sparse_onnx.compilation.write import Writer, lower
from sparse_onnx.document import QuantizedRow, Report
from sparse_onnx.model import model_io
from sparse_onnx.model.work import Work
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.running.input_choice import choose_inputs
from sparse_onnx.running.session import import_onnxruntime
from sparse_onnx.running.stages import StageClock
from sparse_onnx.timing.joined import JoinGuard
from sparse_onnx.timing.table import TimingTable

__all__ = ["OptimizeResult", "compile_into", "plan"]


@dataclasses.dataclass(frozen=True)
class OptimizeResult:
    """What :func:`sparse_onnx.optimize` made. ``report`` is the content of ``report.json``; ``exit_code`` is that of
    the command line: 0 faster, 4 a goal was missed, 5 not proven faster; ``summary.written`` says whether the original
    was written then. ``folder`` is None after a dry run."""

    folder: Path | None
    exit_code: int
    report: Report

    @property
    def speedup(self) -> float | None:
        """Dense time / optimized time of the whole model on this machine; None if it was not timed."""
        value = self.report["summary"]["speedup"]
        return None if value is None else float(value)


def compile_into(
    folder: Path,
    source: Path,
    recipe: Recipe,
    *,
    command: str,
    benchmark: bool = True,
    cache: Path | None = None,
    table: TimingTable | None = None,
    threads: int | None = None,
    statistics: Path | None = None,
    dump_after: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _line: None,
) -> tuple[int, Report]:
    """Compile ``source`` by ``recipe`` into the empty ``folder``, with all that an output folder holds but the report.

    The arguments are as for :func:`sparse_onnx.optimize`; ``threads`` are those to work with, where these are others
    than those that the recipe decides for, and ``statistics`` a file that several compilations share. Returns the exit
    code and the report, which :func:`sparse_onnx.compilation.report_rows.write_report` writes.
    """
    work = folder / ".work"
    work.mkdir()
    dumps, clock = Dumps(dump_after, folder), StageClock(progress)
    found = _compile(
        Job(source, recipe, command, folder, work, clock, benchmark, cache, table, threads, statistics, dumps)
    )
    dumps.note_missing(progress)
    shutil.rmtree(work)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return found


def plan(
    source: Path,
    recipe: Recipe,
    work: Path,
    *,
    command: str,
    progress: Callable[[str], None] = lambda _line: None,
) -> Report:
    """The report of what compiling ``source`` by ``recipe`` would do, as far as that is known without running or
    timing anything. Scratch files go to ``work``."""
    job = Job(source, recipe, command, work, work, StageClock(progress))
    origin, model = load(job)
    with model_io.Spool(work) as spool, job.clock("prune"):
        context = PassContext(spool.put, job.say)
        prepared = prepare(job, origin, model, planned(recipe.pipeline()), context)
        shapes = choose_inputs(model, origin.specs, recipe.target.all_shapes[0], ()).shapes
        counted = Work(model, shapes).count()
        fused = fuse(model, context)
        declined = (*prepared.declined, *fused.declined)
        # What stays dense is not known before it is timed: nothing is given back.
        layers = rows(job, prepared, Settled(decide_unseen(fused)), declined)
    goals = gates(recipe.goal, drop=None, speedup=None, bytes_before=origin.nbytes, bytes_after=None)
    return make_report(
        job,
        origin,
        Found(layers, counted, declined, goals, _quantized(prepared)),
    )


def _compile(job: Job) -> tuple[int, Report]:
    import_onnxruntime()  # what is missing is better known now than after minutes
    sparse_ops.info()
    pipeline = job.recipe.pipeline()
    source, model = load(job)
    inputs = open_inputs(job, source, model, pipeline)
    prove_conversion(job, source, model, inputs.samples[0])
    metric = measure_original(job, source, inputs, model)
    bench = job.open_bench(source.bench)
    with model_io.Spool(job.work) as spool:
        context = PassContext(spool.put, job.say, inputs.calibration, after=job.after)
        with job.clock("prune"):
            prepared = prepare(job, source, model, pipeline, context, inputs, bench)
            candidates = find_candidates(model)[0]
        with job.clock("run dense"):
            dense = run_dense(source, inputs, model, candidates, inputs.samples)
            unfused = model.clone()
        with job.clock("fuse"):
            fused = fuse(model, context)
        packer = Packer(context)
        decisions = decide(job, fused, dense.shapes, packer, bench, inputs.weights)
        guard = JoinGuard(bench, dense.shapes, inputs.weights) if job.benchmark else None
        write = Writer(job, fused.model, packer, context, guard)
        lowered = lower(job, source, inputs, write, decisions, bench, smaller=prepared.removed.modified)
        settled = settle(job, source, inputs, [model, unfused], lowered.decisions, prepared, dense)
        shipped = ship(job, source, write, prepared, lowered, settled)
        with job.clock("verify"):
            verified = verify(job, source, inputs, shipped, unfused, dense.level, settled)
        declined = (*prepared.declined, *fused.declined)
        with job.clock("compare weights"):
            kernels = kernel_names(shipped.model, dense.shapes[0])
            layers = rows(job, prepared, settled, declined, dense.shapes[0], kernels)
        shares = profile(job, source, inputs, shipped, layers)
    quantized = _quantized(prepared)
    outcome = conclude(job, source, inputs, shipped, verified, metric)
    found = Found(
        layers,
        dense.work,
        declined,
        outcome.gates,
        quantized,
        inputs.targets,
        inputs.weights,
        inputs.phases,
        shipped,
        verified,
        outcome,
        shares,
    )
    return outcome.exit_code, make_report(job, source, found)


def _quantized(prepared: Prepared) -> list[QuantizedRow]:
    changes = prepared.quantized.layers
    return quantized_rows(prepared.few_bits, changes, prepared.errors, prepared.held_out_errors)
