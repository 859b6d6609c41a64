"""The report of one compilation: what was found, decided and measured (``report.json``).

:mod:`sparse_onnx.document` describes every key. Null stands where a figure was not measured, or is no finite number.
"""

from __future__ import annotations

import inspect
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_onnx.document import Environment
from sparse_onnx.printable import printable
from sparse_onnx.running.host import available_cores, cpu_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["describe_call", "environment", "write_json"]

_MAX_ARGUMENT = 300  # characters of one argument in the description of a call


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def environment(*, threads: int, seed: int, isa: str) -> Environment:
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


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write ``report`` with sorted layout, so that equal reports are equal bytes."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(printable(text) + "\n", encoding="utf-8")
