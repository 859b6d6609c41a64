"""What this process may use of the machine that it runs on: processors, memory, and what others leave of them.

The only module that asks the system. A container is a control group with limits: the processor time and the memory that
it grants count, not those of the machine. Functions that read files take the ``root`` of the file system, so that other
machines can be simulated: libraries that know processors and quotas (psutil, loky) know neither the memory of nested
control groups nor another root.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

__all__ = [
    "available_cores",
    "available_memory",
    "busy_ticks",
    "cpu_features",
    "cpu_limit",
    "cpu_name",
    "file_system",
    "has_integer_dot_products",
    "machine_memory",
    "memory_limit",
    "peak_rss_bytes",
    "processors",
]

_ROOT = Path("/")
_INTEGER_DOT_PRODUCTS = {"avx512_vnni", "amx_tile", "asimd"}
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
_PERIOD = 100_000  # microseconds, of a quota that names none
_NO_LIMIT = 1 << 60  # version 1 writes its largest multiple of a page


# Processors


def cpu_name(root: Path = _ROOT) -> str:
    """The processor's name, as the system gives it."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_features(root: Path = _ROOT) -> list[str] | None:
    """The instruction sets that matter here and that the operating system lists; None if it lists none."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            have = set(value.split())
            return [name for name in _FEATURES if name in have]
    return None


def has_integer_dot_products(features: Sequence[str] | None) -> bool:
    """Whether products of unsigned and signed bytes are added up exactly on a processor with these features. Where they
    are not (AVX2 and AVX-512 without VNNI), sums of two of them saturate at 16 bits, and weights need 7 bits."""
    return features is not None and not _INTEGER_DOT_PRODUCTS.isdisjoint(features)


def processors() -> tuple[int, ...]:
    """The numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cpu_limit(root: Path = _ROOT) -> float | None:
    """The processors' worth of time that control groups grant; None without a limit.

    Of version 2 (``cpu.max``) and 1 (``cpu.cfs_quota_us``); the tightest of the group and those around it counts.
    """
    limits = [_quota(folder) for folder in _control_groups("cpu", root)]
    return min((limit for limit in limits if limit is not None), default=None)


def available_cores(root: Path = _ROOT) -> int:
    """How many threads can run all the time: one for each processor that this process may use, but no more than control
    groups grant time for. A fraction is rounded down, as a thread that is stopped in the middle keeps the others
    waiting, but one thread there is always."""
    count, limit = len(processors()), cpu_limit(root)
    return count if limit is None else max(1, min(count, int(limit)))


def busy_ticks(numbers: Collection[int] | None, root: Path = _ROOT) -> int:
    """Clock ticks that the processors of these ``numbers`` (None: all) were not idle since the system started; 0 where
    only Linux would tell. Time that a hypervisor gave to other guests counts."""
    names = {"cpu"} if numbers is None else {f"cpu{number}" for number in numbers}
    total = 0
    for line in _lines(root / "proc/stat"):
        name, *fields = line.split() or [""]
        if name in names:
            ticks = [_number([field]) or 0 for field in fields[:8]]
            total += sum(ticks) - sum(ticks[3:5])  # idle, and waiting for a disk
    return total


# Memory


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process could still take without swapping, as far as the system and its control groups tell.
    Cached file pages are given back when they are needed, so they count as free."""
    return min([_free_on_machine(root), *(free for _, free in _memory_limits(root))])


def machine_memory(root: Path = _ROOT) -> int:
    """Bytes of memory that the machine has, whoever may take them."""
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        if key == "MemTotal" and (number := _number(value.split()[:1])) is not None:
            return number * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes that control groups allow in all, the tightest of the group and those around it; None without a limit."""
    return min((limit for limit, _ in _memory_limits(root)), default=None)


