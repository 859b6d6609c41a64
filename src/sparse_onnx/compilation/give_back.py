"""Give layers that stay dense their original weights back: zeros that no sparse kernel uses only cost accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence, Set

import onnx_ir as ir

from sparse_onnx.document import LayerRow
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.passes.base import Declined, LayerChange
from sparse_onnx.timing.choose import Decision

__all__ = [
    "GIVEN_BACK",
    "Originals",
    "Stored",
    "exchange",
    "keeping_zeros",
    "with_pruning",
    "without_zeros",
]

GIVEN_BACK = "its original weight was given back"


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the initializer ``name`` of a main graph holds, and the pattern of its zeros if that is noted."""

    name: str
    tensor: ir.TensorProtocol
    structure: str | None


def _stored(value: ir.Value) -> Stored:
    assert value.const_value is not None
    return Stored(value.name or "", value.const_value, value.metadata_props.get(STRUCTURE_KEY))


def exchange(models: Sequence[ir.Model], states: Iterable[Stored]) -> list[Stored]:
    """Put ``states`` into all ``models``, copies of one another, and return what was there: the way back."""
    found = []
    for state in states:
        found.append(_stored(models[0].graph.initializers[state.name]))
        for model in models:
            value = model.graph.initializers[state.name]
            value.const_value = state.tensor
            value.metadata_props.pop(STRUCTURE_KEY, None)
            if state.structure is not None:
                value.metadata_props[STRUCTURE_KEY] = state.structure
    return found


class Originals:
    """Tensors of a model's main graph as they were before it was pruned."""

    def __init__(self, known: Iterable[Stored]) -> None:
        self._known: Mapping[str, Stored] = {stored.name: stored for stored in known}

    @classmethod
    def of(cls, model: ir.Model) -> Originals:
        """All tensors of ``model``, as they are now."""
        return cls(
            _stored(value) for value in model.graph.initializers.values() if value.const_value is not None
        )

    def without(self, names: Iterable[str]) -> Originals:
        """The same, with nothing known of these weights: they are not given back."""
        dropped = frozenset(names)
        return Originals(stored for name, stored in self._known.items() if name not in dropped)

    def changed(
        self, model: ir.Model, changes: Iterable[LayerChange] = (), kept: Collection[str] = ()
    ) -> list[Stored]:
        """What to put back into ``model`` so that all weights but those named in ``kept`` are as they were, with the
        biases that were changed along with them; these are found in ``changes``."""
        biases: dict[str, tuple[str, ir.TensorProtocol]] = {}
        for change in changes:
            if change.bias is not None:
                name, tensor = change.bias
                biases.setdefault(
                    name, (change.name, tensor)
                )  # if it was changed twice, the first has what it was
        found = []
        for name, value in model.graph.initializers.items():
            owner, bias = biases.get(name, (name, None))
            if owner in kept:
                continue
            if name in self._known:
                if value.const_value is not self._known[name].tensor:
                    found.append(self._known[name])
            elif bias is not None:  # a copy of a bias that several layers share
                found.append(Stored(name, ir.tensor(bias.numpy(), name=name), None))
        return found


def without_zeros(decisions: Sequence[Decision], names: Set[str]) -> list[Decision]:
    """``decisions`` after the weights ``names`` were given back: what is known of their zeros no longer holds."""
    return [
        dataclasses.replace(
            decision,
            candidate=dataclasses.replace(decision.candidate),
            reason=f"{decision.reason}; {GIVEN_BACK}",
        )
        if not names.isdisjoint(decision.candidate.names)
        else decision
        for decision in decisions
    ]


def keeping_zeros(decisions: Sequence[Decision], names: Set[str], why: str) -> list[Decision]:
    """``decisions`` where the weights ``names`` stay dense and keep their zeros all the same."""
    return [
        dataclasses.replace(decision, reason=f"{decision.reason}; its zeros are kept: {why}")
        if not names.isdisjoint(decision.candidate.names)
        else decision
        for decision in decisions
    ]


def with_pruning(
    rows: Iterable[LayerRow],
    changes: Iterable[LayerChange],
    given_back: Collection[str],
    declined: Iterable[Declined],
) -> list[LayerRow]:
    """The layers of a report with what became of every weight: it ships with zeros that were made (``pruned``), it has
    its original weights again (``given back``), or it was ``never`` pruned; and why not, as far as a pass said so."""
    changed = {change.name for change in changes if change.zeros_after > change.zeros_before}
    why = {place.place: place.reason for place in declined if place.pass_name.startswith("prune.")}
    found: list[LayerRow] = []
    for row in rows:
        name = row["name"]
        if name in given_back:
            found.append({**row, "pruning": "given back", "pruning_reason": "it stays dense"})
        elif name in changed:
            found.append({**row, "pruning": "pruned", "pruning_reason": ""})
        else:
            spared = why.get(name, "").startswith("not pruned")
            reason = f"{row['reason']}; {why[name]}" if spared else row["reason"]
            against = why.get(name, "no pruning was asked of it")
            found.append({**row, "reason": reason, "pruning": "never", "pruning_reason": against})
    return found
