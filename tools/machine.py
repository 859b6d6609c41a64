"""How fast this machine is, measured; what it is, :mod:`sparse_onnx.running.host` reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["read_bandwidth", "together"]


def together(measure: Callable[[int], float], threads: int) -> float:
    """The sum of what ``measure(index)`` finds in ``threads`` threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(measure, range(threads)))


def read_bandwidth(arrays: Sequence[np.ndarray], seconds: float) -> float:
    """Bytes a second that threads, one for each of ``arrays`` (float64), read of them in about ``seconds``."""
    import numpy as np

    def read(index: int) -> float:
        start, rounds, spent = time.perf_counter(), 0, 0.0
        while not rounds or spent < seconds:
            np.add.reduce(arrays[index])
            rounds, spent = rounds + 1, time.perf_counter() - start
        return rounds * arrays[index].nbytes / spent

    return together(read, len(arrays))
