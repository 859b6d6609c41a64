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
# Of a processor; and ticks that rounding may add.
_TOLERANCE, _ROUNDING = 0.25, 4


def busy_ticks(stat: str, processors: Collection[int] | None) -> int:
    """Clock ticks that ``processors`` (None: all) were not idle, from the text of Linux's ``/proc/stat``. Time that a
    hypervisor gave to other guests counts."""
    names = {"cpu"} if processors is None else {f"cpu{number}" for number in processors}
    total = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in names:
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
        return self._since()[1]

    def spared(self, threads: int) -> bool:
        """Whether a processor was left for each of ``threads``, but for a quarter of one."""
        seconds, others = self._since()
        if not others:
            return True
        count, tick = len(os.sched_getaffinity(0)), 1 / os.sysconf("SC_CLK_TCK")
        # More threads than processors get in each other's way, not in that of others.
        return min(threads, count) + others <= count + _TOLERANCE + _ROUNDING * tick / seconds

    def _since(self) -> tuple[float, float]:
        """Seconds that have passed, and processors that others kept busy meanwhile."""
        wall, own, ticks = (now - before for now, before in zip(self._now(), self._start, strict=True))
        if not ticks or wall <= 0:
            return wall, 0.0
        return wall, max(0.0, (ticks / os.sysconf("SC_CLK_TCK") - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, int]:
        try:
            own = os.sched_getaffinity(0)
            ticks = busy_ticks(_STAT.read_text(), None if len(own) == os.cpu_count() else own)
        except (OSError, ValueError, AttributeError):  # not Linux, or hidden from a container
            ticks = 0
        return time.perf_counter(), time.process_time(), ticks
