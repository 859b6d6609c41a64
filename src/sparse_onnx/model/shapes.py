"""What is known of the shapes of a model's values, and what follows where they are broadcast.

A dimension is a size, a symbol (equal symbols are equal sizes; different ones may be equal, too) or None, where
nothing is known. Names that exporters write for "any size" (``?``, the empty name) and sizes below zero are None
(:mod:`.dimensions`): two of them have nothing in common.

The functions assume that the model is valid, so that what it broadcasts does fit. They answer yes only where that
holds for all sizes that the symbols may stand for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir

from sparse_onnx.errors import ModelFileError
from sparse_onnx.model import model_io
from sparse_onnx.model.axis_lengths import axis_lengths
from sparse_onnx.model.check import subgraphs as subgraphs_in_file
from sparse_onnx.model.constants import constant_number, constant_tensor, tensor_shape
from sparse_onnx.model.dimensions import Dim, forget_unknown, read_dim
from sparse_onnx.model.graph import STANDARD_DOMAINS, all_graphs, producer, subgraphs
from sparse_onnx.model.shape_inference import inferred

__all__ = ["Dims", "Run", "Shapes", "agree", "broadcast", "keeps", "same", "without_claims"]

Dims = tuple[Dim, ...]
Run = Mapping[str, Sequence[int]]
"""Shapes by the name of the value, as one run of a model has shown them."""

_Known = Mapping[str, tuple[Dims | None, int]]
"""By name: shape (None: rank unknown) and element type, as ONNX numbers them (0: unknown)."""


def same(one: Dim, other: Dim) -> bool:
    """Whether two dimensions are known to be equal."""
    return one is not None and one == other


def agree(one: Dims, other: Dims) -> bool:
    """Whether two shapes are known to be equal."""
    return len(one) == len(other) and all(map(same, one, other))


def broadcast(*shapes: Dims) -> Dims:
    """The shape of what is computed from operands of these shapes, element by element."""
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(map(_broadcast_axis, *padded)) if padded else ()


def _broadcast_axis(*dims: Dim) -> Dim:
    sizes = {dim for dim in dims if dim != 1}
    for dim in sizes:
        if isinstance(dim, int):
            return dim  # all others are 1 or equal
    return 1 if not sizes else sizes.pop() if len(sizes) == 1 else None


def keeps(shape: Dims, *others: Dims) -> bool:
    """Whether a value of ``shape`` is known to keep it when it is combined with ``others``, element by element: they
    neither enlarge it nor add axes."""
    return all(
        len(other) <= len(shape)
        and all(map(_keeps_axis, reversed(shape), reversed(other)))  # map() ends with the shorter one
        for other in others
    )


def _keeps_axis(dim: Dim, other: Dim) -> bool:
    return other == 1 or same(dim, other) or (isinstance(dim, int) and dim != 1)


class Shapes:
    """Shapes and types of the values of ``model``, which stays as it is: those of its main graph and of the bodies of
    If, Loop and Scan in it.

    They are what ONNX shape inference finds, on the model without its large weights, when first asked. It looks into
    functions for what their calls make; what is inside differs from call to call, so inline a function to ask for it.

    Args:
        model: Values of the main graph are looked up by name, so that copies of the model may ask, too; those of
            bodies, which may share a name, are known of ``model`` itself. Of others, what they say themselves is known.
        inputs: Shapes that inputs have, in place of those that the model declares; what it declares for other values
            of the main graph is then left out, since it may hold for other inputs. See also :func:`without_claims`.
        runs: What runs of the model have shown. Used where inference knows nothing: the rank, and each size that no
            run has contradicted, if all inputs of the model have fixed sizes or several runs differ in theirs.
            Values that were filled in so are in ``assumed``: a run shows, but does not prove.
    """

    def __init__(
        self, model: ir.Model, *, inputs: Mapping[str, Sequence[Dim]] | None = None, runs: Sequence[Run] = ()
    ) -> None:
        self._model, self._inputs, self._runs = model, inputs, tuple(runs)
        self.assumed: set[str] = set()

    @functools.cached_property
    def _tables(self) -> tuple[_Known, Mapping[ir.Graph, _Known]]:
        """What is known of the main graph, and of the bodies in it, as they are now."""
        bodies = tuple(_bodies(self._model.graph))
        try:
            graph = self._inferred().graph
        except ModelFileError:  # too large for inference, of a graph that has large weights in bodies
            return {}, {}
        of_bodies = map(_read, _bodies_in_file(graph))
        return _read(graph), dict(zip(bodies, of_bodies, strict=True))

    def _inferred(self) -> onnx.ModelProto:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(model_io.skeleton(self._model)[0])
        if self._inputs is not None:
            _declare(proto.graph, self._inputs)
        forget_unknown(proto.graph)  # or inference would spread it as one symbol
        _prefer_newer_reshape(proto)
        found = inferred(proto)
        told = set[str]()
        while lengths := [value for value in axis_lengths(found.graph) if value.name not in told]:
            _tell(proto.graph, lengths)
            told.update(value.name for value in lengths)
            found = inferred(proto)
        return found

    @property
    def _known(self) -> _Known:
        return self._tables[0]

    def _body(self, value: ir.Value) -> _Known | None:
        """What is known of the body that has ``value``, if one of the model has it."""
        graph = value.graph
        if graph is None or graph is self._model.graph or not isinstance(graph, ir.Graph):
            return None
        return self._tables[1].get(graph)

    @functools.cached_property
    def _runs_tell(self) -> bool:
        """Whether a size that all runs show depends on no size of an input."""
        sizes = [self._known.get(value.name or "", (None, 0))[0] for value in self._model.graph.inputs]
        if all(dims is not None and all(isinstance(dim, int) for dim in dims) for dims in sizes):
            return True
        names = [value.name or "" for value in self._model.graph.inputs]
        return len({tuple(tuple(run.get(name, ())) for name in names) for run in self._runs}) > 1

    def _seen(self, name: str) -> Dims | None:
        """What the runs have shown of this value."""
        seen = [tuple(run[name]) for run in self._runs if name in run]
        if not seen or len(seen) < len(self._runs) or len(set(map(len, seen))) > 1:
            return None
        columns = zip(*seen, strict=True)
        return tuple(sizes[0] if self._runs_tell and len(set(sizes)) == 1 else None for sizes in columns)

    def _find(self, value: ir.Value | None) -> Dims | None:
        """None: not even the rank is known."""
        if value is None:
            return None
        if (tensor := constant_tensor(value)) is not None:
            return tensor_shape(tensor)
        noted = None if value.shape is None else tuple(map(read_dim, value.shape))
        if noted is not None and self._inputs is None and all(map(_is_size, noted)):
            return noted  # needs no inference
        name = value.name or ""
        if (body := self._body(value)) is not None:
            return body.get(name, (noted, 0))[0]
        dims, _ = self._known.get(name, (noted, 0))
        seen = None if dims is not None and all(map(_is_size, dims)) else self._seen(name)
        if seen is None or (dims is not None and len(dims) != len(seen)):
            return dims
        if dims is not None:
            seen = tuple(d if _is_size(d) or s is None else s for d, s in zip(dims, seen, strict=True))
        if seen != dims:
            self.assumed.add(name)
        return seen

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of axes, if it is known."""
        dims = self._find(value)
        return None if dims is None else len(dims)

    def dims(self, value: ir.Value | None) -> Dims:
        """() for a scalar, and where not even the rank is known."""
        return self._find(value) or ()

    def may_add_axes(self, other: ir.Value | None, value: ir.Value) -> bool:
        """Whether ``other`` may have more axes than ``value``, which has one at least."""
        axes = self.rank(other)
        return axes is None or (axes > 1 and axes > (self.rank(value) or 1))

    def element_type(self, value: ir.Value) -> int:
        """As ONNX numbers them; 0 if it is not known."""
        if (tensor := constant_tensor(value)) is not None:
            return int(tensor.dtype)
        known = self._body(value) or self._known
        return known.get(value.name or "", (None, 0))[1]

    def is_float32(self, value: ir.Value) -> bool:
        """Whether ``value`` is known to be FLOAT."""
        return self.element_type(value) == onnx.TensorProto.FLOAT

    def fixed(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The sizes of all axes, if they are known."""
        return _fixed(self._find(value))

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all values of the main graph whose sizes are all known."""
        found = {name: _fixed(dims) for name, (dims, _) in self._known.items()}
        return {name: sizes for name, sizes in found.items() if sizes is not None}

    def number(self, value: ir.Value | None, rank: int | None = None) -> float | None:
        """The only element of a constant, or of what is computed from constants and known dimensions: some
        exports take the scale of an attention from the head size, as Sqrt(1 / Sqrt(Cast(Slice(Shape(q))))).

        None as well where it may have more than ``rank`` axes (None: any number).
        """
        node = producer(value, "Cast", "Identity", "Sqrt", "Mul", "Div", "Slice", "Gather")
        if node is None:
            return constant_number(value, rank)
        known = self.rank(value)
        if rank is not None and (known is None or known > rank):
            return None
        if node.op_type in ("Slice", "Gather"):
            return self._dimension(node)
        operands = [self.number(operand) for operand in node.inputs]
        first, last = operands[0], operands[-1]
        if first is None or last is None:
            return None
        match node.op_type:
            case "Sqrt":
                return math.sqrt(first) if first >= 0 else None
            case "Mul":
                return first * last
            case "Div":
                return first / last if last else None
            case "Cast":
                return first if node.attributes.get_int("to", 0) == ir.DataType.FLOAT else None
        return first

    def _dimension(self, node: ir.Node) -> float | None:
        """The dimension that a Slice or Gather takes from a Shape, if it is known."""
        shape = producer(node.inputs[0], "Shape")
        start = constant_number(node.inputs[1])
        if shape is None or shape.attributes or start is None:
            return None
        dims = self.dims(shape.inputs[0])
        one = node.op_type == "Gather" or self.dims(node.outputs[0]) == (1,)
        dim = dims[int(start)] if one and -len(dims) <= start < len(dims) else None
        return float(dim) if isinstance(dim, int) else None


def without_claims(model: ir.Model) -> ir.Model:
    """A copy of ``model`` that says nothing of the shapes of what its nodes make, in bodies and functions neither: what
    is known of it then follows from its inputs. Its weights are shared."""
    copy = model.clone()
    for graph in all_graphs(copy):
        for node in graph:
            for value in node.outputs:
                value.shape = None
    return copy


def _bodies(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The bodies of If, Loop and Scan in ``graph``, each in front of those inside it."""
    for node in graph:
        for body in subgraphs(node):
            yield body
            yield from _bodies(body)


def _bodies_in_file(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The same in a file, in the same order."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in subgraphs_in_file(attribute):
                yield body
                yield from _bodies_in_file(body)


def _read(graph: onnx.GraphProto) -> _Known:
    known: dict[str, tuple[Dims | None, int]] = {
        tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in graph.initializer
    }
    for value in (*graph.value_info, *graph.output, *graph.input):
        kind = value.type.tensor_type
        dims = tuple(map(_dim, kind.shape.dim)) if kind.HasField("shape") else None
        known[value.name] = (dims, kind.elem_type)
    return known


def _tell(graph: onnx.GraphProto, values: Sequence[onnx.ValueInfoProto]) -> None:
    """Declare these values, whatever is declared of them."""
    names = {value.name for value in values}
    others = [value for value in graph.value_info if value.name not in names]
    del graph.value_info[:]
    graph.value_info.extend([*others, *values])


def _prefer_newer_reshape(proto: onnx.ModelProto) -> None:
    """Let Reshape of opset 13 be inferred as of 14: only that looks through the nodes that compute its target."""
    for opset in proto.opset_import:
        if opset.domain in STANDARD_DOMAINS and opset.version == 13:
            opset.version = 14


def _is_size(dim: Dim) -> bool:
    return isinstance(dim, int)


def _fixed(dims: Dims | None) -> tuple[int, ...] | None:
    sizes = tuple(dim for dim in dims or () if isinstance(dim, int))
    return sizes if dims is not None and len(sizes) == len(dims) else None


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _written(dim: Dim) -> onnx.TensorShapeProto.Dimension:
    if isinstance(dim, str):
        return onnx.TensorShapeProto.Dimension(dim_param=dim)
    return onnx.TensorShapeProto.Dimension(dim_value=dim)


def _declare(graph: onnx.GraphProto, inputs: Mapping[str, Sequence[Dim]]) -> None:
    for value in graph.input:
        if value.name in inputs:
            shape = value.type.tensor_type.shape
            del shape.dim[:]
            shape.dim.extend(map(_written, inputs[value.name]))
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
