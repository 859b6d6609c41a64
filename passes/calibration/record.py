"""What makes a calibration run resumable: parts of the statistics, written from time to time beside the final file."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sparse_onnx.errors import DataError
from sparse_onnx.model.storage import write_error
from sparse_onnx.passes.calibration.captures import Capture
from sparse_onnx.passes.calibration.moments import Layout, Moments
from sparse_onnx.passes.calibration.statistics_file import Entry, Header, StatisticsFile, write_statistics

__all__ = ["Record"]

Sums = Mapping[Capture, Sequence[Moments]]
_DETAIL = list(Layout)  # fullest first


class Record:
    """The file ``path`` and, until it is finished, the folder ``path`` + ``.partial`` with one file for each pass.

    Raises DataError if what is there is of another model, other data or another mask than ``header`` says.
    """

    def __init__(self, path: Path, header: Header, every: int) -> None:
        self._path, self._header, self._every = path, header, every
        self._folder = path.with_name(f"{path.name}.partial")
        self._renewed = not path.exists()
        files = [path] if path.exists() else sorted(self._folder.glob("*.stats"))
        self._known = {
            entry.name: (file, index, entry)
            for file in map(self._checked, files)
            for index, entry in enumerate(file.header.entries)
        }

    def _checked(self, path: Path) -> StatisticsFile:
        file = StatisticsFile(path)
        ours, found = self._header, file.header
        for what, same in (
            ("another model", found.model == ours.model),
            ("other calibration data", found.data == ours.data and found.batches == ours.batches),
            ("another mask", found.mask == ours.mask),
        ):
            if not same:
                where = path if path == self._path else self._folder
                raise DataError(f"{where}: holds statistics of {what}; delete it, or choose another file")
        return file

    def restore(self, capture: Capture, layout: Layout) -> tuple[list[Moments], int] | None:
        """The sums that are there of ``capture`` in ``layout`` or a fuller one, and of how many batches they are."""
        file, index, entry = self._known.get(capture.name, (None, 0, None))
        if file is None or entry is None:
            return None
        fits = (entry.size, entry.groups) == (capture.size, capture.groups)
        if not fits or _DETAIL.index(entry.layout) > _DETAIL.index(layout):
            return None
        return file.moments(index), entry.batches

    def keep(self, sums: Sums, batches: Mapping[Capture, int], *, force: bool = False) -> None:
        """Write the sums of one pass, if it is time to or with ``force``."""
        if not force and min(batches.values()) % self._every:
            return
        entries = tuple(_entry(capture, groups, batches[capture]) for capture, groups in sums.items())
        header = dataclasses.replace(self._header, entries=entries)
        names = "\n".join(entry.name for entry in entries)
        part = self._folder / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.stats"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, self._folder) from error
        write_statistics(part, header, iter(sums.values()))
        self._renewed = True
        file = StatisticsFile(part)
        self._known |= {entry.name: (file, index, entry) for index, entry in enumerate(entries)}

    def finish(self, captures: Sequence[Capture]) -> None:
        """If anything is new, write the final file from the parts, one tensor in memory at a time, and delete them."""
        if not self._renewed:
            return
        places = [self._known[capture.name] for capture in captures]
        header = dataclasses.replace(self._header, entries=tuple(entry for _, _, entry in places))

        def sums() -> Iterator[list[Moments]]:
            for file, index, _ in places:
                yield file.moments(index)

        write_statistics(self._path, header, sums())
        shutil.rmtree(self._folder, ignore_errors=True)


def _entry(capture: Capture, groups: Sequence[Moments], batches: int) -> Entry:
    first = groups[0]
    return Entry(capture.name, capture.size, capture.groups, first.layout, batches, int(first.count))
