"""``optimize`` with goals in place of a share of zeros: from a model to the folder that is shipped."""

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
from sparse_onnx.analysis.forecast import Choice, Plan
from sparse_onnx.compilation.compile import OptimizeResult, compile_into
from sparse_onnx.compilation.goals import gates, goal_document
from sparse_onnx.compilation.groups import Goal
from sparse_onnx.compilation.recipe import Recipe, RecipeStage, recipe_document
from sparse_onnx.compilation.report_rows import target_rows, times, write_report
from sparse_onnx.compilation.whole_model import exit_code, settle
from sparse_onnx.data import inputs
from sparse_onnx.data.samples import open_samples
from sparse_onnx.document import CurveRow, LayerRow, ParetoPoint, Report, SearchDocument, Summary, finite
from sparse_onnx.errors import GoalNotMetError, HostError, UsageError
from sparse_onnx.exporter.source import source_file
from sparse_onnx.model import model_io
from sparse_onnx.model.storage import write_whole
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import Pass, PassContext, Pipeline, Stage
from sparse_onnx.passes.calibration.digest import model_digest
from sparse_onnx.passes.presets import PREPARATION_PASSES
from sparse_onnx.passes.prune.pruning import choose_weights
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.progress import is_lasting
from sparse_onnx.running.fix_inputs import fix_inputs
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.input_choice import choose_inputs, explaining_guesses
from sparse_onnx.running.outputs import check_outputs
from sparse_onnx.running.runtime import session_budget
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.search.driver import Compiled, Search, Trial
from sparse_onnx.search.frontier import pareto
from sparse_onnx.search.limits import Limits
from sparse_onnx.search.losses import measured_losses, weight_losses
from sparse_onnx.search.plans import Family, LossOf, allocated, modifiers, uniform, with_pruning
from sparse_onnx.search.strategy import Expected, Goals
from sparse_onnx.search.workers import choose_workers
from sparse_onnx.timing import rounds
from sparse_onnx.timing.curves import UNSTRUCTURED
from sparse_onnx.timing.models import time_models
from sparse_onnx.timing.rounds import Ratio
from sparse_onnx.timing.table import TimingTable, read_table, write_table
from sparse_onnx.units import parse_size
from sparse_onnx.verification.metrics import MetricResult

__all__ = ["optimize_to_goals", "search_recipe"]

_PLANS, _TABLE = "plans.json", "timings.json"
_STATE = ("search.json", _PLANS, _TABLE, "best")


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
    """Search for the zeros of ``recipe``'s one pruning method, whose own share of them does not count, in one of the
    patterns ``mask_structure`` (with commas). The others as for :func:`sparse_onnx.api.optimize`."""
    pruning = [modifier for modifier in recipe.modifiers() if modifier.stage is Stage.PRUNE]
    template = pruning[0]
    if len(pruning) != 1 or not template.takes_shares:
        raise UsageError(f"{template.name} has no share of zeros to search for: give another method")
    stages = (
        RecipeStage(stage.name, tuple(modifier for modifier in stage.modifiers if modifier is not template))
        for stage in recipe.stages
    )
    patterns = [MaskStructure.parse(text.strip()) for text in (mask_structure or UNSTRUCTURED).split(",")]
    return optimize_to_goals(
        source,
        output,
        dataclasses.replace(recipe, stages=tuple(stage for stage in stages if stage.modifiers)),
        template,
        structures=list(dict.fromkeys(map(str, patterns))),
        limits=limits,
        overwrite=overwrite,
        command=command,
        progress=progress,
    )


