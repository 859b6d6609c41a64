"""Facts about machines, each simulated by a folder that stands for its file system."""

import numpy as np
import pytest

from sparse_onnx.tools.machine import cpu_features, cpu_limit, file_system, read_bandwidth, together


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags : fpu avx2 fma avx2\nflags : none\n", ["fma", "avx2"]),
        ("Features\t: fp asimd sve\n", ["asimd", "sve"]),
        ("model name: x\n", None),
    ],
)
def test_features_of_the_processor(tmp_path, text, expected):
    write(tmp_path, proc__cpuinfo=text)
    assert cpu_features(tmp_path) == expected


def test_nothing_is_known_without_the_files(tmp_path):
    assert cpu_features(tmp_path) is None
    assert cpu_limit(tmp_path) is None
    assert file_system(tmp_path, tmp_path) == ""


def group(root, line, **files):
    """A process in a control group whose folders hold ``files``."""
    write(root, proc__self__cgroup=line)
    for name, text in files.items():
        write(root / "sys/fs/cgroup", **{name.replace("_dot_", "."): text})


def test_limit_of_a_container(tmp_path):
    group(tmp_path, "0::/\n", cpu_dot_max="150000 100000\n")
    assert cpu_limit(tmp_path) == 1.5


def test_no_limit(tmp_path):
    group(tmp_path, "0::/user.slice\n", user_dot_slice__cpu_dot_max="max 100000\n")
    assert cpu_limit(tmp_path) is None


def test_the_tightest_group_counts(tmp_path):
    files = {"a__b__cpu_dot_max": "400000 100000\n", "a__cpu_dot_max": "200000 100000\n"}
    group(tmp_path, "0::/a/b\n", cpu_dot_max="max 100000\n", **files)
    assert cpu_limit(tmp_path) == 2.0


@pytest.mark.parametrize(("quota", "expected"), [("300000", 3.0), ("-1", None)])
def test_limit_of_version_1(tmp_path, quota, expected):
    line = "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n"
    write(tmp_path, proc__self__cgroup=line)
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    folder.mkdir(parents=True)  # a container sees its own group at the root of the mount
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_limit(tmp_path) == expected


def test_file_system_is_that_of_the_innermost_mount(tmp_path):
    real = tmp_path.resolve()
    inner = real / "with space"
    inner.mkdir()
    escaped = str(inner).replace(" ", "\\040")
    write(
        tmp_path,
        proc__mounts=f"a / overlay rw 0 0\nb {real} ext4 rw 0 0\nc {escaped} tmpfs rw 0 0\nd {real}x xfs rw 0 0\n",
    )
    assert file_system(real, tmp_path) == "ext4"
    assert file_system(inner / "below", tmp_path) == "tmpfs"
    assert file_system(real.parent, tmp_path) == "overlay"


def test_together_adds_what_all_threads_find():
    assert together(lambda index: float(index), 4) == 6.0


def test_bandwidth_counts_every_array():
    """Whatever the speed: it is finite, positive, and every array was read at least once."""
    arrays = [np.ones(1000), np.ones(1000)]
    assert 0 < read_bandwidth(arrays, 0.0) < 1e15
