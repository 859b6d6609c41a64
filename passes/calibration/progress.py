"""How far a long job is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Progress"]


class Progress:
    """Tells ``say`` every few seconds which of ``total`` equal steps is done, and the time left."""

    def __init__(self, say: Callable[[str], None], what: str, total: int, *, interval: float = 2.0) -> None:
        self._say, self._what, self._total, self._interval = say, what, total, interval
        self._done = 0
        self._start = self._last = time.perf_counter()

    def step(self) -> None:
        self._done += 1
        now = time.perf_counter()
        if now - self._last < self._interval and self._done < self._total:
            return
        self._last = now
        left = (now - self._start) / self._done * (self._total - self._done)
        tail = (
            f", {_duration(left)} left" if self._done < self._total else f" in {_duration(now - self._start)}"
        )
        self._say(f"{self._what}: {self._done}/{self._total}{tail}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
