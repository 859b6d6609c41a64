"""The file of earlier timings: what it gives back, and that nothing about the file can stop or mislead a run."""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_onnx import sparse_ops
from sparse_onnx.timing import cache
from sparse_onnx.timing.cache import TimingCache, default_cache_file, environment_key, file_digest
from sparse_onnx.timing.rounds import Ratio

TIMING = Ratio(2.0, 1.0, 2.0, 1.5, 2.5)
EARLIER = Ratio(2.0, 1.0, 2.0, 1.5, 2.5, cached=True)
KEY = {"weight": [2, 3], "isa": "avx2"}

# One file a test is enough: every example writes it first.
rewritten = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "timings.jsonl"


def filled(path, count):
    cache = TimingCache(path)
    for index in range(count):
        cache.put({"index": index}, Ratio(index + 2.0, 1.0, index + 2.0, 1.0, index + 3.0))
    return path.read_bytes()


def indices(path):
    """The keys of :func:`filled` that the file gives back as they were put, and the warnings."""
    warnings = []
    cache = TimingCache(path, warnings.append)
    known = {index: cache.get({"index": index}) for index in range(100)}
    expected = {i: Ratio(i + 2.0, 1.0, i + 2.0, 1.0, i + 3.0, cached=True) for i in known}
    return {i for i, timing in known.items() if timing == expected[i]}, warnings


def test_a_later_run_gets_what_was_put_and_is_told_so(path):
    first = TimingCache(path)
    assert first.get(KEY) is None
    first.put(KEY, TIMING)
    assert first.get(KEY) == TIMING, "in the run that measured it, it is no earlier run's"
    later = TimingCache(path)
    assert later.get(KEY) == EARLIER
    assert later.get(dict(reversed(KEY.items()))) == EARLIER
    assert later.get(KEY | {"isa": "avx512"}) is None


def test_the_last_timing_of_a_key_counts(path):
    TimingCache(path).put(KEY, Ratio(9.0, 1.0, 9.0, 9.0, 9.0))
    TimingCache(path).put(KEY, TIMING)
    assert TimingCache(path).get(KEY) == EARLIER


def test_numbers_come_back_bit_by_bit(path):
    timing = Ratio(0.1 + 0.2, 1e-9, math.pi, math.e, 1e300)
    TimingCache(path).put(KEY, timing)
    found = TimingCache(path).get(KEY)
    assert (found.first_ms, found.second_ms, found.median, found.low, found.high) == (
        0.1 + 0.2, 1e-9, math.pi, math.e, 1e300,
    )  # fmt: skip


def test_without_a_file_timings_are_kept_for_this_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = TimingCache()
    cache.put(KEY, TIMING)
    assert cache.get(KEY) == TIMING
    assert list(tmp_path.iterdir()) == []


def test_a_time_taken_beside_other_programs_does_not_stay(path):
    cache = TimingCache(path)
    cache.put(KEY, Ratio(2.0, 1.0, 2.0, 1.5, 2.5, quiet=False))
    assert cache.get(KEY).median == 2.0
    assert TimingCache(path).get(KEY) is None


def test_parallel_writers_lose_nothing(path):
    def write(worker):
        cache = TimingCache(path)
        for index in range(50):
            cache.put({"worker": worker, "index": index}, TIMING)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    cache = TimingCache(path, pytest.fail)
    assert all(cache.get({"worker": w, "index": i}) == EARLIER for w in range(8) for i in range(50))


# Damage


@rewritten
@given(data=st.data())
def test_damage_costs_the_damaged_lines_only(tmp_path, data):
    path = tmp_path / "timings.jsonl"
    path.unlink(missing_ok=True)
    whole = filled(path, 6)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 300)))
    inserted = data.draw(
        st.binary(max_size=40).filter(lambda piece: not any(c in b"0123456789.e-" for c in piece))
    )
    path.write_bytes(whole[:start] + inserted + whole[end:])
    touched = set(range(whole[:start].count(b"\n"), whole[:end].count(b"\n") + 1))
    found, _ = indices(path)
    assert found >= set(range(6)) - touched
    again, warnings = indices(path)
    assert again == found, "the file was written anew"
    assert warnings == []
    TimingCache(path).put({"index": 99}, Ratio(101.0, 1.0, 101.0, 1.0, 102.0))
    assert indices(path) == (found | {99}, [])


@rewritten
@given(content=st.binary(max_size=300))
def test_any_bytes_are_survived(tmp_path, content):
    path = tmp_path / "timings.jsonl"
    path.write_bytes(content)
    TimingCache(path).put(KEY, TIMING)
    assert TimingCache(path, pytest.fail).get(KEY) == EARLIER


