"""Time and memory of the stages of a piece of work, and the lines that tell of them."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

from sparse_onnx.document import StageRow
from sparse_onnx.progress import is_lasting
from sparse_onnx.running.heap import give_back_memory
from sparse_onnx.running.host import peak_rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["StageClock"]


class StageClock:
    """Wall-clock seconds and peak resident memory by stage; :meth:`say` puts the stage before a line of progress."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._stage = ""
        self._told: set[str] = set()
        self.stages: list[StageRow] = []

    def say(self, line: str) -> None:
        """Tell where the work is; what lasts, once."""
        if is_lasting(line):
            if line in self._told:
                return
            self._told.add(line)
        self._progress(f"{self._stage}: {line}" if self._stage and not is_lasting(line) else line)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._progress(name)
        self._stage, start = name, perf_counter()
        try:
            yield
        finally:
            self._stage = ""
            give_back_memory()
            seconds = round(perf_counter() - start, 3)
            self.stages.append(
                {"name": name, "seconds": seconds, "peak_rss_mb": round(peak_rss_bytes() / 2**20)}
            )
