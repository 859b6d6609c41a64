"""Loss gradients in a file: what the exporter writes beside a model and ``prune.gradient`` reads.

An ``.npz`` with two float32 arrays for each weight, named after its ONNX initializer: ``<initializer>.grad_abs``, the
mean of |∂L/∂w| over the batches, and ``<initializer>.fisher``, the mean of (∂L/∂w)². Both are [K, N], as passes see a
weight, however the model stores it: K input channels (for a convolution C / group · window), N output channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from sparse_onnx.errors import DataError, HostError
from sparse_onnx.model.storage import write_whole

__all__ = ["GradientFile", "Moment", "WeightGradients", "open_gradients", "write_gradients"]

Moment = Literal["grad_abs", "fisher"]

_MOMENTS: tuple[Moment, ...] = ("grad_abs", "fisher")
_EXPECTED = "write the file with `sparse-onnx export --gradients`"


@dataclasses.dataclass(frozen=True, eq=False)
class WeightGradients:
    """Of one weight: the means of |∂L/∂w| and of (∂L/∂w)², both float32 [K, N]."""

    grad_abs: np.ndarray
    fisher: np.ndarray


def write_gradients(path: Path, gradients: Mapping[str, WeightGradients]) -> None:
    """Write ``gradients``, by initializer, to ``path``, whole or not at all. The same gradients give the same bytes.

    Raises HostError if there is no space, no permission or no such folder.
    """
    arrays = {
        f"{name}.{moment}": np.asarray(getattr(weight, moment), np.float32)
        for name, weight in gradients.items()
        for moment in _MOMENTS
    }
    with write_whole(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # no name is allow_pickle


class GradientFile:
    """An open file of gradients; arrays are read when they are asked for."""

    def __init__(self, path: Path, archive: Mapping[str, np.ndarray]) -> None:
        self._path, self._archive = path, archive
        found = [key.rpartition(".") for key in archive]
        if not found or any(moment not in _MOMENTS for _, _, moment in found):
            raise DataError(f"{path} holds no gradients; {_EXPECTED}")
        self.names = tuple(dict.fromkeys(name for name, _, _ in found))

    def read(self, name: str, moment: Moment, shape: tuple[int, int]) -> np.ndarray:
        """One moment of the weight ``name``, float32 [K, N] = ``shape``.

        Raises DataError, with the name and what was expected, if it is missing, of another shape or type, or
        holds negative values, NaN or Inf.
        """
        where = f"{self._path}: {name}.{moment}"
        try:
            array = self._archive[f"{name}.{moment}"]
        except KeyError:
            raise DataError(f"{where} is missing; {_EXPECTED}") from None
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{where} is damaged ({error}); {_EXPECTED}") from error
        if array.shape != shape or array.dtype.kind != "f":
            raise DataError(
                f"{where} is {array.dtype}{list(array.shape)}; the weight needs float32{list(shape)} "
                "(input by output channels): is the file of this model?"
            )
        if not (np.isfinite(array) & (array >= 0)).all():
            raise DataError(f"{where} holds NaN, Inf or negative values; {_EXPECTED}")
        return np.asarray(array, np.float32)


@contextlib.contextmanager
def open_gradients(path: Path) -> Iterator[GradientFile]:
    """Read ``path``. Raises DataError if it is missing or no file of gradients, HostError if it may not be read."""
    try:
        stream = path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(f"{path}: no such file of gradients; {_EXPECTED}") from None
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror or error}") from error
    with stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read as .npz ({error}); {_EXPECTED}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array; {_EXPECTED}")
        with archive:
            yield GradientFile(path, archive)
