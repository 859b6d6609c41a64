"""Statistics in a file: written whole or not at all, read without trust, merged.

A ``.stats`` file is a zip archive without compression: ``header.json`` and float64 arrays as ``.npy``. For capture
i and group g: ``i.g.shift`` near the mean of X, ``i.g.total``, the sum of X less the shift, and ``i.g.gram.b`` (block
b) its second moments. All are sums, so files add up. In version 1 there is no shift: it is 0, and inputs that vary
little around a large mean are known less well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.errors import DataError, HostError
from sparse_onnx.model.storage import write_whole
from sparse_onnx.passes.calibration.moments import Layout, Moments

__all__ = ["Entry", "Header", "StatisticsFile", "merge", "write_statistics"]

_FORMAT, _VERSION, _WITHOUT_SHIFT = "sparse-onnx statistics", 2, 1
_HEADER = "header.json"
_HEADER_LIMIT = 64 << 20
_NPY_LIMIT = 4096  # bytes before the data of an .npy
_SIZE_LIMIT = 1 << 24  # channels


@dataclasses.dataclass(frozen=True)
class Entry:
    """One capture: its name, K, groups and layout, and the number of batches and tokens summed so far."""

    name: str
    size: int
    groups: int
    layout: Layout
    batches: int
    count: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What the statistics are of. ``model`` and ``data`` are digests, of ``data`` one for every part of a merger."""

    model: str
    data: tuple[str, ...]
    batches: int
    mask: str | None
    entries: tuple[Entry, ...]

    @property
    def complete(self) -> bool:
        return all(entry.batches == self.batches for entry in self.entries)


