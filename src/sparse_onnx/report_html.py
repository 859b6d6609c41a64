"""The report as one HTML file that needs nothing else: no network, no other file, no script to be read.

What is shown is prepared here as plain data; ``report.html.j2`` only lays it out. All text comes from a model
file, so the template escapes everything, and a content policy in the page forbids any outside resource.
"""

from __future__ import annotations

import dataclasses
import math
from importlib import resources
from pathlib import Path
from typing import Any

from sparse_onnx.units import format_bytes, format_ms, format_number, format_share

__all__ = ["render_html", "write_html"]

_MAX_BARS = 60
_ERRORS = ("output_error", "output_error_held_out")
_SIMILAR = 0.98
"""Below this cosine to the original's outputs the page warns, and its headline is no good news."""


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write ``report`` (the content of ``report.json``) as a page to ``path``, in UTF-8."""
    path.write_text(render_html(report), encoding="utf-8")


def render_html(report: dict[str, Any]) -> str:
    """The page for ``report``, the content of ``report.json``. Values that were not measured may be None."""
    import jinja2

    template = resources.files("sparse_onnx").joinpath("report.html.j2").read_text(encoding="utf-8")
    engine = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters.update(bytes=format_bytes, ms=format_ms, number=format_number, share=format_share)
    return engine.from_string(template).render(
        report=report,
        verdict=_verdict(report),
        facts=_facts(report),
        checks=_checks(report),
        predictions=_predictions(report),
        layers=[_layer(row) for row in report["layers"]],
        with_errors=any(row.get(key) is not None for row in report["layers"] for key in _ERRORS),
        bars=_bars(report["layers"]),
        declined=_by_reason(report["declined"]),
        stages=_stages(report["stages"]),
    )


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """The headline, a sentence below it, and its kind (good, plain or bad), which is its colour."""

    kind: str
    title: str
    detail: str
    warning: str = ""


def _verdict(report: dict[str, Any]) -> _Verdict:
    summary, goal, layers = report["summary"], report["goal"], report["layers"]
    sparse = f"{sum(row['decision'] == 'sparse' for row in layers)} of {len(layers)} layers sparse"
    speedup, low = summary["speedup"], summary["speedup_low"]
    if summary["bytes_after"] is None:
        return _Verdict("plain", "Plan only: nothing was written", f"{sparse} by a table; nothing was timed")
    if not goal["met"]:
        detail = f"1 − cosine is {_drop(goal['drop'])}, the goal allows {goal['max_drop']}; this is the best so far"
        return _Verdict("bad", "Goal not met", detail)
    if sparse.startswith("0 "):
        detail = "The dense model was written. Why each layer stayed dense is in the table below."
        return _Verdict("plain", "Nothing was faster in sparse form", detail)
    warning = ""
    cosine = summary["cosine"]
    if cosine is None or cosine < _SIMILAR:
        far = "not a number" if cosine is None else f"{cosine:.3f}"
        warning = f"The outputs are no longer the original's (cosine {far}): check the accuracy on your task."
    if speedup is None:
        return _Verdict("plain", "Written, but not timed", f"{sparse} by a table, not by timing", warning)
    detail = f"middle half of the rounds: {low:.2f}× to {summary['speedup_high']:.2f}×, with {sparse}"
    if low < 1:
        return _Verdict("plain", f"{speedup:.2f}× the speed, within the noise", detail, warning)
    return _Verdict("plain" if warning else "good", f"{speedup:.2f}× faster", detail, warning)


def _drop(drop: float | None) -> str:
    return "not a number" if drop is None else f"{drop:.4f}"


def _facts(report: dict[str, Any]) -> list[dict[str, str]]:
    """The numbers below the headline: label, value, and what it is compared with."""
    summary = report["summary"]
    before, after = summary["bytes_before"], summary["bytes_after"]
    facts = []
    if summary["optimized_ms"] is not None:
        facts.append(
            {
                "label": "Latency",
                "value": format_ms(summary["optimized_ms"]),
                "note": f"was {format_ms(summary['dense_ms'])}",
            }
        )
    size = format_bytes(before if after is None else after)
    note = (
        "before"
        if after is None
        else f"was {format_bytes(before)}, {before / after:.2f}× smaller"
        if after
        else ""
    )
    facts.append({"label": "Size", "value": size, "note": note})
    if summary["cosine"] is not None:
        error = f"relative error {format_number(summary['relative_error'])}"
        facts.append({"label": "Cosine to the original", "value": f"{summary['cosine']:.5f}", "note": error})
    facts += _prediction_facts(_predictions(report))
    share = f"{format_share(summary['sparse_flops_fraction'])} of the linears' work runs sparse"
    facts.append({"label": "Zeros in linears", "value": format_share(summary["sparsity"]), "note": share})
    return facts


def _predictions(report: dict[str, Any]) -> list[dict[str, Any]]:
    """How the result's predictions differ from the original's, by output."""
    found: list[dict[str, Any]] = report["verification"].get("against_original", {}).get("predictions", [])
    return found


def _prediction_facts(predictions: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Of the output whose predictions changed most."""
    if not predictions:
        return []
    worst = max(
        predictions, key=lambda row: math.inf if row["kl_divergence"] is None else row["kl_divergence"]
    )
    agreement = {
        "label": "Same first choice as the original",
        "value": format_share(worst["top1_agreement"]),
        "note": f"KL divergence {format_number(worst['kl_divergence'])}",
    }
    if worst["reference_perplexity"] is None:
        return [agreement]
    after = "infinite" if worst["candidate_perplexity"] is None else f"{worst['candidate_perplexity']:.4g}"
    note = f"was {worst['reference_perplexity']:.4g}, on {worst['tokens']} tokens"
    return [agreement, {"label": "Perplexity", "value": after, "note": note}]


