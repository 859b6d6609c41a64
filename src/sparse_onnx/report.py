"""The report of one compilation: what was found, decided and measured (``report.json``).

``report_schema.json`` describes every key. Null stands where a figure was not measured, or is no finite number.
"""

from __future__ import annotations

import inspect
import json
import platform
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sparse_onnx.host import available_cores, cpu_name, peak_rss_bytes
from sparse_onnx.printable import printable
from sparse_onnx.progress import is_lasting
from sparse_onnx.runtime import give_back_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "SCHEMA_VERSION",
    "StageClock",
    "describe_call",
    "environment",
    "write_json",
]

SCHEMA_VERSION = 1
_MAX_ARGUMENT = 300  # characters of one argument in the description of a call


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def environment(*, threads: int, seed: int, isa: str) -> dict[str, Any]:
    """The machine and the software that the numbers of a report hold for."""
    packages = ("sparse-onnx", "onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "numpy")
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "isa": isa,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "seed": seed,
    }


def describe_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The call of ``function`` as Python source, without arguments that have their defaults and without callables."""
    shown = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = arguments[name]
        if callable(value) or value == parameter.default:
            continue
        text = repr(str(value) if isinstance(value, Path) else value)
        if len(text) > _MAX_ARGUMENT:  # a recipe, say, which the report holds anyway
            text = f"{type(value).__name__}(…)"
        shown.append(text if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else f"{name}={text}")
    return f"sparse_onnx.{function.__name__}({', '.join(shown)})"


class StageClock:
    """Wall-clock seconds and peak resident memory by stage; :meth:`say` puts the stage before a line of progress."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._stage = ""
        self._told: set[str] = set()
        self.stages: list[dict[str, Any]] = []

    def say(self, line: str) -> None:
        """Tell where the work is; what lasts, once."""
        if is_lasting(line):
            if line in self._told:
                return
            self._told.add(line)
        self._progress(f"{self._stage}: {line}" if self._stage and not is_lasting(line) else line)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._progress(name)
        self._stage, start = name, perf_counter()
        try:
            yield
        finally:
            self._stage = ""
            give_back_memory()
            seconds = round(perf_counter() - start, 3)
            self.stages.append(
                {"name": name, "seconds": seconds, "peak_rss_mb": round(peak_rss_bytes() / 2**20)}
            )


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write ``report`` with sorted layout, so that equal reports are equal bytes."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(printable(text) + "\n", encoding="utf-8")
