"""Layers that are done, kept in a folder, so that a run that was interrupted does not solve them again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.model.storage import write_whole

__all__ = ["Checkpoint"]

_KEY = "sparse-onnx-checkpoint"


class Checkpoint:
    """Arrays by name in ``folder``, which belong to the job that ``key`` names: one of another job begins anew.

    Raises UsageError if the folder holds other things, HostError if it cannot be written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            marker = folder / _KEY
            present = sorted(folder.iterdir())
            if present and not marker.is_file():
                raise UsageError(f"checkpoint: {folder} is not empty and no checkpoint: give another folder")
            if present and marker.read_text(encoding="ascii", errors="replace") == key:
                return
            for path in present:
                if path.suffix in (".npy", ".part"):
                    path.unlink()
            marker.write_text(key, encoding="ascii")
        except OSError as error:
            raise HostError(f"checkpoint: {folder} cannot be used: {error.strerror}") from error

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The float32 array kept as ``name``, or None if there is none of that shape that can be read."""
        try:
            array = np.load(self._path(name), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return array if array.shape == shape and array.dtype == np.float32 else None

    def put(self, name: str, array: np.ndarray) -> None:
        """Keep ``array``, whole or not at all."""
        with write_whole(self._path(name)) as file:
            np.save(file, np.asarray(array, np.float32))

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npy"
