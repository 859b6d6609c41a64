"""``clean.fold-constants``: compute once what depends on constants and on known sizes only.

Before::                                                 After::

    n = Gather(Shape(X), 1)          X [B, 12, E]            mask                    # an initializer [12, 12]
    p = Range(0, n, 1)
    mask = LessOrEqual(p, Unsqueeze(p, 1))

Exporters write masks, positions and the shapes of Reshape like this, and what is not known to be constant hides what a
graph does. A size is known if ONNX shape inference proves it from the inputs of the model, its tensors and its
operators: the shapes that a file merely claims for values in between are not asked. A dimension without a number stays
what it is.

Folded is what has the same result whoever computes it: operators that move, choose and compare elements, arithmetic of
integers, and sums, differences, products, quotients and roots of floats, which IEEE 754 rounds in one way only. It is
:mod:`onnx.reference` that computes. Left as nodes: everything else, results of more than 2¹⁸ elements (an Expand of
one number to a large mask), what comes behind 64 MiB of other results, NaN, what the weights and biases of linears
and convolutions are computed from, which is the subject of :mod:`sparse_onnx.passes.clean.fold_weights`, weights of
LSTM and GRU that a codebook decodes, what is stored with 8 bits and cast to floats (quantized), subgraphs and
functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from sparse_onnx.model.constants import constant_tensor
from sparse_onnx.model.decoding import decodes
from sparse_onnx.model.graph import add_initializer, is_standard, remove_if_unread
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.model.shape_inference import proven
from sparse_onnx.model.shapes import Dims, Shapes
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage

__all__ = ["FoldConstants"]

_MOVES = (
    *("Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
    *(
        "Range",
        "Reshape",
        "ScatterND",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
    ),
    "Where",
)
_COMPARISONS = ("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor")
_ARITHMETIC = (
    *("Abs", "Add", "Cast", "Ceil", "Div", "Floor", "Max", "Min", "Mul", "Neg", "Reciprocal", "Sign", "Sqrt"),
    "Sub",
)
_OF_INTEGERS = ("CumSum", "Mod", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")
_FOLDED = frozenset([*_MOVES, *_COMPARISONS, *_ARITHMETIC, *_OF_INTEGERS])
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_LINEARS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MAX_ELEMENTS = 2**18
_MAX_READ = 2**20  # elements of a constant that less is taken of
_MAX_BYTES = 2**26
_MAX_SIZES = 64  # elements of a tensor that may be a shape
_IN_MEMORY = 1024  # bytes: what is smaller is no weight

_Constants = dict[ir.Value, np.ndarray]
_Sizes = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "clean.fold-constants"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        statistics: dict[str, int | float] = {"nodes": 0, "tensors": 0, "bytes": 0}
        while any(is_standard(node, *_FOLDED) for node in model.graph):
            # What is folded may be the shape of a Reshape, and let inference know more.
            found = _find(model, _MAX_BYTES - int(statistics["bytes"]))
            done = _replace(model, found, context)
            if not done["nodes"]:
                break
            statistics = {name: count + done[name] for name, count in statistics.items()}
        return PassResult(model, statistics["nodes"] > 0, statistics)


def _find(model: ir.Model, budget: int) -> _Constants:
    """What nodes of the main graph compute from constants, in its order, as long as ``budget`` bytes suffice."""
    # What the file declares for values in between is left out, as if other inputs were given.
    shapes = Shapes(model, inputs={})
    evaluator = _Evaluator(model.opset_imports.get("", 1))
    found: _Constants = {}
    sizes: dict[ir.Value, _Sizes] = {}
    for node in model.graph:
        first = node.inputs[0] if node.inputs else None
        if is_standard(node, "Shape") and shapes.rank(first) is not None:
            sizes[node.outputs[0]] = _part_of_shape(node, shapes.dims(first))
            results = _as_constant(sizes[node.outputs[0]])
        elif first in sizes and is_standard(node, "Gather", "Slice"):
            results = _as_constant(_taken(node, sizes[first]))
        elif is_standard(node, *_FOLDED):
            inputs = [None if value is None else _constant(value, found) for value in node.inputs]
            absent = [value is None for value in node.inputs]
            known = all(none or array is not None for none, array in zip(absent, inputs, strict=True))
            results = evaluator.run(node, inputs) if known else None
        else:
            results = None
        if results is None:
            continue
        budget -= sum(array.nbytes for array in results)
        if budget < 0:
            break
        found.update(zip(node.outputs, results, strict=True))
    return found


def _part_of_shape(node: ir.Node, dims: Dims) -> _Sizes:
    """What a Shape gives of ``dims``."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
    return tuple(dim if isinstance(dim, int) else None for dim in dims[start:end])


