"""What a report has to say of how the model was read and run, where that is out of the ordinary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_onnx.model.check import MIN_OPSET
from sparse_onnx.model.quantized_weights import describe
from sparse_onnx.verification.likeness import UNLIKE

__all__ = ["run_notes"]


_WRITTEN = ("with_library", "without_library")
"""How the model that was written was run."""


def run_notes(report: Mapping[str, Any]) -> list[str]:
    """Sentences for a reader of ``report``, the content of ``report.json``."""
    notes = []
    if (opset := report.get("converted_from_opset")) is not None:
        notes.append(
            f"The model's file is of opset {opset}: it was converted to {MIN_OPSET} inside, and so is the result."
        )
    if rows := [row for row in report.get("quantized", ()) if not row["rounded"]]:
        size = sum(row["elements"] for row in rows)
        zeros = sum(row["sparsity"] * row["elements"] for row in rows)
        pruned = sum(row["pruned"] for row in rows)
        notes.append(f"{describe([row['bits'] for row in rows], zeros / size, pruned)}.")
    verification = report["verification"]
    if others := verification.get("left_out"):
        listed = ", ".join(f"{name} ({kind})" for name, kind in others.items())
        notes.append(f"Outputs that are no tensors were not compared: {listed}.")
    levels = verification.get("optimization_levels", {})
    if any(levels.get(way, "all") != "all" for way in _WRITTEN):  # others nobody else runs like this
        low = ", ".join(
            f"{way.replace('_', ' ')}: {level}" for way, level in levels.items() if level != "all"
        )
        notes.append(
            "ONNX Runtime's own optimizations break this model, so it ran with fewer "
            f"(graph_optimization_level; {low}). Run it so, too."
        )
    if (found := verification.get("unlikeness")) is not None and found >= UNLIKE:
        notes.append(
            f"The data that the result was measured on looks unlike the calibration data ({found:.2f}; alike is 1.0, "
            f"unlike from {UNLIKE:g} on)."
        )
    return notes
