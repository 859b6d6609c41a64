"""Values that pass from one part of a model to the next, for every batch: on disk, mapped when they are read."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.model.storage import write_error

__all__ = ["Streams"]


class Streams:
    """Named arrays, one for each batch, in a new folder inside ``work``; :meth:`close` deletes it.

    Raises HostError if the disk is full or not writable.
    """

    def __init__(self, work: Path) -> None:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="streams-", dir=work))
        except OSError as error:
            raise write_error(error, work) from error
        self._numbers: dict[str, int] = {}
        self._next = itertools.count()

    def put(self, batch: int, values: Feeds) -> None:
        """Keep ``values`` of the batch with this number; a value of the same name is replaced."""
        for name, array in values.items():
            path = self._path(name, batch)
            try:
                path.unlink(missing_ok=True)  # whoever has the old file mapped keeps its content
                np.save(path, array, allow_pickle=False)
            except OSError as error:
                raise write_error(error, path, array.nbytes) from error

    def get(self, batch: int, names: Collection[str]) -> Feeds:
        """The values of one batch, as read-only maps of their files."""
        return {name: self._read(self._path(name, batch)) for name in names}

    def keep_only(self, names: Collection[str]) -> None:
        """Delete all values but these."""
        for name in self._numbers.keys() - set(names):
            for path in self._folder.glob(f"{self._numbers.pop(name)}-*.npy"):
                path.unlink()

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str, batch: int) -> Path:
        if name not in self._numbers:
            self._numbers[name] = next(self._next)
        return self._folder / f"{self._numbers[name]}-{batch}.npy"

    @staticmethod
    def _read(path: Path) -> np.ndarray:
        if path.stat().st_size <= 1024:  # shapes and other small values: not worth a mapping
            return np.asarray(np.load(path, allow_pickle=False))
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]  # memmap of any dtype
