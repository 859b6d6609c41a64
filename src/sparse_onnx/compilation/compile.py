"""Compile a model by a recipe into a folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.compilation.dumps import Dumps
from sparse_onnx.compilation.recipe import Recipe, dump_recipe
from sparse_onnx.compilation.steps import Compilation
from sparse_onnx.timing.table import TimingTable

__all__ = ["OptimizeResult", "compile_into"]


@dataclasses.dataclass(frozen=True)
class OptimizeResult:
    """What :func:`sparse_onnx.optimize` made. ``report`` is the content of ``report.json``; ``exit_code`` is that of
    the command line: 0 faster, 4 a goal was missed, 5 not proven faster; ``summary.written`` says whether the original
    was written then. ``folder`` is None after a dry run."""

    folder: Path | None
    exit_code: int
    report: dict[str, Any]

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
    dump_after: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _line: None,
) -> tuple[int, dict[str, Any]]:
    """Compile ``source`` by ``recipe`` into the empty ``folder``, with all that an output folder holds but the report.

    The arguments are as for :func:`sparse_onnx.optimize`; ``threads`` are those to work with, where these are others
    than those that the recipe decides for. Returns the exit code and the report, which
    :func:`sparse_onnx.compilation.report_rows.write_report` writes.
    """
    work = folder / ".work"
    work.mkdir()
    dumps = Dumps(dump_after, folder)
    job = Compilation(
        source, recipe, benchmark, progress, folder, work, command, cache, table, threads, dumps
    )
    exit_code, report = job.compile(recipe.pipeline())
    dumps.note_missing(progress)
    shutil.rmtree(work)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return exit_code, report
