"""Scratch files and output folders: where results lie while they are made, and how they appear.

:class:`Spool` keeps computed weights on disk instead of in memory. :class:`OutputFolder` makes a result
appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn, Self, TypeAlias

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.units import format_bytes

__all__ = ["OutputFolder", "PathLike", "Spool", "release_mapping", "write_error", "write_whole"]

PathLike: TypeAlias = str | os.PathLike[str]

_ALIGNMENT = 64  # bytes: a cache line
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_error(error: OSError, path: Path, needed: int = 0) -> HostError:
    """What to tell the user when writing ``needed`` bytes to ``path`` ended in ``error``."""
    if error.errno in _NO_SPACE:
        wanted = f"{format_bytes(needed)} are needed: " if needed else ""
        return HostError(
            f"{path}: no space left ({error.strerror}); {wanted}free space or choose another disk"
        )
    if error.errno in _NO_PERMISSION:
        return HostError(f"{path}: no permission to write ({error.strerror}); choose another folder")
    return HostError(f"{path}: cannot be written: {error.strerror or error}; choose another folder")


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes ``path`` when all went well, and is gone otherwise.

    Raises HostError if there is no space, no permission or no such folder.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def release_mapping(tensor: ir.TensorProtocol) -> None:
    """Drop the memory mapping of an external tensor; it is mapped again when next used. Others: nothing.

    Arrays that :meth:`numpy` has handed out stay valid.
    """
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:  # an array is still in use; the mapping goes with it
            tensor.raw = None


class Spool:
    """A scratch file for weights that a pass has computed, so that they do not pile up in memory.

    ::

        with Spool(folder) as spool:
            value.const_value = spool.put(pruned, value.name)
            ...
            save_model(model, folder)

    Leaving the ``with`` block deletes the file; its tensors are then invalid and say so when used.

    Raises:
        HostError: no space or no permission in ``folder``.
    """

    def __init__(self, folder: PathLike) -> None:
        self._folder = Path(os.path.abspath(folder))
        self._tensors: list[ir.ExternalTensor] = []
        self._size = 0
        try:
            descriptor, path = tempfile.mkstemp(prefix=".spool-", suffix=".data", dir=self._folder)
        except OSError as error:
            raise write_error(error, self._folder) from error
        self._path = Path(path)
        self._file: BinaryIO = open(descriptor, "wb", buffering=0)  # noqa: SIM115 (closed by close)

    def put(self, array: np.ndarray, name: str) -> ir.ExternalTensor:
        """Append ``array`` (any shape, any numeric dtype of ONNX) and return a tensor that maps it.

        Raises:
            TypeError: ONNX has no type for the dtype of ``array``.
            HostError: the disk is full; what was put before stays readable.
        """
        tensor = ir.Tensor(np.asarray(array), name=name)
        if tensor.dtype == ir.DataType.STRING:
            raise TypeError("a spool holds numbers, not strings")
        offset = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        try:
            self._file.seek(offset)
            remaining = _bytes_view(tensor)
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise write_error(error, self._path, tensor.nbytes) from error
        self._size = offset + tensor.nbytes
        stored = ir.ExternalTensor(
            self._path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self._folder,
        )
        self._tensors.append(stored)
        return stored

    def release(self) -> None:
        """Drop the memory mappings of all tensors; they are mapped again when next used."""
        for tensor in self._tensors:
            release_mapping(tensor)

    def close(self) -> None:
        """Delete the file and invalidate its tensors. Closing twice is fine."""
        self.release()
        for tensor in self._tensors:
            tensor.invalidate()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes_view(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes of an array's tensor; a copy only where elements are packed or strided."""
    array = tensor.numpy()
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class OutputFolder:
    """A folder that appears whole or not at all.

    ::

        with OutputFolder(path, overwrite=False, sources=[model_path]) as folder:
            save_model(model, folder)

    ``folder`` is a temporary sibling of ``path``. At a clean end it is renamed to ``path``; after an error or
    a keyboard interrupt it is deleted. All questions that can be settled before the work are settled on
    entry. If only the renaming fails, the finished folder is kept and the message says where.

    With ``overwrite``, an existing folder is replaced if it is empty, or if it holds ``model.onnx`` or
    ``report.json`` and nothing but visible regular files; so no home, project or data folder can be lost.
    A folder that holds one of ``sources`` (files or folders) is never replaced.

    Raises:
        UsageError: ``path`` exists and may not be replaced, or its parent does not exist.
        HostError: no permission or no space.
    """

    def __init__(self, path: PathLike, *, overwrite: bool = False, sources: Sequence[PathLike] = ()) -> None:
        self._path = Path(os.path.abspath(path))
        self._overwrite = overwrite
        self._sources = list(sources)
        self._tag = secrets.token_hex(4)
        self._temporary = self._sibling("tmp")

    def __enter__(self) -> Path:
        try:
            self._check()
            self._temporary.mkdir()
        except OSError as error:
            raise write_error(error, self._path.parent) from error
        return self._temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        old = self._sibling("old")
        try:
            if self._path.exists():
                self._check()  # the folder may have changed during the work
                self._path.rename(old)
            try:
                self._temporary.rename(self._path)
            except BaseException:
                if old.exists():
                    old.rename(self._path)
                raise
        except UsageError as refusal:
            raise UsageError(f"{refusal}. The finished result is in {self._temporary}") from None
        except OSError as failure:
            raise HostError(
                f"{write_error(failure, self._path)}. The finished result is in {self._temporary}"
            ) from failure
        if old.exists():
            try:
                shutil.rmtree(old)
            except OSError as failure:
                raise HostError(
                    f"{self._path}: written, but {old}, which it replaced, cannot be deleted: "
                    f"{failure.strerror}; delete it by hand"
                ) from failure

    def _sibling(self, suffix: str) -> Path:
        return self._path.parent / f".{self._path.name}.{self._tag}.{suffix}"

    def _check(self) -> None:
        path = self._path
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent}: is no folder; create it first, or choose another output folder")
        if not os.path.lexists(path):
            return
        real = Path(os.path.realpath(path))
        for source in (*self._sources, ".", os.path.expanduser("~")):
            inside = Path(os.path.realpath(source))
            if real == inside or real in inside.parents:
                self._refuse(f"holds {inside}")
        if path.is_symlink() or not path.is_dir():
            self._refuse("is no folder")
        if not self._overwrite:
            raise UsageError(f"{path}: exists; choose another output folder, or give --overwrite")
        entries = list(os.scandir(path))
        strange = [e.name for e in entries if e.name.startswith(".") or not e.is_file(follow_symlinks=False)]
        if strange:
            self._refuse(f"holds {strange[0]!r}, which this program did not write")
        if entries and not {"model.onnx", "report.json"} & {entry.name for entry in entries}:
            self._refuse("holds neither model.onnx nor report.json, so it is no result of this program")

    def _refuse(self, reason: str) -> NoReturn:
        raise UsageError(f"{self._path}: {reason} and is not replaced; choose another output folder")
