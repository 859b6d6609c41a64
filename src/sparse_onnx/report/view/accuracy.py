"""How far the outputs are from what they were, and by whose doing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparse_onnx.report.view.words import Row
from sparse_onnx.units import format_error

__all__ = ["accuracy_answer", "checks", "only_rounded", "predictions", "unchanged"]


def predictions(report: Mapping[str, Any]) -> list[Row]:
    """How the result's predictions differ from the original's, by output."""
    found: list[Row] = report["verification"].get("against_original", {}).get("predictions", [])
    return found


def checks(verification: Mapping[str, Any]) -> list[Row]:
    """The comparisons that were made, each with what it shows."""
    names = {
        "against_original": ("Result against the original", "the loss from compression"),
        "against_pruned_dense": ("Result against the pruned dense model", "the compiler alone"),
        "without_library": ("The same on standard operators only", "the compiler alone"),
        "rounded_activations": (
            "Result against itself with activations in floats",
            "the loss from rounding them",
        ),
    }
    return [
        {"name": name, "meaning": meaning, **verification[key]}
        for key, (name, meaning) in names.items()
        if key in verification
    ]


def _compiler_error(verification: Mapping[str, Any]) -> float:
    """The larger relative error of the two ways to run the result, against the pruned dense model."""
    found = (verification[key]["relative_error"] for key in ("against_pruned_dense", "without_library"))
    return max(math.inf if error is None else float(error) for error in found)


def unchanged(verification: Mapping[str, Any]) -> bool:
    """Whether the result is no farther from the original than the compiler's own error explains."""
    loss = verification["against_original"]["relative_error"]
    compiler = _compiler_error(verification)
    return math.isinf(compiler) if loss is None else loss <= 2 * compiler


def only_rounded(verification: Mapping[str, Any]) -> bool:
    """Whether outputs differ by more than they should, but by what rounding explains and by nothing else."""
    return "rounding" in verification and unchanged(verification)


def accuracy_answer(verification: Mapping[str, Any]) -> str:
    """The heading: what compiling changed, and what compression did."""
    if not verification:
        return "Not verified: nothing was run"
    compiler = _compiler_error(verification)
    loss = verification["against_original"]["relative_error"]
    exact = "Compiling changed the outputs by "
    exact += "more than they are" if math.isinf(compiler) else format_error(compiler)
    if "rounding" in verification:
        exact += ", which rounding explains"
    if unchanged(verification):
        return f"{exact}; nothing else changed them"
    return f"{exact}, compression by {'an amount that is no number' if loss is None else format_error(loss)}"
