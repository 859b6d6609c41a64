"""What the sections of the benchmark tables share: their settings, and tables as data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_onnx.timing.rounds import Ratio
from sparse_onnx.tools.console import table

__all__ = ["Settings", "Table", "band", "count", "percent"]


@dataclass(frozen=True)
class Settings:
    """``threads`` are the thread counts to measure with. ``quick`` keeps few and small points and few rounds: it
    shows that everything runs, its numbers mean little. ``deepsparse`` and ``openvino`` are Python interpreters that
    have them, or None. Models are taken from the folder ``models``, and made there if they are missing."""

    threads: tuple[int, ...]
    quick: bool
    deepsparse: Path | None
    openvino: Path | None
    models: Path
    say: Callable[[str], None]


@dataclass(frozen=True)
class Table:
    """One table of results. Cells are text or numbers; None is a cell that has nothing to say."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        body = table([[_cell(value) for value in row] for row in self.rows], self.columns)
        return "\n".join([self.title, body, *self.notes])

    def document(self) -> dict[str, Any]:
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        document = {"title": self.title, "rows": rows, "notes": list(self.notes)}
        json.dumps(document)  # a cell of another type is a defect: say so before anything is printed
        return document


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"


def band(ratio: Ratio) -> str:
    """The 95 % confidence interval of a ratio."""
    return f"{ratio.low:.2f}-{ratio.high:.2f}"


def count(threads: int) -> str:
    """A number of threads in words."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def percent(share: float) -> str:
    """A share of one as whole percents."""
    return f"{100 * share:.0f} %"
