"""The numbers below the headline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_onnx.report.view.accuracy import predictions
from sparse_onnx.report.view.words import Row, capital
from sparse_onnx.units import format_bytes, format_error, format_ms, format_number, format_share

__all__ = ["facts"]

_FLOAT_BYTES = 4


def _fact(label: str, value: str, note: str = "") -> dict[str, str]:
    unbroken = note.replace("e-", "e\N{NON-BREAKING HYPHEN}")  # a number stays on its line
    return {"label": label, "value": value, "note": unbroken}


def facts(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers below the headline: label, value, and what it is compared with."""
    summary = report["summary"]
    before, after = summary["bytes_before"], summary["bytes_after"]
    found = []
    if summary["optimized_ms"] is not None:
        found.append(
            _fact("Latency", format_ms(summary["optimized_ms"]), f"was {format_ms(summary['dense_ms'])}")
        )
    if after is None:
        found.append(_fact("Size", format_bytes(before), "before"))
    else:
        found.append(_fact("Size", format_bytes(after), f"was {format_bytes(before)}"))
    if summary["cosine"] is not None:
        error = f"relative error {format_error(summary['relative_error'])}"
        found.append(_fact("Cosine to the original", f"{summary['cosine']:.5f}", error))
    if (metric := summary["metric"]) is not None:
        after, before = ("-" if metric[key] is None else f"{metric[key]:.4g}" for key in ("after", "before"))
        found.append(_fact(capital(metric["name"]), after, f"was {before}, on {metric['samples']} samples"))
    found += _prediction_facts(predictions(report))
    found += _bits_facts(report.get("quantized", []))
    share = f"{format_share(summary['sparse_flops_fraction'])} of all work runs sparse"
    found.append(_fact("Zeros in layers", format_share(summary["sparsity"]), share))
    return found


def _bits_facts(quantized: Sequence[Row]) -> list[dict[str, str]]:
    """What this run rounded takes, and took as floats."""
    rounded = [row for row in quantized if row["rounded"] and row["bits"] is not None]
    if not rounded or any(row["bytes"] is None for row in rounded):
        return []
    after = sum(row["bytes"] for row in rounded)
    before = sum(_FLOAT_BYTES * row["elements"] for row in rounded)
    per = f"{8 * after / sum(row['elements'] for row in rounded):.1f} bits a weight"
    return [_fact("Weights in few bits", per, f"{format_bytes(after)}, as float32 {format_bytes(before)}")]


def _prediction_facts(predictions: Sequence[Row]) -> list[dict[str, str]]:
    """Of the output whose predictions changed most."""
    if not predictions:
        return []
    worst = max(
        predictions, key=lambda row: math.inf if row["kl_divergence"] is None else row["kl_divergence"]
    )
    divergence = f"KL divergence {format_number(worst['kl_divergence'])}"
    found = [_fact("Same first choice", format_share(worst["top1_agreement"]), divergence)]
    if worst["reference_perplexity"] is not None:
        after = (
            "infinite" if worst["candidate_perplexity"] is None else f"{worst['candidate_perplexity']:.4g}"
        )
        note = f"was {worst['reference_perplexity']:.4g}, on {worst['tokens']} tokens"
        found.append(_fact("Perplexity", after, note))
    return found
