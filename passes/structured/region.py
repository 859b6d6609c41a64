"""What belongs to the units that a layer reads: all that changes in a graph when some of them go."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.model.weights import Weight

__all__ = ["Blocks", "Divided", "Region", "Removal", "Reshaped", "Swapped"]

Blocks = tuple[int, ...]
"""How units lie along an axis: one segment after another (queries, keys, values), each with as many consecutive
elements of every unit."""


@dataclasses.dataclass(frozen=True)
class Removal:
    """Input ``index`` of ``node``, a constant with the units along ``axis`` (negative)."""

    node: ir.Node
    index: int
    axis: int
    blocks: Blocks


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """A Reshape or Expand whose new shape is ``dims``, with the units in place of ``dims[axis]``, if there is one.

    ``dims`` None: the shape is a Concat; of its input ``piece[0]``, a constant, element ``piece[1]`` changes.
    """

    node: ir.Node
    dims: tuple[int, ...] | None
    axis: int | None
    blocks: Blocks
    piece: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Divided:
    """A Split whose part i has ``sizes[i]`` elements of each unit."""

    node: ir.Node
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Keys [B, H, S, D] that are transposed as matrices: ``first`` makes [B·H, S, D], ``last`` [B, H, D, S] of the
    ``transpose``, which will do without them."""

    first: ir.Node
    transpose: ir.Node
    last: ir.Node


@dataclasses.dataclass(frozen=True)
class Region:
    """What changes with ``units`` units: ``writers`` make them, ``readers`` mix them (a layer and elements per unit),
    ``removals`` are constants, weights of writers included (the bias of a Conv goes with its weight), ``values`` are
    computed (axis and blocks of each), ``grouped`` are convolutions with a group for each unit."""

    units: int
    writers: tuple[Weight, ...]
    readers: tuple[tuple[Weight, int], ...]
    removals: tuple[Removal, ...]
    values: tuple[tuple[ir.Value, int, Blocks], ...]
    grouped: tuple[ir.Node, ...]
    reshaped: tuple[Reshaped, ...]
    divided: tuple[Divided, ...]
    swapped: tuple[Swapped, ...]
