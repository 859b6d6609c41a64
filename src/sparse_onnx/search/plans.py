"""The plans that a search tries.

Families of plans, each from dense to as fast or small as can be: ``allocated`` has zeros and bits where they buy most
for what they lose (:func:`.frontier.frontier`); ``int8`` and ``int4`` the same with these bits alone, so that the
layers that lose most stay float32 longest, and all have them in the end; ``uniform`` the same share of zeros in every
layer that is faster with it. What a layer loses alone tells little of what the model loses with all of them, so all are
tried and the trials decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.forecast import Forecast, Plan
from sparse_onnx.passes.solvers.masks import MaskStructure, resolve_sparsity
from sparse_onnx.search.frontier import Option, frontier
from sparse_onnx.search.strategy import Expected, Goals
from sparse_onnx.search.tables import Table

__all__ = ["SPARSITIES", "Family", "LossOf", "allocated", "choices_of", "families", "uniform"]

SPARSITIES = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""The shares of zeros that a layer may get."""

_NO_TABLES: Mapping[str, Table] = MappingProxyType({})

_UNIFORM = tuple(round(0.4 + 0.01 * step, 2) for step in range(56))

LossOf = Callable[[str, Choice], float | None]
"""What a layer, by the name of its weight, loses with a choice, in units that add up over layers; None: it cannot
have that pattern or these bits, or it is not known."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Plans in the order of rising speed or smallness, with what is expected of each."""

    name: str
    plans: tuple[Plan, ...]
    expected: tuple[Expected, ...]


def allocated(
    forecast: Forecast,
    options: Mapping[str, Collection[Choice]],
    loss: LossOf,
    goals: Goals,
    tables: Mapping[str, Table] = _NO_TABLES,
    name: str = "allocated",
) -> Family:
    """One of its ``options`` for every layer, or none, with the least loss for the time that they leave; for the size
    where only that is asked for; for both in equal shares of dense where both are. Where size counts, ``tables`` have
    fewer bits, too."""
    dense_ms = sum(forecast.layer_milliseconds(layer) for layer in options)
    dense_bytes = sum(forecast.layer_bytes(layer) for layer in options) or forecast.dense_bytes
    by_size = goals.nbytes is not None
    by_time = goals.speedup is not None or not by_size

    def cost(name: str, choice: Choice | None) -> float:
        total = 0.0
        if by_time:
            total += forecast.layer_milliseconds(name, choice) / dense_ms
        if by_size:
            total += forecast.layer_bytes(name, choice) / dense_bytes
        return total

    known: dict[str, list[Option]] = {}
    for layer, choices in options.items():
        known[layer] = [Option(None, cost(layer, None), 0.0)]
        for choice in choices:
            lost = loss(layer, choice)
            if lost is not None:
                known[layer].append(Option(choice, cost(layer, choice), lost))
    for table, own in tables.items() if by_size else ():
        known[table] = [Option(None, 0.0, 0.0)] + [
            Option(Choice(bits=bits), -saved / dense_bytes, own.loss[bits])
            for bits, saved in own.saved.items()
        ]
    plans = [
        {layer: option.choice for layer, option in plan.items() if option.choice is not None}
        for plan in frontier(known)
    ]
    return _family(name, plans, forecast, loss, tables)


def choices_of(structures: Iterable[str], bits: Iterable[tuple[int, int]] = ()) -> list[Choice]:
    """Zeros in any of the patterns ``structures``, alone, and with every one of ``bits`` (of the weight, and that
    activations are rounded to); and these alone."""
    zeros = []
    for structure in structures:
        parsed = MaskStructure.parse(structure)
        if parsed.kind == "n:m":
            zeros.append(Choice(resolve_sparsity(None, parsed), structure))
        else:
            zeros += [Choice(sparsity, structure) for sparsity in SPARSITIES]
    plain = [Choice(bits=own, activations=activations) for own, activations in bits]
    both = [zero._replace(bits=own.bits, activations=own.activations) for own in plain for zero in zeros]
    return [*zeros, *plain, *both]


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


def families(
    forecast: Forecast,
    options: Mapping[str, Collection[Choice]],
    loss: LossOf,
    goals: Goals,
    tables: Mapping[str, Table] = _NO_TABLES,
) -> list[Family]:
    """All families of plans that give every layer one of its ``options``, no two with the same plans."""
    found = [allocated(forecast, options, loss, goals, tables)]
    for bits in (8, 4):
        own = {
            name: [choice for choice in choices if (choice.sparsity, choice.bits) == (0, bits)]
            for name, choices in options.items()
        }
        found.append(allocated(forecast, own, loss, goals, tables, f"int{bits}"))
    plain = [name for name, choices in options.items() if Choice(SPARSITIES[0]) in choices]
    found.append(uniform(forecast, plain, loss, goals))
    different: list[Family] = []
    for family in found:
        plain_only = len(family.plans) == 1 and bool(different)
        if not plain_only and all(family.plans != other.plans for other in different):
            different.append(family)
    return different


def _family(
    name: str,
    plans: Iterable[Plan],
    forecast: Forecast,
    loss: LossOf,
    tables: Mapping[str, Table] = _NO_TABLES,
) -> Family:
    """In order, without plans that are no faster and no smaller than the one before."""
    kept: list[Plan] = []
    expected: list[Expected] = []
    for plan in plans:
        layers = {layer: choice for layer, choice in plan.items() if layer not in tables}
        rounded = {table: choice.bits for table, choice in plan.items() if table in tables}
        outlook = forecast.outlook(layers)
        nbytes = outlook.nbytes - sum(tables[table].saved[bits] for table, bits in rounded.items())
        if not kept or outlook.speedup > expected[-1].speedup or nbytes < expected[-1].nbytes:
            kept.append(_with_others(plan, forecast))
            lost = math.fsum(loss(layer, choice) or 0.0 for layer, choice in layers.items())
            lost += math.fsum(tables[table].loss[bits] for table, bits in rounded.items())
            expected.append(Expected(outlook.speedup, nbytes, lost))
    return Family(name, tuple(kept), tuple(expected))


def _with_others(plan: Plan, forecast: Forecast) -> Plan:
    """The same for the weights that go along with those of ``plan``."""
    others = {
        other: plan[layer.name] for layer in forecast.layers if layer.name in plan for other in layer.others
    }
    return {**plan, **others}