LINE = {"key": {"index": 0}, "first_ms": 2.0, "second_ms": 1.0, "median": 2.0, "low": 1.0, "high": 3.0}


@pytest.mark.parametrize(
    "change",
    [
        {"first_ms": 0.0}, {"second_ms": -1.0}, {"median": math.nan}, {"high": math.inf}, {"low": 2.5},
        {"high": 1.5}, {"median": "2.0"}, {"median": None}, {"median": True}, {"median": [2.0]}, {"key": "index"},
        {"key": None}, {"key": [["index", 0]]}, {"key": {"index": math.nan}}, {"high": 10**400},
    ],
)  # fmt: skip
def test_a_line_that_is_no_timing_is_left_out_with_a_warning(path, change):
    filled(path, 3)
    with path.open("a") as file:
        file.write(json.dumps(LINE | {"key": {"index": 3}} | change) + "\n")
    found, warnings = indices(path)
    assert found == {0, 1, 2}
    assert warnings == [f"warning: timing cache {path}: 1 damaged lines are left out"]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("name", LINE)
def test_a_line_that_lacks_something_is_left_out(path, name):
    path.parent.mkdir()
    path.write_text(json.dumps({k: v for k, v in LINE.items() if k != name}) + "\n")
    assert indices(path)[0] == set()


def test_a_line_that_was_cut_off_does_not_spoil_the_next(path):
    """As a full disk or a power cut leaves it; here even without its line break alone."""
    whole = filled(path, 2)
    path.write_bytes(whole[:-1])
    TimingCache(path).put({"index": 2}, Ratio(4.0, 1.0, 4.0, 1.0, 5.0))
    assert indices(path) == ({0, 1, 2}, [])


def test_a_file_that_grew_too_large_keeps_its_younger_half(path, monkeypatch):
    whole = filled(path, 40)
    monkeypatch.setattr(cache, "MAX_BYTES", len(whole))
    assert indices(path)[0] == set(range(40))
    TimingCache(path).put(
        {"index": 3}, Ratio(5.0, 1.0, 5.0, 1.0, 6.0)
    )  # one of the older half, measured anew
    found, warnings = indices(path)
    assert found == {3, *range(40)}, "all of it still serves the run that shortens it"
    assert warnings == []
    assert indices(path)[0] == {3, *range(21, 40)}
    assert len(path.read_bytes()) < 0.6 * len(whole)


# Places


def test_an_unwritable_place_is_said_once_and_timings_last_for_the_run(tmp_path):
    (tmp_path / "file").write_text("no folder")
    warnings = []
    cache = TimingCache(tmp_path / "file" / "timings.jsonl", warnings.append)
    for index in range(3):
        cache.put({"index": index}, TIMING)
    assert all(cache.get({"index": index}) == TIMING for index in range(3))
    (line,) = warnings
    assert line.startswith(f"warning: timing cache {tmp_path / 'file' / 'timings.jsonl'}: cannot be ")
    assert line.endswith("timings are kept for this run only")


def test_a_folder_in_the_place_of_the_file(tmp_path):
    warnings = []
    cache = TimingCache(tmp_path, warnings.append)
    cache.put(KEY, TIMING)
    assert cache.get(KEY) == TIMING
    assert len(warnings) == 1
    assert "cannot be read" in warnings[0]


def test_where_the_file_lies(monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_CACHE", "/own")
    assert default_cache_file() == Path("/own/timings.jsonl")
    monkeypatch.setenv("SPARSE_ONNX_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("sys.platform", "linux")
    assert default_cache_file() == Path("/xdg/sparse-onnx/timings.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says: to be ignored
    assert default_cache_file() == Path("/home/me/.cache/sparse-onnx/timings.jsonl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_file() == Path("/home/me/.cache/sparse-onnx/timings.jsonl")
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_cache_file() == Path("/home/me/Library/Caches/sparse-onnx/timings.jsonl")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert default_cache_file() == Path("/local/sparse-onnx/timings.jsonl")


# Keys


def test_the_environment_is_part_of_a_key():
    key = environment_key(3)
    assert key["threads"] == 3
    assert key["isa"] == sparse_ops.info().isa
    assert key["features"] == list(sparse_ops.info().features)
    assert key["library_sha256"] == hashlib.sha256(sparse_ops.library_path().read_bytes()).hexdigest()[:16]
    assert key["cpu"]
    assert key["onnxruntime"]
    assert json.loads(json.dumps(key)) == key


def test_digest_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea"
