"""The C library's heap.

glibc keeps what is freed and, once it has seen large blocks come and go, cuts the next ones out of what it kept.
Sessions that open and close one after the other then leave holes of the size of weights, and each opens with up to a
model's size more memory than the first. With another C library nothing here does anything.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["give_back_memory", "large_blocks_apart"]

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt
_APART, _USUAL = 1 << 20, 32 << 20
"""Bytes from which a block gets pages of its own, which go back to the system as soon as it is freed: while sessions
open, and else. The latter is what glibc comes to by itself: computations with large arrays would lose time otherwise,
since new pages are cleared."""


def give_back_memory(*, cycles: bool = False) -> None:
    """Return to the system what was freed: a session's weights, before the next session's come on top.

    With ``cycles`` the models that nobody knows any more go first: their graphs point to each other's parts, and Python
    would keep them, weights and all, until its collector happens to come. It takes a tenth of a second.
    """
    if cycles:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Large blocks that are allocated meanwhile leave no holes in the heap when they are freed."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is None:
        yield
        return
    option(_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        option(_MMAP_THRESHOLD, _USUAL)
        option(_TRIM_THRESHOLD, 2 * _USUAL)
