"""The shapes of a model's inputs from what is known: given shapes, the names of dimensions, operators, and guesses.

What is given comes first, then what the names say of each other (:mod:`sparse_onnx.model.dimensions`), then
conventions of exporters and
further facts as far as they contradict nothing, and at last guesses by name: one at a time, so that what follows from
one is not guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sparse_onnx.errors import UsageError
from sparse_onnx.model.dimensions import (
    Contradiction,
    Equation,
    Expression,
    Unsolvable,
    equal,
    names_of,
    parse,
    solve,
    unnamed,
    value_of,
)

if TYPE_CHECKING:
    from sparse_onnx.data.inputs import InputSpec

__all__ = ["Sizes", "is_cache_length", "other_shapes", "solve_shapes"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """``shapes`` of all inputs; the sizes of all ``names`` in their dimensions; of these the ``guessed`` ones."""

    shapes: Mapping[str, tuple[int, ...]]
    names: Mapping[str, int]
    guessed: Mapping[str, int]


def solve_shapes(
    specs: Sequence[InputSpec],
    given: Mapping[str, tuple[int, ...]],
    facts: Iterable[tuple[str, int | str]] = (),
) -> Sizes:
    """A shape for every input of known rank; ``facts`` are sizes of dimensions by name, or names of which the one has
    the size of the other, the surest first.

    Raises UsageError if given shapes do not fit the inputs or each other, or a size becomes negative.
    """
    shapes = _given_shapes(specs, given)
    equations = [
        Equation(parse(name), size, name)
        for spec in specs
        if spec.name in shapes and spec.shape is not None
        for name, size in zip(_names(spec), shapes[spec.name], strict=True)
        if name is not None
    ]
    places: dict[str, _Place] = {}
    for place in _places(specs):
        for atom in names_of(parse(place.name)):
            places.setdefault(atom, dataclasses.replace(place, name=atom))
    loose = _loose(places)
    rules = [_sum_rule(*convention) for convention in _conventions(places)]
    rules += [Equation(loose[e.text], e.size, e.text) for e in equations if e.text in loose]
    rules += [equal(name, size) for name, size in facts]
    exact = [equation for equation in equations if equation.text not in loose]
    exact.sort(key=_terms)  # names first: a message then tells of what is made of them
    try:
        sizes = solve(exact, {})
        sizes = _add(rules, exact, sizes)
        guessed: dict[str, int] = {}
        for atom, place in sorted(places.items(), key=_guess_order):
            if atom not in sizes:
                guessed[atom] = _guess(place)
                sizes = _add([*exact, *rules], [], sizes | {atom: guessed[atom]})
        solve(exact, sizes)
    except Contradiction as error:
        raise UsageError(
            f"--input-shape makes dimension {error.text} both {error.found} and {error.size}"
        ) from error
    except Unsolvable as error:
        raise UsageError(
            f"--input-shape makes dimension {error.text} {error.size}, which no size of {error.name} gives"
        ) from error
    for spec in specs:
        if spec.name not in shapes and spec.shape is not None:
            shapes[spec.name] = tuple(_evaluated(spec, sizes, loose))
    return Sizes(shapes, sizes, guessed)


def _given_shapes(
    specs: Sequence[InputSpec], given: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes given, and those of values given; checked one by one."""
    known = {spec.name: spec for spec in specs}
    shapes = {}
    for name, shape in given.items():
        if name not in known:
            raise UsageError(
                f"--input-shape names {name!r}; the inputs are {'; '.join(s.describe() for s in specs)}"
            )
        if not known[name].takes(shape):
            raise UsageError(
                f"--input-shape {name}:{','.join(map(str, shape))} does not fit {known[name].describe()}"
            )
        shapes[name] = tuple(shape)
    for spec in specs:
        own = spec.value_shape
        if own is not None and shapes.setdefault(spec.name, own) != own:
            raise UsageError(
                f"--input-shape {spec.name}:{','.join(map(str, shapes[spec.name]))} is not the shape of the value "
                f"that is given for it, {list(own)}"
            )
    return shapes


