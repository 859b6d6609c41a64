"""Search for the zeros that meet a goal: try a plan, measure it, choose the next; the best so far is always there.

A trial is a whole compilation: pruned and quantized with the methods asked for, lowered, verified, its drop measured,
in as many processes as there are. Its speed is measured after that, alone on the machine. The first trials compare the
families of plans (:mod:`.plans`) where they are expected to be as fast; the search goes on with the one that loses
least, until nothing more is to be learned of it, then with the next one as long as the goals are not met, or until time
or trials are used up. After every trial all that is known goes to a file, from which an interrupted search goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.analysis.forecast import Plan
from sparse_onnx.document import Report
from sparse_onnx.errors import SparseOnnxError, VerificationError
from sparse_onnx.model.storage import write_whole
from sparse_onnx.passes.lower.forms import FLOAT_BITS
from sparse_onnx.progress import format_duration
from sparse_onnx.search.limits import Limits
from sparse_onnx.search.plans import Family
from sparse_onnx.search.strategy import Goals, Outcome, best, next_points
from sparse_onnx.search.workers import Workers
from sparse_onnx.timing.rounds import Ratio

__all__ = ["Compiled", "Measured", "Search", "Trial"]

_VERSION = 3
_STATE, _BEST = "search.json", "best"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled plan: bytes of its files, the drop of the metric (infinite: outputs that are not finite), the share of
    zeros in the weights that kernels could take, its report, and the bits of a weight in the mean."""

    nbytes: int
    drop: float
    sparsity: float
    report: Report
    bits: float = FLOAT_BITS


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a trial reached: time against dense, overall and at every target, bytes of its files, and the drop of the
    metric (infinite: outputs that are not finite)."""

    speed: Ratio
    targets: tuple[Ratio, ...]
    nbytes: int
    drop: float

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.speed.median, self.nbytes, self.drop)


@dataclasses.dataclass(frozen=True)
class Trial:
    """Plan number ``index`` of a family; ``sparsity`` is the share of zeros in the weights that could have some,
    ``bits`` are those of one in the mean. ``error`` says why nothing was measured."""

    family: str
    index: int
    sparsity: float
    measured: Measured | None
    error: str = ""
    bits: float = FLOAT_BITS


class Search:
    """One search.

    Args:
        families: The plans to choose from.
        goals: What to meet.
        compile_plan: Compiles a plan into a folder with so many threads; runs in a worker, so it can be pickled.
        time_alone: Times the model in a folder against dense: overall, and at every target.
        workers: Where trials run.
        limits: When to stop.
        folder: For trials and for what is known; a search with the same ``key`` goes on from there.
        key: Names the question: model, data, options, goals.
        progress: Called with one line of text at every step.
    """

    def __init__(
        self,
        families: Sequence[Family],
        goals: Goals,
        *,
        compile_plan: Callable[[Plan, Path, int], Compiled],
        time_alone: Callable[[Path], tuple[Ratio, Sequence[Ratio]]],
        workers: Workers,
        limits: Limits,
        folder: Path,
        key: str,
        progress: Callable[[str], None],
    ) -> None:
        self._families = {family.name: family for family in families}
        self._goals, self._limits = goals, limits
        self._compile, self._time_alone, self._workers = compile_plan, time_alone, workers
        self._folder, self._key, self._say = folder, key, progress
        self._best: Trial | None = None
        self._report: Report | None = None
        self.trials: list[Trial] = []
        self._resume()

    @property
    def best(self) -> Trial | None:
        """The trial to ship, see :func:`.strategy.best`; None before the first one that could be measured."""
        return self._best

    @property
    def best_report(self) -> Report | None:
        """Its report, as it was compiled."""
        return self._report

    @property
    def best_folder(self) -> Path:
        """Its compiled model."""
        return self._folder / _BEST

    def run(self) -> None:
        """Try until there is nothing more to learn or a limit is reached."""
        start = time.perf_counter()
        longest = 0.0
        while len(self.trials) < self._limits.trials:
            spent = time.perf_counter() - start
            if self.trials and spent + longest > 60 * self._limits.minutes:
                self._say(f"note: the search stops after {format_duration(spent)}: time is used up")
                return
            chosen = self._next()[: self._limits.trials - len(self.trials)]
            if not chosen:
                return
            self._round(chosen)
            longest = max(longest, time.perf_counter() - start - spent)

    def _next(self) -> list[tuple[str, int]]:
        """The plans of the next round: of every family where nothing is known yet, then of the best one of which there
        is more to be learned; of others than the best one only where nothing meets the goals."""
        if not self.trials:
            return self._first()
        for place, name in enumerate(self._ranked()):
            tried = {
                index: trial.measured.outcome if trial.measured else Outcome(1e-9, math.inf, math.inf)
                for trial in self.trials
                for index, plan in enumerate(self._families[name].plans)
                if plan == self._families[trial.family].plans[trial.index]
            }
            expected = self._families[name].expected
            points = next_points(expected, tried, self._goals, max(1, self._workers.jobs))
            if points or (place == 0 and self._is_met()):
                return [(name, index) for index in points]
        return []

    def _first(self) -> list[tuple[str, int]]:
        """Of every family one plan, but for plans of others, and for those that are not expected to be fast and small
        enough where others are."""
        chosen: list[tuple[str, int]] = []
        enough: list[tuple[str, int]] = []
        plans: list[Plan] = []
        for name, family in self._families.items():
            index = next_points(family.expected, {}, self._goals)[0]
            if family.plans[index] in plans:  # families meet at their ends
                continue
            plans.append(family.plans[index])
            chosen.append((name, index))
            expected = family.expected[index]
            if Outcome(expected.speedup, expected.nbytes, 0.0).misses(self._goals) == (0.0, 0.0):
                enough.append((name, index))
        return enough or chosen

    def _is_met(self) -> bool:
        known = None if self._best is None else self._best.measured
        return known is not None and known.outcome.misses(self._goals) == (0.0, 0.0)

    def _ranked(self) -> list[str]:
        """The families, the one whose first trial loses least before the others; the trials were chosen for equal speed
        or loss."""
        first: dict[str, Trial] = {}
        for trial in self.trials:
            first.setdefault(trial.family, trial)

        def rank(name: str) -> tuple[float, float]:
            measured = first[name].measured if name in first else None
            if measured is None:
                return math.inf, 0.0
            # What it loses for what it saves: trials are seldom exactly as fast or small as forecast.
            gain = 0.0
            if self._goals.speedup is not None or self._goals.nbytes is None:
                gain += 1 - 1 / max(measured.speed.median, 1 + 1e-9)
            if self._goals.nbytes is not None:
                gain += 1 - measured.nbytes / self._families[name].expected[0].nbytes
            return measured.drop / max(gain, 1e-9), -gain

        return sorted(self._families, key=rank)

    def _round(self, chosen: Sequence[tuple[str, int]]) -> None:
        folders = [self._folder / f"trial-{name}-{index}" for name, index in chosen]
        tasks = []
        for (name, index), folder in zip(chosen, folders, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            tasks.append(functools.partial(self._compile, self._families[name].plans[index], folder))
            number = len(self.trials) + len(tasks)
            expected = self._families[name].expected[index]
            self._say(f"trial {number}: {name} {index}, expected {expected.speedup:.2f}x")
        results = self._workers.run(tasks)
        for (name, index), folder, result in zip(chosen, folders, results, strict=True):
            if isinstance(result, VerificationError):
                raise result  # a defect of the compiler, not of the plan
            if isinstance(result, SparseOnnxError):
                self._add(Trial(name, index, 0.0, None, str(result)), folder, None)
                continue
            speed, targets = self._time_alone(folder)
            measured = Measured(speed, tuple(targets), result.nbytes, result.drop)
            trial = Trial(name, index, result.sparsity, measured, bits=result.bits)
            self._add(trial, folder, result.report)

    def _add(self, trial: Trial, folder: Path, report: Report | None) -> None:
        """Keep the folder and the report of the best, delete the others."""
        self.trials.append(trial)
        what = f"trial {len(self.trials)}: {trial.family} {trial.index}"
        if trial.measured is None:
            self._say(f"note: {what} failed: {trial.error}")
        else:
            speed = trial.measured.speed
            bits = f", {trial.bits:.3g} bits" if trial.bits < FLOAT_BITS else ""
            times = f"{speed.median:.2f}x ({speed.low:.2f}-{speed.high:.2f})"
            drop = trial.measured.drop
            self._say(f"note: {what}, {trial.sparsity:.0%} zeros{bits}: {times}, drop {drop:.4f}")
            rivals = [rival for rival in (self._best, trial) if rival is not None]
            outcomes = [rival.measured.outcome for rival in rivals if rival.measured is not None]
            if rivals[best(outcomes, self._goals)] is trial:
                shutil.rmtree(self.best_folder, ignore_errors=True)
                folder.rename(self.best_folder)
                self._best, self._report = trial, report
        shutil.rmtree(folder, ignore_errors=True)
        self._save()

    # -- what is known, kept in a file ------------------------------------------------------------------------

    def _save(self) -> None:
        document = {
            "version": _VERSION,
            "key": self._key,
            "best": None if self._best is None else self.trials.index(self._best),
            "report": self._report,
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
        }
        with write_whole(self._folder / _STATE) as file:
            file.write(json.dumps(document, indent=1).encode())

    def _resume(self) -> None:
        """Take over the trials of an interrupted search for the same; a file that cannot be read counts as none."""
        try:
            document = json.loads((self._folder / _STATE).read_text(encoding="utf-8"))
            if document["version"] != _VERSION or document["key"] != self._key:
                return
            trials = [_trial(entry) for entry in document["trials"]]
            found = trials[document["best"]] if document["best"] is not None else None
            report: Report | None = document["report"]
            if report is not None and not isinstance(report, dict):
                return
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return
        if found is None or (self.best_folder / "model.onnx").is_file():
            self.trials, self._best, self._report = trials, found, report
            self._say(f"note: going on after {len(trials)} trials")


def _trial(entry: Mapping[str, Any]) -> Trial:
    measured = entry["measured"]
    if measured is not None:
        targets = tuple(Ratio(**timing) for timing in measured["targets"])
        measured = Measured(Ratio(**measured["speed"]), targets, measured["nbytes"], measured["drop"])
    return Trial(entry["family"], entry["index"], entry["sparsity"], measured, entry["error"], entry["bits"])