def write_statistics(path: Path, header: Header, parts: Iterator[Sequence[Moments]]) -> None:
    """Write ``path`` under another name and rename it. ``parts`` are the sums of ``header.entries``, one a group.

    Raises HostError if there is no space or no permission.
    """
    with (
        write_whole(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for index, groups in enumerate(parts):
            for group, moments in enumerate(groups):
                for name, array in moments.arrays().items():
                    info = zipfile.ZipInfo(_member(index, group, name))
                    with archive.open(info, "w", force_zip64=True) as member:
                        stored = np.ascontiguousarray(array, "<f8")
                        np.lib.format.write_array(member, stored, allow_pickle=False)
        content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(header)}
        archive.writestr(zipfile.ZipInfo(_HEADER), json.dumps(content, indent=1))


def _member(index: int, group: int, name: str) -> str:
    return f"{index}.{group}.{name}.npy"


class StatisticsFile:
    """A ``.stats`` file that is open for reading; sums are read when they are asked for.

    Raises DataError with the path and the reason if the file is missing, cut off, damaged or no statistics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._refusing():
            try:
                with self._open() as archive:
                    self.header = self._read_header(archive)
            except FileNotFoundError:
                raise DataError(f"{path}: no such file; give a .stats file") from None

    def moments(self, index: int) -> list[Moments]:
        """The sums of ``header.entries[index]``, one for each group."""
        entry = self.header.entries[index]
        result = []
        with self._refusing(), self._open() as archive:
            for group in range(entry.groups):
                moments = Moments(entry.size, entry.layout)
                moments.count = entry.count
                for name, array in moments.arrays().items():
                    if name != "shift" or self._version != _WITHOUT_SHIFT:
                        array[...] = self._read_array(archive, _member(index, group, name), array.shape)
                result.append(moments)
        return result

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise HostError(f"{self.path}: no permission to read it") from error
        except (
            zipfile.BadZipFile,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            NotImplementedError,
            OSError,
            RuntimeError,
            struct.error,
            RecursionError,
        ) as error:  # what zipfile, json and numpy raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.path}: cannot be read as statistics ({reason[:200]}); calibrate again"
            ) from error

    def _open(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def _read_header(self, archive: zipfile.ZipFile) -> Header:
        info = archive.getinfo(_HEADER)
        if info.file_size > _HEADER_LIMIT or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its header is too large or compressed")
        content = json.loads(archive.read(info))
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise ValueError("it has another format")
        self._version = content.get("version")
        if self._version not in (_WITHOUT_SHIFT, _VERSION):
            raise ValueError(
                f"its version is {self._version!r}, this program reads {_WITHOUT_SHIFT} and {_VERSION}"
            )
        entries = tuple(_entry(entry) for entry in content["entries"])
        if len({entry.name for entry in entries}) != len(entries):
            raise ValueError("a tensor is listed twice")
        needed = sum(entry.groups * entry.layout.nbytes(entry.size) for entry in entries)
        if needed > self.path.stat().st_size:  # told before memory is taken for it
            raise ValueError(f"its tensors would take {needed} bytes, more than the file has")
        data, mask = content["data"], content["mask"]
        if not all(isinstance(part, str) for part in (content["model"], *data, mask or "")):
            raise ValueError("its digests are no text")
        batches = _number(content["batches"], "batches", 1 << 40)
        return Header(content["model"], tuple(data), batches, mask, entries)

    def _read_array(self, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
        info = archive.getinfo(name)
        nbytes = 8 * int(np.prod(shape, dtype=np.int64))
        if info.compress_type != zipfile.ZIP_STORED or not nbytes < info.file_size <= nbytes + _NPY_LIMIT:
            raise ValueError(f"{name} has {info.file_size} bytes, {nbytes} and an .npy header were expected")
        with archive.open(info) as member:
            array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
            member.read()  # to the end, where the checksum is compared
        if array.shape != shape or array.dtype != np.dtype("<f8") or not np.isfinite(array.sum()):
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)} or holds NaN; expected float64{list(shape)}"
            )
        return array


def _number(value: Any, name: str, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError(f"{name} is {value!r}")
    return value


def _entry(content: Any) -> Entry:
    if not isinstance(content, Mapping) or not isinstance(content.get("name"), str):
        raise ValueError("an entry has no name")
    return Entry(
        content["name"],
        _number(content["size"], "size", _SIZE_LIMIT),
        _number(content["groups"], "groups", _SIZE_LIMIT),
        Layout(content["layout"]),
        _number(content["batches"], "batches", 1 << 40),
        _number(content["count"], "count", 1 << 60),
    )


def merge(first: Path, second: Path, output: Path) -> Header:
    """Add the statistics of two complete files of one model, on different data; equal to a joint run.

    One tensor's sums are in memory at a time. Raises DataError if the files do not belong together.
    """
    one, two = StatisticsFile(first), StatisticsFile(second)
    a, b = one.header, two.header
    places = {entry.name: index for index, entry in enumerate(b.entries)}
    kinds = [{(e.name, e.size, e.groups, e.layout) for e in header.entries} for header in (a, b)]
    if not a.complete or not b.complete:
        raise DataError(f"{second if a.complete else first}: is unfinished; finish the calibration first")
    if a.model != b.model or a.mask != b.mask:
        raise DataError(
            f"{first} and {second} are of different models or masks; merge statistics of one model"
        )
    if kinds[0] != kinds[1]:
        raise DataError(f"{first} and {second} hold other tensors or layouts; calibrate with equal options")
    if common := set(a.data) & set(b.data):
        raise DataError(
            f"{first} and {second} are both of the same data ({min(common)[:12]}): it would count twice"
        )
    batches = a.batches + b.batches
    entries = tuple(
        dataclasses.replace(e, batches=batches, count=e.count + b.entries[places[e.name]].count)
        for e in a.entries
    )
    header = Header(a.model, (*a.data, *b.data), batches, a.mask, entries)

    def sums() -> Iterator[list[Moments]]:
        for index, entry in enumerate(a.entries):
            groups = one.moments(index)
            for mine, other in zip(groups, two.moments(places[entry.name]), strict=True):
                mine.merge(other)
            yield groups

    write_statistics(output, header, sums())
    return header
