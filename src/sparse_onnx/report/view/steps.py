"""What was left as it was, and what compiling took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_onnx.report.charts import bars
from sparse_onnx.report.view.words import Row

__all__ = ["by_reason", "stage_rows"]


def by_reason(declined: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Places left alone, gathered by (pass, reason), the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for place in declined:
        groups.setdefault((place["pass_name"], place["reason"]), []).append(place["place"])
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [{"pass_name": name, "reason": reason, "places": places} for (name, reason), places in ordered]


def stage_rows(stages: Sequence[Row]) -> dict[str, Any]:
    """Time and memory of the steps of the compilation, as bars."""
    seconds = sum(stage["seconds"] for stage in stages)
    memory = max((stage["peak_rss_mb"] for stage in stages), default=0)
    longest = max((stage["seconds"] for stage in stages), default=0.0)
    return {
        "answer": f"Compiling took {seconds:.1f} s and at most {memory} MiB of memory",
        "rows": [{**stage, "chart": bars((stage["seconds"],), ("after",), longest)} for stage in stages],
    }
