"""Speed of layers over their share of zeros, by form and pattern."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_onnx.report.charts import Mark, Point, Rule, Series, axis_over, line_chart, marker
from sparse_onnx.report.view.words import Row

__all__ = ["curve_panels"]

_MAX_PANELS = 6


def curve_panels(curves: Sequence[Row], layers: Sequence[Row]) -> dict[str, Any] | None:
    """A panel for each kind of layer: speed over sparsity by form and pattern, and the point that ships.

    Layers that were measured together share their points, and then their panel.
    """
    if not curves:
        return None
    known = {row["name"]: row for row in layers}
    curves = _with_series(curves)
    by_layer: dict[str | None, list[Row]] = defaultdict(list)
    for curve in curves:
        by_layer[curve["layer"]].append(curve)
    kinds: dict[tuple[Any, ...], list[str | None]] = defaultdict(list)
    for name, own in by_layer.items():
        points = tuple((c["series"], tuple((p["sparsity"], p["speedup"]) for p in c["points"])) for c in own)
        kinds[points].append(name)

    def weight(names: Sequence[str | None]) -> float:
        if None in names:
            return math.inf
        return sum((known[name]["dense_ms"] or 0.0) for name in names if name in known)

    ordered = sorted(kinds.values(), key=lambda names: -weight(names))
    series = list(dict.fromkeys(curve["series"] for curve in curves))
    panels = [_panel(names, by_layer, known, series) for names in ordered[:_MAX_PANELS]]
    rows = [
        {
            "name": _kind_title(names, known),
            "break_even": [_break_even(by_layer[names[0]], each) for each in series],
        }
        for names in ordered
    ]
    return {
        "answer": _curves_answer(curves),
        "panels": panels,
        "legend": [{"name": name, "sign": marker(index)} for index, name in enumerate(series)],
        "series": series,
        "rows": rows,
    }


def _with_series(curves: Sequence[Row]) -> list[Row]:
    """Each with the name of its line: the pattern, with the form before it where there are several; the form alone of
    what was measured without zeros only, which has no use for them."""
    several = len({curve["form"] for curve in curves}) > 1

    def series(curve: Row) -> str:
        if [point["sparsity"] for point in curve["points"]] == [0.0]:
            return str(curve["form"])
        return f"{curve['form']}, {curve['mask_structure']}" if several else str(curve["mask_structure"])

    return [{**curve, "series": series(curve)} for curve in curves]


def _curves_answer(curves: Sequence[Row]) -> str:
    own = [curve for curve in curves if curve["layer"] is not None] or list(curves)
    first, form = own[0]["mask_structure"], own[0]["form"].capitalize()
    points = [curve["break_even"] for curve in own if curve["series"] == own[0]["series"]]
    paying = [point for point in points if point is not None]
    if not paying:
        return f"{form} pays at no measured share of zeros ({first})"
    if len(points) == 1:
        return f"{form} pays from {paying[0]:.0%} zeros on ({first})"
    return (
        f"{form} pays from {min(paying):.0%} to {max(paying):.0%} zeros on, at the median layer from "
        f"{statistics.median(paying):.0%} ({first})"
    )


def _kind_title(names: Sequence[str | None], known: Mapping[str, Row]) -> str:
    first = names[0]
    if first is None:
        return "the whole model"
    title = known[first]["title"] if first in known else first
    return title if len(names) == 1 else f"{title} and {len(names) - 1} like it"


def _break_even(own: Sequence[Row], series: str) -> str:
    for curve in own:
        if curve["series"] == series:
            return "never" if curve["break_even"] is None else f"{curve['break_even']:.0%}"
    return "-"


def _panel(
    names: Sequence[str | None],
    by_layer: Mapping[str | None, Sequence[Row]],
    known: Mapping[str, Row],
    series: Sequence[str],
) -> dict[str, Any]:
    own = {curve["series"]: curve for curve in by_layer[names[0]]}
    lines = []
    for each in series:  # every one keeps its sign in all panels
        points = own[each]["points"] if each in own else []
        lines.append(
            Series(
                each,
                tuple(
                    Point(p["sparsity"], p["speedup"], p.get("speedup_low"), p.get("speedup_high"))
                    for p in points
                ),
            )
        )
    chosen = {
        (curve["chosen"], _at(curve["points"], curve["chosen"]))
        for name in names
        for curve in by_layer[name]
        if curve["chosen"] is not None
    }
    marks = [Mark(*place, "ships" if len(chosen) == 1 else "") for place in sorted(chosen)]
    every = [point for line in lines for point in line.points]
    y_values = [value for point in every for value in (point.y, point.low, point.high) if value is not None]
    x = axis_over("zeros", [point.x for point in every] + [mark.x for mark in marks], text=_percent)
    x = dataclasses.replace(x, low=max(0.0, x.low), high=min(1.0, x.high))
    y = axis_over("times dense speed", [*y_values, 1.0], start=0.0, text="{:g}×".format)
    title = _kind_title(names, known)
    described = "; ".join(f"{each} {_break_even(by_layer[names[0]], each)}" for each in series if each in own)
    return {
        "title": title,
        "chart": line_chart(
            f"Speed over zeros of {title}. Sparse pays from: {described}.",
            lines,
            x,
            y,
            rules=[Rule(1.0, "dense")],
            marks=marks,
        ),
    }


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


def _at(points: Sequence[Row], sparsity: float) -> float:
    """The speedup at ``sparsity``, on straight lines between points."""
    before = [p for p in points if p["sparsity"] <= sparsity] or points[:1]
    after = [p for p in points if p["sparsity"] >= sparsity] or points[-1:]
    left, right = before[-1], after[0]
    gap = right["sparsity"] - left["sparsity"]
    share = (sparsity - left["sparsity"]) / gap if gap > 0 else 0.0
    return float(left["speedup"] + min(max(share, 0.0), 1.0) * (right["speedup"] - left["speedup"]))
