"""What a process may use, on machines and in containers that a folder stands for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.passes.calibration import calibrator
from sparse_onnx.running import host

MB = 1 << 20
LARGEST = "9223372036854771712"  # how version 1 says that there is no limit


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def group(root: Path, line: str, files: dict[str, str], *, mounts: str = "", free: int = 10_000 * MB) -> Path:
    """A process in control groups, whose folders hold ``files``."""
    write(
        root, {"proc/self/cgroup": line, "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {free // 1024} kB\n"}
    )
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    if mounts:
        write(root, {"proc/self/mountinfo": mounts})
    return root


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "processors", lambda: tuple(range(16)))


# Processors

CPU = {
    "no control groups": ("", {}, "", None),
    "version 2": ("0::/\n", {"cpu.max": "150000 100000\n"}, "", 1.5),
    "version 2, no limit": ("0::/user.slice\n", {"user.slice/cpu.max": "max 100000\n"}, "", None),
    "the tightest counts": (
        "0::/a/b\n",
        {"cpu.max": "max 100000", "a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"},
        "",
        2.0,
    ),
    "the innermost counts": (
        "0::/a/b\n",
        {"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"},
        "",
        0.5,
    ),
    "a gap between": ("0::/a/b/c\n", {"a/cpu.max": "300000 100000"}, "", 3.0),
    "no period": ("0::/\n", {"cpu.max": "250000\n"}, "", 2.5),
    "another period": ("0::/\n", {"cpu.max": "20000 10000\n"}, "", 2.0),
    "version 1, as a container sees it": (
        "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        "",
        3.0,
    ),
    "version 1, no limit": (
        "3:cpu,cpuacct:/\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        "",
        None,
    ),
    "version 1, one folder a controller": (
        "3:cpuacct,cpu:/x\n",
        {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "50000"},
        "",
        2.0,
    ),
    "hybrid": (
        "3:cpu:/a\n0::/a\n",
        {"cpu/a/cpu.cfs_quota_us": "400000", "unified/a/cpu.max": "300000 100000"},
        "",
        3.0,
    ),
    "mounted elsewhere": (
        "0::/a\n",
        {"mine/a/cpu.max": "100000 100000", "a/cpu.max": "300000 100000"},
        "30 1 0:26 / /sys/fs/cgroup/mine rw - cgroup2 cgroup rw\n",
        1.0,
    ),
    "mounted from its own group on": (
        "7:cpu,cpuacct:/docker/x/y\n",
        {"c/y/cpu.cfs_quota_us": "200000", "c/y/cpu.cfs_period_us": "100000", "c/cpu.cfs_quota_us": "-1"},
        "30 1 0:26 /docker/x /sys/fs/cgroup/c rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n",
        2.0,
    ),
    "outside of what is mounted": (
        "0::/../../other\n",
        {"cpu.max": "200000 100000", "other/cpu.max": "100000 100000"},
        "",
        2.0,
    ),
    "other controllers": ("3:cpuset:/\n4:memory:/\n", {"cpuset/cpu.cfs_quota_us": "100000"}, "", None),
    "garbage": (
        "0::/\nnonsense\n:\n\n::\n5\n",
        {"cpu.max": "lots of it\n", "cpu.cfs_quota_us": "\0\1"},
        "x y - z\n - \n",
        None,
    ),
    "a quota of nothing": ("0::/\n", {"cpu.max": "0 0\n"}, "", None),
}


@pytest.mark.parametrize("case", CPU)
def test_processor_time_of_control_groups(case: str, tmp_path: Path) -> None:
    line, files, mounts, expected = CPU[case]
    assert host.cpu_limit(group(tmp_path, line, files, mounts=mounts)) == expected


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max", 16), ("150000", 1), ("250000", 2), ("20000", 1), ("1600000", 16), ("9900000", 16)],
)
def test_cores_are_whole_and_at_least_one(quota: str, expected: int, tmp_path: Path, sixteen: None) -> None:
    assert host.available_cores(group(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000\n"})) == expected


def test_cores_without_any_file(tmp_path: Path, sixteen: None) -> None:
    assert host.available_cores(tmp_path) == 16


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs Linux: processors cannot be chosen here"
)
def test_cores_heed_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host.processors() == (min(before),)
        assert host.available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


STAT = """cpu  10 10 10 1000 10 10 10 10 10 10
cpu0 1 2 4 1000 1000 8 16 32 64 128
cpu1 100 0 0 1000 0 0 0 0 0 0
cpu10 100000 0 0 0 0 0 0 0 0 0
intr 12345 6 7
ctxt 99

