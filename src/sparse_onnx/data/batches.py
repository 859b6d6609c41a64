"""Which axis of which input is the batch, so that data can be counted and cut.

The batch is the name that most inputs have in front, unless a name says "batch". An input may have it in another axis
(a recurrent state ``[2, batch, 128]``), several rows a sample (``batch*heads``), or not at all: such a one is given
once and goes with every batch, as a value of the user's own does. In a model with fixed sizes the batch is the size
that most inputs have in front.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparse_onnx.model.dimensions import names_of, parse, unnamed

if TYPE_CHECKING:
    from sparse_onnx.data.inputs import InputSpec

__all__ = ["Batching", "batching", "equal_batches"]

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batching:
    """``axes`` of the arrays that are cut, by name; ``counted`` are those of them with one row a sample.

    ``fixed`` is the batch size that the model demands, or None.
    """

    axes: Mapping[str, int]
    counted: tuple[str, ...]
    fixed: int | None

    def counts(self, arrays: Arrays) -> dict[str, int]:
        """How many samples each of the counted arrays has; equal in data that fits."""
        return {name: arrays[name].shape[self.axes[name]] for name in self.counted}

    def samples(self, arrays: Arrays) -> int:
        """How many samples there are; 1 if no array is cut."""
        return next(iter(self.counts(arrays).values()), 1)

    def uneven(self, arrays: Arrays) -> list[str]:
        """Arrays whose rows are no multiple of the samples."""
        total = self.samples(arrays)
        return [name for name, axis in self.axes.items() if total and arrays[name].shape[axis] % total]

    def cut(self, arrays: Arrays, start: int, end: int) -> dict[str, np.ndarray]:
        """Samples start..end-1 of every array that is cut, and the others as they are."""
        total = max(self.samples(arrays), 1)
        parts = {}
        for name, array in arrays.items():
            if (axis := self.axes.get(name)) is None:
                parts[name] = array
                continue
            rows = array.shape[axis] // total
            parts[name] = array[(slice(None),) * axis + (slice(start * rows, end * rows),)]
        return parts


def batching(specs: Sequence[InputSpec], arrays: Arrays) -> Batching:
    """How ``arrays`` are cut: inputs of the model by their specs, and others (labels) along the first axis."""
    known = {spec.name: spec for spec in specs}
    symbol = _symbol(specs)
    fixed = None if symbol is not None else _fixed(specs)
    counted: dict[str, int] = {}
    others: dict[str, int] = {}
    unsure: dict[str, int] = {}
    for name, array in arrays.items():
        if not array.ndim:
            continue
        dims = known[name].shape if name in known else (symbol,)
        if dims is None or (name in known and known[name].value is not None):
            unsure[name] = 0
        elif name not in known:
            counted[name] = 0
        elif symbol in dims and symbol is not None:
            counted[name] = dims.index(symbol)
        elif (axis := _inside(dims, symbol)) is not None:
            others[name] = axis
        elif dims[0] is None or (fixed is not None and dims[0] == fixed):
            counted[name] = 0
        elif isinstance(dims[0], str):
            if not _elsewhere(dims[0], specs, symbol):
                unsure[name] = 0
        elif fixed is not None and (axis := _grown(dims, array)) is not None:
            others[name] = axis
        elif None in dims:  # a state without names
            unsure[name] = dims.index(None)
    ours = [name for name in counted if name in known]
    total = next((arrays[name].shape[counted[name]] for name in (*ours, *counted)), None)
    for name, axis in unsure.items():
        if arrays[name].ndim > axis and (arrays[name].shape[axis] == total or (total is None and not axis)):
            counted[name], total = axis, arrays[name].shape[axis]
    ordered = (*ours, *(name for name in counted if name not in ours))
    return Batching(counted | others, ordered, fixed)


def equal_batches(specs: Sequence[InputSpec], arrays: Arrays | None = None) -> list[tuple[str, str]]:
    """Names of dimensions that are the batch, whatever they are called, each with the first of them: those that are cut
    in ``arrays``; without, where the batch is free in front of an input, also the first dimension without a name behind
    a fixed one (a state ``[2, ?, 128]``)."""
    axes: dict[str, int] = {}
    if arrays:
        cut = batching(specs, arrays)
        axes = {name: cut.axes[name] for name in cut.counted}
    elif any(spec.shape and not isinstance(spec.shape[0], int) for spec in specs):
        symbol = _symbol(specs)
        for spec in specs:
            dims = spec.shape or ()
            if dims and (dims[0] is None or dims[0] == symbol):
                axes[spec.name] = 0
            elif (
                len(dims) > 2
                and isinstance(dims[0], int)
                and None in dims
                and (symbol is None or symbol not in dims)
            ):
                axes[spec.name] = dims.index(None)
    found = {
        dim or unnamed(spec.name, axis): axis
        for spec in specs
        for axis, dim in enumerate(spec.shape or ())
        if axes.get(spec.name) == axis and not isinstance(dim, int)
    }
    first, *others = [*sorted(found, key=found.__getitem__), ""]
    return [(name, first) for name in others if name]


def _symbol(specs: Sequence[InputSpec]) -> str | None:
    """The name of the batch, or None if no input has a name or nothing in front."""
    dims = [spec.shape for spec in specs if spec.shape]
    named = Counter(d for shape in dims for d in shape if isinstance(d, str) and _is_batch(d))
    leading = Counter(shape[0] for shape in dims if isinstance(shape[0], str))
    found = (named or leading).most_common(1)
    return found[0][0] if found else None


def _is_batch(name: str) -> bool:
    return "batch" in name.lower() and parse(name) == {(name,): 1}


def _fixed(specs: Sequence[InputSpec]) -> int | None:
    """The size in front of most inputs, if every one of them is fixed there."""
    leading = [spec.shape[0] for spec in specs if spec.shape]
    sizes = Counter(size for size in leading if isinstance(size, int))
    return sizes.most_common(1)[0][0] if sizes and len(leading) == sizes.total() else None


def _inside(dims: Sequence[int | str | None], symbol: str | None) -> int | None:
    """The axis whose expression holds the batch."""
    axes = (a for a, dim in enumerate(dims) if isinstance(dim, str) and symbol in names_of(parse(dim)))
    return next(axes, None)


def _elsewhere(name: str, specs: Iterable[InputSpec], symbol: str | None) -> bool:
    """Whether ``name`` is another axis of an input that has the batch: a length, say."""
    return any(symbol in spec.shape and name in spec.shape for spec in specs if spec.shape)


def _grown(dims: Sequence[int | str | None], array: np.ndarray) -> int | None:
    """The axis of which there is more than the model takes at once."""
    if len(dims) != array.ndim:
        return None
    axes = (
        axis
        for axis, (dim, size) in enumerate(zip(dims, array.shape, strict=True))
        if isinstance(dim, int) and dim and dim != size and size % dim == 0
    )
    return next(axes, None)
