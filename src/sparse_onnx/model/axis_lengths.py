"""Lengths that ONNX shape inference does not tell: of a Range that counts an axis, of a Slice that is as long as one.

::

    p = Range(0, n, 1)                 n being the size of an axis of another value: p is [n]
    p = Slice(table, 0, n, axis, 1)    positions: p has n at this axis, if the graph goes on to broadcast it with n

A Slice is shorter where the table is. Then the model fails for this input where it broadcasts, whatever was made of
it before, unless n is 1: so all that it computes has length n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from sparse_onnx.model.graph import STANDARD_DOMAINS

__all__ = ["axis_lengths"]

_SAME_NUMBER = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_SAME_AXES = ("Cast", "Identity", "Unsqueeze")
_MAX_DEPTH = 16

_Dim = onnx.TensorShapeProto.Dimension


def axis_lengths(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Shapes of Ranges and Slices whose lengths have a name or size that an input of the model has.

    ``graph`` has the shapes that inference found. Names that it made up are not used: they hold for one run of it.
    """
    reader = _Reader(graph)
    found = []
    for node in graph.node:
        dims = reader.range(node) if node.op_type == "Range" else None
        if node.op_type == "Slice":
            dims = reader.slice(node)
        kind = reader.kinds.get(node.output[0], 0) if node.output else 0
        if dims is not None and kind:
            found.append(onnx.helper.make_tensor_value_info(node.output[0], kind, dims))
    return found


class _Reader:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._producers = {name: node for node in graph.node for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._users[name].append(node)
        self._constants: Mapping[str, onnx.TensorProto] = dict(_constants(graph))
        values = (*graph.value_info, *graph.output, *graph.input)
        self.kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        self._shapes = {
            value.name: list(value.type.tensor_type.shape.dim)
            for value in values
            if value.type.tensor_type.HasField("shape")
        }
        self._shapes |= {
            name: [_Dim(dim_value=size) for size in tensor.dims] for name, tensor in self._constants.items()
        }
        self._names = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim}

    def range(self, node: onnx.NodeProto) -> list[str | int] | None:
        """The shape of a Range that starts with 0 and goes on by 1."""
        if self._number(node.input[0]) != 0 or self._number(node.input[2]) != 1:
            return None
        length = self.dimension(node.input[1])
        return None if length is None else [_value(length)]

    def slice(self, node: onnx.NodeProto) -> list[str | int] | None:
        """The shape of the first elements of a table, as many as an axis of another value has."""
        given = [*node.input, "", ""][:5]
        axis, start = self._number(given[3]), self._number(given[1])
        if axis is None or start != 0 or (given[4] and self._number(given[4]) != 1):
            return None
        length, table = self.dimension(given[2]), self._shapes.get(given[0], [])
        if length is None or not -len(table) <= axis < len(table):
            return None
        if not all(dim.HasField("dim_value") for dim in table):
            return None
        if not self._is_broadcast_with(node.output[0], _value(length)):
            return None
        dims: list[str | int] = [dim.dim_value for dim in table]
        dims[axis] = _value(length)
        return dims

    def _is_broadcast_with(self, name: str, length: str | int, depth: int = _MAX_DEPTH) -> bool:
        """Whether positions go on to where something of this length is added to what is taken by them."""
        for node in self._users[name] if depth else ():
            taken = node.op_type in ("Gather", "GatherElements") and node.input[1] == name
            if node.op_type == "Add" and any(self._is_sum_of(operand, length) for operand in node.input):
                return True
            if (
                node.op_type == "Expand"
                and node.input[0] == name
                and self._names_length(node.input[1], length)
            ):
                return True
            goes_on = taken or (node.op_type in _SAME_AXES and node.input[0] == name)
            if goes_on and self._is_broadcast_with(node.output[0], length, depth - 1):
                return True
        return False

    def _is_sum_of(self, name: str, length: str | int, depth: int = _MAX_DEPTH) -> bool:
        """Whether a value, or a term of it, has an axis of this length."""
        if length in [_value(dim) for dim in self._shapes.get(name, [])]:
            return True
        node = self._producers.get(name)
        if node is None or node.op_type != "Add" or depth == 0:
            return False
        return any(self._is_sum_of(operand, length, depth - 1) for operand in node.input)

    def _names_length(self, target: str, length: str | int) -> bool:
        """Whether sizes that are put together have this one among them."""
        node = self._producers.get(target)
        parts = node.input if node is not None and node.op_type == "Concat" else ()
        sizes = [self.dimension(part) for part in parts]
        return any(size is not None and _value(size) == length for size in sizes)

    def dimension(self, name: str, depth: int = _MAX_DEPTH) -> _Dim | None:
        """The dimension that the only element of this value is."""
        node = self._producers.get(name)
        if node is None or depth == 0 or node.domain not in STANDARD_DOMAINS:
            return None
        if node.op_type in _SAME_NUMBER:
            return self.dimension(node.input[0], depth - 1)
        if node.op_type == "Shape":
            start, end = _range_of(node, len(self._shapes.get(node.input[0], ())))
            return self._of_input(node.input[0], start) if end - start == 1 else None
        shape = self._producers.get(node.input[0]) if node.op_type in ("Gather", "Slice") else None
        if shape is None or shape.op_type != "Shape" or shape.attribute:
            return None
        first = self._number(node.input[1])
        if first is None or (node.op_type == "Slice" and self._number(node.input[2]) != first + 1):
            return None
        return self._of_input(shape.input[0], first)

    def _of_input(self, name: str, axis: int) -> _Dim | None:
        dims = self._shapes.get(name, [])
        if not -len(dims) <= axis < len(dims):
            return None
        dim = dims[axis]
        return dim if dim.HasField("dim_value") or (dim.dim_param and dim.dim_param in self._names) else None

    def _number(self, name: str) -> int | None:
        tensor = self._constants.get(name)
        if tensor is None or tensor.external_data or int(np.prod(tensor.dims)) != 1:
            return None
        return int(onnx.numpy_helper.to_array(tensor).item())


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t


def _range_of(shape: onnx.NodeProto, rank: int) -> tuple[int, int]:
    given = {attribute.name: attribute.i for attribute in shape.attribute}
    start, end, _ = slice(given.get("start", 0), given.get("end", rank)).indices(rank)
    return start, end


def _value(dim: _Dim) -> str | int:
    return dim.dim_param or dim.dim_value
