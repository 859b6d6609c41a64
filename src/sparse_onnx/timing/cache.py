"""Timings of earlier runs in a file, so that equal questions get equal answers, at once.

A key says all that a time depends on: what is computed, at which shapes, by which software, on which machine; see
:func:`environment_key` for the part that is the same for all. The file holds one line of JSON a timing::

    {"key": {...}, "first_ms": 1.9, "second_ms": 0.8, "median": 2.4, "low": 2.3, "high": 2.5}

A line is appended in one write, so that any number of processes may share the file. The last line with a key counts.
What is no such line is left out, with a warning, and the file is then written anew; so it is when it has grown past
:data:`MAX_BYTES`, with the younger half of its lines. A file that cannot be read or written costs time only: then
timings are kept for this run alone, which is said.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_onnx import sparse_ops
from sparse_onnx.errors import HostError
from sparse_onnx.model.storage import write_whole
from sparse_onnx.running.host import cpu_name
from sparse_onnx.running.session import import_onnxruntime
from sparse_onnx.timing.rounds import Ratio

__all__ = ["MAX_BYTES", "TimingCache", "default_cache_file", "environment_key", "file_digest"]

MAX_BYTES = 8 << 20
"""Size from which on the file is cut to half: about 10 000 timings."""

_NUMBERS = ("first_ms", "second_ms", "median", "low", "high")


def default_cache_file() -> Path:
    """``timings.jsonl`` in ``$SPARSE_ONNX_CACHE``, or in the folder that the platform has for a user's caches."""
    own = os.environ.get("SPARSE_ONNX_CACHE")
    return (Path(own) if own else _user_caches() / "sparse-onnx") / "timings.jsonl"


def _user_caches() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path("~/AppData/Local").expanduser())
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path("~/.cache").expanduser()


def environment_key(threads: int) -> dict[str, Any]:
    """What every timing depends on: processor, threads, ONNX Runtime, and the kernel library down to its bytes."""
    library = sparse_ops.info()
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "onnxruntime": import_onnxruntime().__version__,
        "library": library.version,
        "library_sha256": file_digest(library.path),
        "isa": library.isa,
        "features": list(library.features),
    }


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class TimingCache:
    """Timings by key; see the module's docstring.

    Args:
        path: The file, which need not exist; None: keep timings in memory only.
        warn: Called with one line where the file is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path | None = None, warn: Callable[[str], None] = lambda _line: None) -> None:
        self._path, self._warn = path, warn
        self._known: dict[str, Ratio] = {}
        if path is not None:
            self._read(path)

    def get(self, key: Mapping[str, Any]) -> Ratio | None:
        """The timing with that key; ``cached`` where an earlier run measured it."""
        return self._known.get(_text(key))

    def put(self, key: Mapping[str, Any], timing: Ratio) -> None:
        """Keep ``timing`` in memory, and at the end of the file if it was quiet: a wrong time is not to stay."""
        self._known[_text(key)] = timing
        if self._path is None or not timing.quiet:
            return
        line = f"{_line(_text(key), timing)}\n".encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._give_up(f"cannot be written: {error.strerror}")

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._give_up(f"cannot be read: {error.strerror}")
            return
        lines = data.split(b"\n")
        bad = 0
        for line in filter(None, lines):
            try:
                key, timing = _parse(line)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                bad += 1
                continue
            self._known.pop(key, None)  # dictionaries keep the first place of a key, the file its last
            self._known[key] = timing
        unfinished = lines[-1] != b""  # the next line would be glued to it
        if bad:
            self._warn(f"warning: timing cache {path}: {bad} damaged lines are left out")
        if bad or unfinished or len(data) > MAX_BYTES:
            self._write_anew(path, half=len(data) > MAX_BYTES)

    def _write_anew(self, path: Path, *, half: bool) -> None:
        entries = list(self._known.items())
        kept = entries[len(entries) // 2 :] if half else entries
        try:
            with write_whole(path) as file:
                file.writelines(f"{_line(key, timing)}\n".encode() for key, timing in kept)
        except HostError as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._warn(f"warning: timing cache {self._path}: {reason}; timings are kept for this run only")
        self._path = None


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _line(key: str, timing: Ratio) -> str:
    numbers = ",".join(f'"{name}":{float(getattr(timing, name))!r}' for name in _NUMBERS)
    return f'{{"key":{key},{numbers}}}'


def _parse(line: bytes) -> tuple[str, Ratio]:
    document = json.loads(line)
    if not isinstance(document["key"], dict):
        raise ValueError("a key has names")
    numbers = [document[name] for name in _NUMBERS]
    if not all(type(number) in (int, float) and math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError("times are positive")
    first, second, median, low, high = map(float, numbers)
    if not low <= median <= high:
        raise ValueError("the interval holds the median")
    return _text(document["key"]), Ratio(first, second, median, low, high, cached=True)
