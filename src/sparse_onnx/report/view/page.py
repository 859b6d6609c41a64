"""What the page of a report says, as plain data: sentences, rows and charts. The templates only lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_onnx.report.view.accuracy import accuracy_answer, checks, predictions
from sparse_onnx.report.view.curves import curve_panels
from sparse_onnx.report.view.figures import facts
from sparse_onnx.report.view.layers import (
    columns,
    error_chart,
    forms_of,
    layer_row,
    layer_times,
    layers_answer,
)
from sparse_onnx.report.view.profile import profile_chart
from sparse_onnx.report.view.search import search_chart
from sparse_onnx.report.view.steps import by_reason, stage_rows
from sparse_onnx.report.view.targets import target_rows, targets_answer
from sparse_onnx.report.view.verdict import verdict

__all__ = ["report_view"]


def report_view(report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template of a report shows, but for what it takes from ``report`` itself."""
    bits = {row["name"]: row["bits"] for row in report.get("quantized", ())}
    layers = [layer_row(row, bits) for row in report["layers"]]
    return {
        "verdict": verdict(report),
        "facts": facts(report),
        "checks": checks(report["verification"]),
        "accuracy_answer": accuracy_answer(report["verification"]),
        "predictions": predictions(report),
        "perplexities": any(row["reference_perplexity"] is not None for row in predictions(report)),
        "times": layer_times(layers),
        "errors": error_chart(layers),
        "targets": target_rows(report["targets"]),
        "targets_answer": targets_answer(report["targets"]),
        "profile": profile_chart(report.get("profile")),
        "curves": curve_panels(report.get("curves", []), layers),
        "search": search_chart(report.get("search")),
        "layers": layers,
        "layers_answer": layers_answer(layers),
        "columns": columns(layers),
        "forms": forms_of(layers),
        "declined": by_reason(report["declined"]),
        "stages": stage_rows(report["stages"]),
    }
