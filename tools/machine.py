"""Facts about this machine that decide how fast a model runs here: limits, file systems, and measured speed.

Every function that reads the system takes the ``root`` of its file system, so that other machines can be simulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["cpu_features", "cpu_limit", "file_system", "read_bandwidth", "together"]

_FEATURES = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "amx_tile",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "sve2",
)
_ROOT = Path("/")


def cpu_features(root: Path = _ROOT) -> list[str] | None:
    """The instruction sets that matter here and that the operating system lists; None if it lists none."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            have = set(value.split())
            return [name for name in _FEATURES if name in have]
    return None


def cpu_limit(root: Path = _ROOT) -> float | None:
    """The processors' worth of time that control groups grant, as a container is limited; None without a limit.

    Version 2 (``cpu.max``) and 1 (``cpu.cfs_quota_us``); the tightest of the group and those around it counts.
    """
    limits = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / controllers
        inside = base / group.strip("/")
        for folder in (inside, *inside.parents):
            limits.append(_quota(folder))
            if folder == base:
                break
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def _quota(folder: Path) -> float | None:
    if words := _words(folder / "cpu.max"):
        quota, period = words[0], words[1]
    else:
        quota = " ".join(_words(folder / "cpu.cfs_quota_us"))
        period = " ".join(_words(folder / "cpu.cfs_period_us"))
    try:
        microseconds = int(quota)
        return microseconds / int(period) if microseconds > 0 else None
    except ValueError:  # "max", or no such file
        return None


def file_system(path: Path, root: Path = _ROOT) -> str:
    """The type of the file system that holds ``path``, such as ext4 or tmpfs; "" if that is not known."""
    real, found, length = str(path.resolve()), "", -1
    for line in _lines(root / "proc/mounts"):
        _, point, kind, *_ = line.split()
        point = point.encode().decode("unicode_escape")  # spaces are \\040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= length:
            found, length = kind, len(point)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


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