def optimize_to_goals(
    source: Path,
    output: Path,
    recipe: Recipe,
    template: Pass,
    *,
    structures: Sequence[str],
    limits: Limits,
    overwrite: bool,
    command: str,
    progress: Callable[[str], None],
) -> OptimizeResult:
    """Search for the zeros that meet the goals of ``recipe``, and write the best result.

    Args:
        source: An ``.onnx`` file or a Hugging Face model folder.
        output: The folder to write.
        recipe: All but the pruning that is searched for. Its ``calibration.checkpoint`` is where the search keeps what
            it knows, to go on after an interruption.
        template: A pruning method with its options; its own share of zeros does not count.
        structures: The patterns to choose from.
        limits: When to stop, and where trials run.
        overwrite, command, progress: As for :func:`sparse_onnx.api.optimize`.

    Raises:
        SparseOnnxError: With one clear message and its exit code; nothing is written then.
    """
    with model_io.OutputFolder(output, overwrite=overwrite, sources=[source]) as folder:
        work = folder / ".work"
        work.mkdir()
        job = _Job(source, recipe, template, tuple(structures), work, command, progress)
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
    template: Pass
    sizes: Mapping[str, int]
    table: TimingTable
    command: str
    progress: Callable[[str], None] | None = None

    def __call__(self, plan: Plan, folder: Path, threads: int) -> Compiled:
        passes = modifiers(plan, self.template, self.sizes)
        recipe = with_pruning(self.recipe, passes)
        folder.mkdir()
        _, report = compile_into(
            folder,
            self.source,
            recipe,
            command=self.command,
            benchmark=False,
            table=self.table,
            threads=threads,
            progress=self._say,
        )
        summary = report["summary"]
        metric = summary["metric"]
        drop = 1 - _number(summary["cosine"]) if metric is None else _number(metric["drop"])
        drop = drop if math.isfinite(drop) else math.inf
        assert summary["bytes_after"] is not None
        return Compiled(summary["bytes_after"], drop, summary["sparsity"], report)

    def _say(self, line: str) -> None:
        if self.progress is not None and not is_lasting(line):  # the notes of a trial are those of all
            self.progress(f"trial: {line}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


_Planned = tuple[list[Family], TimingTable, dict[str, int], list[CurveRow]]
"""Families, timings to decide by, elements of the weights, and the curves of the layers as a report has them."""


class _Job:
    """One search: the state that its steps share."""

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        template: Pass,
        structures: tuple[str, ...],
        work: Path,
        command: str,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.recipe, self.template, self.structures = source, recipe, template, structures
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
        target = recipe.target
        specs = inputs.input_specs(self.model, target.input_values, target.fixed_inputs)
        fix_inputs(self.model, specs)
        first = self._first_batch(specs)
        self.choices = [choose_inputs(self.model, specs, given, first) for given in target.all_shapes]
        for line in dict.fromkeys(line for choice in self.choices for line in choice.notes("for another")):
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
        families, table, sizes, self.curves = self.kept_plans(key) or self.plan(key)
        trial = dataclasses.replace(
            self.recipe,
            goal=dataclasses.replace(self.recipe.goal, max_drop=None, target_speedup=None, target_size=None),
            calibration=dataclasses.replace(self.recipe.calibration, checkpoint=None),
        )
        here = limits.jobs == 1 and limits.ray is None
        return Search(
            families,
            self.goals,
            compile_plan=_Compile(
                self.path.absolute(),
                trial,
                self.template,
                sizes,
                table,
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

    def key(self) -> str:
        """Equal for equal questions."""
        kept = Goal(keep_pruned=self.recipe.goal.keep_pruned)
        document = recipe_document(dataclasses.replace(self.recipe, goal=kept))
        document["calibration"]["checkpoint"] = None
        parts = (document, dataclasses.asdict(self.goals), repr(self.template), self.structures, self.threads)
        text = json.dumps([model_digest(self.model), *map(str, parts)])
        return hashlib.sha256(text.encode()).hexdigest()

    def plan(self, key: str) -> _Planned:
        """Measure layers and whole models, and make the families of plans of it; both are kept."""
        calibration = self.recipe.calibration
        selection = self.template.selection
        with model_io.Spool(self.work) as spool, explaining_guesses(self.choices):
            Pipeline(PREPARATION_PASSES)(self.model, PassContext(spool.put))
            weights, left = choose_weights(self.model, selection, MaskStructure())
            if not weights:
                why = "; ".join(f"{place} {reason}" for place, reason in left[:5])
                raise UsageError(
                    f"no layer of the model can be pruned: {why or 'it has no linear, convolution, LSTM or GRU'}"
                )
            analysis = analyze(
                self.path,
                mask_structures=self.structures,
                bits=(),
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
            loss = self.losses(analysis, weights)
        forecast = analysis.forecast
        sizes = {weight.name: math.prod(weight.shape) for weight in weights}
        names = [layer.name for layer in forecast.layers if layer.name in sizes and not layer.reason]
        families = [allocated(forecast, names, self.structures, loss, self.goals)]
        if UNSTRUCTURED in self.structures:
            families.append(uniform(forecast, names, loss, self.goals))
        table = analysis.table()
        write_table(table, self.state / _TABLE)
        curves: list[CurveRow] = analysis.to_dict()["curves"]
        kept = [dataclasses.asdict(family) for family in families]
        document = {"key": key, "sizes": sizes, "families": kept, "curves": curves}
        with write_whole(self.state / _PLANS) as file:
            file.write(json.dumps(document).encode())
        return families, table, sizes, curves

    def losses(self, analysis: Analysis, weights: Sequence[Weight]) -> LossOf:
        """Measured on real inputs where there are some."""
        known = {layer.name: layer.loss for layer in analysis.forecast.layers if layer.loss is not None}
        return measured_losses(known) if known else weight_losses(weights, self.structures, self.say)

    def kept_plans(self, key: str) -> _Planned | None:
        """What an interrupted search for the same had planned; None if there is nothing that can be read."""
        try:
            document = json.loads((self.state / _PLANS).read_text(encoding="utf-8"))
            if document["key"] != key:
                return None
            families = [
                Family(
                    family["name"],
                    tuple(
                        {name: Choice(*choice) for name, choice in plan.items()} for plan in family["plans"]
                    ),
                    tuple(Expected(**expected) for expected in family["expected"]),
                )
                for family in document["families"]
            ]
            return families, read_table(self.state / _TABLE), document["sizes"], document["curves"]
        except (OSError, ValueError, KeyError, TypeError, UsageError):
            return None

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
            return rounds.overall(timings, self.recipe.target.weights)[0]

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
            "targets": target_rows(self.targets, self.recipe.target.weights, measured.targets),
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
            "pareto": [_point(trial, trial == search.best) for trial in front],
        }


def _chosen(row: LayerRow, curve: CurveRow) -> float | None:
    """The share of zeros that a layer ships with in the form and pattern of a curve."""
    ships = (row["decision"], row["mask_structure"]) == (curve["form"], curve["mask_structure"])
    return float(row["sparsity"]) if ships else None


def _speed(trial: Trial) -> float:
    assert trial.measured is not None
    return trial.measured.speed.median


def _point(trial: Trial, chosen: bool) -> ParetoPoint:
    measured = trial.measured
    assert measured is not None
    return {
        "speedup": measured.speed.median,
        "speedup_low": measured.speed.low,
        "speedup_high": measured.speed.high,
        "drop": finite(measured.drop),
        "bytes": measured.nbytes,
        "sparsity": trial.sparsity,
        "chosen": chosen,
    }
