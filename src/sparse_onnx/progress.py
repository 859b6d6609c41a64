"""Progress of long jobs, told as lines of text to a function that the caller gives.

A line replaces the one before it, but for those that :func:`is_lasting` finds: what the user should still see at the
end begins with ``warning: `` or ``note: ``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

__all__ = ["Progress", "format_duration", "is_lasting"]

_LASTING = re.compile(r"([^:]+: )?(warning|note): ")


def is_lasting(line: str) -> bool:
    """True for warnings and notes, also behind the name of a stage: later lines do not replace them."""
    return _LASTING.match(line) is not None


class Progress:
    """Tells ``say`` every few seconds how much of ``total`` is done, and the time left at the pace so far."""

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
        spent = now - self._start
        left = spent / self._done * (self._total - self._done)
        tail = f" in {format_duration(spent)}" if finished else f", {format_duration(left)} left"
        self._say(f"{self._what}: {self._done:.0f}/{self._total:.0f}{tail}")


def format_duration(seconds: float) -> str:
    """In whole seconds, minutes, or hours with one decimal."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
