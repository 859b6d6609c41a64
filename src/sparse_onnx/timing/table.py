"""Curves of layers in a file: measured on one machine, used to decide on another.

JSON with the keys ``format``, ``schema_version``, ``environment`` (machine and software, as in ``report.json``) and
``kinds``, a list of objects with ``kind`` (see :func:`sparse_onnx.passes.patterns.layer.layer_kind`), ``dense_ms``
and ``curves``: by form and pattern the lists ``sparsities``, ``times``, ``low`` and ``high`` of
:class:`sparse_onnx.timing.curves.Curve`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.errors import UsageError
from sparse_onnx.model.storage import write_whole
from sparse_onnx.passes.patterns.layer import Layer, layer_kind
from sparse_onnx.timing.curves import Curve, LayerCurves

__all__ = ["TimingTable", "read_table", "write_table"]

FORMAT, SCHEMA_VERSION = "sparse-onnx timing table", 2
_SIDES = ("sparsities", "times", "low", "high")


@dataclasses.dataclass(frozen=True)
class TimingTable:
    """Curves by kind of layer, and the ``environment`` that they were measured in."""

    environment: Mapping[str, Any]
    kinds: tuple[tuple[Mapping[str, Any], LayerCurves], ...]

    @functools.cached_property
    def _by_kind(self) -> Mapping[str, LayerCurves]:
        """Of layers that differ in what they may become alone, those with the most curves."""
        ordered = sorted(self.kinds, key=lambda entry: len(entry[1].curves))
        return {_text(kind): curves for kind, curves in ordered}

    @property
    def machine(self) -> str:
        """Where it was measured, in words."""
        threads = self.environment.get("threads", "?")
        return f"{self.environment.get('cpu', 'unknown processor')}, {threads} threads"

    def find(self, layer: Layer, shapes: Sequence[tuple[int, ...]]) -> LayerCurves | None:
        """The curves of ``layer`` with inputs of these ``shapes``, if it was measured."""
        return self._by_kind.get(_text(layer_kind(layer, shapes)))


def _text(kind: Mapping[str, Any]) -> str:
    return json.dumps(kind, sort_keys=True)


def write_table(table: TimingTable, path: Path) -> None:
    """Write ``table`` to ``path``. Raises HostError if that is not possible."""
    kinds = [
        {
            "kind": dict(kind),
            "dense_ms": curves.dense_ms,
            "curves": _by_form(curves),
        }
        for kind, curves in table.kinds
    ]
    document = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "environment": dict(table.environment),
        "kinds": kinds,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with write_whole(path) as file:
        file.write(text.encode())


def read_table(path: Path) -> TimingTable:
    """The table in ``path``. Raises UsageError if it is missing, damaged, of another version, or no such table."""
    how = "make one with `sparse-onnx analyze MODEL --save-table FILE` on the target machine"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; {how}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no timing table: {error}; {how}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f"{path} is no timing table: it does not say format {FORMAT!r}; {how}")
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise UsageError(f"{path} has schema_version {found}; this version reads {SCHEMA_VERSION}: {how}")
    try:
        environment = dict(document["environment"])
        kinds = tuple(
            (
                dict(entry["kind"]),
                LayerCurves(
                    _positive(entry["dense_ms"]),
                    {
                        (str(form), str(structure)): _curve(value)
                        for form, by_structure in entry["curves"].items()
                        for structure, value in by_structure.items()
                    },
                ),
            )
            for entry in document["kinds"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} is a damaged timing table ({why}); {how}") from error
    return TimingTable(environment, kinds)


def _by_form(curves: LayerCurves) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (form, structure), curve in curves.curves.items():
        found.setdefault(form, {})[structure] = dataclasses.asdict(curve)
    return found


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"a time must be a positive number, not {value!r}")
    return float(value)


def _curve(value: Mapping[str, Any]) -> Curve:
    sparsities = tuple(float(share) for share in value["sparsities"])
    if not sparsities or not all(0 <= share < 1 for share in sparsities):
        raise ValueError("sparsities must lie in [0, 1)")
    if list(sparsities) != sorted(set(sparsities)):
        raise ValueError("sparsities must rise")
    sides = [tuple(_positive(number) for number in value[side]) for side in _SIDES[1:]]
    if any(len(side) != len(sparsities) for side in sides):
        raise ValueError("a curve must have as many times as sparsities")
    return Curve(sparsities, *sides)
