"""Axes whose size a model leaves open, and example inputs of other sizes along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparse_onnx.exporter._extras import require

__all__ = ["NamedAxis", "larger_or_smaller", "named_axes", "resized", "traceable"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class NamedAxis:
    """A dynamic axis with a name; ``lowest`` and ``highest`` bound its size, both included."""

    name: str
    lowest: int = 1
    highest: int | None = None

    def clip(self, size: int) -> int:
        size = max(size, self.lowest)
        return size if self.highest is None else min(size, self.highest)


def named_axes(dynamic_shapes: Mapping[str, Any]) -> dict[str, dict[int, NamedAxis]]:
    """The axes that torch's ``dynamic_shapes`` gives a name, by input and position."""
    found: dict[str, dict[int, NamedAxis]] = {}
    for name, spec in dynamic_shapes.items():
        pairs = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
        axes = {index: axis for index, dim in pairs if (axis := _named_axis(dim)) is not None}
        if axes:
            found[name] = axes
    return found


def _named_axis(dim: Any) -> NamedAxis | None:
    if isinstance(dim, str):
        return NamedAxis(dim)
    name = getattr(dim, "__name__", None)
    if not isinstance(name, str) or hasattr(dim, "root"):  # a number, a hint such as AUTO, or `2 * batch`
        return None
    return NamedAxis(name, max(int(dim.min), 1), int(dim.max) if isinstance(dim.max, int) else None)


def resized(
    inputs: Inputs, axes: Mapping[str, Mapping[int, NamedAxis]], size: Callable[[NamedAxis, int], int]
) -> Inputs:
    """``inputs`` cut or repeated cyclically along the named axes to ``size(axis, present size)``."""
    torch = require("torch")
    result = dict(inputs)
    for name, positions in axes.items():
        for position, axis in positions.items():
            tensor = result[name]
            present = tensor.shape[position]
            index = torch.arange(size(axis, present)) % max(present, 1)
            result[name] = tensor.index_select(position, index)
    return result


def traceable(inputs: Inputs, axes: Mapping[str, Mapping[int, NamedAxis]]) -> Inputs:
    """``inputs`` with at least 2 along each named axis: torch takes a traced size of 1 for a constant."""
    return resized(inputs, axes, lambda axis, present: axis.clip(max(present, 2)))


def larger_or_smaller(inputs: Inputs, axes: Mapping[str, Mapping[int, NamedAxis]]) -> Iterator[Inputs]:
    """``inputs`` of twice, then of half the size along the named axes, as far as their bounds allow."""
    for scale in (lambda size: 2 * size, lambda size: size // 2):
        other = resized(inputs, axes, partial(_scaled, scale))
        if any(other[name].shape != inputs[name].shape for name in axes):
            yield other


def _scaled(scale: Callable[[int], int], axis: NamedAxis, present: int) -> int:
    return axis.clip(scale(present))