def _as_constant(sizes: _Sizes | int | None) -> list[np.ndarray] | None:
    """The result of a node that gives these numbers, if all are known."""
    if sizes is None or (isinstance(sizes, tuple) and None in sizes):
        return None
    return [np.array(sizes, np.int64)]


def _taken(node: ir.Node, sizes: _Sizes) -> _Sizes | int | None:
    """What a Gather or Slice takes of ``sizes``."""
    numbers = [_integers(value) for value in node.inputs[1:]]
    places = np.arange(len(sizes))
    if any(
        number is None and value is not None for number, value in zip(numbers, node.inputs[1:], strict=True)
    ):
        return None
    try:
        if node.op_type == "Gather":
            chosen = places[numbers[0]]
        else:
            start, end, _axes, step = [None if x is None else int(x.item()) for x in (*numbers, None, None)][
                :4
            ]
            chosen = places[start:end:step]
    except (IndexError, ValueError):  # a broken node: whoever runs the model says so
        return None
    if chosen.ndim > 1:
        return None
    return sizes[int(chosen)] if chosen.ndim == 0 else tuple(sizes[i] for i in chosen)


def _integers(value: ir.Value | None) -> np.ndarray | None:
    tensor = constant_tensor(value)
    return tensor.numpy() if tensor is not None and tensor.dtype.is_integer() else None


def _constant(value: ir.Value, found: _Constants) -> np.ndarray | None:
    if value in found:
        return found[value]
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > _MAX_READ or not _is_plain(tensor.dtype):
        return None
    array = tensor.numpy()
    release_mapping(tensor)
    return array


def _is_plain(dtype: ir.DataType) -> bool:
    return dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL) or dtype.is_integer()


