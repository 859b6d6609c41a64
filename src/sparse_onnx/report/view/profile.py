"""Time by operator, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_onnx.report.charts import bars
from sparse_onnx.report.view.layers import MAX_BARS
from sparse_onnx.units import format_ms, format_share

__all__ = ["profile_chart"]

_LAYERS = "all layers"


def profile_chart(profile: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Time in the layers, in other operators by type, and between them; before and after."""
    sides = (
        {} if profile is None else {side: shares for side, shares in profile.items() if shares is not None}
    )
    if not sides:
        return None
    times = {side: _parts(shares) for side, shares in sides.items()}
    last = times[list(times)[-1]]
    names = sorted(
        {name for part in times.values() for name in part}, key=lambda name: (-last.get(name, 0.0), name)
    )
    shown, others = names[:MAX_BARS], names[MAX_BARS:]
    rows = [(name, [part.get(name) for part in times.values()]) for name in shown]
    if others:
        rows.append(
            (f"{len(others)} more", [sum(part.get(name, 0.0) for name in others) for part in times.values()])
        )
    longest = max(ms for _, values in rows for ms in values if ms is not None)
    whole = sides[list(sides)[-1]]
    rest = {name: ms for name, ms in last.items() if name != _LAYERS}
    first = max(rest, key=lambda name: rest[name], default=None)
    answer = f"{format_share(whole['layers_ms'] / whole['wall_ms'])} of the time is in the layers"
    return {
        "answer": answer
        if first is None
        else f"{answer}, most of the rest in {first} ({format_ms(rest[first])})",
        "note": ", ".join(f"{format_ms(shares['wall_ms'])} {side}" for side, shares in sides.items()),
        "sides": list(sides),
        "rows": [
            {
                "name": name,
                "chart": bars(values, tuple(sides), longest),
                "values": [format_ms(ms) for ms in values],
            }
            for name, values in rows
        ],
    }


def _parts(shares: Mapping[str, Any]) -> dict[str, float]:
    found = {_LAYERS: shares["layers_ms"], **{row["op_type"]: row["ms"] for row in shares["others"]}}
    between = shares["wall_ms"] - sum(found.values())
    return {**found, "between operators": between} if between > 0 else found
