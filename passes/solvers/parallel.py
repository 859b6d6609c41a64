"""Parts of one layer side by side, each on one thread.

Solvers that go input by input make many small products. Threads of BLAS spend more time on meeting than such a product
takes, and several times as much where another program holds a core; so each part has a thread of Python, which lets
the others run while it computes, and BLAS has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import threadpoolctl

__all__ = ["cuts", "together"]

T = TypeVar("T")

_LEAST = 128  # output channels of a part: below, what all parts repeat costs more than a second thread gains


def cuts(outputs: int, most: int) -> list[slice]:
    """At most so many even parts of so many output channels, none too small to be worth a thread."""
    count = max(1, min(most, outputs // _LEAST))
    ends = [outputs * index // count for index in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(ends)]


def together(parts: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """What every part gives, in their order, on at most ``threads`` threads; BLAS has one thread meanwhile.

    What a part raises is raised when all have ended.
    """
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        if threads == 1 or len(parts) == 1:
            return [part() for part in parts]
        with ThreadPoolExecutor(min(threads, len(parts))) as pool:
            return list(pool.map(lambda part: part(), parts))