cpu7 5 garbage
"""


@pytest.mark.parametrize(
    ("numbers", "ticks"),
    [({0}, 63), ({1}, 100), ({0, 1}, 163), ({2}, 0), (set(), 0), (None, 60), ({7}, 5)],
)
def test_ticks_of_the_own_processors_without_idle_waiting_and_guests(
    numbers: set[int] | None, ticks: int, tmp_path: Path
) -> None:
    """Guests' time (the last two columns) is part of the user's already. The first line is that of all processors."""
    write(tmp_path, {"proc/stat": STAT})
    assert host.busy_ticks(numbers, tmp_path) == ticks


@pytest.mark.parametrize(
    ("text", "features", "name"),
    [
        ("flags : fpu avx2 fma avx2\nflags : none\n", ["fma", "avx2"], None),
        ("Features\t: fp asimd sve\n", ["asimd", "sve"], None),
        ("model name\t: Some CPU @ 1: 2\nmodel name: other\n", None, "Some CPU @ 1: 2"),
    ],
)
def test_features_and_name_of_the_processor(
    text: str, features: list[str] | None, name: str | None, tmp_path: Path
) -> None:
    write(tmp_path, {"proc/cpuinfo": text})
    assert host.cpu_features(tmp_path) == features
    assert host.cpu_name(tmp_path) == name or name is None


# Memory

MEMORY = {
    "version 2": ("0::/\n", {"memory.max": str(1000 * MB), "memory.current": str(300 * MB)}, 1000, 700),
    "version 2, no limit": ("0::/\n", {"memory.max": "max", "memory.current": str(300 * MB)}, None, 10_000),
    "cached files are given back": (
        "0::/\n",
        {
            "memory.max": str(1000 * MB),
            "memory.current": str(900 * MB),
            "memory.stat": f"anon 1\nfile {600 * MB}\ninactive_file {400 * MB}\nactive_file {100 * MB}\n",
        },
        1000,
        600,
    ),
    "slowed down above": (
        "0::/\n",
        {"memory.max": str(1000 * MB), "memory.high": str(500 * MB), "memory.current": str(100 * MB)},
        500,
        400,
    ),
    "the group around is tighter": (
        "0::/a/b\n",
        {
            "a/b/memory.max": str(500 * MB),
            "a/b/memory.current": str(100 * MB),
            "a/memory.max": str(800 * MB),
            "a/memory.current": str(790 * MB),
        },
        500,
        10,
    ),
    "full": ("0::/\n", {"memory.max": str(100 * MB), "memory.current": str(200 * MB)}, 100, 0),
    "more than the machine has": (
        "0::/\n",
        {"memory.max": str(10**12), "memory.current": "0"},
        10**12 // MB,
        10_000,
    ),
    "version 1": (
        "4:memory:/docker/x\n",
        {
            "memory/memory.limit_in_bytes": str(2000 * MB),
            "memory/memory.usage_in_bytes": str(1500 * MB),
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {500 * MB}\ntotal_active_file 0\n",
        },
        2000,
        1000,
    ),
    "version 1, no limit": (
        "4:memory:/\n",
        {"memory/memory.limit_in_bytes": LARGEST, "memory/memory.usage_in_bytes": "1"},
        None,
        10_000,
    ),
    "hybrid": (
        "4:memory:/x\n0::/x\n",
        {"memory/x/memory.limit_in_bytes": str(64 * MB), "unified/x/memory.max": "max"},
        64,
        64,
    ),
    "usage unknown": ("0::/\n", {"memory.max": str(64 * MB)}, 64, 64),
    "garbage": (
        "0::/\n",
        {"memory.max": "much", "memory.current": "-", "memory.stat": "a b c\nactive_file many\n"},
        None,
        10_000,
    ),
    "no control groups": ("", {}, None, 10_000),
}


def test_memory_of_the_machine(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal:       2048 kB\nMemAvailable: 7 kB\n"})
    assert host.machine_memory(tmp_path) == 2 * MB
    assert host.machine_memory(tmp_path / "nothing") == host.machine_memory(tmp_path / "other") > MB
    assert host.memory_limit(tmp_path) is None


@pytest.mark.parametrize("case", MEMORY)
def test_memory_of_control_groups(case: str, tmp_path: Path) -> None:
    line, files, limit, free = MEMORY[case]
    root = group(tmp_path, line, files)
    assert host.memory_limit(root) == (None if limit is None else pytest.approx(limit * MB, abs=MB))
    assert host.available_memory(root) == free * MB


@pytest.mark.parametrize("text", ["", "MemFree: 1 kB\n", "MemAvailable: much\n", "MemAvailable:\n"])
def test_memory_where_the_system_does_not_tell(text: str, tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": text})
    assert host.available_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def test_memory_here_is_a_sensible_number() -> None:
    assert 1 * MB < host.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_calibration_asks_the_same_module() -> None:
    assert calibrator.available_memory is host.available_memory
    assert calibrator.available_cores is host.available_cores


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=120))
def test_no_text_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, line: str, limit: str, mounts: str
) -> None:
    root = tmp_path_factory.mktemp("host")
    for name in ("self/cgroup", "meminfo", "stat", "cpuinfo", "mounts"):
        write(root, {f"proc/{name}": line})
    mounts = f"1 2 3 {mounts} \\ - cgroup2 a b\n"
    write(
        root,
        {"proc/self/mountinfo": mounts, "sys/fs/cgroup/cpu.max": limit, "sys/fs/cgroup/memory.max": limit},
    )
    assert host.available_cores(root) >= 1
    assert host.available_memory(root) >= 0
    assert host.busy_ticks(None, root) >= 0
    assert isinstance(host.file_system(Path("/"), root), str)


def test_peak_memory_grows_with_what_is_held() -> None:
    before = host.peak_rss_bytes()
    assert before > 10 << 20
    held = np.ones(64 << 20, np.uint8)
    assert host.peak_rss_bytes() >= before
    assert held.nbytes == 64 << 20


# Files


def test_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    real = tmp_path.resolve()
    inner = real / "with space"
    inner.mkdir()
    escaped = str(inner).replace(" ", "\\040")
    text = f"a / overlay rw 0 0\nb {real} ext4 rw 0 0\nc {escaped} tmpfs rw 0 0\nd {real}x xfs rw 0 0\n"
    write(tmp_path, {"proc/mounts": text})
    assert host.file_system(real, tmp_path) == "ext4"
    assert host.file_system(inner / "below", tmp_path) == "tmpfs"
    assert host.file_system(real.parent, tmp_path) == "overlay"
    assert host.file_system(real, inner) == ""


def test_peak_memory_is_that_of_this_program(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t  12345 kB\n")
    assert host.peak_rss_bytes(tmp_path) == 12345 * 1024
    assert host.peak_rss_bytes(tmp_path / "none") > 10 << 20
