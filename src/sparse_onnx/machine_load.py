"""Whether a timing had the processors to itself.

Where other programs leave fewer processors free than there are threads, a thread waits for milliseconds while its
session's other threads wait for it: such times say nothing about the code that was timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

__all__ = ["OtherLoad", "busy_ticks"]

_STAT = Path("/proc/stat")
_TOLERANCE = 0.25


def busy_ticks(stat: str, processors: Collection[int]) -> int:
    """Clock ticks that ``processors`` were not idle, from the text of Linux's ``/proc/stat``. Time that a hypervisor
    gave to other guests counts."""
    total = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in processors:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total


class OtherLoad:
    """What other programs do on this process's processors from the moment on that this object is made.

    Only Linux tells; elsewhere there seems to be no other program.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def processors(self) -> float:
        """How many processors they kept busy, in the mean."""
        wall, own, ticks = (now - before for now, before in zip(self._now(), self._start, strict=True))
        if not ticks or wall <= 0:
            return 0.0
        return max(0.0, (ticks / os.sysconf("SC_CLK_TCK") - own) / wall)

    def spared(self, threads: int) -> bool:
        """Whether a processor was left for each of ``threads``, but for a quarter of one."""
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # More threads than processors get in each other's way, not in that of others.
        return min(threads, count) + self.processors() <= count + _TOLERANCE

    @staticmethod
    def _now() -> tuple[float, float, int]:
        try:
            ticks = busy_ticks(_STAT.read_text(), os.sched_getaffinity(0))
        except (OSError, ValueError, AttributeError):  # not Linux, or hidden from a container
            ticks = 0
        return time.perf_counter(), time.process_time(), ticks
