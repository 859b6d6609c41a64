"""Time and error by layer, and the table of layers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_onnx.report.charts import bars
from sparse_onnx.report.view.words import DENSE, Row, form_words
from sparse_onnx.units import format_error, format_ms

__all__ = ["MAX_BARS", "columns", "error_chart", "forms_of", "layer_row", "layer_times", "layers_answer"]

MAX_BARS = 20
"""The most that one chart shows."""

_MEASURES = (
    ("output_error_held_out", "output", "of each layer’s output, on inputs that nothing was pruned with"),
    ("output_error", "output", "of each layer’s output, on the inputs that it was pruned with"),
    (
        "relative_error",
        "weights",
        "of each layer’s weights, which is that of its output on uncorrelated inputs",
    ),
)
"""What the error of a layer is taken from: the first that is known. Key, what it is a share of, what it means."""


FLOAT_BITS = 32


def layer_row(row: Row, bits: Mapping[str, int | None]) -> Row:
    """A row of the report with what the sections say of it: title, dimensions, and the times of charts. ``bits`` are
    those of weights that are stored in few, by name."""
    low, high = row["speedup_low"], row["speedup_high"]
    title = row["module"] or row["name"]
    return {
        **row,
        "title": title,
        "subtitle": "" if row["name"] in (title, f"{title}.weight") else row["name"],
        "bits": bits.get(row["name"]) or FLOAT_BITS,
        "dimensions": " × ".join(str(size) for size in row["shape"]),
        "size": math.prod(row["shape"]),
        "speedup": "-" if low is None or high is None else f"{low:.2f}–{high:.2f}×",
        "dense_ms": row["times"].get(DENSE),
        "ships_ms": row["times"].get(row["decision"]),
    }


def columns(layers: Sequence[Row]) -> dict[str, bool]:
    """Which columns of the table of layers say anything."""
    shown = {
        key: any(row[key] is not None for row in layers) for key in ("output_error", "output_error_held_out")
    }
    timed = any(row["times"] for row in layers)
    changed = any(row["relative_error"] != 0 for row in layers)
    bits = any(row["bits"] < FLOAT_BITS for row in layers)
    patterns = len({row["mask_structure"] for row in layers}) > 1
    return {**shown, "times": timed, "relative_error": changed, "mask_structure": patterns, "bits": bits}


def forms_of(layers: Sequence[Row]) -> list[str]:
    """The forms that any layer was timed in, dense first."""
    others = dict.fromkeys(form for row in layers for form in row["times"] if form != DENSE)
    return [DENSE, *others]


def layers_answer(layers: Sequence[Row]) -> str:
    """The heading of the table."""
    if not layers:
        return "There is no layer that a sparse kernel could take"
    return form_words(layers, "runs" if len(layers) == 1 else "run")


def _top(rows: Sequence[Row], key: str) -> tuple[list[Row], list[Row]]:
    """The rows with the largest ``key``, at most 20, and the others; one row alone is no "others"."""
    ordered = sorted(rows, key=lambda row: -row[key])
    cut = MAX_BARS if len(ordered) > MAX_BARS + 1 else len(ordered)
    return ordered[:cut], ordered[cut:]


def layer_times(layers: Sequence[Row]) -> dict[str, Any]:
    """Time of layers before and after: the kinds with the most time before, and the others as one.

    Layers whose paths differ in numbers only are one kind, if they are alike in shape and decision.
    """
    timed = [row for row in layers if row["dense_ms"] is not None and row["ships_ms"] is not None]
    if not timed:
        return {"answer": "No layer was timed", "rows": []}
    kinds: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in timed:
        kinds[re.sub(r"\d+", "*", row["title"]), *row["shape"], row["decision"]].append(row)
    rows = [
        {
            "name": own[0]["title"] if len(own) == 1 else kind[0],
            "count": len(own),
            "decision": kind[-1],
            "before": sum(row["dense_ms"] for row in own),
            "after": sum(row["ships_ms"] for row in own),
        }
        for kind, own in kinds.items()
    ]
    shown, others = _top(rows, "before")
    longest = max(max(row["before"], row["after"]) for row in shown)
    for row in shown:
        row["chart"] = bars((row["before"], row["after"]), ("before", "after"), longest)
    if others:
        sums = {key: sum(row[key] for row in others) for key in ("count", "before", "after")}
        shown.append({"name": "other layers", "decision": "", "chart": "", **sums})
    before, after = (sum(row[key] for row in rows) for key in ("before", "after"))
    best = max(rows, key=lambda row: row["before"] - row["after"])
    saved = best["before"] - best["after"]
    answer = f"The layers take {format_ms(after)} instead of {format_ms(before)}"
    return {
        "answer": answer if saved > 0 else f"No layer gets faster: together they take {format_ms(before)}",
        "note": f"{best['name']} saves most, {format_ms(saved)}." if saved > 0 and len(rows) > 1 else "",
        "summed": any(row["count"] > 1 for row in shown),
        "rows": shown,
    }


def error_chart(layers: Sequence[Row]) -> dict[str, Any]:
    """Error of layers: of their outputs where that is known, else of their weights; the largest first."""
    for key, what, meaning in _MEASURES:
        if known := [row for row in layers if row[key]]:
            return _error_bars(known, key, what, meaning)
    return {"answer": "No weight was changed" if layers else "", "rows": []}


def _error_bars(known: Sequence[Row], key: str, what: str, meaning: str) -> dict[str, Any]:
    shown, others = _top(known, key)
    worst = shown[0]
    return {
        "answer": f"{worst['title']} changed most: its {what} by {format_error(worst[key])}",
        "note": f"Relative error {meaning}."
        + (f" {len(others)} layers lose less than those shown." if others else ""),
        "rows": [
            {
                "name": row["title"],
                "chart": bars((row[key],), ("error",), worst[key]),
                "value": format_error(row[key]),
            }
            for row in shown
        ],
    }
