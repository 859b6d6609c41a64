"""Reading reports back: the schema, made of the types in :mod:`sparse_onnx.document`, says what one is made of, key by
key, and here it is held to that.

The same lies beside this module as ``schema.json``, for other programs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sparse_onnx.document import SCHEMA_VERSION, Report
from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.report.json_schema import json_schema

__all__ = ["check_report", "load_schema", "read_report"]

_MAX_BYTES = 64 << 20
_AGAIN = "damaged or edited? Write it again with `sparse-onnx optimize`"


@functools.cache
def load_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a report."""
    return json_schema(Report, "report.json of sparse-onnx")


def check_report(report: object) -> None:
    """Raise UsageError, with the place of the first thing that is wrong, if ``report`` does not fit the schema."""
    import jsonschema

    if not isinstance(report, Mapping) or not {"schema_version", "summary", "layers"} <= report.keys():
        raise UsageError("is JSON, but no report of sparse-onnx")
    version = report["schema_version"]
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError(
            f"was written by a newer sparse-onnx (schema {version}, this one reads {SCHEMA_VERSION}): update it"
        )
    if isinstance(version, int) and 1 <= version < SCHEMA_VERSION:
        raise UsageError(
            f"was written by an older sparse-onnx (schema {version}, this one reads {SCHEMA_VERSION}): "
            "compile the model again with `sparse-onnx optimize`"
        )
    validator = jsonschema.Draft202012Validator(load_schema())
    if (error := next(validator.iter_errors(report), None)) is not None:
        message = error.message if len(error.message) <= 120 else f"{error.message[:117]}..."
        raise UsageError(f"does not fit the schema at {error.json_path}: {message}; {_AGAIN}")


def read_report(path: Path) -> Report:
    """The report in ``path``: a ``report.json``, or the folder that holds it.

    Raises:
        UsageError: There is none, or it is damaged, foreign or from another version.
        HostError: It may not be read.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        where = "this folder has no report.json" if path.is_dir() else "there is no such file"
        raise UsageError(f"{path}: {where}; give what `sparse-onnx optimize -o` wrote") from error
    except OSError as error:
        raise HostError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{file}: larger than 64 MiB, so no report")
    try:
        report = json.loads(
            data.decode("utf-8"), parse_float=_finite, parse_int=_finite_int, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{file}: cannot be read as JSON ({' '.join(str(error).split())}): {_AGAIN}"
        ) from error
    try:
        check_report(report)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return cast(Report, report)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _finite_int(text: str) -> int:
    value = int(text)
    _finite(str(value))
    return value
