"""Which zeros buy most: the plans that lose least for what they cost, from dense to as sparse as can be.

Every layer has *options*: a way to store it, with what it costs (time, bytes) and what it loses. Losses and costs add
up over layers. Going through the steps between neighbouring options of all layers in the order of loss per cost saved
gives, at every point, the least loss for its cost among the lower convex hulls of the layers: the solutions of
min Σ loss + λ · cost for all λ (Everett 1963, generalized Lagrange multipliers).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Option", "frontier", "lower_hull", "pareto"]


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to store a layer; ``choice`` names it for the caller. ``cost`` and ``loss`` are finite, smaller is
    better."""

    choice: Any
    cost: float
    loss: float


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of (cost, loss), from the most to the least costly, the loss rising."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.cost, o.loss)):
        if hull and option.cost == hull[-1].cost:
            continue
        while hull and option.loss <= hull[-1].loss:
            hull.pop()  # costs less and loses no more
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    """Loss for each unit of cost saved."""
    return (second.loss - first.loss) / (first.cost - second.cost)


def frontier(layers: Mapping[str, Sequence[Option]]) -> list[dict[str, Option]]:
    """Plans from the one of least loss to the one of least cost, each with one layer changed from the one before.

    A layer's options must not be empty. Equal slopes go in the order of ``layers``.
    """
    hulls = {name: lower_hull(options) for name, options in layers.items()}
    steps = sorted(
        (
            (_slope(before, after), order, position, name, after)
            for order, (name, hull) in enumerate(hulls.items())
            for position, (before, after) in enumerate(itertools.pairwise(hull))
        ),
        key=lambda step: step[:3],
    )
    plan = {name: hull[0] for name, hull in hulls.items()}
    plans = [plan]
    for *_, name, option in steps:
        plan = {**plan, name: option}
        plans.append(plan)
    return plans


def pareto(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other one beats: at least as large in every coordinate and larger in one.

    Of equal points all are kept.
    """
    return [
        index
        for index, point in enumerate(points)
        if not any(
            other != point and all(b >= a for a, b in zip(point, other, strict=True)) for other in points
        )
    ]
