"""Whether a timing had the processors to itself.

Where other programs leave fewer processors free than there are threads, a thread waits for milliseconds while its
session's other threads wait for it: such times say nothing about the code that was timed.
"""

from __future__ import annotations

import os
import time

from sparse_onnx.running import host

__all__ = ["OtherLoad"]

# Of a processor; and ticks that rounding may add.
_TOLERANCE, _ROUNDING = 0.25, 4


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
        count, tick = len(host.processors()), 1 / os.sysconf("SC_CLK_TCK")
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
        own = host.processors()
        ticks = host.busy_ticks(None if len(own) == os.cpu_count() else own)
        return time.perf_counter(), time.process_time(), ticks
