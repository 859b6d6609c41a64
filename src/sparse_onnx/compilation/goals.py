"""Goals as gates: what a recipe asks of the result as a whole, what was reached, and whether that is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparse_onnx.document import GateRow, GoalDocument, finite
from sparse_onnx.units import format_bytes, parse_size

if TYPE_CHECKING:
    from sparse_onnx.compilation.groups import Goal
    from sparse_onnx.verification.metrics import MetricResult

__all__ = ["Gate", "gates", "goal_document"]


@dataclasses.dataclass(frozen=True)
class Gate:
    """One goal: its ``name`` in the recipe, what was ``asked`` and ``reached`` in the same unit, and that as ``text``.

    ``reached`` is None where nothing was measured, as in a plan, and NaN where that is no number.
    """

    name: str
    asked: float
    reached: float | None
    at_most: bool
    text: str

    @property
    def met(self) -> bool | None:
        """None if it was not measured."""
        if self.reached is None:
            return None
        return self.reached <= self.asked if self.at_most else self.reached >= self.asked

    def to_dict(self) -> GateRow:
        """For JSON, which has no NaN: None there."""
        return {
            "name": self.name,
            "asked": self.asked,
            "reached": finite(self.reached),
            "met": self.met,
            "text": self.text,
        }


def gates(
    goal: Goal,
    *,
    drop: float | None,
    metric: MetricResult | None = None,
    speedup: float | None,
    bytes_before: int,
    bytes_after: int | None,
) -> tuple[Gate, ...]:
    """The gates that ``goal`` asks for.

    Args:
        goal: Of the recipe.
        drop: The quality that was lost: of the ``metric``, or 1 − cosine to the original's outputs.
        metric: Before and after, if the goal names one and it was measured.
        speedup: Time of the original model / time of the result.
        bytes_before: Of the original's files; a ``target_size`` that is a share is a share of these.
        bytes_after: Of the files that were written.
    """
    found = []
    if goal.max_drop is not None:
        if metric is None:
            what = f"{'1 - cosine' if goal.metric is None else f'the drop of {goal.metric}'} is"
        else:
            what = f"{metric.name} went from {metric.before:.5g} to {metric.after:.5g}, a drop of"
        text = f"{what} {_value(drop, '.4f')}, allowed are {goal.max_drop:g}"
        found.append(Gate("max_drop", goal.max_drop, drop, True, text))
    if goal.target_speedup is not None:
        text = f"the speedup is {_value(speedup, '.2f')}, asked for are {goal.target_speedup:g}"
        found.append(Gate("target_speedup", goal.target_speedup, speedup, False, text))
    if goal.target_size is not None:
        allowed = parse_size(goal.target_size, bytes_before)
        text = f"the size is {format_bytes(bytes_after)}, allowed are {format_bytes(allowed)}"
        found.append(Gate("target_size", allowed, bytes_after, True, text))
    return tuple(found)


def goal_document(found: Sequence[Gate]) -> GoalDocument:
    """The ``goal`` of a report: every gate, and ``met``: whether all are; None if one was not measured."""
    results = [gate.met for gate in found]
    met = False if False in results else None if None in results else True
    return {"met": met, "gates": [gate.to_dict() for gate in found]}


def _value(value: float | None, style: str) -> str:
    return "not measured" if value is None else format(value, style)
