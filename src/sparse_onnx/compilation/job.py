"""What one compilation is asked to do, and where it works."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.compilation.recipe import Recipe
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.stages import StageClock
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing.cache import TimingCache
from sparse_onnx.timing.choose import Bench
from sparse_onnx.timing.table import TimingTable

__all__ = ["Job"]


def _unseen(_name: str, _model: ir.Model) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Job:
    """One compilation.

    Attributes:
        source: An ``.onnx`` file or a model folder of Hugging Face.
        recipe: What to do with it.
        command: What was typed, or called from Python.
        folder: Where the result is written.
        work: For scratch files.
        clock: Tells of stages and keeps their times.
        benchmark: Whether layers and the whole model are timed here.
        cache: A file of earlier timings; None: there is none.
        table: Timings of another machine, to decide by where nothing is timed.
        statistics: A file for statistics of oneshot calibration that several compilations share, where the recipe names
            none.
        threads_here: Threads to work with, where these are others than those that the recipe decides for.
        after: Called with the name of every pass and the model behind it.
    """

    source: Path
    recipe: Recipe
    command: str
    folder: Path
    work: Path
    clock: StageClock
    benchmark: bool = True
    cache: Path | None = None
    table: TimingTable | None = None
    threads_here: int | None = None
    statistics: Path | None = None
    after: Callable[[str, ir.Model], None] = _unseen

    def say(self, line: str) -> None:
        """Tell how far it is."""
        self.clock.say(line)

    @property
    def target_threads(self) -> int:
        """The threads that are decided for."""
        return self.recipe.target.threads or available_cores()

    @property
    def threads(self) -> int:
        """The threads to work with."""
        return self.threads_here or self.target_threads

    @property
    def written(self) -> Path:
        """The file of the result."""
        return self.folder / "model.onnx"

    def open_bench(self, workbench: Workbench) -> Bench:
        """How layers are timed; reads the cache."""
        cache = TimingCache(self.cache if self.benchmark else None, self.say)
        return Bench(workbench, cache, self.recipe.goal.min_speedup)