def peak_rss_bytes(root: Path = _ROOT) -> int:
    """The largest resident set of this program so far, in bytes."""
    for line in _lines(root / "proc/self/status"):
        key, _, value = line.partition(":")
        if key == "VmHWM" and (number := _number(value.split()[:1])) is not None:
            return number * 1024
    # Begins with what the process had before it became this program.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free_on_machine(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        if key == "MemAvailable" and (number := _number(value.split()[:1])) is not None:
            return number * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what of it is free) of every control group that has a limit."""
    for folder in _control_groups("memory", root):
        # Above the first the kernel stops the process, above the second it slows it down to a crawl.
        found = [
            _number(_words(folder / name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        ]
        limits = [limit for limit in found if limit is not None and limit < _NO_LIMIT]
        if not limits:
            continue
        used = (
            _number(_words(folder / "memory.current"))
            or _number(_words(folder / "memory.usage_in_bytes"))
            or 0
        )
        cached = _cached(folder)
        yield min(limits), max(0, min(limits) - max(0, used - cached))


def _cached(folder: Path) -> int:
    """Bytes of file pages in a control group and those inside it, which version 1 calls total."""
    pages = {}
    for line in _lines(folder / "memory.stat"):
        words = line.split()
        if len(words) == 2 and (number := _number(words[1:])) is not None:
            pages[words[0]] = number
    return sum(pages.get(f"total_{name}", pages.get(name, 0)) for name in ("active_file", "inactive_file"))


# Files


def file_system(path: Path, root: Path = _ROOT) -> str:
    """The type of the file system that holds ``path``, such as ext4 or tmpfs; "" if that is not known."""
    real, found, length = str(path.resolve()), "", -1
    for line in _lines(root / "proc/mounts"):
        fields = line.split()
        if len(fields) < 3:
            continue
        point, kind = _unescaped(fields[1]), fields[2]
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= length:
            found, length = kind, len(point)
    return found


# Control groups


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control group that limits this process and of those around it, as far as they can be seen, in
    every hierarchy that may have the controller; not all of them exist."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if not colon or (controllers and controller not in controllers.split(",")):
            continue
        for base, top in _hierarchies(controllers, root):
            inside = _inside(base, PurePosixPath(group), top)
            yield inside
            while inside != base:
                inside = inside.parent
                yield inside


def _hierarchies(controllers: str, root: Path) -> list[tuple[Path, PurePosixPath]]:
    """Where the hierarchy with these ``controllers`` (none: version 2) is mounted, and which group is seen there."""
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        same = set(controllers.split(",")) <= set(kinds[2].split(",")) and kinds[0] == "cgroup"
        if kinds[0] == "cgroup2" if not controllers else same:
            point = _unescaped(fields[4]).lstrip("/")
            found.append((root / point, PurePosixPath(_unescaped(fields[3]))))
    if found:
        return found
    names = [controllers, *controllers.split(",")] if controllers else ["", "unified"]
    return [(root / "sys/fs/cgroup" / name, PurePosixPath("/")) for name in dict.fromkeys(names)]


def _inside(base: Path, group: PurePosixPath, top: PurePosixPath) -> Path:
    """The folder of ``group`` where ``top`` is mounted at ``base``: ``base`` itself if the group lies outside, as it
    seems to from inside a container."""
    if ".." in group.parts or not group.is_relative_to(top):
        return base
    return base / group.relative_to(top)


def _quota(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    if not words:
        words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
    quota, period = _number(words[:1]), _number(words[1:2])
    return None if not quota else quota / (period or _PERIOD)


def _number(words: list[str]) -> int | None:
    """The first word as a number; None if there is none, as in "max", or below zero, which stands for no limit."""
    try:
        number = int(words[0])
    except (IndexError, ValueError):
        return None
    return number if number >= 0 else None


def _unescaped(text: str) -> str:
    """A path as mount tables write it: a space is ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _lines(path: Path) -> Iterator[str]:
    """Read as they are asked for: what the first processor says is enough, of many."""
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
