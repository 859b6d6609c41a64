"""Follow the units of a layer's input through the graph: all that has to change when some of them go.

From the value that a layer reads, backwards and forwards, through every operator that keeps the units apart, up to
the layers that make them and the layers that mix them. Each value that is met has its units along one axis, some
consecutive elements each::

    MatMul, Gemm, Conv with a constant weight     makes units (its outputs) or mixes them (its inputs): the region ends
    elementwise operators, gates included         same axis; constants along the axis lose elements too
    Conv with one channel a group, pools,         same axis
    BatchNormalization, Softmax, reductions and
    normalizations over another axis
    MatMul of two computed values                 same axis, if it is one of the batch
    Reshape, Transpose, Unsqueeze, Squeeze,       the axis where the units are afterwards; shapes become constants
    Expand, and Gather, Slice, Concat over others
    Split                                         every part has all units, as of queries, keys and values packed

Anything else is a reason to leave the place as it is: other operators, a sum with a value that comes from elsewhere (a
residual), inputs and outputs of the model, dimensions that are not known.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array
from sparse_onnx.model.graph import is_standard
from sparse_onnx.model.shapes import Dims, Shapes
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.structured.operators import (
    PER_CHANNEL,
    POOLS,
    REDUCTIONS,
    SHAPE_ARITHMETIC,
    SUMS,
    is_elementwise,
    label,
    sources,
)
from sparse_onnx.passes.structured.region import Blocks, Divided, Region, Removal, Reshaped, Swapped
from sparse_onnx.passes.structured.shapes import constant_piece, counterpart, product, template

__all__ = ["Unsuitable", "follow"]


class Unsuitable(Exception):
    """The units cannot go; the text says why."""


class _Coarser(Exception):
    """Several units are one elsewhere (heads that share keys and values): only so many are independent."""

    def __init__(self, units: int) -> None:
        self.units = units


def follow(
    value: ir.Value, axis: int, units: int, block: int, layers: Mapping[ir.Node, Weight], shapes: Shapes
) -> Region:
    """The region of the ``units`` that ``value`` has along ``axis`` (negative), ``block`` elements each, or of fewer,
    larger ones.

    ``layers`` are the nodes that may make or mix units, with their weights. Raises Unsuitable.
    """
    while True:
        try:
            return _Tracer(units, layers, shapes).region(value, axis, (block,))
        except _Coarser as coarser:
            block, units = block * (units // coarser.units), coarser.units


class _Tracer:
    """One walk; gives up at the first thing that does not fit."""

    def __init__(self, units: int, layers: Mapping[ir.Node, Weight], shapes: Shapes) -> None:
        self.units, self.layers, self.shapes = units, layers, shapes
        self.places: dict[ir.Value, tuple[int, Blocks]] = {}
        self.waiting: list[ir.Value] = []
        self.done: set[ir.Node] = set()
        self.writers: dict[ir.Node, Weight] = {}
        self.readers: dict[ir.Node, tuple[Weight, int]] = {}
        self.removals: list[Removal] = []
        self.grouped: list[ir.Node] = []
        self.reshaped: dict[ir.Node, Reshaped] = {}
        self.divided: list[Divided] = []
        self.swapped: list[Swapped] = []
        self.moves = {
            "Concat": self.concat,
            "Expand": self.expand,
            "Gather": self.gather,
            "Reshape": self.reshape,
            "Slice": self.slice,
            "Split": self.split,
            "Squeeze": self.squeeze,
            "Transpose": self.transpose,
            "Unsqueeze": self.unsqueeze,
        }
        self.asked: list[ir.Node] = []  # Shape nodes

    def region(self, value: ir.Value, axis: int, blocks: Blocks) -> Region:
        self.visit(value, axis, blocks)
        while self.waiting:
            value = self.waiting.pop()
            axis, blocks = self.places[value]
            node = value.producer()
            if node is None or value.is_graph_input():
                raise Unsuitable(f"units come from {value.name}, which is given from outside")
            if value.is_graph_output():
                raise Unsuitable(f"units reach {value.name}, an output of the model")
            self.made(node, value, axis, blocks)
            for use in value.uses():
                if use.node.graph is not node.graph:
                    raise Unsuitable(f"{value.name} is read in the body of an If, Loop or Scan")
                self.read(use.node, use.idx, value, axis, blocks)
        for shape in self.asked:
            self.check_shape(shape)
        if not self.writers or not self.readers:
            raise Unsuitable("no layer with a constant weight makes the units")
        return Region(
            self.units,
            tuple(self.writers.values()),
            tuple(self.readers.values()),
            tuple(self.removals),
            tuple((value, *place) for value, place in self.places.items()),
            tuple(self.grouped),
            tuple(self.reshaped.values()),
            tuple(self.divided),
            tuple(self.swapped),
        )

    # -- values -------------------------------------------------------------------------------------------------

    def visit(self, value: ir.Value | None, axis: int, blocks: Blocks) -> None:
        assert value is not None
        known = self.places.get(value)
        if known is not None:
            if known != (axis, blocks):
                raise Unsuitable(f"{value.name} would hold the units in two different ways")
            return
        if self.size(value, axis) != self.length(blocks):
            raise Unsuitable(f"the dimensions of {value.name} are not known to fit")
        self.places[value] = (axis, blocks)
        self.waiting.append(value)

    def size(self, value: ir.Value | None, axis: int) -> int | str | None:
        """Of the axis; 1 if there is none, None if that is not known."""
        array = constant_array(value)
        dims = self.shapes.dims(value) if array is None else array.shape
        if array is None and not dims:
            return None if self.shapes.number(value) is None else 1
        return dims[axis] if -axis <= len(dims) else 1

    def length(self, blocks: Blocks) -> int:
        """Of an axis with the units."""
        return self.units * sum(blocks)

    def rank(self, value: ir.Value | None) -> int:
        rank = len(self.shapes.dims(value))
        if not rank:
            raise Unsuitable(f"the rank of {value.name if value is not None else '?'} is not known")
        return rank

    def cut(self, node: ir.Node, index: int, axis: int, blocks: Blocks) -> None:
        self.removals.append(Removal(node, index, axis, blocks))

    # -- nodes --------------------------------------------------------------------------------------------------

    def made(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        """``node`` makes ``value``."""
        weight = self.layers.get(node)
        if weight is None or self.is_depthwise(node):
            self.through(node, value, axis, blocks)
        elif node not in self.writers:
            self.writes(node, weight, axis, blocks)

    def read(self, node: ir.Node, index: int, value: ir.Value, axis: int, blocks: Blocks) -> None:
        weight = self.layers.get(node)
        if weight is not None and index == 0 and not self.is_depthwise(node):
            self.reads(node, weight, axis, blocks)
        elif is_standard(node, "Shape"):
            self.asked.append(node)
        elif is_standard(node, "Reshape", "Expand") and index == 1:
            raise Unsuitable(f"{value.name} is a shape for {label(node)}")
        else:
            self.through(node, value, axis, blocks)

    def is_depthwise(self, node: ir.Node) -> bool:
        return node.op_type == "Conv" and node.attributes.get_int("group", 1) > 1

    def writes(self, node: ir.Node, weight: Weight, axis: int, blocks: Blocks) -> None:
        rank = len(weight.tensor.shape)
        if len(weight.nodes) > 1:
            raise Unsuitable(f"{weight.name} is shared by several layers")
        if axis != (1 - rank if node.op_type == "Conv" else -1):
            raise Unsuitable(f"{label(node)} makes the units along another axis")
        self.writers[node] = weight
        self.cut(node, 1, -rank if weight.transposed else -1, blocks)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            if node.op_type == "Conv":
                self.checkconstant(node, 2)  # it goes with the weight
            else:
                self.cutconstant(node, 2, -1, blocks)

    def reads(self, node: ir.Node, weight: Weight, axis: int, blocks: Blocks) -> None:
        if len(weight.nodes) > 1:
            raise Unsuitable(f"{weight.name} is shared by several layers")
        shape = weight.tensor.shape.numpy()
        if axis != (1 - len(shape) if node.op_type == "Conv" else -1):
            raise Unsuitable(f"{label(node)} reads the units along another axis")
        if len(blocks) > 1:
            raise Unsuitable(f"{label(node)} reads several parts of each unit")
        self.readers[node] = (weight, weight.shape[0] // self.units)

    def checkconstant(self, node: ir.Node, index: int) -> None:
        if constant_array(node.inputs[index]) is None:
            raise Unsuitable(f"{label(node)} has a parameter that is no constant")

    def cutconstant(self, node: ir.Node, index: int, axis: int, blocks: Blocks) -> None:
        """Cut a constant input if it has the axis; one that is broadcast along it stays."""
        self.checkconstant(node, index)
        size = self.size(node.inputs[index], axis)
        if size == self.length(blocks):
            self.cut(node, index, axis, blocks)
        elif size != 1:
            raise Unsuitable(f"{label(node)} has a constant that does not fit")

    def through(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        """``node`` has ``value`` among its inputs or outputs and keeps units apart, or the walk ends here."""
        if node in self.done:
            return
        self.done.add(node)
        more = node.outputs[1:] if not is_standard(node, "Split") else ()
        if any(output.uses() or output.is_graph_output() for output in more):
            raise Unsuitable(f"{label(node)} has a second output that is used")
        if is_elementwise(node):
            self.elementwise(node, axis, blocks)
        elif self.layers.get(node) is not None and self.is_depthwise(node):
            self.depthwise(node, axis, blocks)
        elif is_standard(node, *POOLS, *PER_CHANNEL):
            self.per_channel(node, axis, blocks)
        elif is_standard(node, "Softmax", "LogSoftmax", "LayerNormalization", *REDUCTIONS):
            self.over_other_axes(node, axis, blocks)
        elif is_standard(node, "MatMul"):
            self.product(node, axis, blocks)
        elif node.domain in ("", "ai.onnx") and node.op_type in self.moves:
            self.moves[node.op_type](node, value, axis, blocks)
        else:
            raise Unsuitable(f"units go through {label(node)}, which may mix them")

    def elementwise(self, node: ir.Node, axis: int, blocks: Blocks) -> None:
        held = []
        for index, operand in enumerate(node.inputs):
            if operand is None:
                continue
            if constant_array(operand) is not None:
                self.cutconstant(node, index, axis, blocks)
                continue
            size = self.size(operand, axis)
            if size == self.length(blocks):
                held.append(operand)
            elif size != 1:
                raise Unsuitable(f"the dimensions of {operand.name} are not known to fit")
        if node.op_type in SUMS and len(held) > 1:
            first, *others = [sources(operand) for operand in held]
            if any(other != first for other in others):
                raise Unsuitable(
                    f"{label(node)} binds the units to those of another path, such as a residual"
                )
        for operand in (*held, node.outputs[0]):
            self.visit(operand, axis, blocks)

    def depthwise(self, node: ir.Node, axis: int, blocks: Blocks) -> None:
        weight = self.layers[node]
        rank = len(weight.tensor.shape)
        group = node.attributes.get_int("group", 1)
        if group != self.units or weight.tensor.shape[0] != group or axis != 1 - rank or blocks != (1,):
            raise Unsuitable(f"{label(node)} has {group} groups for {weight.tensor.shape[0]} channels")
        if len(weight.nodes) > 1:
            raise Unsuitable(f"{weight.name} is shared by several layers")
        self.cut(node, 1, -rank, blocks)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self.checkconstant(node, 2)
        self.grouped.append(node)
        self.ends(node, axis, blocks)

    def ends(self, node: ir.Node, axis: int, blocks: Blocks) -> None:
        self.visit(node.inputs[0], axis, blocks)
        self.visit(node.outputs[0], axis, blocks)

    def per_channel(self, node: ir.Node, axis: int, blocks: Blocks) -> None:
        if axis != 1 - self.rank(node.inputs[0]):
            raise Unsuitable(f"{label(node)} pools the units")
        if node.attributes.get_int("training_mode", 0):
            raise Unsuitable(f"{label(node)} is in training form")
        for index in range(1, len(node.inputs)):
            self.cutconstant(node, index, -1, blocks)
        self.ends(node, axis, blocks)

    def over_other_axes(self, node: ir.Node, axis: int, blocks: Blocks) -> None:
        """Softmax, normalizations and reductions, over axes behind or beside that of the units."""
        rank = self.rank(node.inputs[0])
        if node.op_type in REDUCTIONS:
            axes = self.ints(node, "axes", 1)
            apart = axes is not None and node.attributes.get_int("keepdims", 1) == 1
        elif node.op_type == "LayerNormalization":
            first = node.attributes.get_int("axis", -1)
            axes, apart = tuple(range(first - rank if first >= 0 else first, 0)), True
            for index in range(1, len(node.inputs)):
                self.cutconstant(node, index, axis, blocks)
        else:
            axes, apart = (node.attributes.get_int("axis", -1),), True
        if not apart or axes is None or axis in {one - rank if one >= 0 else one for one in axes}:
            raise Unsuitable(f"{label(node)} mixes the units")
        self.ends(node, axis, blocks)

    def product(self, node: ir.Node, axis: int, blocks: Blocks) -> None:
        if axis >= -2:
            raise Unsuitable(f"{label(node)} mixes the units, and has no weight that could change")
        for operand in node.inputs:
            size = self.size(operand, axis)
            if size == self.length(blocks) and constant_array(operand) is None:
                self.visit(operand, axis, blocks)
            elif size != 1:
                raise Unsuitable(f"the dimensions of {operand.name if operand else '?'} are not known to fit")
        self.visit(node.outputs[0], axis, blocks)

    # -- shapes -------------------------------------------------------------------------------------------------

    def ints(self, node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
        """An attribute that later became an input."""
        if name in node.attributes:
            return tuple(node.attributes[name].as_ints())
        array = constant_array(node.inputs[index]) if index < len(node.inputs) else None
        return None if array is None else tuple(int(one) for one in array.reshape(-1))

    def reshape(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        """Units stay consecutive; where, is known if all before them, or the size of all behind, stays as it was."""
        swap = _swap(node)
        if swap is not None and self.is_swap(swap):
            self.done |= {swap.first, swap.transpose, swap.last}
            self.swapped.append(swap)
            self.visit(swap.first.inputs[0], -3, blocks)
            self.visit(swap.last.outputs[0], -3, blocks)
            return
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        before, after = self.shapes.dims(source), self.shapes.dims(result)
        if not before or not after:
            raise Unsuitable(f"the dimensions around {label(node)} are not known")
        here, there = (before, after) if value is source else (after, before)
        at, width = self.reshaped_place(node, here, there, axis, blocks)
        place, other = (axis, blocks), (at - len(there), width)
        target, elements = place if value is result else other
        position = len(after) + target
        dims = template(before, after, position)
        piece = constant_piece(node.inputs[1], position, self.shapes) if dims is None else (0, 0)
        if piece is None:
            raise Unsuitable(f"too many dimensions around {label(node)} are not known")
        self.reshaped[node] = Reshaped(node, dims, position, elements, piece)
        self.visit(source, *(place if value is source else other))
        self.visit(result, *(place if value is result else other))

    def reshaped_place(
        self, node: ir.Node, here: Dims, there: Dims, axis: int, blocks: Blocks
    ) -> tuple[int, Blocks]:
        """The axis (from the front) and blocks of the units in the shape ``there``, if in ``here`` they are so."""
        position = len(here) + axis
        at = counterpart(here, there, position)
        if at is not None:
            size = there[at]
            if size == here[position]:
                return at, blocks
            if not isinstance(size, int) or not size:
                raise Unsuitable(f"the dimensions around {label(node)} are not known")
            if len(blocks) == 1 and size % self.units == 0:
                return at, (size // self.units,)
            if len(blocks) == 1 and self.units % size == 0 and size > 1:
                raise _Coarser(size)
            raise Unsuitable(f"{label(node)} cuts through units")
        if None not in here[axis:] and here[axis:] == there[axis:]:
            return len(there) + axis, blocks
        # Several parts side by side, each with all units: [3, H, D] as [3·H·D].
        for first in range(position):
            if len(blocks) == 1 and there[-1] is not None and product(here[first:]) == there[-1]:
                parts, inner = product(here[first:position]), product(here[position + 1 :])
                assert parts is not None
                assert inner is not None
                return len(there) - 1, (inner * blocks[0],) * parts
        raise Unsuitable(f"where {label(node)} puts the units is not known")

    def is_swap(self, swap: Swapped) -> bool:
        """Whether the dimensions are as :class:`Swapped` says, the units being heads."""
        source, result = swap.first.inputs[0], swap.last.outputs[0]
        split, middle, swapped = (self.shapes.dims(x) for x in (source, swap.first.outputs[0], result))
        if len(split) != 4 or len(middle) != 3 or len(swapped) != 4:
            return False
        b, h, s, d = split
        known = None not in (h, s, d) and middle[1:] == (s, d) and swapped[1:3] == (h, d)
        # Of batch and length, one tells the other.
        return known and (swapped[3] == s or (b is not None and swapped[0] == b))

    def transpose(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        rank = self.rank(value)
        perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
        position = rank + axis
        if value is node.inputs[0]:
            self.visit(node.outputs[0], list(perm).index(position) - rank, blocks)
        else:
            self.visit(node.inputs[0], perm[position] - rank, blocks)

    def unsqueeze(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        self.single_axes(node, node.inputs[0], node.outputs[0], value, axis, blocks)

    def squeeze(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        self.single_axes(node, node.outputs[0], node.inputs[0], value, axis, blocks)

    def single_axes(
        self,
        node: ir.Node,
        small: ir.Value | None,
        large: ir.Value | None,
        value: ir.Value,
        axis: int,
        blocks: Blocks,
    ) -> None:
        """``large`` has axes of one element more than ``small``."""
        axes, rank = self.ints(node, "axes", 1), self.rank(large)
        if axes is None:
            raise Unsuitable(f"{label(node)} has axes that are no constant")
        others = [one - rank for one in range(rank) if one not in {given % rank for given in axes}]
        if value is large and axis not in others:
            raise Unsuitable(f"{label(node)} takes some of the units")
        self.visit(small, others.index(axis) - len(others) if value is large else axis, blocks)
        self.visit(large, axis if value is large else others[axis], blocks)

    def gather(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        data, indices = node.inputs[0], constant_array(node.inputs[1])
        if indices is None:
            raise Unsuitable(f"{label(node)} has indices that are no constant")
        rank = self.rank(data)
        along = node.attributes.get_int("axis", 0) % rank
        # The axis that is taken from is replaced by those of the indices.
        result: list[int | None] = [*range(along), *[None] * indices.ndim, *range(along + 1, rank)]
        position = rank + axis if value is data else result[axis]
        if position is None or position == along:
            raise Unsuitable(f"{label(node)} takes some of the units")
        self.visit(data, position - rank, blocks)
        self.visit(node.outputs[0], result.index(position) - len(result), blocks)

    def split(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        """Along another axis, or into parts that each have all units."""
        source = node.inputs[0]
        rank = self.rank(source)
        if axis != node.attributes.get_int("axis", 0) % rank - rank:
            for operand in (source, *node.outputs):
                self.visit(operand, axis, blocks)
            return
        sizes = [self.size(part, axis) for part in node.outputs]
        each = tuple(size // self.units for size in sizes if isinstance(size, int) and size % self.units == 0)
        if "split" in node.attributes or len(each) < len(sizes) or (value is source and blocks != each):
            raise Unsuitable(f"{label(node)} cuts through units")
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            self.divided.append(Divided(node, each))
        self.visit(source, axis, each)
        for part, size in zip(node.outputs, each, strict=True):
            self.visit(part, axis, (size,))

    def expand(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        """A shape of Expand may have a 1 wherever the input has the size already."""
        source, result = node.inputs[0], node.outputs[0]
        before, after = self.shapes.dims(source), self.shapes.dims(result)
        if not before or len(before) != len(after):
            raise Unsuitable(f"the dimensions around {label(node)} are not known")
        dims = []
        for old, new in zip(before, after, strict=True):
            if old is not None and old == new:
                dims.append(1)
            elif isinstance(new, int):
                dims.append(new)
            else:
                raise Unsuitable(f"the dimensions around {label(node)} are not known")
        self.reshaped[node] = Reshaped(node, tuple(dims), None, blocks)
        self.ends(node, axis, blocks)

    def slice(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        rank, axes = self.rank(value), self.ints(node, "axes", 3)
        if axes is None or axis in {one - rank if one >= 0 else one for one in axes}:
            raise Unsuitable(f"{label(node)} takes some of the units")
        self.ends(node, axis, blocks)

    def concat(self, node: ir.Node, value: ir.Value, axis: int, blocks: Blocks) -> None:
        rank, along = self.rank(value), node.attributes.get_int("axis", 0)
        if axis == (along - rank if along >= 0 else along):
            raise Unsuitable(f"{label(node)} binds the units to others")
        for operand in (*node.inputs, node.outputs[0]):
            if constant_array(operand) is not None:
                raise Unsuitable(f"{label(node)} adds constants to the units")
            self.visit(operand, axis, blocks)

    def check_shape(self, node: ir.Node) -> None:
        """Whoever asks for the shape of a value may learn only what stays, or ask for a Reshape that is rewritten."""
        source = node.inputs[0]
        assert source is not None
        rank = self.rank(source)
        position = rank + self.places[source][0]
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
        taken = range(rank)[start:end]
        if position not in taken:
            return
        index = taken.index(position)
        rewritten = {change.node for change in self.reshaped.values() if change.dims is not None}
        removed = {one for swap in self.swapped for one in (swap.first, swap.last)}
        waiting, seen = list(node.outputs), set[ir.Value]()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.is_graph_output():
                raise Unsuitable(f"the shape of {source.name} is an output of the model")
            for use in value.uses():
                user = use.node
                if use.idx == 1 and (user in removed or user in rewritten):
                    continue
                if value is node.outputs[0] and _picks_others(user, index, len(taken)):
                    continue
                if not is_standard(user, *SHAPE_ARITHMETIC):
                    raise Unsuitable(f"{label(user)} depends on the size of {source.name}")
                waiting += user.outputs


def _picks_others(node: ir.Node, index: int, count: int) -> bool:
    """Whether a Gather or Slice of ``count`` dimensions leaves out that of ``index``."""
    if is_standard(node, "Gather"):
        picked = constant_array(node.inputs[1])
        return picked is not None and index not in {int(one) % count for one in picked.reshape(-1)}
    if is_standard(node, "Slice"):
        limits = [constant_array(value) for value in node.inputs[1:3]]
        steps = constant_array(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
        if any(limit is None or limit.size != 1 for limit in (*limits, steps)):
            return False
        start, end, step = (int(limit.reshape(())) for limit in (*limits, steps) if limit is not None)
        return index not in range(count)[start:end:step]
    return False


def _swap(node: ir.Node) -> Swapped | None:
    """The three nodes of :class:`Swapped`, if ``node`` is the first or the last and nothing else reads in between."""
    for last in (node, _only_user(_only_user(node))):
        transpose = last.inputs[0].producer() if last is not None and last.inputs[0] is not None else None
        first = (
            transpose.inputs[0].producer()
            if transpose is not None and transpose.inputs[0] is not None
            else None
        )
        if (
            last is not None
            and transpose is not None
            and first is not None
            and is_standard(last, "Reshape")
            and is_standard(transpose, "Transpose")
            and is_standard(first, "Reshape")
            and tuple(transpose.attributes.get_ints("perm", ())) == (0, 2, 1)
            and _only_user(first) is transpose
            and _only_user(transpose) is last
        ):
            return Swapped(first, transpose, last)
    return None


def _only_user(node: ir.Node | None) -> ir.Node | None:
    if node is None:
        return None
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None
