"""Where trials run: one after another here, side by side with joblib, or on a Ray cluster.

A *task* is one trial: a function of no arguments but ``threads`` that can be pickled. It finds its model and data by
their paths and writes a folder, so the machines of a cluster must share a disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sparse_onnx.errors import HostError, SparseOnnxError

__all__ = ["Task", "Workers", "choose_workers"]

Task = Callable[[int], Any]


class Workers(Protocol):
    """Runs tasks, ``jobs`` at once."""

    @property
    def jobs(self) -> int: ...

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """The results in order; of a task that raised a SparseOnnxError that error. Other errors are raised."""
        ...


class _Serial:
    """In this process, with all threads."""

    jobs = 1

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        return [_attempt(task, self._threads) for task in tasks]


class _Processes:
    """On this machine, in processes that share its cores."""

    def __init__(self, threads: int, jobs: int) -> None:
        try:
            import joblib
        except ImportError as error:
            raise HostError("several jobs need joblib: pip install 'sparse-onnx[search]'") from error
        self._joblib = joblib
        self.jobs = jobs
        self._threads = max(1, threads // jobs)

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        attempt = self._joblib.delayed(_attempt)
        workers = self._joblib.Parallel(n_jobs=self.jobs, backend="loky")
        return list(workers(attempt(task, self._threads) for task in tasks))


class _Cluster:
    """On the Ray cluster at ``address``: "auto" for the one that this machine belongs to, "local" for its own cores."""

    def __init__(self, threads: int, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise HostError("a Ray cluster needs ray: pip install 'sparse-onnx[ray]'") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise HostError(f"no Ray cluster at {address!r}: {error}") from error
        self._ray = ray
        largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        self._threads = max(1, min(threads, largest))
        self.jobs = max(1, int(ray.cluster_resources().get("CPU", 1)) // self._threads)

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        attempt = self._ray.remote(_attempt).options(num_cpus=self._threads)
        return list(self._ray.get([attempt.remote(task, self._threads) for task in tasks]))


def choose_workers(threads: int, *, jobs: int = 1, ray: str | None = None) -> Workers:
    """``ray``: the address of a cluster; else ``jobs`` processes on this machine.

    Raises HostError if what that needs is missing.
    """
    if ray is not None:
        return _Cluster(threads, ray)
    return _Serial(threads) if jobs == 1 else _Processes(threads, jobs)


def _attempt(task: Task, threads: int) -> Any:
    try:
        return task(threads)
    except SparseOnnxError as error:
        return error
