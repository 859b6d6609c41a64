"""What a search has planned, and keeps in files for the case that it is interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.document import CurveRow
from sparse_onnx.errors import UsageError
from sparse_onnx.model.storage import write_whole
from sparse_onnx.search.plans import Family
from sparse_onnx.search.strategy import Expected
from sparse_onnx.timing.table import TimingTable, read_table, write_table

__all__ = ["FILES", "Planned"]

_PLANS, _TABLE = "plans.json", "timings.json"
FILES = (_PLANS, _TABLE)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is planned with.

    Attributes:
        families: The plans to choose from.
        table: Timings to decide by.
        sizes: The elements of the weights, by name.
        rows: The lengths of the rows of tables, by name.
        curves: Of the layers, as a report has them.
    """

    families: tuple[Family, ...]
    table: TimingTable
    sizes: Mapping[str, int]
    rows: Mapping[str, int]
    curves: tuple[CurveRow, ...]

    def save(self, folder: Path, key: str) -> None:
        """Keep it under ``key``, which names the question."""
        write_table(self.table, folder / _TABLE)
        document = {
            "key": key,
            "sizes": self.sizes,
            "rows": self.rows,
            "families": [dataclasses.asdict(family) for family in self.families],
            "curves": self.curves,
        }
        with write_whole(folder / _PLANS) as file:
            file.write(json.dumps(document).encode())

    @classmethod
    def load(cls, folder: Path, key: str) -> Planned | None:
        """What was kept under ``key``; None if there is nothing that can be read."""
        try:
            document = json.loads((folder / _PLANS).read_text(encoding="utf-8"))
            if document["key"] != key:
                return None
            return cls(
                tuple(map(_family, document["families"])),
                read_table(folder / _TABLE),
                document["sizes"],
                document["rows"],
                tuple(document["curves"]),
            )
        except (OSError, ValueError, KeyError, TypeError, UsageError):
            return None


def _family(document: Mapping[str, Any]) -> Family:
    return Family(
        document["name"],
        tuple({name: Choice(*choice) for name, choice in plan.items()} for plan in document["plans"]),
        tuple(Expected(**expected) for expected in document["expected"]),
    )
