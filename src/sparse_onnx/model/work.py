"""How many multiplications every operator of a model does, and which of them no sparse kernel takes, with the reason.

Counted are the multiply-adds of one run, zeros included, of operators that do matrix-like work; all others do little
beside them. :data:`OPERATORS` says what to count: one entry for each operator, with a :class:`Product` for each weight
that it multiplies by. What is in a body of If, Loop or Scan counts as often as the body runs, of the branches of an If
the one with more work; what is inside a model-local function counts with each call.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from sparse_onnx.model.bit_packing import UNPACK_DOMAIN
from sparse_onnx.model.decoding import decodes
from sparse_onnx.model.graph import input_at, is_standard, name_of, producer, subgraphs
from sparse_onnx.model.integer_operators import integer_operator, read_integers
from sparse_onnx.model.level_weights import level_weight, node_weights
from sparse_onnx.model.shapes import Shapes, without_claims
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.ops import int8_conv, int8_feed_forward, int8_matmul, q_matmul
from sparse_onnx.sparse_ops.ops.sparse_feed_forward import PREFIX

__all__ = [
    "OPERATORS",
    "NodeWork",
    "Product",
    "Untouched",
    "Work",
    "left_alone",
    "sparse_share",
    "untouched",
]

Shape = tuple[int, ...]
ShapeOf = Callable[[ir.Value | None], Shape]

_MICROSOFT = "com.microsoft"
_FUNCTION = "sparse_onnx.from_function"
# From a constant to a weight that the model computes anew in every run.
_CONVERSIONS = (
    *("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose"),
    "Unsqueeze",
)
_KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", _MICROSOFT, DOMAIN)
_MATRIX_LIKE = re.compile("MatMul|Gemm|Conv|Attention|LSTM|MoE")  # of ONNX Runtime's, which become more
_BODIES = ("If", "Loop", "Scan")
_NO_WEIGHT = "multiplies computed values: there is no weight"


class _UnknownShapeError(Exception):
    """A shape that the count depends on is not known."""


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of an operator: ``count`` gives its multiply-adds, ``weights`` are the inputs that may hold the
    weight, the first constant one of them does."""

    weights: tuple[int, ...]
    count: Callable[[ir.Node, ShapeOf], int]


@dataclasses.dataclass(frozen=True)
class NodeWork:
    """One product of one node.

    Attributes:
        node: Equal for the products of one node.
        op_type: Its operator, with the domain before it if that is not the standard one.
        weight: The name of the constant that it multiplies by; empty if there is none.
        products: Multiply-adds in one run, zeros included; None if a shape is not known.
        sparse: Whether an operator of ours does it already.
        reason: Why no sparse kernel takes it, as far as the operator alone says.
    """

    node: int
    op_type: str
    weight: str
    products: int | None
    sparse: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Untouched:
    """What no sparse kernel takes: ``count`` nodes of an operator for one reason, with ``share`` of all work (None if
    it could not be counted)."""

    op_type: str
    count: int
    share: float | None
    reason: str


def _matmul(a: int, transposed: str = "") -> Callable[[ir.Node, ShapeOf], int]:
    """The product of input ``a`` with another, which may be transposed by an attribute."""

    def count(node: ir.Node, shape: ShapeOf) -> int:
        left = shape(input_at(node, a))
        turned = transposed != "" and node.attributes.get_int(transposed, 0) == 1 and len(left) > 1
        return math.prod(shape(node.outputs[0])) * (left[-2] if turned else left[-1])

    return count


def _linear(a: int, b: int) -> Callable[[ir.Node, ShapeOf], int]:
    """The product of input ``a`` with the matrix ``b``, for operators whose outputs no shape inference knows."""

    def count(node: ir.Node, shape: ShapeOf) -> int:
        outputs = shape(input_at(node, b))[0 if node.attributes.get_int("transB", 0) else -1]
        return math.prod(shape(input_at(node, a))) * outputs

    return count


def _packed_matmul(node: ir.Node, shape: ShapeOf) -> int:
    return math.prod(shape(input_at(node, 0))) * node.attributes.get_int("N", 0)


