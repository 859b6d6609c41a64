"""What is known of the shapes around a Reshape: where an axis goes, and a new shape that holds for all sizes."""

from __future__ import annotations

import math

import onnx_ir as ir

from sparse_onnx.model.constants import constant_array
from sparse_onnx.model.graph import producer
from sparse_onnx.model.shapes import Dims, Shapes, agree, same

__all__ = ["constant_piece", "counterpart", "product", "template"]


def counterpart(here: Dims, there: Dims, position: int) -> int | None:
    """Where, in another shape of as many elements, what follows ``position`` begins."""
    before = here[:position]
    if position < len(there) and agree(before, there[:position]):
        return position
    rest = product(here[position:])
    ends = [at for at in range(len(there)) if rest is not None and product(there[at:]) == rest]
    return ends[-1] if ends else None


def product(dims: Dims) -> int | None:
    """Their product, if all are known."""
    known = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(known) if len(known) == len(dims) else None


def template(before: Dims, after: Dims, axis: int) -> tuple[int, ...] | None:
    """A shape for Reshape that holds for all sizes of what is not known; the entry at ``axis`` is a placeholder."""
    kept = 0
    while kept < min(axis, len(before)) and same(before[kept], after[kept]):
        kept += 1
    dims = [0] * kept + [dim if isinstance(dim, int) else -1 for dim in after[kept:]]
    dims[axis] = 1
    return None if dims.count(-1) > 1 or 0 in dims[kept:] else tuple(dims)


def constant_piece(shape: ir.Value | None, position: int, shapes: Shapes) -> tuple[int, int] | None:
    """Of a shape that is a Concat: which input, a constant, holds ``position``, and where in it."""
    concat = producer(shape, "Concat")
    if concat is None:
        return None
    for index, piece in enumerate(concat.inputs):
        array = constant_array(piece)
        dims = shapes.dims(piece) if array is None else array.shape
        length = dims[0] if len(dims) == 1 else None
        if not isinstance(length, int):
            return None
        if position < length:
            return None if array is None else (index, position)
        position -= length
    return None
