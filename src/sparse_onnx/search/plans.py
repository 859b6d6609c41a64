"""The plans that a search tries, and what each is as pruning modifiers of a recipe.

Two families, each from dense to as sparse as can be: ``allocated`` has the zeros where they buy most for what they
lose (:func:`.frontier.frontier`), ``uniform`` the same share in every layer that is faster with it. What a layer loses
alone is a forecast of what the model loses, no more, so both are tried and the trials decide.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from sparse_onnx.passes.base import Pass
from sparse_onnx.passes.magnitude import Magnitude
from sparse_onnx.passes.oneshot import OneShot
from sparse_onnx.search.frontier import Option, Plan, frontier
from sparse_onnx.search.strategy import Forecast, Goals

__all__ = ["SPARSITIES", "Costs", "Family", "Losses", "SparsePlan", "allocated", "modifiers", "uniform"]

SPARSITIES = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""The shares of zeros that a layer may get."""

_STEPS = 56
"""Of the uniform family: sparsities from .4 to .95, one per cent apart."""


SparsePlan = Mapping[str, tuple[str, float]]
"""(structure, sparsity) of the layers that are not dense, by name."""


class Costs(Protocol):
    """What a model costs for any plan, without measuring anew."""

    def milliseconds(self, name: str, structure: str, sparsity: float) -> float:
        """Time of one layer; ``sparsity`` 0: dense."""
        ...

    def nbytes(self, name: str, structure: str, sparsity: float) -> float:
        """Stored bytes of one layer."""
        ...

    def whole(self, plan: SparsePlan) -> tuple[float, float]:
        """(speedup, bytes of the files) of the model with (structure, sparsity) for some layers, the others dense."""
        ...


Losses = Mapping[str, Mapping[tuple[str, float], float]]
"""What each layer loses: by name, then by (structure, sparsity). Losses of different layers add up."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Plans in the order of rising speed and loss, each with its forecast. A plan has the sparse layers alone."""

    name: str
    plans: tuple[SparsePlan, ...]
    forecasts: tuple[Forecast, ...]


def allocated(costs: Costs, losses: Losses, goals: Goals) -> Family:
    """Least loss for the time, for the size where only that is asked for, or for both in equal shares of dense."""
    dense_ms = sum(costs.milliseconds(name, "unstructured", 0.0) for name in losses)
    dense_bytes = sum(costs.nbytes(name, "unstructured", 0.0) for name in losses)
    by_size = goals.nbytes is not None
    by_time = goals.speedup is not None or not by_size

    def cost(name: str, structure: str, sparsity: float) -> float:
        total = 0.0
        if by_time:
            total += costs.milliseconds(name, structure, sparsity) / dense_ms
        if by_size:
            total += costs.nbytes(name, structure, sparsity) / dense_bytes
        return total

    options = {
        name: [
            Option(0.0, "unstructured", cost(name, "unstructured", 0.0), 0.0),
            *(
                Option(sparsity, structure, cost(name, structure, sparsity), loss)
                for (structure, sparsity), loss in table.items()
            ),
        ]
        for name, table in losses.items()
    }
    plans = [_sparse_part(plan) for plan in frontier(options)]
    return _family("allocated", plans, costs, losses)


def uniform(costs: Costs, losses: Losses, goals: Goals) -> Family:
    """The same share of unstructured zeros in all layers that cost less with it."""
    plans: list[dict[str, tuple[str, float]]] = [{}]
    for step in range(_STEPS):
        sparsity = round(0.4 + 0.01 * step, 2)
        plans.append(
            {
                name: ("unstructured", sparsity)
                for name in losses
                if goals.nbytes is not None
                or costs.milliseconds(name, "unstructured", sparsity)
                < costs.milliseconds(name, "unstructured", 0.0)
            }
        )
    return _family("uniform", plans, costs, losses)


def _sparse_part(plan: Plan) -> dict[str, tuple[str, float]]:
    return {name: (option.structure, option.sparsity) for name, option in plan.items() if option.sparsity}


def _family(name: str, plans: Sequence[SparsePlan], costs: Costs, losses: Losses) -> Family:
    """In order, without plans that are no faster and no smaller than the one before."""
    kept: list[SparsePlan] = []
    forecasts: list[Forecast] = []
    for plan in plans:
        speedup, nbytes = costs.whole(plan)
        forecast = Forecast(speedup, nbytes, _loss(plan, losses))
        if not forecasts or speedup > forecasts[-1].speedup or nbytes < forecasts[-1].nbytes:
            kept.append(plan)
            forecasts.append(forecast)
    return Family(name, tuple(kept), tuple(forecasts))


def _loss(plan: SparsePlan, losses: Losses) -> float:
    return sum(_read_off(losses[name], structure, sparsity) for name, (structure, sparsity) in plan.items())


def _read_off(table: Mapping[tuple[str, float], float], structure: str, sparsity: float) -> float:
    """Between the shares that were measured: on a straight line."""
    if (structure, sparsity) in table:
        return table[structure, sparsity]
    points = [(0.0, 0.0), *sorted((s, loss) for (kind, s), loss in table.items() if kind == structure)]
    for (before, low), (after, high) in itertools.pairwise(points):
        if before <= sparsity <= after:
            return low + (high - low) * (sparsity - before) / (after - before)
    return points[-1][1]


def modifiers(plan: SparsePlan, template: Pass, sizes: Mapping[str, int]) -> tuple[Pass, ...]:
    """``plan`` as pruning passes with the options of ``template``, which has none of the shares.

    ``sizes`` are the elements of the weights. A one-shot method prunes all layers of one structure together; by
    magnitude, those of one structure and share.
    """
    passes: list[Pass] = []
    for structure in dict.fromkeys(kind for kind, _ in plan.values()):
        shares = {name: share for name, (kind, share) in plan.items() if kind == structure}
        fixed = ":" in structure and not structure.startswith("block")  # N:M
        if isinstance(template, OneShot):
            total = sum(sizes[name] for name in shares)
            mean = sum(share * sizes[name] for name, share in shares.items()) / total
            passes.append(
                dataclasses.replace(
                    template,
                    mask_structure=structure,
                    targets=tuple(shares),
                    sparsity=None if fixed else mean,
                    sparsities={} if fixed else shares,
                )
            )
            continue
        assert isinstance(template, Magnitude)
        for share in dict.fromkeys(shares.values()):
            passes.append(
                dataclasses.replace(
                    template,
                    mask_structure=structure,
                    targets=tuple(name for name in shares if shares[name] == share),
                    sparsity=None if fixed else share,
                )
            )
    return tuple(passes)
