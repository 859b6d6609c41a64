"""Progress of long jobs, told as lines of text to a function that the caller gives.

A line is the name of a stage, or ``stage: step``, and replaces the one before it; steps may come quickly and need not
all be shown. What the user should still see at the end begins with ``warning: `` or ``note: `` and lasts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

__all__ = ["Progress", "done_of", "format_duration", "is_lasting", "is_step"]

_LASTING = re.compile(r"([^:]+: )?(warning|note): ")


def is_lasting(line: str) -> bool:
    """True for warnings and notes, also behind the name of a stage: later lines do not replace them."""
    return _LASTING.match(line) is not None


def is_step(line: str) -> bool:
    """True for a step of a stage, false for the name of one."""
    return ": " in line


class Progress:
    """Tells ``say`` about once a second how much of ``total`` is done, and the time left at the pace so far."""

    def __init__(self, say: Callable[[str], None], what: str, total: float, *, interval: float = 1.0) -> None:
        self._say, self._what, self._total, self._interval = say, what, total, interval
        self._done = 0.0
        self._start = self._last = time.perf_counter()

    def step(self, amount: float = 1) -> None:
        """``amount`` more of the total is done."""
        self._done += amount
        now = time.perf_counter()
        finished = self._done >= self._total
        if now - self._last < self._interval and not finished:
            return
        self._last = now
        tail = f" in {format_duration(now - self._start)}" if finished else ""
        self._say(f"{self._what}: {done_of(self._done, self._total, self._start)}{tail}")


def done_of(done: float, total: float, start: float) -> str:
    """How much of ``total`` is done, and the time left at the pace since ``start`` (:func:`time.perf_counter`)."""
    counted = f"{done:.0f}/{total:.0f}"
    if done <= 0 or done >= total:
        return counted
    return f"{counted}, {format_duration((time.perf_counter() - start) / done * (total - done))} left"


def format_duration(seconds: float) -> str:
    """In whole seconds, minutes, or hours with one decimal."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
