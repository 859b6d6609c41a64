"""The Pareto front of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_onnx.report.charts import Mark, Point, Rule, Series, axis_over, line_chart

__all__ = ["search_chart"]


def search_chart(search: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The Pareto front of a search as a chart and a table."""
    if search is None:
        return None
    points, budget = search["pareto"], search["budget"]
    known = sorted((p for p in points if p["drop"] is not None), key=lambda p: p["speedup"])
    found = {
        "answer": _search_answer(search),
        "chart": None,
        "evaluated": search["evaluated"],
        "metric": search["metric"],
        "rows": points,
        "with_bits": any("bits" in point for point in points),
        "with_bytes": any(point["bytes"] is not None for point in points),
    }
    if not known:
        return found
    speedup, drop = budget.get("target_speedup"), budget.get("max_drop")
    rules = [
        *([] if speedup is None else [Rule(speedup, f"at least {speedup:g}×", vertical=True)]),
        *([] if drop is None else [Rule(drop, f"at most {drop:g} lost")]),
    ]
    x = axis_over(
        "times the original's speed", [p["speedup"] for p in known] + _given(speedup), text="{:g}×".format
    )
    y = axis_over("lost", [p["drop"] for p in known] + _given(drop), start=0.0)
    front = Series("front", tuple(Point(p["speedup"], p["drop"]) for p in known))
    marks = [Mark(p["speedup"], p["drop"], "chosen") for p in known if p["chosen"]]
    label = f"{len(known)} plans by speed and by what they lose ({search['metric']}). {found['answer']}."
    found["chart"] = line_chart(label, [front], x, y, rules, marks)
    return found


def _given(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _search_answer(search: Mapping[str, Any]) -> str:
    chosen = next((point for point in search["pareto"] if point["chosen"]), None)
    if chosen is None:
        return "No plan was found"
    lost = "outputs that are no numbers" if chosen["drop"] is None else f"a loss of {chosen['drop']:.2g}"
    what = f"{chosen['speedup']:.2f}× at {lost}"
    return f"The budget is met: {what}" if search["met"] else f"The budget was not met; the best is {what}"