def _names(spec: InputSpec) -> list[str | None]:
    """What each dimension is called; None for a number."""
    dims = spec.shape or ()
    return [
        None if isinstance(dim, int) else dim or unnamed(spec.name, axis) for axis, dim in enumerate(dims)
    ]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a ``name`` stands: the axis, the rank of the input, and whether the model says the name."""

    name: str
    axis: int
    rank: int
    said: bool

    @property
    def is_cache_length(self) -> bool:
        """Without a name of its own: the last axis but one of an input that is called so."""
        return is_cache_length(self.name) and (self.said or (self.rank > 2 and self.axis == self.rank - 2))


def _places(specs: Sequence[InputSpec]) -> Iterator[_Place]:
    """Every name, wherever it stands."""
    for spec in specs:
        for axis, (name, dim) in enumerate(zip(_names(spec), spec.shape or (), strict=True)):
            if name is not None:
                yield _Place(name, axis, len(spec.shape or ()), dim is not None)


def _terms(equation: Equation) -> int:
    return len(equation.expression)


_Sum = tuple[str, tuple[str, ...]]
"""A name, and those that it is the sum of."""


def _conventions(atoms: Collection[str]) -> Iterator[_Sum]:
    """By the words of exporters a total is what is past and what comes, and so is the length of a mask."""
    for atom in atoms:
        for prefix in ("total_", "attention_mask_"):
            new = atom.removeprefix(prefix)
            if new != atom and new in atoms and f"past_{new}" in atoms:
                yield atom, (f"past_{new}", new)
            elif new != atom and new in atoms and prefix == "attention_mask_":
                yield atom, (new,)


def _sum_rule(total: str, parts: Sequence[str]) -> Equation:
    return Equation({(total,): 1, **{(part,): -1 for part in parts}}, 0, total)


def _loose(atoms: Collection[str]) -> Mapping[str, Expression]:
    """Names that are not meant as they are written, with what is meant: older exports say ``past_n + 1`` for what is
    past and what comes, however much comes."""
    return {
        f"past_{atom}{plus}1": {(f"past_{atom}",): 1, (atom,): 1}
        for atom in atoms
        if f"past_{atom}" in atoms
        for plus in (" + ", "+")
    }


def _add(equations: Iterable[Equation], exact: Sequence[Equation], sizes: dict[str, int]) -> dict[str, int]:
    """``sizes`` with what follows from each of ``equations`` that contradicts neither them nor the ``exact`` ones."""
    waiting, held = (
        [equation for equation in group if value_of(equation.expression, sizes) is None]
        for group in (equations, exact)
    )
    while True:
        before = len(sizes)
        for equation in waiting:
            try:
                sizes = solve([*held, equation], sizes)
            except (Contradiction, Unsolvable):
                continue
        if len(sizes) == before:
            return sizes


def is_cache_length(name: str) -> bool:
    """Whether a dimension's name says that it is the length of a cache, which is empty at first."""
    word = name.lower()
    return "past" in word or ("cache" in word and not any(other in word for other in ("dim", "head")))


def _guess_order(entry: tuple[str, _Place]) -> int:
    """Lengths of caches first, then batches: what is left of a given total is more likely something else."""
    atom, place = entry
    return 0 if place.is_cache_length else 1 if "batch" in atom.lower() else 2


def _guess(place: _Place) -> int:
    word = place.name.lower()
    if word.isdecimal():
        return int(word)
    if place.is_cache_length:
        return 0
    if "batch" in word or place.axis == 0:
        return 1
    if any(side in word for side in ("height", "width")) or (place.rank == 4 and not is_cache_length(word)):
        return 224
    return 128


def _evaluated(spec: InputSpec, sizes: Mapping[str, int], loose: Mapping[str, Expression]) -> Iterator[int]:
    for dim, name in zip(spec.shape or (), _names(spec), strict=True):
        if isinstance(dim, int):
            yield dim
            continue
        assert name is not None
        expression = loose.get(name) or parse(name)
        size = value_of(expression, sizes)
        assert size is not None
        if size < 0:
            known = ", ".join(f"{atom} = {sizes[atom]}" for atom in names_of(expression))
            raise UsageError(
                f"dimension {name} of {spec.name} becomes {size} with {known}: say --input-shape {spec.name}:DIM,.."
            )
        yield size


def other_shapes(
    specs: Sequence[InputSpec], sizes: Sizes, facts: Sequence[tuple[str, int | str]], short: int
) -> dict[str, tuple[int, ...]]:
    """Shapes with a batch of one made two and long dimensions of at most ``short``, where the model leaves them open;
    what ``facts`` say, as for :func:`solve_shapes`, stays true, and what must agree agrees.

    Axes after the second stay: what heights and widths a network takes depends on its strides.
    """
    changed = dict(sizes.names)
    seen = {
        *(name for name, size in facts if isinstance(size, int)),
        *(name for spec in specs if spec.value is not None for name in _names(spec)),
    }
    for place in _places(specs):
        if place.name in seen or place.name not in changed:
            continue
        seen.add(place.name)
        if place.axis <= 1:
            size = changed[place.name]
            changed[place.name] = 2 if size == 1 and place.axis == 0 else min(size, short)
    for name, other in facts:
        if isinstance(other, str) and name in changed and sizes.names[name] == sizes.names.get(other):
            changed[name] = changed[other]
    for total, parts in _conventions(changed):
        if sizes.names[total] == sum(sizes.names[part] for part in parts):
            changed[total] = sum(changed[part] for part in parts)
    loose = _loose(changed)
    return {
        spec.name: spec.value_shape or tuple(_evaluated(spec, changed, loose))
        for spec in specs
        if spec.shape is not None
    }