def _checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    verification = report["verification"]
    if not verification:
        return []
    names = {
        "against_pruned_dense": ("Compiled against pruned dense, with the library", "the compiler alone"),
        "without_library": ("Compiled against pruned dense, standard operators", "the compiler alone"),
        "against_original": ("Result against the original", "the loss from pruning included"),
    }
    return [{"name": name, "meaning": meaning, **verification[key]} for key, (name, meaning) in names.items()]


def _layer(row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["speedup_low"], row["speedup_high"]
    title = row["module"] or row["name"]
    return {
        **dict.fromkeys(_ERRORS),
        **row,
        "title": title,
        "subtitle": "" if row["name"] in (title, f"{title}.weight") else row["name"],
        "dimensions": " × ".join(str(size) for size in row["shape"]),
        "size": row["shape"][0] * row["shape"][1],
        "speedup": "-" if low is None or high is None else f"{low:.2f}–{high:.2f}×",
    }


def _bars(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Times as widths in percent of the longest; the layers with the most dense time, in the model's order."""
    timed = [row for row in rows if row["dense_ms"] is not None and row["sparse_ms"] is not None]
    chosen = {id(row) for row in sorted(timed, key=lambda row: -row["dense_ms"])[:_MAX_BARS]}
    longest = max((max(row["dense_ms"], row["sparse_ms"]) for row in timed), default=0) or 1
    return {
        "left_out": len(timed) - len(chosen),
        "rows": [
            {
                "name": row["module"] or row["name"],
                "decision": row["decision"],
                "dense_ms": row["dense_ms"],
                "sparse_ms": row["sparse_ms"],
                "dense_width": f"{100 * row['dense_ms'] / longest:.2f}%",
                "sparse_width": f"{100 * row['sparse_ms'] / longest:.2f}%",
            }
            for row in timed
            if id(row) in chosen
        ],
    }


def _by_reason(declined: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Places left alone, gathered by (pass, reason), the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for place in declined:
        groups.setdefault((place["pass_name"], place["reason"]), []).append(place["place"])
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [{"pass_name": name, "reason": reason, "places": places} for (name, reason), places in ordered]


def _stages(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((stage["seconds"] for stage in stages), default=0) or 1
    return [{**stage, "width": f"{100 * stage['seconds'] / longest:.2f}%"} for stage in stages]
