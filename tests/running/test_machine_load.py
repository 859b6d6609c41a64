"""Whether other programs were in the way: from clocks that are made up, and once from the real ones."""

import os
import time

import pytest

from sparse_onnx.running import host
from sparse_onnx.running.machine_load import OtherLoad


@pytest.fixture
def load(monkeypatch):
    """What is found on 4 processors after 10 s, from seconds of the machine's and this process's own work."""

    def found(machine, own):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3}, raising=False)
        clock = iter([(0.0, 0.0, 0), (10.0, own, round(machine * os.sysconf("SC_CLK_TCK")))])
        monkeypatch.setattr(OtherLoad, "_now", staticmethod(lambda: next(clock)))
        return OtherLoad()

    return found


@pytest.mark.parametrize(
    ("machine", "own", "others"), [(25, 20, 0.5), (20, 20, 0.0), (19, 20, 0.0), (40, 0, 4.0), (0, 5, 0.0)]
)
def test_what_is_not_ours_is_that_of_others(load, machine, own, others):
    assert load(machine, own).processors() == pytest.approx(others)


@pytest.mark.parametrize(
    ("others", "threads", "spared"),
    [
        (0, 4, True),
        (2, 4, True),  # a fifth of a processor
        (2.53, 4, True),  # 0.004 more than a quarter may be rounding
        (2.55, 4, False),
        (3, 4, False),
        (12, 3, True),
        (13, 3, False),
        (32, 1, True),
        (33, 1, False),
        (1, 8, True),  # eight threads on four processors: in their own way
        (3, 8, False),
    ],
)
def test_a_processor_for_every_thread(load, others, threads, spared):
    """``others`` in seconds of 10, on 4 processors."""
    assert load(others + 5, 5).spared(threads) is spared


def test_where_nothing_can_be_read_there_is_no_other_program(monkeypatch):
    monkeypatch.setattr(host, "busy_ticks", lambda _numbers: 0)
    load = OtherLoad()
    assert load.processors() == 0
    assert load.spared(1000)


def test_the_real_clocks_give_a_share_of_the_processors():
    load = OtherLoad()
    start = time.perf_counter()
    while time.perf_counter() - start < 0.3:
        pass
    assert 0 <= load.processors() <= 1.5 * (os.cpu_count() or 1)
