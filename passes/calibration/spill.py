"""Statistics by layer, in memory or, where the Grams do not fit together, on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sparse_onnx.model.storage import write_error
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["Groups", "Loader", "Spill", "Statistics", "at_hand"]

Groups = tuple[InputStatistics, ...]
Loader = Callable[[], Groups]


class Statistics(Mapping[str, Groups]):
    """By the name of the weight: one entry for a linear; one for each group of a convolution, whose output channels
    are split evenly among its groups, in order.

    Weights with the same input have equal statistics. What lies on disk is read whenever it is asked for, and is in
    memory no longer than the caller keeps it.
    """

    def __init__(self, loaders: Mapping[str, Loader]) -> None:
        self._loaders = dict(loaders)

    def __getitem__(self, name: str) -> Groups:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def at_hand(groups: Sequence[InputStatistics]) -> Loader:
    """A loader of statistics that are in memory."""
    kept = tuple(groups)
    return lambda: kept


class Spill:
    """A new folder of arrays inside ``work``; what :meth:`put` returned can be read until :meth:`close`, after which
    the spill can be used again."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._folder: Path | None = None
        self._count = 0

    def put(self, groups: Sequence[InputStatistics]) -> Loader:
        """Write the statistics and return what reads them. Raises HostError if the disk is full."""
        return partial(_load, [self._write(inputs) for inputs in groups])

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _write(self, inputs: InputStatistics) -> tuple[Path, float]:
        """The file of the arrays, and the tokens."""
        blocks = inputs.gram if isinstance(inputs.gram, tuple) else ()
        arrays = {f"gram.{index}": block for index, block in enumerate(blocks)}
        if isinstance(inputs.gram, np.ndarray):
            arrays["gram"] = inputs.gram
        if inputs.mean is not None:
            arrays["mean"] = inputs.mean
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="statistics-", dir=self._work))
            path = self._folder / f"{self._count}.npz"
            self._count += 1
            np.savez(path, allow_pickle=False, **arrays)
        except OSError as error:
            raise write_error(error, self._work, sum(array.nbytes for array in arrays.values())) from error
        return path, inputs.count


def _load(files: Sequence[tuple[Path, float]]) -> Groups:
    groups = []
    for path, count in files:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        mean, gram = arrays.pop("mean", None), arrays.pop("gram", None)
        groups.append(InputStatistics(tuple(arrays.values()) if gram is None else gram, mean, count))
    return tuple(groups)
