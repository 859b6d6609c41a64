"""Lines of progress: how much is done, the time left, and which lines last."""

import pytest

from sparse_onnx import progress
from sparse_onnx.progress import Progress, done_of, format_duration, is_lasting, is_step


@pytest.fixture
def clock(monkeypatch):
    """The seconds on the clock, which stands still unless it is set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("line", "lasting", "step"),
    [
        ("load", False, False),
        ("prune: W 3/4", False, True),
        ("warning: few tokens", True, True),
        ("note: dimension b is 1", True, True),
        ("prune: warning: few tokens", True, True),
        ("this is no warning", False, False),
        ("layers.warning: 3/4", False, True),
    ],
)
def test_kinds_of_lines(line, lasting, step):
    assert is_lasting(line) is lasting
    assert is_step(line) is step


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5999, "100 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_time_left_is_at_the_pace_so_far(clock):
    clock[0] = 10.0
    assert done_of(2, 10, start=0.0) == "2/10, 40 s left"
    assert done_of(0, 10, start=0.0) == "0/10"
    assert done_of(10, 10, start=0.0) == "10/10"


def test_says_something_about_once_a_second_and_at_the_end(clock):
    said = []
    steps = Progress(said.append, "batches", 6)
    for seconds in (0.4, 0.9, 1.1, 1.5, 2.2, 3.0):
        clock[0] = seconds
        steps.step()
    assert said == ["batches: 3/6, 1 s left", "batches: 5/6, 0 s left", "batches: 6/6 in 3 s"]


def test_steps_of_different_size(clock):
    said = []
    steps = Progress(said.append, "bytes", 100, interval=0)
    clock[0] = 4.0
    steps.step(25)
    assert said == ["bytes: 25/100, 12 s left"]
