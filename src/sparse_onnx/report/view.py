"""What the page of a report says, as plain data: sentences, rows and charts. The templates only lay it out."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_onnx.report.charts import (
    Mark,
    Point,
    Rule,
    Series,
    axis_over,
    bars,
    line_chart,
    marker,
)
from sparse_onnx.units import format_bytes, format_error, format_ms, format_number, format_share

__all__ = [
    "NOTABLE_LOSS",
    "Verdict",
    "accuracy_words",
    "loss_of",
    "report_view",
    "size_words",
    "speed_words",
    "verdict",
]

NOTABLE_LOSS, _GRAVE_LOSS = (
    0.02,
    0.2,
)  # of the metric, or 1 - cosine: from here on a reason to look closer, bad news
_SAME = 0.9999
_LAYERS = "all layers"
_DENSE, _SPARSE = "dense", "sparse"
_MAX_BARS = 20
_MAX_PANELS = 6
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


Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The headline: its ``kind`` (good, check or bad: a colour) and the same as a ``word``, one sentence, and notes
    that qualify it."""

    kind: str
    word: str
    sentence: str
    notes: tuple[str, ...] = ()


def report_view(report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template of a report shows, but for what it takes from ``report`` itself."""
    layers = [_layer(row) for row in report["layers"]]
    return {
        "verdict": verdict(report),
        "facts": _facts(report),
        "checks": _checks(report["verification"]),
        "accuracy_answer": _accuracy_answer(report["verification"]),
        "predictions": _predictions(report),
        "perplexities": any(row["reference_perplexity"] is not None for row in _predictions(report)),
        "times": _times(layers),
        "errors": _error_chart(layers),
        "targets": _targets(report["targets"]),
        "targets_answer": _targets_answer(report["targets"]),
        "profile": _profile(report.get("profile")),
        "curves": _curves(report.get("curves", []), layers),
        "search": _search(report.get("search")),
        "layers": layers,
        "layers_answer": _layers_answer(layers),
        "columns": _columns(layers),
        "forms": _forms(layers),
        "declined": _by_reason(report["declined"]),
        "stages": _stages(report["stages"]),
    }


# -- verdict -----------------------------------------------------------------------------------------------


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The report in one sentence: speed with its interval, size, accuracy; and how that is to be taken."""
    summary, goal, layers = report["summary"], report["goal"], report["layers"]
    name = report["source"]
    lowered = any(row["decision"] != _DENSE for row in layers)
    if summary["bytes_after"] is None:
        sentence = f"A plan for {name}: {_form_words(layers, 'would become')}."
        return Verdict(
            "check", "Plan only", sentence, ("Decided by a table; nothing was run, timed or written.",)
        )
    rounded = _only_rounded(report["verification"])
    outputs = "its outputs are the original's but for rounding" if rounded else accuracy_words(summary)
    written = summary.get("written", "compiled" if lowered else "original")
    timed = summary["speedup"] is not None
    if written == "compiled" and not timed and not lowered:
        sentence = f"{name} is now {size_words(summary)}, its speed not measured; {outputs}."
    elif written == "compiled" and (_proven(summary) or not timed):
        sentence = f"{name} is now {speed_words(summary)} and {size_words(summary)}; {outputs}."
    elif written == "compiled":
        sentence = f"{name} is {speed_words(summary)}; it is now {size_words(summary)}; {outputs}."
    elif written == "pruned":
        sentence = (
            f"Nothing in {name} is faster in sparse form; the pruned model was written, dense; {outputs}."
        )
    else:
        sentence = f"Nothing in {name} is faster in sparse form, so the dense model was written; {outputs}."
    missed = [gate["text"] for gate in goal["gates"] if gate["met"] is False]
    if goal["met"] is False:
        why = f"{_capital('; '.join(missed))}."
        return Verdict("bad", "Goal not met", sentence, (why, "This is the best so far."))
    loss = 0.0 if rounded else loss_of(summary)
    if loss is None:
        why = "NaN or Inf stand where the original has numbers."
        return Verdict("bad", "Broken outputs", sentence, (why,))
    if any(gate["name"] == "max_drop" for gate in goal["gates"]):
        loss = 0.0  # what is lost is allowed
    notes = []
    if loss > NOTABLE_LOSS:
        notes.append("Speed is no use if the answers are wrong: check the accuracy on your task.")
    if report["verification"]["inputs"] == "generated" and not _unchanged(report["verification"]):
        notes.append("The outputs were compared on generated inputs; real ones would tell more.")
    if loss > _GRAVE_LOSS:
        return Verdict("bad", "Accuracy lost", sentence, tuple(notes))
    if written == "compiled" and not timed:
        notes.append("Decided by a table, not by timing on this machine.")
    elif written == "compiled" and not _proven(summary):
        noise = "The 95 % interval includes 1.00×: the gain in speed is within the noise."
        notes.append(noise if summary["speedup_high"] >= 1 else "The original is faster.")
    if any(target["quiet"] is False for target in report["targets"]):
        notes.append("Other programs were running while it was timed.")
    if not lowered:
        notes.append("Why each layer stayed dense is in the table of layers.")
    if notes:
        return Verdict("check", "Look closer", sentence, tuple(notes))
    return Verdict("good", "Goal met" if goal["gates"] else "Good", sentence)


def speed_words(summary: Mapping[str, Any]) -> str:
    """How much faster the whole is, with its interval; or that this is not proven."""
    if summary["speedup"] is None:
        return "sparse, its speed not measured"
    speedup, low, high = (summary[key] for key in ("speedup", "speedup_low", "speedup_high"))
    times = f"{speedup:.2f}× ({low:.2f} to {high:.2f})"
    if _proven(summary):
        return f"{speedup:.2f}× faster ({low:.2f} to {high:.2f})"
    return f"slower, {times}" if high < 1 else f"not proven faster, {times}"


def _proven(summary: Mapping[str, Any]) -> bool:
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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- figures -----------------------------------------------------------------------------------------------


def _fact(label: str, value: str, note: str = "") -> dict[str, str]:
    unbroken = note.replace("e-", "e\N{NON-BREAKING HYPHEN}")  # a number stays on its line
    return {"label": label, "value": value, "note": unbroken}


def _facts(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers below the headline: label, value, and what it is compared with."""
    summary = report["summary"]
    before, after = summary["bytes_before"], summary["bytes_after"]
    facts = []
    if summary["optimized_ms"] is not None:
        facts.append(
            _fact("Latency", format_ms(summary["optimized_ms"]), f"was {format_ms(summary['dense_ms'])}")
        )
    if after is None:
        facts.append(_fact("Size", format_bytes(before), "before"))
    else:
        facts.append(_fact("Size", format_bytes(after), f"was {format_bytes(before)}"))
    if summary["cosine"] is not None:
        error = f"relative error {format_error(summary['relative_error'])}"
        facts.append(_fact("Cosine to the original", f"{summary['cosine']:.5f}", error))
    if (metric := summary["metric"]) is not None:
        after, before = ("-" if metric[key] is None else f"{metric[key]:.4g}" for key in ("after", "before"))
        facts.append(_fact(_capital(metric["name"]), after, f"was {before}, on {metric['samples']} samples"))
    facts += _prediction_facts(_predictions(report))
    share = f"{format_share(summary['sparse_flops_fraction'])} of all work runs sparse"
    facts.append(_fact("Zeros in layers", format_share(summary["sparsity"]), share))
    return facts


def _predictions(report: Mapping[str, Any]) -> list[Row]:
    """How the result's predictions differ from the original's, by output."""
    found: list[Row] = report["verification"].get("against_original", {}).get("predictions", [])
    return found


def _prediction_facts(predictions: Sequence[Row]) -> list[dict[str, str]]:
    """Of the output whose predictions changed most."""
    if not predictions:
        return []
    worst = max(
        predictions, key=lambda row: math.inf if row["kl_divergence"] is None else row["kl_divergence"]
    )
    divergence = f"KL divergence {format_number(worst['kl_divergence'])}"
    facts = [_fact("Same first choice", format_share(worst["top1_agreement"]), divergence)]
    if worst["reference_perplexity"] is not None:
        after = (
            "infinite" if worst["candidate_perplexity"] is None else f"{worst['candidate_perplexity']:.4g}"
        )
        note = f"was {worst['reference_perplexity']:.4g}, on {worst['tokens']} tokens"
        facts.append(_fact("Perplexity", after, note))
    return facts


def _checks(verification: Mapping[str, Any]) -> list[Row]:
    names = {
        "against_original": ("Result against the original", "the loss from compression"),
        "against_pruned_dense": ("Result against the pruned dense model", "the compiler alone"),
        "without_library": ("The same on standard operators only", "the compiler alone"),
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


def _unchanged(verification: Mapping[str, Any]) -> bool:
    """Whether the result is no farther from the original than the compiler's own error explains."""
    loss = verification["against_original"]["relative_error"]
    compiler = _compiler_error(verification)
    return math.isinf(compiler) if loss is None else loss <= 2 * compiler


def _only_rounded(verification: Mapping[str, Any]) -> bool:
    """Whether outputs differ by more than they should, but by what rounding explains and by nothing else."""
    return "rounding" in verification and _unchanged(verification)


def _accuracy_answer(verification: Mapping[str, Any]) -> str:
    if not verification:
        return "Not verified: nothing was run"
    compiler = _compiler_error(verification)
    loss = verification["against_original"]["relative_error"]
    exact = "Compiling changed the outputs by "
    exact += "more than they are" if math.isinf(compiler) else format_error(compiler)
    if "rounding" in verification:
        exact += ", which rounding explains"
    if _unchanged(verification):
        return f"{exact}; nothing else changed them"
    return f"{exact}, compression by {'an amount that is no number' if loss is None else format_error(loss)}"


# -- layers ------------------------------------------------------------------------------------------------


def _layer(row: Row) -> Row:
    low, high = row["speedup_low"], row["speedup_high"]
    title = row["module"] or row["name"]
    return {
        **row,
        "title": title,
        "subtitle": "" if row["name"] in (title, f"{title}.weight") else row["name"],
        "dimensions": " × ".join(str(size) for size in row["shape"]),
        "size": math.prod(row["shape"]),
        "speedup": "-" if low is None or high is None else f"{low:.2f}–{high:.2f}×",
        "dense_ms": row["times"].get(_DENSE),
        "ships_ms": row["times"].get(row["decision"]),
    }


def _columns(layers: Sequence[Row]) -> dict[str, bool]:
    """Which columns of the table of layers say anything."""
    shown = {
        key: any(row[key] is not None for row in layers) for key in ("output_error", "output_error_held_out")
    }
    timed = any(row["times"] for row in layers)
    changed = any(row["relative_error"] != 0 for row in layers)
    patterns = len({row["mask_structure"] for row in layers}) > 1
    return {**shown, "times": timed, "relative_error": changed, "mask_structure": patterns}


def _forms(layers: Sequence[Row]) -> list[str]:
    """The forms that any layer was timed in, dense first."""
    others = dict.fromkeys(form for row in layers for form in row["times"] if form != _DENSE)
    return [_DENSE, *others]


def _form_words(layers: Sequence[Row], verb: str) -> str:
    """How many layers have which form but dense, such as "2 of 4 layers run sparse"."""
    counts = Counter(row["decision"] for row in layers if row["decision"] != _DENSE) or {_SPARSE: 0}
    (form, first), *others = counts.items()
    more = "".join(f", {count} {other}" for other, count in others)
    return f"{first} of {len(layers)} {'layer' if len(layers) == 1 else 'layers'} {verb} {form}{more}"


def _layers_answer(layers: Sequence[Row]) -> str:
    if not layers:
        return "There is no layer that a sparse kernel could take"
    return _form_words(layers, "runs" if len(layers) == 1 else "run")


def _top(rows: Sequence[Row], key: str) -> tuple[list[Row], list[Row]]:
    """The rows with the largest ``key``, at most 20, and the others; one row alone is no "others"."""
    ordered = sorted(rows, key=lambda row: -row[key])
    cut = _MAX_BARS if len(ordered) > _MAX_BARS + 1 else len(ordered)
    return ordered[:cut], ordered[cut:]


def _times(layers: Sequence[Row]) -> dict[str, Any]:
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


def _error_chart(layers: Sequence[Row]) -> dict[str, Any]:
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


def _targets(targets: Sequence[Row]) -> list[Row]:
    """A row for each set of input shapes; none if there is only one, which the figures above are of."""
    if len(targets) < 2:
        return []
    return [
        {
            **target,
            "name": ", ".join(f"{name} {shape}" for name, shape in target["input_shapes"].items()),
            "interval": "-"
            if target["speedup"] is None
            else f"{target['speedup']:.2f}× ({target['speedup_low']:.2f} to {target['speedup_high']:.2f})",
        }
        for target in targets
    ]


def _targets_answer(targets: Sequence[Row]) -> str:
    speedups = [target["speedup"] for target in targets if target["speedup"] is not None]
    if not speedups:
        return f"{len(targets)} input shapes were decided for"
    return f"{min(speedups):.2f}× to {max(speedups):.2f}× the speed at {len(targets)} input shapes"


# -- optional charts ---------------------------------------------------------------------------------------


def _profile(profile: Mapping[str, Any] | None) -> dict[str, Any] | None:
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
    shown, others = names[:_MAX_BARS], names[_MAX_BARS:]
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


def _curves(curves: Sequence[Row], layers: Sequence[Row]) -> dict[str, Any] | None:
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
    """Each with the name of its line: the pattern, with the form before it where there are several."""
    several = len({curve["form"] for curve in curves}) > 1
    return [
        {
            **curve,
            "series": f"{curve['form']}, {curve['mask_structure']}" if several else curve["mask_structure"],
        }
        for curve in curves
    ]


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


def _search(search: Mapping[str, Any] | None) -> dict[str, Any] | None:
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


# -- the rest ----------------------------------------------------------------------------------------------


def _by_reason(declined: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Places left alone, gathered by (pass, reason), the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for place in declined:
        groups.setdefault((place["pass_name"], place["reason"]), []).append(place["place"])
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [{"pass_name": name, "reason": reason, "places": places} for (name, reason), places in ordered]


def _stages(stages: Sequence[Row]) -> dict[str, Any]:
    seconds = sum(stage["seconds"] for stage in stages)
    memory = max((stage["peak_rss_mb"] for stage in stages), default=0)
    longest = max((stage["seconds"] for stage in stages), default=0.0)
    return {
        "answer": f"Compiling took {seconds:.1f} s and at most {memory} MiB of memory",
        "rows": [{**stage, "chart": bars((stage["seconds"],), ("after",), longest)} for stage in stages],
    }