def _second_linear(node: ir.Node, shape: ShapeOf) -> int:
    sizes = (node.attributes.get_int(PREFIX + name, 0) for name in ("K", "N"))
    return math.prod(shape(input_at(node, 0))[:-1]) * math.prod(sizes)


def _convolution(weight: int) -> Callable[[ir.Node, ShapeOf], int]:
    def count(node: ir.Node, shape: ShapeOf) -> int:
        return math.prod(shape(node.outputs[0])) * math.prod(shape(input_at(node, weight))[1:])

    return count


def _packed_convolution(node: ir.Node, shape: ShapeOf) -> int:
    window = node.attributes.get_ints("kernel_shape", ())
    inputs = node.attributes.get_int("channels", 0) * math.prod(window)
    return math.prod(shape(node.outputs[0])) * inputs


def _transposed_convolution(node: ir.Node, shape: ShapeOf) -> int:
    return math.prod(shape(input_at(node, 0))) * math.prod(shape(input_at(node, 1))[1:])


def _recurrent(weight: int) -> Callable[[ir.Node, ShapeOf], int]:
    """Every step of every sequence multiplies by all of the weight."""

    def count(node: ir.Node, shape: ShapeOf) -> int:
        return math.prod(shape(input_at(node, 0))[:2]) * math.prod(shape(input_at(node, weight)))

    return count


