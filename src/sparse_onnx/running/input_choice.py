"""What a model is run with where nothing real is at hand: one target's shapes and values, and what was assumed.

Sizes come from the user, from what the dimensions' names say of each other, from operators and weights, from real data
where there is some, and at last from guesses, which are told.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.data.batches import batching, equal_batches
from sparse_onnx.data.input_sizes import Sizes, is_cache_length, other_shapes, solve_shapes
from sparse_onnx.data.inputs import (
    Feeds,
    InputSpec,
    Value,
    generate,
    plain_values,
    steers,
)
from sparse_onnx.data.operator_sizes import operator_sizes
from sparse_onnx.errors import UsageError
from sparse_onnx.model.dimensions import unnamed
from sparse_onnx.model.graph import is_standard
from sparse_onnx.running.fix_inputs import fix_inputs

__all__ = ["Choice", "choose_inputs", "explaining_guesses"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Inputs of one target.

    Attributes:
        specs: The inputs; all have a rank.
        sizes: Their shapes, and the sizes of the names in them.
        facts: What else is known of the names: sizes, or equal names; see
            :func:`sparse_onnx.data.input_sizes.solve_shapes`.
        seen: Names whose size is that of the data, and inputs whose single value is.
    """

    specs: tuple[InputSpec, ...]
    sizes: Sizes
    facts: tuple[tuple[str, int | str], ...]
    seen: Mapping[str, Value]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.sizes.shapes)

    def feeds(self, seed: int) -> Feeds:
        """Generated values; see :func:`sparse_onnx.data.inputs.generate`."""
        return generate(self.specs, self.sizes.shapes, seed)

    def others(self, short: int) -> dict[str, tuple[int, ...]] | None:
        """Other shapes that the model should take, see :func:`sparse_onnx.data.input_sizes.other_shapes`; None if
        there are none."""
        try:
            return other_shapes(self.specs, self.sizes, self.facts, short)
        except UsageError:  # a size that would become negative
            return None

    def notes(self, purpose: str) -> list[str]:
        """What was assumed, and how to decide ``purpose`` ("for another"); one line each."""
        lines = [
            f"dimension {name} is taken as {size}; say --input-shape {purpose}"
            for name, size in self.sizes.guessed.items()
        ]
        lines += [
            f"{name} is taken as {value}, as in the data; say --input-shape or --input {purpose}"
            for name, value in self.seen.items()
        ]
        lines += [
            f"input {spec.name} is taken as {spec.compared}, which the graph compares it with; say --input "
            f"{spec.name}=VALUE {purpose}"
            for spec in self._steering()
        ]
        if (tokens := self._prefill()) is not None:
            lines.append(f"the target is a prefill: {tokens} tokens, nothing in the cache")
        return lines

    def guesses(self) -> str:
        """What was guessed, for a message; "" if nothing was."""
        sizes = [f"{name} = {size}" for name, size in self.sizes.guessed.items()]
        return ", ".join([*sizes, *(f"{spec.name} = {spec.compared}" for spec in self._steering())])

    def _steering(self) -> list[InputSpec]:
        return [spec for spec in self.specs if steers(spec, self.sizes.shapes[spec.name])]

    def _prefill(self) -> int | None:
        """How many tokens come, where caches are taken to be empty."""
        ids = next((self.sizes.shapes[s.name] for s in self.specs if s.name.endswith("input_ids")), ())
        empty = any(not size and is_cache_length(name) for name, size in self.sizes.guessed.items())
        return ids[-1] if len(ids) > 1 and empty else None


