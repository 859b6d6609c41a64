"""What is said of a result in several sections of its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "DENSE",
    "NOTABLE_LOSS",
    "Row",
    "accuracy_words",
    "bits_words",
    "capital",
    "form_words",
    "loss_of",
    "proven",
    "size_words",
    "speed_words",
]

Row = dict[str, Any]

NOTABLE_LOSS = 0.02
"""Of the metric, or 1 - cosine: from here on a reason to look closer."""

DENSE, _SPARSE = "dense", "sparse"  # as a report names these forms
_SAME = 0.9999


def speed_words(summary: Mapping[str, Any]) -> str:
    """How much faster the whole is, with its interval; or that this is not proven."""
    if summary["speedup"] is None:
        return "sparse, its speed not measured"
    speedup, low, high = (summary[key] for key in ("speedup", "speedup_low", "speedup_high"))
    times = f"{speedup:.2f}× ({low:.2f} to {high:.2f})"
    if proven(summary):
        return f"{speedup:.2f}× faster ({low:.2f} to {high:.2f})"
    return f"slower, {times}" if high < 1 else f"not proven faster, {times}"


def proven(summary: Mapping[str, Any]) -> bool:
    """Whether the interval of the speedup lies above 1."""
    return summary["speedup"] is not None and summary["speedup_low"] > 1


def size_words(summary: Mapping[str, Any]) -> str:
    """How much smaller the whole is."""
    before, after = summary["bytes_before"], summary["bytes_after"]
    if not before or not after or abs(before / after - 1) < 0.005:
        return "of the same size"
    return f"{before / after:.2f}× smaller" if after < before else f"{after / before:.2f}× larger"


def accuracy_words(summary: Mapping[str, Any]) -> str:
    """How good the outputs are still: by the metric if there is one, else by how near they are to the original's."""
    cosine, metric, loss = summary["cosine"], summary["metric"], loss_of(summary)
    if loss is None:
        return "its outputs are no longer numbers"
    if metric is not None:
        return f"its {metric['name']} is {metric['after']:.4g}, was {metric['before']:.4g}"
    if cosine >= _SAME:
        return f"its outputs are the original's (cosine {cosine:.4f})"
    near = "are no longer" if loss > NOTABLE_LOSS else "stay close to"
    return f"its outputs {near} the original's (cosine {cosine:.3f})"


def loss_of(summary: Mapping[str, Any]) -> float | None:
    """What the metric lost, without one 1 - cosine; None where that is no number."""
    if summary["metric"] is not None:
        values = [summary["metric"][key] for key in ("before", "after", "drop")]
        return None if None in values else float(values[-1])
    return None if summary["cosine"] is None else round(1 - float(summary["cosine"]), 9)


def bits_words(quantized: Sequence[Row]) -> str:
    """What this run stored in few bits, such as "36 weights in 4 bits, 1 table in 8 bits"; empty if nothing."""
    counts = Counter(
        (row["bits"], "weight" if row["op_type"] else "table")
        for row in quantized
        if row["rounded"] and row["bits"] is not None
    )
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{count} {what if count == 1 else f'{what}s'} in {bits} bits" for (bits, what), count in ordered
    )


def form_words(layers: Sequence[Row], verb: str) -> str:
    """How many layers have which form but dense, such as "2 of 4 layers run sparse"."""
    counts = Counter(row["decision"] for row in layers if row["decision"] != DENSE) or {_SPARSE: 0}
    (form, first), *others = counts.items()
    more = "".join(f", {count} {other}" for other, count in others)
    return f"{first} of {len(layers)} {'layer' if len(layers) == 1 else 'layers'} {verb} {form}{more}"


def capital(text: str) -> str:
    """``text`` as the beginning of a sentence; the rest of its letters stay."""
    return text[:1].upper() + text[1:]
