"""Two reports side by side: what the second run, B, changed against the first, A, and whether that can be said at all.

Speedups are compared, not milliseconds: each is against the original on the same machine in the same minutes. Where
their 95 % intervals overlap, no difference is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_onnx.document import SPARSE_FORMS
from sparse_onnx.report.view.verdict import Verdict
from sparse_onnx.report.view.words import NOTABLE_LOSS, loss_of
from sparse_onnx.units import format_bytes, format_error, format_ms, format_share

__all__ = ["compare_reports", "comparison_rows", "comparison_verdict"]

_MACHINE = ("cpu", "cores", "isa", "system", "threads")
_SAME_SIZE = 0.01  # relative
_SAME_LOSS = 5e-4  # of 1 - cosine, or of the metric
_SAME_MACHINE = 0.2  # how far the original's own time may differ between the runs, relative

Report = Mapping[str, Any]


def compare_reports(a: Report, b: Report) -> dict[str, Any]:
    """What differs between the contents of two ``report.json``, as one JSON document.

    ``speed``, ``size`` and ``accuracy`` hold the figures of both under ``a`` and ``b``, and ``change``: ``better``,
    ``worse`` or ``same`` for B against A, None where that cannot be told. In ``speed``, ``ratio`` is B's speedup / A's,
    and ``overlap`` says whether their intervals do. ``decisions`` are the layers that ship otherwise; ``only_a`` and
    ``only_b`` name layers that the other has not. ``recipe`` and ``environment`` list keys with other values.
    ``accuracy`` is judged by the ``metric`` if both runs name the same, else by the cosine. ``warnings`` are reasons
    to distrust the comparison.
    """
    environment = _differences(a["environment"], b["environment"])
    layers_a, layers_b = ({row["name"]: row for row in report["layers"]} for report in (a, b))
    return {
        "a": {key: a[key] for key in ("source", "command")},
        "b": {key: b[key] for key in ("source", "command")},
        "warnings": _warnings(a, b, {row["key"].partition(".")[0] for row in environment}),
        "speed": _speed(a, b, comparable=not _elsewhere(a, b)),
        "size": _size(a["summary"], b["summary"]),
        "accuracy": _accuracy(a["summary"], b["summary"]),
        "sparsity": {"a": a["summary"]["sparsity"], "b": b["summary"]["sparsity"]},
        "layers": {"a": _sparse(a), "b": _sparse(b)},
        "goal": {"a": _met(a), "b": _met(b)},
        "decisions": [
            {
                "name": name,
                "module": row["module"],
                "a": row["decision"],
                "b": layers_b[name]["decision"],
                "reason_a": row["reason"],
                "reason_b": layers_b[name]["reason"],
                "close": row["close"] or layers_b[name]["close"],
            }
            for name, row in layers_a.items()
            if name in layers_b and row["decision"] != layers_b[name]["decision"]
        ],
        "only_a": [name for name in layers_a if name not in layers_b],
        "only_b": [name for name in layers_b if name not in layers_a],
        "recipe": _differences(a["recipe"], b["recipe"]),
        "environment": environment,
    }


def _elsewhere(a: Report, b: Report) -> bool:
    """Whether the runs were on other machines, at other thread counts, other shapes or other values of inputs."""
    shapes = [[target["input_shapes"] for target in report["targets"]] for report in (a, b)]
    if shapes[0] != shapes[1] or _steered(a) != _steered(b):
        return True
    return any(a["environment"][key] != b["environment"][key] for key in _MACHINE)


def _steered(report: Report) -> dict[str, Any]:
    """The values that were given for inputs."""
    target = report["recipe"].get("target", {})
    return {**target.get("input_values", {}), **target.get("fixed_inputs", {})}


def _warnings(a: Report, b: Report, differing: set[str]) -> list[str]:
    found = []
    if a["source"] != b["source"] or a["summary"]["bytes_before"] != b["summary"]["bytes_before"]:
        found.append("The runs are of different models.")
    if keys := [key for key in _MACHINE if key in differing]:
        found.append(f"The machines differ ({', '.join(keys)}): speeds do not compare.")
    shapes = [[target["input_shapes"] for target in report["targets"]] for report in (a, b)]
    if all(shapes) and shapes[0] != shapes[1]:
        found.append("The input shapes differ: speeds do not compare.")
    if _steered(a) != _steered(b):
        found.append("Inputs that steer the graph have other values: speeds do not compare.")
    times = [report["summary"]["dense_ms"] for report in (a, b)]
    if all(times) and not keys and shapes[0] == shapes[1] and max(times) > (1 + _SAME_MACHINE) * min(times):
        found.append(
            f"The original itself took {format_ms(times[0])} and {format_ms(times[1])}: "
            "the machine was not equally fast, so milliseconds do not compare."
        )
    versions = [report["environment"]["versions"].get("onnxruntime") for report in (a, b)]
    if versions[0] != versions[1]:
        found.append(f"ONNX Runtime differs: {versions[0] or 'none'} and {versions[1] or 'none'}.")
    inputs = [report["verification"].get("inputs") for report in (a, b)]
    if all(inputs) and inputs[0] != inputs[1]:
        found.append("The outputs were compared on different inputs: accuracies do not compare.")
    return found


def _change(gain: float, tolerance: float) -> str:
    """``gain`` is positive where B is better."""
    return "same" if abs(gain) <= tolerance else "better" if gain > 0 else "worse"


def _speed(a: Report, b: Report, *, comparable: bool) -> dict[str, Any]:
    keys = ("dense_ms", "optimized_ms", "speedup", "speedup_low", "speedup_high")
    first, second = ({key: report["summary"][key] for key in keys} for report in (a, b))
    found: dict[str, Any] = {"a": first, "b": second, "ratio": None, "overlap": None, "change": None}
    if first["speedup"] and second["speedup"] and comparable:
        overlap = (
            first["speedup_low"] <= second["speedup_high"] and second["speedup_low"] <= first["speedup_high"]
        )
        ratio = second["speedup"] / first["speedup"]
        found.update(ratio=ratio, overlap=overlap, change="same" if overlap else _change(ratio - 1, 0.0))
    return found


def _size(a: Report, b: Report) -> dict[str, Any]:
    before, after = a["bytes_after"], b["bytes_after"]
    change = _change(1 - after / before, _SAME_SIZE) if before and after else None
    return {"a": before, "b": after, "change": change}


def _accuracy(a: Report, b: Report) -> dict[str, Any]:
    """By the metric if both runs have the same one, else by the cosine."""
    names = [None if summary["metric"] is None else summary["metric"]["name"] for summary in (a, b)]
    metric = names[0] if names[0] == names[1] else None
    first, second = (
        {
            "cosine": summary["cosine"],
            "relative_error": summary["relative_error"],
            "metric": summary["metric"]["after"] if metric else None,
            "loss": loss_of(summary if metric else {**summary, "metric": None}),
        }
        for summary in (a, b)
    )
    change = None
    if first["loss"] is not None and second["loss"] is not None:
        change = _change(first["loss"] - second["loss"], _SAME_LOSS)
    elif first["loss"] is not None and b["bytes_after"] is not None:
        change = "worse"  # its outputs are no finite numbers
    return {"metric": metric, "a": first, "b": second, "change": change}


def _sparse(report: Report) -> dict[str, int]:
    return {
        "sparse": sum(row["decision"] in SPARSE_FORMS for row in report["layers"]),
        "all": len(report["layers"]),
    }


def _met(report: Report) -> bool | None:
    """Whether the goals were met; None without any."""
    return report["goal"]["met"] if report["goal"]["gates"] else None


def _differences(a: Any, b: Any) -> list[dict[str, Any]]:
    """Paths to values that differ; None where there is none."""
    first, second = _flat(a), _flat(b)
    return [
        {"key": key, "a": first.get(key), "b": second.get(key)}
        for key in dict.fromkeys((*first, *second))
        if first.get(key) != second.get(key)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every value by its path, such as ``stages[0].name``; lists of plain values are one value."""
    if isinstance(value, Mapping):
        parts = [_flat(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        parts = [_flat(item, f"{path}[{index}]") for index, item in enumerate(value)]
    else:
        return {} if value == [] else {path: value}
    return {key: item for part in parts for key, item in part.items()}


# -- in words ----------------------------------------------------------------------------------------------


def comparison_rows(comparison: Report) -> list[tuple[str, ...]]:
    """The figures as text: what, A, B, change."""
    speed, size, accuracy = (comparison[key] for key in ("speed", "size", "accuracy"))
    rows: list[tuple[str, ...]] = [
        ("latency", *(format_ms(speed[side]["optimized_ms"]) for side in "ab"), ""),
        ("speedup", *(_interval(speed[side]) for side in "ab"), _speed_words(speed)),
        (
            "size",
            *(format_bytes(size[side]) for side in "ab"),
            _size_words(size),
        ),
        ("zeros in layers", *(format_share(comparison["sparsity"][side]) for side in "ab"), ""),
        ("layers sparse", *("{sparse} of {all}".format(**comparison["layers"][side]) for side in "ab"), ""),
        (
            "cosine to the original",
            *(
                "-" if accuracy[side]["cosine"] is None else f"{accuracy[side]['cosine']:.5f}"
                for side in "ab"
            ),
            "" if accuracy["metric"] else accuracy["change"] or "",
        ),
        ("relative error", *(format_error(accuracy[side]["relative_error"]) for side in "ab"), ""),
    ]
    if accuracy["metric"] is not None:
        values = (
            "-" if accuracy[side]["metric"] is None else f"{accuracy[side]['metric']:.4g}" for side in "ab"
        )
        rows.append((accuracy["metric"], *values, accuracy["change"] or ""))
    if any(comparison["goal"][side] is not None for side in "ab"):
        words = {None: "-", True: "met", False: "missed"}
        rows.append(("goals", *(words[comparison["goal"][side]] for side in "ab"), ""))
    return rows


def _interval(speed: Report) -> str:
    if speed["speedup"] is None:
        return "-"
    return f"{speed['speedup']:.2f}x ({speed['speedup_low']:.2f}-{speed['speedup_high']:.2f})"


def _speed_words(speed: Report) -> str:
    if speed["ratio"] is None:
        return "speed not comparable"
    if speed["overlap"]:
        return "no difference in speed (intervals overlap)"
    return f"{speed['ratio']:.2f}x faster" if speed["ratio"] > 1 else f"{1 / speed['ratio']:.2f}x slower"


def _size_words(size: Report) -> str:
    before, after = size["a"], size["b"]
    if not before or not after:
        return "size not known"
    if abs(after / before - 1) < 0.005:
        return "same size"
    return f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"


def comparison_verdict(comparison: Report) -> Verdict:
    """B against A in one sentence; good news, bad news, or neither."""
    speed, size, accuracy = (comparison[key] for key in ("speed", "size", "accuracy"))
    parts = (_speed_words(speed), _size_words(size), _accuracy_words(accuracy))
    sentence = f"B against A: {', '.join(parts).replace('x ', '× ')}."
    changes = {part["change"] for part in (speed, size, accuracy)}
    loss = accuracy["b"]["loss"]
    lost = accuracy["change"] == "worse" and (loss is None or loss > NOTABLE_LOSS)
    missed = comparison["goal"]["b"] is False and comparison["goal"]["a"] is not False
    if missed or lost or ("worse" in changes and "better" not in changes):
        kind, word = "bad", "B misses a goal" if missed else "B loses accuracy" if lost else "B is worse"
    elif "worse" in changes:
        kind, word = "check", "Better and worse"
    elif comparison["warnings"] or None in changes:
        kind, word = "check", "Look closer"
    else:
        kind, word = "good", "B is better" if "better" in changes else "No difference"
    return Verdict(kind, word, sentence, tuple(comparison["warnings"]))


def _accuracy_words(accuracy: Report) -> str:
    a, b = accuracy["a"], accuracy["b"]
    if accuracy["change"] is None:
        return "accuracy not known"
    if b["loss"] is None:
        return "outputs that are no longer numbers"
    if accuracy["metric"] is not None:
        return f"{accuracy['metric']} {b['metric']:.4g}, was {a['metric']:.4g}"
    words = {"same": "as near to", "better": "nearer to", "worse": "farther from"}[accuracy["change"]]
    return f"outputs {words} the original's (cosine {b['cosine']:.4f}, was {a['cosine']:.4f})"