def _einsum(node: ir.Node, shape: ShapeOf) -> int:
    """The sizes of all letters, as if all operands were multiplied at once."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    operands = equation.split("->")[0].split(",")
    if len(operands) < 2:
        return 0
    if len(operands) != len(node.inputs):
        raise _UnknownShapeError
    sizes: dict[str, int] = {}
    others: list[int] = []  # behind an ellipsis, aligned at the end
    for text, value in zip(operands, node.inputs, strict=True):
        before, dots, after = text.partition("...")
        dims = shape(value)
        named = [*before, *after]
        middle = dims[len(before) : len(dims) - len(after)] if dots else ()
        if len(dims) != len(named) + len(middle):
            raise _UnknownShapeError
        outer = [*dims[: len(before)], *dims[len(dims) - len(after) :]]
        for letter, size in zip(named, outer, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
        others = [1] * (len(middle) - len(others)) + others
        for place, size in enumerate(reversed(middle)):
            others[-1 - place] = max(others[-1 - place], size)
    return math.prod(sizes.values()) * math.prod(others)


def _attention(
    key: int, present: int | None = None, past: int | None = None
) -> Callable[[ir.Node, ShapeOf], int]:
    """Queries by keys and probabilities by values: ``key`` has the keys, [B, L, H] or [B, heads, L, D]. With a cache,
    all of them are in the output ``present`` or begin with the input ``past``, [B, heads, L, D]."""

    def count(node: ir.Node, shape: ShapeOf) -> int:
        made = present is not None and present < len(node.outputs) and node.outputs[present].name
        if made:
            length = shape(node.outputs[present or 0])[2]
        else:
            length = shape(input_at(node, key))[-2]
            if past is not None and (before := input_at(node, past)) is not None:
                length += shape(before)[-2]
        return 2 * math.prod(shape(node.outputs[0])) * length

    return count


def _uncounted(_node: ir.Node, _shape: ShapeOf) -> int:
    raise _UnknownShapeError


def _projection(node: ir.Node, shape: ShapeOf) -> int:
    return math.prod(shape(input_at(node, 0))) * shape(input_at(node, 1))[-1]


def _one(weights: tuple[int, ...], count: Callable[[ir.Node, ShapeOf], int]) -> tuple[Product, ...]:
    return (Product(weights, count),)


_RECURRENT = (Product((1,), _recurrent(1)), Product((2,), _recurrent(2)))
_SELF_ATTENTION = (Product((1,), _projection), Product((), _attention(0)))

OPERATORS: Mapping[tuple[str, str], tuple[Product, ...]] = {
    ("", "MatMul"): _one((1, 0), _matmul(0)),
    ("", "Gemm"): _one((1, 0), _matmul(0, "transA")),
    ("", "MatMulInteger"): _one((1, 0), _matmul(0)),
    ("", "QLinearMatMul"): _one((3, 0), _matmul(0)),
    ("", "Conv"): _one((1,), _convolution(1)),
    ("", "ConvInteger"): _one((1,), _convolution(1)),
    ("", "QLinearConv"): _one((3,), _convolution(3)),
    ("", "DeformConv"): _one((1,), _convolution(1)),
    ("", "ConvTranspose"): _one((1,), _transposed_convolution),
    ("", "Einsum"): _one((1, 0, 2, 3), _einsum),
    ("", "LSTM"): _RECURRENT,
    ("", "GRU"): _RECURRENT,
    ("", "RNN"): _RECURRENT,
    ("", "Attention"): _one((), _attention(1, present=1, past=4)),
    (_MICROSOFT, "FusedMatMul"): _one((1, 0), _matmul(0, "transA")),
    (_MICROSOFT, "FusedMatMulActivation"): _one((1, 0), _matmul(0, "transA")),
    (_MICROSOFT, "TransposeMatMul"): _one((1, 0), _matmul(0, "transA")),
    (_MICROSOFT, "SparseToDenseMatMul"): _one((0, 1), _matmul(0, "transA")),
    (_MICROSOFT, "FusedGemm"): _one((1, 0), _matmul(0, "transA")),
    (_MICROSOFT, "GemmFastGelu"): _one((1, 0), _matmul(0)),
    (_MICROSOFT, "GemmFloat8"): _one((1, 0), _matmul(0, "transA")),
    (_MICROSOFT, "QGemm"): _one((3, 0), _linear(0, 3)),
    (_MICROSOFT, "MatMulInteger16"): _one((1, 0), _matmul(0)),
    (_MICROSOFT, "MatMulIntegerToFloat"): _one((1, 0), _linear(0, 1)),
    (_MICROSOFT, "DynamicQuantizeMatMul"): _one((1, 0), _linear(0, 1)),
    (_MICROSOFT, "MatMulNBits"): _one((1,), _packed_matmul),
    (_MICROSOFT, "MatMulBnb4"): _one((1,), _packed_matmul),
    (_MICROSOFT, "MatMulFpQ4"): _one((1,), _matmul(0)),
    (_MICROSOFT, "FusedConv"): _one((1,), _convolution(1)),
    (_MICROSOFT, "NhwcFusedConv"): _one((1,), _convolution(1)),
    (_MICROSOFT, "QLinearConv"): _one((3,), _convolution(3)),
    (_MICROSOFT, "ConvTransposeWithDynamicPads"): _one((1,), _transposed_convolution),
    (_MICROSOFT, "DynamicQuantizeLSTM"): _RECURRENT,
    (_MICROSOFT, "Attention"): _SELF_ATTENTION,
    (_MICROSOFT, "QAttention"): _SELF_ATTENTION,
    (_MICROSOFT, "MultiHeadAttention"): _one((), _attention(1, present=1, past=6)),
    (_MICROSOFT, "DecoderMaskedMultiHeadAttention"): _one((), _attention(1, present=1, past=5)),
    (_MICROSOFT, "GroupQueryAttention"): _one((), _attention(1, present=1, past=3)),
    (_MICROSOFT, "MoE"): tuple(Product((weight,), _uncounted) for weight in (2, 4, 6)),
    (_MICROSOFT, "QMoE"): tuple(Product((weight,), _uncounted) for weight in (2, 5, 8)),
    **{
        (DOMAIN, op_type): _one((1,), _packed_matmul)
        for op_type in (*int8_matmul.OP_TYPES, *q_matmul.OP_TYPES)
    },
    **{
        (DOMAIN, op_type): (
            Product((1,), _packed_matmul),
            Product((len(int8_quads.parts(kind.dense)) + 2,), _second_linear),
        )
        for op_type, kind in int8_feed_forward.OP_TYPES.items()
    },
    **{(DOMAIN, op_type): _one((1,), _packed_convolution) for op_type in int8_conv.OP_TYPES},
}
"""Products by (domain, operator). ``LSTM`` multiplies by two weights, MatMul by whichever operand is constant."""


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _label(node: ir.Node) -> str:
    return f"{_domain(node)}::{node.op_type}" if _domain(node) else node.op_type


def _has_tensor(value: ir.Value | None) -> bool:
    """Whether the model has a value for it, even if a caller may give another."""
    if value is None:
        return False
    producer = value.producer()
    return value.const_value is not None or (producer is not None and is_standard(producer, "Constant"))


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    return value.const_value or ir.convenience.get_const_tensor(value)


def _weight(node: ir.Node, product: Product) -> tuple[ir.Value | None, ir.Node | None]:
    """The constant that a product multiplies by, and the node that makes the operand of it, if there is one."""
    for index in product.weights:
        if _has_tensor(value := input_at(node, index)):
            return value, None
    for index in product.weights:
        value = input_at(node, index)
        producer = value.producer() if value is not None else None
        maker = producer
        while producer is not None and (place := _converted(producer)) is not None:
            value = producer.inputs[place]
            if _has_tensor(value):
                return value, maker
            producer = value.producer() if value is not None else None
    return None, None


def _converted(node: ir.Node) -> int | None:
    """Which input ``node`` makes a weight of that is computed in every run; None: it does something else."""
    if is_standard(node, *_CONVERSIONS) or decodes(node, 0):
        return 0
    if decodes(node, 1):
        return 1  # of a codebook the indices
    if is_standard(node, "Sub"):  # a zero point of integers that were cast
        cast = producer(node.inputs[1], "Cast")
        return 0 if _has_tensor(node.inputs[1] if cast is None else cast.inputs[0]) else None
    if is_standard(node, "Mul"):  # by their scale
        constant = [_has_tensor(value) for value in node.inputs]
        return constant.index(False) if constant.count(False) == 1 else None
    return None


def _reason(node: ir.Node, product: Product) -> str:
    """Why the kernels do not take it, or the general words if nothing about the operator says so."""
    value, maker = _weight(node, product)
    if value is None:
        return _NO_WEIGHT
    if value.is_graph_input():
        return "is also a graph input, so a caller may replace it"
    if maker is not None:
        return f"its weight is computed in every run, by {maker.op_type}"
    if is_standard(node, "MatMul", "Gemm") and value is input_at(node, 0):
        return f"the constant is the left operand of {node.op_type}"
    if node.domain == DOMAIN:
        return "is a product of integers already"
    tensor = _tensor(value)
    if is_standard(node, "Conv") and node.attributes.get_int("group", 1) > 1:
        return "belongs to a depthwise or grouped convolution"
    dtype = "" if tensor is None or tensor.dtype == ir.DataType.FLOAT else f" ({tensor.dtype.name})"
    unread = read_integers(value) if integer_operator(node) is not None and value.is_initializer() else None
    why = f": {unread}" if isinstance(unread, str) else ""
    return f"no sparse kernel takes the weights of {_label(node)}{dtype}{why}"


def _products(node: ir.Node) -> tuple[Product, ...]:
    """Of an operator that is not in the table, each constant matrix among its inputs is taken for a weight, unless it
    is known to do little work."""
    if node.domain == UNPACK_DOMAIN:
        return ()
    if (key := (_domain(node), node.op_type)) in OPERATORS:
        return OPERATORS[key]
    if node.domain in _KNOWN_DOMAINS and (node.domain != _MICROSOFT or not _MATRIX_LIKE.search(node.op_type)):
        return ()
    constants = [index for index, value in enumerate(node.inputs) if _has_tensor(value)]
    tensors = {index: _tensor(node.inputs[index]) for index in constants}  # type: ignore[arg-type]
    return tuple(
        Product((index,), _uncounted) for index, tensor in tensors.items() if tensor and len(tensor.shape) > 1
    )


def left_alone(model: ir.Model, known: Collection[str]) -> list[tuple[str, str]]:
    """(place, reason) of the constant weights that only operators without a sparse kernel multiply by, and of the
    functions with such operators inside. ``known`` has the places of which all is said already."""
    found: dict[str, str] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            for product in _products(node):
                value, _ = _weight(node, product)
                if value is None or value.name in known:
                    continue
                inside = "" if graph is model.graph else "lies in the body of If, Loop or Scan: "
                found.setdefault(value.name or name_of(node), inside + _reason(node, product))
    for function in model.functions.values():
        place = f"{function.domain}::{function.name}"
        inner = collections.Counter(_label(node) for node in function.all_nodes() if _products(node))
        if function.domain != DOMAIN and inner and place not in known:
            found[place] = (
                f"{', '.join(f'{count} {label}' for label, count in inner.items())} inside a function"
            )
    return list(found.items())


class Work:
    """The work of ``model`` with inputs of these shapes, or of those that it declares: those of other values are
    inferred, and where that fails taken from a run. ``model`` is not changed."""

    def __init__(self, model: ir.Model, input_shapes: Mapping[str, Shape] | None = None) -> None:
        self._model = _without_functions(model)
        self._shapes = Shapes(self._model, inputs=input_shapes or {})
        # A run can tell no shapes of what stood in a function.
        self._visible = {value.name for node in model.graph for value in node.outputs}

    def unknown(self) -> set[str]:
        """Names of values of the main graph whose shapes a run has to tell."""
        found = set()
        for node in self._model.graph:
            if _products(node) or level_weight(node):
                values = [*node.inputs, *node.outputs]
                found |= {
                    value.name for value in values if value is not None and self._shapes.fixed(value) is None
                }
        return {name for name in found if name and name in self._visible}

    def count(self, observed: Mapping[str, Shape] | None = None) -> tuple[NodeWork, ...]:
        """Every product, in the order of the graph; ``observed`` has shapes of a run by name."""
        known = observed or {}

        def shape(value: ir.Value | None) -> Shape:
            if value is None:
                raise _UnknownShapeError
            if value.graph is self._model.graph and value.name in known:
                return known[value.name or ""]
            if (fixed := self._shapes.fixed(value)) is None:
                raise _UnknownShapeError
            return fixed

        numbers = {id(node): number for number, node in enumerate(self._model.graph.all_nodes())}
        return tuple(_graph_work(self._model.graph, 1, shape, numbers))


def _without_functions(model: ir.Model) -> ir.Model:
    """A copy with the bodies of functions in place of their calls, but of ours, which stay as they are."""
    copy = without_claims(model)
    for key in [
        key for key, function in copy.functions.items() if function.domain in (DOMAIN, UNPACK_DOMAIN)
    ]:
        del copy.functions[key]
    for function in copy.functions.values():
        for node in function.all_nodes():
            node.metadata_props[_FUNCTION] = f"{function.domain}::{function.name}"
    if copy.functions:
        try:
            common.InlinePass()(copy)
        except ir.passes.PreconditionError:  # they call each other in a circle: no runtime takes that
            copy.functions.clear()
    return copy


def _graph_work(
    graph: ir.Graph, times: int | None, shape: ShapeOf, numbers: Mapping[int, int], inside: str = ""
) -> Iterator[NodeWork]:
    """The work of a graph that runs so many times (None: that is not known)."""

    def scaled(count: Callable[[ir.Node, ShapeOf], int], node: ir.Node) -> int | None:
        try:
            return None if times is None else times * count(node, shape)
        except (_UnknownShapeError, IndexError):
            return None

    for node in graph:
        function = node.metadata_props.get(_FUNCTION)
        where = f"lies in the function {function}: " if function else inside
        for product in _products(node):
            weight, _ = _weight(node, product)
            name = "" if weight is None else weight.name or ""
            products = scaled(product.count, node)
            if products != 0:
                reason = where + _reason(node, product)
                yield NodeWork(
                    numbers[id(node)], _label(node), name, products, _leaves_zeros_out(node), reason
                )
        for stored in node_weights(node):
            rows = scaled(_rows_of_ours, node)
            products = None if rows is None else rows * math.prod(stored.shape)
            yield NodeWork(numbers[id(node)], _label(node), stored.name, products, True, "is sparse already")
        if is_standard(node, *_BODIES):
            repeats = _repeats(node, shape)
            total = None if times is None or repeats is None else times * repeats
            bodies = [
                list(_graph_work(body, total, shape, numbers, "lies in the body of If, Loop or Scan: "))
                for body in subgraphs(node)
            ]
            yield from (
                _largest(bodies) if node.op_type == "If" else (work for body in bodies for work in body)
            )


def _leaves_zeros_out(node: ir.Node) -> bool:
    """Whether an operator of ours multiplies by integers, without the zeros among them."""
    return node.domain == DOMAIN and node.op_type.startswith("Sparse")


def _largest(branches: Sequence[list[NodeWork]]) -> Iterator[NodeWork]:
    """All of both branches, but with the work of the larger one only: one of them runs."""

    def total(branch: list[NodeWork]) -> int:
        return sum(work.products or 0 for work in branch)

    largest = max(range(len(branches)), key=lambda index: total(branches[index]), default=0)
    for index, branch in enumerate(branches):
        yield from branch if index == largest else (dataclasses.replace(work, products=0) for work in branch)


def _repeats(node: ir.Node, shape: ShapeOf) -> int | None:
    """How often a body runs, as far as that is fixed."""
    if node.op_type == "If":
        return 1
    if node.op_type == "Loop":
        trips = input_at(node, 0)
        tensor = None if trips is None else _tensor(trips)
        return None if tensor is None or tensor.size != 1 else int(tensor.numpy().reshape(-1)[0])
    scanned = node.attributes.get_int("num_scan_inputs", 0)
    axes = node.attributes["scan_input_axes"].as_ints() if "scan_input_axes" in node.attributes else [0]
    try:
        return shape(node.inputs[len(node.inputs) - scanned])[axes[0]]
    except (_UnknownShapeError, IndexError):
        return None


def _rows_of_ours(node: ir.Node, shape: ShapeOf) -> int:
    """The vectors that every stored weight of an operator of ours multiplies."""
    if node.op_type.startswith("SparseConvDepthwise"):
        raise _UnknownShapeError  # the maps between the two are no value of the graph
    if node.op_type.startswith("SparseConv"):
        images, _, *positions = shape(node.outputs[0])
        return images * math.prod(positions)
    return math.prod(shape(input_at(node, 0))[:-1])


def sparse_share(work: Sequence[NodeWork], sparse: Collection[str]) -> float:
    """The share, in [0, 1], of all multiply-adds that could be counted which sparse kernels do: with the weights named
    in ``sparse``, and what was sparse already."""
    total = sum(part.products or 0 for part in work)
    done = sum(part.products or 0 for part in work if part.sparse or part.weight in sparse)
    return done / total if total else 0.0


def untouched(
    work: Sequence[NodeWork], layers: Collection[str], reasons: Mapping[str, str]
) -> list[Untouched]:
    """What is no layer for a sparse kernel, by operator and reason, the most work first; what could not be counted
    comes last. ``layers`` are the names of weights that are; ``reasons`` says more of some others, by name."""
    groups: dict[tuple[str, str], list[NodeWork]] = collections.defaultdict(list)
    for part in work:
        if not part.sparse and part.weight not in layers:
            reason = reasons.get(part.weight, part.reason) if part.weight else part.reason
            groups[part.op_type, reason].append(part)
    total = sum(part.products or 0 for part in work)
    found = []
    for (op_type, reason), parts in groups.items():
        counted = [part.products for part in parts if part.products is not None]
        share = sum(counted) / total if total and len(counted) == len(parts) else None
        found.append(Untouched(op_type, len({part.node for part in parts}), share, reason))
    return sorted(found, key=lambda row: (row.share is None, -(row.share or 0)))
