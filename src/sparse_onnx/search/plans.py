"""The plans that a search tries, and what each is as pruning modifiers of a recipe.

Two families, each from dense to as sparse as can be: ``allocated`` has the zeros where they buy most for what they
lose (:func:`.frontier.frontier`), ``uniform`` the same share in every layer that is faster with it. What a layer loses
alone tells little of what the model loses with all of them, so both are tried and the trials decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from sparse_onnx.analysis.forecast import Choice, Forecast, Plan
from sparse_onnx.compilation.recipe import Recipe, RecipeStage
from sparse_onnx.passes.base import Pass, Stage
from sparse_onnx.passes.solvers.masks import MaskStructure, resolve_sparsity
from sparse_onnx.search.frontier import Option, frontier
from sparse_onnx.search.strategy import Expected, Goals

__all__ = ["SPARSITIES", "Family", "LossOf", "allocated", "modifiers", "uniform", "with_pruning"]

SPARSITIES = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""The shares of zeros that a layer may get."""

_UNIFORM = tuple(round(0.4 + 0.01 * step, 2) for step in range(56))

LossOf = Callable[[str, Choice], float | None]
"""What a layer, by the name of its weight, loses with a choice, in units that add up over layers; None: it cannot
have that pattern."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Plans in the order of rising speed or smallness, with what is expected of each."""

    name: str
    plans: tuple[Plan, ...]
    expected: tuple[Expected, ...]


def allocated(
    forecast: Forecast, names: Iterable[str], structures: Iterable[str], loss: LossOf, goals: Goals
) -> Family:
    """Zeros in the layers ``names``, in any of the patterns ``structures``, with the least loss for the time that they
    leave; for the size where only that is asked for; for both in equal shares of dense where both are."""
    names = list(names)
    dense_ms = sum(forecast.layer_milliseconds(name) for name in names)
    dense_bytes = sum(forecast.layer_bytes(name) for name in names)
    by_size = goals.nbytes is not None
    by_time = goals.speedup is not None or not by_size

    def cost(name: str, choice: Choice | None) -> float:
        total = 0.0
        if by_time:
            total += forecast.layer_milliseconds(name, choice) / dense_ms
        if by_size:
            total += forecast.layer_bytes(name, choice) / dense_bytes
        return total

    choices = list(_choices(structures))
    options: dict[str, list[Option]] = {}
    for name in names:
        options[name] = [Option(None, cost(name, None), 0.0)]
        for choice in choices:
            lost = loss(name, choice)
            if lost is not None:
                options[name].append(Option(choice, cost(name, choice), lost))
    plans = [
        {name: option.choice for name, option in plan.items() if option.choice is not None}
        for plan in frontier(options)
    ]
    return _family("allocated", plans, forecast, loss)


def _choices(structures: Iterable[str]) -> Iterable[Choice]:
    for structure in structures:
        parsed = MaskStructure.parse(structure)
        if parsed.kind == "n:m":
            yield Choice(resolve_sparsity(None, parsed), structure)
        else:
            yield from (Choice(sparsity, structure) for sparsity in SPARSITIES)


def uniform(forecast: Forecast, names: Iterable[str], loss: LossOf, goals: Goals) -> Family:
    """The same share of unstructured zeros in all of the layers ``names`` that cost less with it."""
    names = list(names)
    plans: list[Plan] = [{}]
    for sparsity in _UNIFORM:
        choice = Choice(sparsity)
        plans.append(
            {
                name: choice
                for name in names
                if forecast.layer_milliseconds(name, choice) < forecast.layer_milliseconds(name)
            }
        )
    return _family("uniform", plans, forecast, loss)


def _family(name: str, plans: Iterable[Plan], forecast: Forecast, loss: LossOf) -> Family:
    """In order, without plans that are no faster and no smaller than the one before."""
    kept: list[Plan] = []
    expected: list[Expected] = []
    for plan in plans:
        outlook = forecast.outlook(plan)
        if not kept or outlook.speedup > expected[-1].speedup or outlook.nbytes < expected[-1].nbytes:
            kept.append(_with_others(plan, forecast))
            lost = math.fsum(loss(layer, choice) or 0.0 for layer, choice in plan.items())
            expected.append(Expected(outlook.speedup, outlook.nbytes, lost))
    return Family(name, tuple(kept), tuple(expected))


def _with_others(plan: Plan, forecast: Forecast) -> Plan:
    """The same for the weights that go along with those of ``plan``."""
    others = {
        other: plan[layer.name] for layer in forecast.layers if layer.name in plan for other in layer.others
    }
    return {**plan, **others}


def modifiers(plan: Plan, template: Pass, sizes: Mapping[str, int]) -> tuple[Pass, ...]:
    """``plan`` as pruning passes with the options of ``template``, whose own share of zeros does not count.

    ``sizes`` are the elements of the weights. Each pattern is asked of the template on its own.
    """
    passes: list[Pass] = []
    for structure in dict.fromkeys(choice.structure for choice in plan.values()):
        shares = {name: choice.sparsity for name, choice in plan.items() if choice.structure == structure}
        passes += template.with_shares(shares, structure, sizes)
    return tuple(passes)


def with_pruning(recipe: Recipe, passes: tuple[Pass, ...]) -> Recipe:
    """``recipe`` with these pruning passes as a stage of its own: before what has to follow them, behind all else."""
    early, late = (
        tuple(
            RecipeStage(stage.name, kept)
            for stage in recipe.stages
            if (kept := tuple(step for step in stage.modifiers if (step.stage > Stage.PRUNE) is follows))
        )
        for follows in (False, True)
    )
    pruning = (RecipeStage("prune", passes),) if passes else ()
    return dataclasses.replace(recipe, stages=(*early, *pruning, *late))
