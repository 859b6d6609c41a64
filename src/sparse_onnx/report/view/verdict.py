"""The headline of a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparse_onnx.report.view.accuracy import only_rounded, unchanged
from sparse_onnx.report.view.words import (
    DENSE,
    NOTABLE_LOSS,
    accuracy_words,
    bits_words,
    capital,
    form_words,
    loss_of,
    proven,
    size_words,
    speed_words,
)

__all__ = ["Verdict", "verdict"]

_GRAVE_LOSS = 0.2  # of the metric, or 1 - cosine: bad news


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The headline: its ``kind`` (good, check or bad: a colour) and the same as a ``word``, one sentence, and notes
    that qualify it."""

    kind: str
    word: str
    sentence: str
    notes: tuple[str, ...] = ()


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The report in one sentence: speed with its interval, size, accuracy; and how that is to be taken."""
    summary, goal, layers = report["summary"], report["goal"], report["layers"]
    name = report["source"]
    lowered = any(row["decision"] != DENSE for row in layers)
    if summary["bytes_after"] is None:
        sentence = f"A plan for {name}: {form_words(layers, 'would become')}."
        return Verdict(
            "check", "Plan only", sentence, ("Decided by a table; nothing was run, timed or written.",)
        )
    rounded = only_rounded(report["verification"])
    outputs = "its outputs are the original's but for rounding" if rounded else accuracy_words(summary)
    written = summary.get("written", "compiled" if lowered else "original")
    bits = bits_words(report.get("quantized", []))
    if bits and written == "compiled":
        name = f"{name}, with {bits},"
    timed = summary["speedup"] is not None
    if written == "compiled" and not timed and not lowered:
        sentence = f"{name} is now {size_words(summary)}, its speed not measured; {outputs}."
    elif written == "compiled" and (proven(summary) or not timed):
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
        why = f"{capital('; '.join(missed))}."
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
    if report["verification"]["inputs"] == "generated" and not unchanged(report["verification"]):
        notes.append("The outputs were compared on generated inputs; real ones would tell more.")
    if loss > _GRAVE_LOSS:
        return Verdict("bad", "Accuracy lost", sentence, tuple(notes))
    if written == "compiled" and not timed:
        notes.append("Decided by a table, not by timing on this machine.")
    elif written == "compiled" and not proven(summary):
        noise = "The 95 % interval includes 1.00×: the gain in speed is within the noise."
        notes.append(noise if summary["speedup_high"] >= 1 else "The original is faster.")
    if any(target["quiet"] is False for target in report["targets"]):
        notes.append("Other programs were running while it was timed.")
    if not lowered:
        notes.append("Why each layer stayed dense is in the table of layers.")
    if notes:
        return Verdict("check", "Look closer", sentence, tuple(notes))
    return Verdict("good", "Goal met" if goal["gates"] else "Good", sentence)
