"""``optimize`` with goals in place of zeros or bits: from a model to the folder that is shipped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.analysis.analyze import Analysis, analyze
from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.forecast import Forecast, Plan
from sparse_onnx.compilation.compile import OptimizeResult, compile_into
from sparse_onnx.compilation.goals import gates, goal_document
from sparse_onnx.compilation.groups import AUTO, FLOAT32, INT4, INT8, Goal
from sparse_onnx.compilation.recipe import Recipe, RecipeStage, recipe_document
from sparse_onnx.compilation.report_rows import target_rows, times, write_report
from sparse_onnx.compilation.whole_model import exit_code, settle
from sparse_onnx.data import inputs
from sparse_onnx.data.samples import open_samples
from sparse_onnx.document import CurveRow, LayerRow, ParetoPoint, Report, SearchDocument, Summary, finite
from sparse_onnx.errors import GoalNotMetError, HostError, UsageError
from sparse_onnx.exporter.source import source_file
from sparse_onnx.model import model_io
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import PassContext, Pipeline, Stage
from sparse_onnx.passes.calibration.digest import model_digest
from sparse_onnx.passes.presets import PREPARATION_PASSES
from sparse_onnx.passes.prune.pruning import choose_weights
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.progress import is_lasting
from sparse_onnx.running.fix_inputs import fix_inputs
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.input_choice import explaining_guesses
from sparse_onnx.running.outputs import check_outputs
from sparse_onnx.running.requests import choose_targets, phase_of
from sparse_onnx.running.runtime import session_budget
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.search.driver import Compiled, Search, Trial
from sparse_onnx.search.frontier import pareto
from sparse_onnx.search.limits import Limits
from sparse_onnx.search.losses import measured_losses, weight_losses
from sparse_onnx.search.planned import FILES, Planned
from sparse_onnx.search.plans import LossOf, families
from sparse_onnx.search.recipes import Templates, mean_bits, recipe_of
from sparse_onnx.search.strategy import Goals
from sparse_onnx.search.tables import Table, measure_tables
from sparse_onnx.search.workers import choose_workers
from sparse_onnx.timing import rounds
from sparse_onnx.timing.curves import SPARSITIES, UNSTRUCTURED
from sparse_onnx.timing.models import time_models
from sparse_onnx.timing.rounds import Ratio
from sparse_onnx.timing.table import TimingTable
from sparse_onnx.units import parse_size
from sparse_onnx.verification.metrics import MetricResult

__all__ = ["optimize_to_goals", "search_recipe"]

_SMALLEST = 3
"""Bits that are tried only for their size: no operator is faster with them."""

_BITS = {
    FLOAT32: frozenset[int](),
    INT8: frozenset({8}),
    INT4: frozenset({4}),
    AUTO: frozenset({8, 4, _SMALLEST}),
}
"""Of weights, by what the recipe allows."""

_NO_ZEROS = (0.5,)
"""Where nothing is pruned: one share of zeros, so that what others would bring is not measured."""

_STATISTICS = "inputs.stats"
_STATE = ("search.json", "best", _STATISTICS, f"{_STATISTICS}.partial", *FILES)


def search_recipe(
    source: Path,
    output: Path,
    recipe: Recipe,
    mask_structure: str | None,
    limits: Limits,
    *,
    overwrite: bool,
    command: str,
    progress: Callable[[str], None],
) -> OptimizeResult:
    """Search for what ``recipe``'s one pruning method and its quantizer are to make, whose own share of zeros and bits
    do not count: zeros in one of the patterns ``mask_structure`` (with commas), bits that its precision allows. The
    others as for :func:`sparse_onnx.api.optimize`."""
    pruning = [modifier for modifier in recipe.modifiers() if modifier.stage is Stage.PRUNE]
    if pruning and (len(pruning) != 1 or not pruning[0].takes_shares):
        raise UsageError(f"{pruning[0].name} has no share of zeros to search for: give another method")
    quantizing = [modifier for modifier in recipe.modifiers() if isinstance(modifier, QuantizeWeights)]
    templates = Templates(pruning[0] if pruning else None, quantizing[0] if quantizing else None)
    searched = (templates.zeros, templates.bits)
    stages = (
        RecipeStage(stage.name, tuple(modifier for modifier in stage.modifiers if modifier not in searched))
        for stage in recipe.stages
    )
    patterns = [MaskStructure.parse(text.strip()) for text in (mask_structure or UNSTRUCTURED).split(",")]
    return optimize_to_goals(
        source,
        output,
        dataclasses.replace(recipe, stages=tuple(stage for stage in stages if stage.modifiers)),
        templates,
        structures=list(dict.fromkeys(map(str, patterns))) if pruning else [],
        limits=limits,
        overwrite=overwrite,
        command=command,
        progress=progress,
    )


def optimize_to_goals(
    source: Path,
    output: Path,
    recipe: Recipe,
    templates: Templates,
    *,
    structures: Sequence[str],
    limits: Limits,
    overwrite: bool,
    command: str,
    progress: Callable[[str], None],
) -> OptimizeResult:
    """Search for the zeros and bits that meet the goals of ``recipe``, and write the best result.

    Args:
        source: An ``.onnx`` file or a Hugging Face model folder.
        output: The folder to write.
        recipe: All but the pruning and quantizing that are searched for; its precision says which bits there are. Its
            ``calibration.checkpoint`` is where the search keeps what it knows, to go on after an interruption.
        templates: The passes that make zeros and integers.
        structures: The patterns of zeros to choose from.
        limits: When to stop, and where trials run.
        overwrite, command, progress: As for :func:`sparse_onnx.api.optimize`.

    Raises:
        SparseOnnxError: With one clear message and its exit code; nothing is written then.
    """
    with model_io.OutputFolder(output, overwrite=overwrite, sources=[source]) as folder:
        work = folder / ".work"
        work.mkdir()
        job = _Job(source, recipe, templates, tuple(structures), work, command, progress)
        try:
            search = job.search(limits)
            search.run()
        except KeyboardInterrupt as stop:
            stop.add_note(job.how_to_resume())
            raise
        if search.best is None:
            raise UsageError(f"every trial failed, the last one so: {search.trials[-1].error}")
        for path in search.best_folder.iterdir():
            target = folder / path.name
            shutil.copy2(path, target) if recipe.calibration.checkpoint else path.rename(target)
        exit_code, report = job.finish(search)
        shutil.rmtree(work)
        write_report(report, folder)
    return OptimizeResult(output, exit_code, report)


@dataclasses.dataclass(frozen=True)
class _Compile:
    """Compiles one plan; goes to the workers. ``progress`` is for trials in this process."""

    source: Path
    recipe: Recipe
    templates: Templates
    sizes: Mapping[str, int]
    rows: Mapping[str, int]
    table: TimingTable
    statistics: Path | None
    command: str
    progress: Callable[[str], None] | None = None

    def __call__(self, plan: Plan, folder: Path, threads: int) -> Compiled:
        recipe = recipe_of(plan, self.recipe, self.templates, self.sizes, self.rows)
        folder.mkdir()
        _, report = compile_into(
            folder,
            self.source,
            recipe,
            command=self.command,
            benchmark=False,
            table=self.table,
            threads=threads,
            statistics=self.statistics,
            progress=self._say,
        )
        summary = report["summary"]
        metric = summary["metric"]
        drop = 1 - _number(summary["cosine"]) if metric is None else _number(metric["drop"])
        drop = drop if math.isfinite(drop) else math.inf
        assert summary["bytes_after"] is not None
        bits = mean_bits(plan, self.sizes)
        return Compiled(summary["bytes_after"], drop, summary["sparsity"], report, bits)

    def _say(self, line: str) -> None:
        if self.progress is not None and not is_lasting(line):  # the notes of a trial are those of all
            self.progress(f"trial: {line}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class _Job:
    """One search: the state that its steps share."""

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        templates: Templates,
        structures: tuple[str, ...],
        work: Path,
        command: str,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.recipe, self.templates, self.structures = source, recipe, templates, structures
        self.work, self.command, self.say = work, command, say
        self.threads = recipe.target.threads or available_cores()
        self.state = self._state_folder()
        self.path = source_file(source, work)
        self.model = model_io.load_model(self.path)
        check_outputs(self.model, say)
        self.nbytes = model_io.file_bytes(self.path, self.model)
        goal = recipe.goal
        size = None if goal.target_size is None else float(parse_size(goal.target_size, self.nbytes))
        self.goals = Goals(goal.target_speedup, size, goal.max_drop)
        precision = FLOAT32 if templates.bits is None else recipe.target.precision
        self.bits = _BITS[precision] - (frozenset() if size is not None else {_SMALLEST})
        target = recipe.target
        specs = inputs.input_specs(self.model, target.input_values, target.fixed_inputs)
        fix_inputs(self.model, specs)
        self.first = self._first_batch(specs)
        found = choose_targets(
            self.model, specs, target.all_shapes, target.weights, target.request, self.first
        )
        self.choices, self.weights = found.choices, found.weights
        lines = [line for choice in self.choices for line in choice.notes("for another")]
        for line in dict.fromkeys([*lines, found.note] if found.note else lines):
            say(f"note: {line}")
        self.targets = [choice.shapes for choice in self.choices]
        self.feeds = [choice.feeds(recipe.calibration.seed) for choice in self.choices]

    def _first_batch(self, specs: Sequence[inputs.InputSpec]) -> list[inputs.Feeds]:
        """One batch of the data, as trials see it; none without data."""
        calibration = self.recipe.calibration
        if calibration.data is None:
            return []
        size = calibration.batch_size
        data = open_samples(calibration.data, specs, limit=size, batch=size, tokenizer=calibration.tokenizer)
        return [next(iter(data))]

    def _state_folder(self) -> Path:
        kept = self.recipe.calibration.checkpoint
        folder = self.work / "search" if kept is None else Path(kept)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            strangers = [p.name for p in folder.iterdir() if p.name not in _STATE and "trial-" not in p.name]
        except OSError as error:
            raise HostError(f"checkpoint: {folder} cannot be used: {error.strerror}") from error
        if strangers:
            raise UsageError(
                f"checkpoint: {folder} holds {strangers[0]}, which is not of a search: give another folder"
            )
        return folder

    def how_to_resume(self) -> str:
        """What to say after an interruption."""
        if self.recipe.calibration.checkpoint is not None:
            return f"Run the same command again to go on: finished trials are kept in {self.state} (--checkpoint)."
        return "Run the same command again to start over; with --checkpoint DIR a next interruption keeps the trials."

    # -- steps ------------------------------------------------------------------------------------------------

    def search(self, limits: Limits) -> Search:
        """Plan; or take over the plans of an interrupted search for the same."""
        key = self.key()
        planned = Planned.load(self.state, key) or self.plan(key)
        self.curves = planned.curves
        trial = dataclasses.replace(
            self.recipe,
            goal=dataclasses.replace(self.recipe.goal, max_drop=None, target_speedup=None, target_size=None),
            calibration=dataclasses.replace(self.recipe.calibration, checkpoint=None),
        )
        here = limits.jobs == 1 and limits.ray is None
        return Search(
            planned.families,
            self.goals,
            compile_plan=_Compile(
                self.path.absolute(),
                trial,
                self.templates,
                planned.sizes,
                planned.rows,
                planned.table,
                self.state.absolute() / _STATISTICS if self.solves_one_model() else None,
                self.command,
                self.say if here else None,
            ),
            time_alone=self.time_alone,
            workers=choose_workers(self.threads, jobs=limits.jobs, ray=limits.ray),
            limits=limits,
            folder=self.state,
            key=key,
            progress=self.say,
        )

    def solves_one_model(self) -> bool:
        """Whether every trial has one pass that solves layers, of one model: they can share what its layers see."""
        if self.templates.bits is None:
            return len(self.structures) == 1
        return self.templates.zeros is None and self.goals.nbytes is None

    def key(self) -> str:
        """Equal for equal questions."""
        kept = Goal(keep_pruned=self.recipe.goal.keep_pruned)
        document = recipe_document(dataclasses.replace(self.recipe, goal=kept))
        document["calibration"]["checkpoint"] = None
        parts = (
            document,
            dataclasses.asdict(self.goals),
            repr(self.templates),
            self.structures,
            self.threads,
        )
        text = json.dumps([model_digest(self.model), *map(str, parts)])
        return hashlib.sha256(text.encode()).hexdigest()

    def plan(self, key: str) -> Planned:
        """Measure layers and whole models, and make the families of plans of it; both are kept."""
        (self.state / _STATISTICS).unlink(missing_ok=True)  # of another question
        shutil.rmtree(self.state / f"{_STATISTICS}.partial", ignore_errors=True)
        calibration = self.recipe.calibration
        with model_io.Spool(self.work) as spool, explaining_guesses(self.choices):
            Pipeline(PREPARATION_PASSES)(self.model, PassContext(spool.put))
            selection = self.templates.selection
            weights, left = choose_weights(self.model, selection, MaskStructure())
            if not weights:
                why = "; ".join(f"{place} {reason}" for place, reason in left[:5])
                raise UsageError(
                    f"no layer of the model can be {'pruned' if self.templates.bits is None else 'changed'}: "
                    f"{why or 'it has no linear, convolution, LSTM or GRU'}"
                )
            analysis = analyze(
                self.path,
                mask_structures=self.structures,
                sparsities=SPARSITIES if self.structures else _NO_ZEROS,
                anchors=True if self.structures else _NO_ZEROS,
                bits=sorted(self.bits, reverse=True),
                group_size=self.templates.group_sizes(self.bits),
                encoded_structures=self.structures,
                targets=selection.targets,
                ignore=selection.ignore,
                input_shapes=self.targets[0],
                input_values=self.recipe.target.input_values,
                fixed_inputs=self.recipe.target.fixed_inputs,
                threads=self.threads,
                min_speedup=self.recipe.goal.min_speedup,
                calibration_data=calibration.data,
                tokenizer=calibration.tokenizer,
                batch_size=calibration.batch_size,
                seed=calibration.seed,
                progress=self.say,
            )
            forecast = analysis.forecast
            options = self.options(forecast, weights)
            loss = self.losses(analysis, weights)
            tables = self.tables()
        found = families(forecast, options, loss, self.goals, tables)
        planned = Planned(
            tuple(found),
            analysis.table(),
            {weight.name: math.prod(weight.shape) for weight in weights},
            {name: table.length for name, table in tables.items()},
            tuple(analysis.to_dict()["curves"]),
        )
        planned.save(self.state, key)
        return planned

    def options(self, forecast: Forecast, weights: Sequence[Weight]) -> dict[str, list[Choice]]:
        """What every layer may become, by the name of its weight."""
        known = {weight.name: weight for weight in weights}
        return {
            layer.name: self.templates.choices(
                known[layer.name],
                self.structures,
                [(bits, activations) for bits, activations in layer.precisions if bits in self.bits],
            )
            for layer in forecast.layers
            if layer.name in known and not layer.reason
        }

    def tables(self) -> dict[str, Table]:
        """Those of embeddings, where size counts and bits are searched for."""
        if self.goals.nbytes is None or self.templates.bits is None:
            return {}
        bench = Workbench(
            self.threads, self.work, session_budget(model_io.weight_bytes(self.model)), self.say
        )
        return measure_tables(self.model, self.bits - {_SMALLEST}, self.first or self.feeds[:1], bench)

    def losses(self, analysis: Analysis, weights: Sequence[Weight]) -> LossOf:
        """Measured on real inputs where there are some."""
        known = {layer.name: layer.loss for layer in analysis.forecast.layers if layer.loss is not None}
        if known:
            return measured_losses(known)
        return weight_losses(weights, self.structures, self.say, self.templates.bits, self.bits)

    def time_alone(self, folder: Path) -> tuple[Ratio, list[Ratio]]:
        """The original against the model in ``folder`` at every target."""
        written = folder / "model.onnx"
        pair: list[tuple[ir.Model, Path]] = [
            (model_io.load_model(path), path) for path in (self.path, written)
        ]
        budget = session_budget(model_io.weight_bytes(self.model))
        bench = Workbench(self.threads, self.work, budget, self.say)

        def once() -> list[Ratio]:
            return time_models(pair, self.feeds, bench)

        def overall(timings: Sequence[Ratio]) -> Ratio:
            return rounds.overall(timings, self.weights)[0]

        timings = settle(once, overall, progress=self.say)
        return overall(timings), timings

    def finish(self, search: Search) -> tuple[int, Report]:
        """The report of the best trial with its times, the goals, and the search."""
        assert search.best is not None
        assert search.best.measured is not None
        measured, compiled = search.best.measured, search.best_report
        assert compiled is not None
        summary: Summary = {**compiled["summary"], **times(measured.speed)}
        metric = summary["metric"]
        found = gates(
            self.recipe.goal,
            drop=measured.drop,
            metric=None if metric is None else MetricResult.of(metric),
            speedup=measured.speed.median,
            bytes_before=self.nbytes,
            bytes_after=measured.nbytes,
        )
        layers = {row["name"]: row for row in compiled["layers"]}
        met = all(gate.met for gate in found)
        report: Report = {
            **compiled,
            "source": self.source.name,
            "summary": summary,
            "goal": goal_document(found),
            "targets": target_rows(
                self.targets,
                self.weights,
                measured.targets,
                [phase_of(choice.specs, choice.shapes) for choice in self.choices],
            ),
            "curves": [
                {**curve, "chosen": _chosen(layers[curve["layer"]], curve)}
                for curve in self.curves
                if curve["layer"] in layers
            ],
            "search": self.document(search, met),
        }
        if not met:
            return GoalNotMetError.exit_code, report
        gained = summary["written"] == "compiled"
        return exit_code(measured.speed if gained else None, gained=gained), report

    def document(self, search: Search, met: bool) -> SearchDocument:
        """The search in the report: what was asked, and the trials that no other one beats."""
        trials = [trial for trial in search.trials if trial.measured is not None]
        points = [
            (trial.measured.speed.median, -trial.measured.drop, -float(trial.measured.nbytes))
            for trial in trials
            if trial.measured is not None
        ]
        front = sorted((trials[index] for index in pareto(points)), key=_speed)
        return {
            "metric": self.recipe.goal.metric or "1 - cosine",
            "budget": {
                "target_speedup": self.goals.speedup,
                "target_bytes": None if self.goals.nbytes is None else int(self.goals.nbytes),
                "max_drop": self.goals.drop,
            },
            "met": met,
            "evaluated": len(search.trials),
            "pareto": [
                _point(trial, trial == search.best, with_bits=self.templates.bits is not None)
                for trial in front
            ],
        }


def _chosen(row: LayerRow, curve: CurveRow) -> float | None:
    """The share of zeros that a layer ships with in the form and pattern of a curve."""
    ships = (row["decision"], row["mask_structure"]) == (curve["form"], curve["mask_structure"])
    return float(row["sparsity"]) if ships else None


def _speed(trial: Trial) -> float:
    assert trial.measured is not None
    return trial.measured.speed.median


def _point(trial: Trial, chosen: bool, *, with_bits: bool) -> ParetoPoint:
    measured = trial.measured
    assert measured is not None
    point: ParetoPoint = {
        "speedup": measured.speed.median,
        "speedup_low": measured.speed.low,
        "speedup_high": measured.speed.high,
        "drop": finite(measured.drop),
        "bytes": measured.nbytes,
        "sparsity": trial.sparsity,
        "chosen": chosen,
    }
    return {**point, "bits": trial.bits} if with_bits else point