def choose_inputs(
    model: ir.Model,
    specs: Sequence[InputSpec],
    given: Mapping[str, Sequence[int]],
    data: Sequence[Feeds] = (),
) -> Choice:
    """Shapes and values for one target of ``model``.

    Args:
        model: As it is; it is not changed.
        specs: Its inputs, with the values that the user gives, see :func:`sparse_onnx.data.inputs.input_specs`.
        given: Shapes that the user gives, by input name.
        data: Batches of real inputs: a size that all of them have is better than a guess, but for the batch.

    Raises:
        UsageError: Given shapes do not fit, or one is missing for an input of unknown rank.
    """
    shapes = {name: tuple(shape) for name, shape in given.items()}
    ranked = tuple(_ranked(spec, shapes, data) for spec in specs)
    single = _single_values(ranked, data)
    ranked = tuple(dataclasses.replace(spec, value=single.get(spec.name, spec.value)) for spec in ranked)
    sizes = solve_shapes(ranked, shapes)
    facts: tuple[tuple[str, int | str], ...] = ()
    seen: dict[str, Value] = dict(single)
    if sizes.guessed:
        sure, likely = operator_sizes(_with_branches_taken(model, ranked))
        sizes = solve_shapes(ranked, shapes, sure)
        common = _common_sizes(ranked, data)
        found = {name: common[name] for name in sizes.guessed if name in common}
        seen |= {f"dimension {name}": size for name, size in found.items()}
        facts = (*sure, *equal_batches(ranked, data[0] if data else None), *found.items(), *likely)
        sizes = solve_shapes(ranked, shapes, facts)
    return Choice(ranked, sizes, facts, seen)


def _with_branches_taken(model: ir.Model, specs: Sequence[InputSpec]) -> ir.Model:
    """``model``, or a copy without the branches that the values of its inputs do not take."""
    if not any(is_standard(node, "If") for node in model.graph):
        return model
    known = [
        dataclasses.replace(spec, value=spec.compared if spec.value is None else spec.value, fixed=True)
        for spec in specs
        if spec.value is not None
        or (spec.compared is not None and steers(spec, (1,) * len(spec.shape or ())))
    ]
    inputs = {value.name for value in model.graph.inputs}
    copy = model.clone()
    try:
        fix_inputs(copy, [spec for spec in known if spec.name in inputs and spec.array() is not None])
    except UsageError:  # which the run itself will meet, and tell
        return model
    return copy


def _ranked(spec: InputSpec, given: Mapping[str, tuple[int, ...]], data: Sequence[Feeds]) -> InputSpec:
    """``spec`` with as many unknown dimensions as what is known of it has, where the model does not say."""
    if spec.shape is not None:
        return spec
    shape = given.get(spec.name) or spec.value_shape
    if shape is None and data and spec.name in data[0]:
        shape = data[0][spec.name].shape
    if shape is None:
        raise UsageError(
            f"the model does not say how many dimensions {spec.name} has: give --input-shape {spec.name}:DIM,.."
        )
    return dataclasses.replace(spec, shape=(None,) * len(shape))


def _single_values(specs: Sequence[InputSpec], data: Sequence[Feeds]) -> dict[str, Value]:
    """What the data has for inputs of one element that are the same for all samples, where the user gives nothing."""
    if not data:
        return {}
    cut = batching(specs, data[0]).axes
    found = {spec.name: data[0][spec.name] for spec in specs if spec.value is None and spec.name not in cut}
    values = plain_values({name: array for name, array in found.items() if array.size == 1})
    return values or {}


def _common_sizes(specs: Sequence[InputSpec], data: Sequence[Feeds]) -> dict[str, int]:
    """Sizes that all batches share, by the name of the dimension; not of the batch, which is how the data was cut."""
    sizes: dict[str, set[int]] = {}
    batches: set[str] = set()
    for feeds in data:
        cut = batching(specs, feeds).axes
        for spec in specs:
            for axis, dim in enumerate(spec.shape or ()):
                if isinstance(dim, int):
                    continue
                name = dim or unnamed(spec.name, axis)
                sizes.setdefault(name, set()).add(feeds[spec.name].shape[axis])
                if axis == cut.get(spec.name):
                    batches.add(name)
    return {name: found.pop() for name, found in sizes.items() if len(found) == 1 and name not in batches}


@contextlib.contextmanager
def explaining_guesses(choices: Sequence[Choice]) -> Iterator[None]:
    """Say in an error of a run which sizes were guessed, and how to give them."""
    try:
        yield
    except UsageError as error:
        guessed = list(dict.fromkeys(filter(None, (choice.guesses() for choice in choices))))
        if not guessed:
            raise
        raise type(error)(
            f"{error}\nGuessed were {'; '.join(guessed)}: give what the model takes with --input-shape NAME:DIM,.. "
            "(sizes) or --input NAME=VALUE (values)"
        ) from error