class _Evaluator:
    """Computes nodes of one opset."""

    def __init__(self, opset: int) -> None:
        self._opsets = [helper.make_opsetid("", opset)]

    def run(self, node: ir.Node, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
        """The outputs of ``node``, or None if they are not for this pass."""
        given = {f"i{index}": array for index, array in enumerate(inputs) if array is not None}
        if _depends_on_who_computes(node, list(given.values())):
            return None
        proto = ir.serde.serialize_node(node)
        names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
        proto.input[:], proto.output[:] = names, [f"o{index}" for index in range(len(node.outputs))]
        try:
            model = self._model(proto, given)
            return _evaluate(model, given) if _is_small(model) else None
        except Exception:  # whatever is wrong with this node, it stays, and whoever runs the model says so
            return None

    def _model(self, node: onnx.NodeProto, given: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        """``node`` alone, with the types and shapes of its outputs as far as they are known beforehand."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
        ]
        sizes = [
            onnx.numpy_helper.from_array(array, name)
            for name, array in given.items()
            if array.size <= _MAX_SIZES
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
        graph = helper.make_graph([node], "node", inputs, outputs, sizes)
        model = helper.make_model(graph, opset_imports=self._opsets)
        return proven(model)


def _is_small(model: onnx.ModelProto) -> bool:
    """Whether all sizes of the outputs are known and not too large."""
    types = [output.type.tensor_type for output in model.graph.output]
    known = all(t.HasField("shape") and all(dim.HasField("dim_value") for dim in t.shape.dim) for t in types)
    return known and all(math.prod(dim.dim_value for dim in t.shape.dim) <= _MAX_ELEMENTS for t in types)


def _evaluate(model: onnx.ModelProto, given: Mapping[str, np.ndarray]) -> list[np.ndarray] | None:
    """The outputs, if they are what was announced, without NaN."""
    from onnx.reference import ReferenceEvaluator  # takes a quarter of a second
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):  # that of onnx.reference 1.23 fails for more than 64 elements
        def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
            return (np.take_along_axis(data, indices, axis),)

    evaluator = ReferenceEvaluator(model, new_ops=[GatherElements])
    with np.errstate(all="ignore"):
        results = [np.asarray(result) for result in evaluator.run(None, dict(given))]
    for output, array in zip(model.graph.output, results, strict=True):
        announced = output.type.tensor_type
        if (
            helper.np_dtype_to_tensor_dtype(array.dtype) != announced.elem_type
            or array.shape != tuple(dim.dim_value for dim in announced.shape.dim)
            or (array.dtype in _FLOATS and np.isnan(array).any())
        ):
            return None
    return results


def _depends_on_who_computes(node: ir.Node, inputs: Sequence[np.ndarray]) -> bool:
    """Whether the result is not laid down to the last bit, or is quantized data."""
    floats = any(array.dtype in _FLOATS for array in inputs)
    match node.op_type:
        case "CumSum" | "Mod" | "Range" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceSum":
            return floats
        case "Div":
            return not floats and bool((inputs[1] <= 0).any() or (inputs[0] < 0).any())
        case "Max" | "Min":
            return floats and any(np.isnan(array).any() for array in inputs)
        case "Cast":
            return _is_lossy_cast(inputs[0], ir.DataType(node.attributes.get_int("to", 0)))
    return False


def _is_lossy_cast(array: np.ndarray, to: ir.DataType) -> bool:
    if not _is_plain(to):
        return True
    if to in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return array.dtype.itemsize == 1 and array.dtype != np.bool_
    if to == ir.DataType.BOOL or array.dtype not in _FLOATS:
        return False
    limits = np.iinfo(to.numpy())
    return not bool(((array > limits.min) & (array < limits.max)).all())


def _replace(model: ir.Model, found: _Constants, context: PassContext) -> dict[str, int]:
    """Put initializers in place of what is read of ``found``, and remove the nodes; what was done, counted."""
    done = {"nodes": 0, "tensors": 0, "bytes": 0}
    kept = set[ir.Node]()
    for value, array in reversed(found.items()):
        node = value.producer()
        assert node is not None
        if value.is_graph_output() or any(
            use.node in kept
            or _is_weight(use.node, use.idx)
            or (_is_recurrent_weight(use.node, use.idx) and _is_decoded(value))
            for use in value.uses()
        ):
            kept.add(node)
            continue
        if value.uses():
            name = value.name
            assert name is not None
            value.name = None
            array = np.array(array, order="C")
            small = array.nbytes <= _IN_MEMORY
            tensor = ir.tensor(array, name=name) if small else context.store(array, name)
            new = add_initializer(model.graph, name, tensor)
            new.metadata_props.update(value.metadata_props)
            value.replace_all_uses_with(new)
            done["tensors"] += 1
            done["bytes"] += array.nbytes
        done["nodes"] += remove_if_unread(node)
    return done


def _is_weight(node: ir.Node, index: int) -> bool:
    return index > 0 and is_standard(node, *_LINEARS)


def _is_recurrent_weight(node: ir.Node, index: int) -> bool:
    return index in (1, 2) and is_standard(node, "GRU", "LSTM")


def _is_decoded(value: ir.Value) -> bool:
    """Whether it comes from a codebook, maybe in another order or shape."""
    node = value.producer()
    while node is not None and not decodes(node, 1) and is_standard(node, *_MOVES):
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return node is not None and decodes(node, 1)
