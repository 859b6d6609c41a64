"""Tasks give the same results wherever they run."""

import functools
import os
import sys

import pytest

from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.search.limits import Limits
from sparse_onnx.search.workers import choose_workers


def _square(value, threads):
    if value < 0:
        raise UsageError(f"{value} is negative")
    return value**2, threads, os.getpid()


def _tasks(*values):
    return [functools.partial(_square, value) for value in values]


def test_here():
    workers = choose_workers(4)
    assert workers.jobs == 1
    (first, error) = workers.run(_tasks(3, -1))
    assert first == (9, 4, os.getpid())
    assert isinstance(error, UsageError)


def test_in_processes_that_share_the_cores():
    pytest.importorskip("joblib")
    workers = choose_workers(4, jobs=2)
    first, error, second = workers.run(_tasks(3, -1, 5))
    assert (first[:2], second[:2]) == ((9, 2), (25, 2))
    assert isinstance(error, UsageError)
    assert str(error) == "-1 is negative"
    assert os.getpid() not in (first[2], second[2])


@pytest.mark.slow
def test_on_a_cluster():
    ray = pytest.importorskip("ray")
    try:
        workers = choose_workers(1, ray="local")
        assert workers.jobs >= 1
        first, error = workers.run(_tasks(3, -1))
    finally:
        ray.shutdown()
    assert first[:2] == (9, 1)
    assert first[2] != os.getpid()
    assert isinstance(error, UsageError)


@pytest.mark.parametrize(
    "options", [{"trials": 0}, {"minutes": 0.0}, {"jobs": 0}, {"jobs": 2, "ray": "auto"}], ids=str
)
def test_limits_out_of_range(options):
    with pytest.raises(UsageError, match=r"search_trials|search_minutes|jobs"):
        Limits(**options)


@pytest.mark.parametrize(("module", "options"), [("joblib", {"jobs": 2}), ("ray", {"ray": "auto"})])
def test_what_is_missing_is_said(module, options, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HostError, match=module):
        choose_workers(4, **options)
