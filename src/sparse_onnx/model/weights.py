"""Find the weights of linears, convolutions and recurrent layers, and the places to leave alone, with the reason.

A *linear* is a ``MatMul(X, W)`` or ``Gemm(X, W, ...)`` whose second operand is a constant matrix. Passes see
its weight as W [K, N]: K input channels (the axis that is summed over), N output channels. A *convolution* is a
``Conv(X, W, ...)`` with a constant weight [N, C / group, window...]; W is then [K, N] with K = C / group · window.
An ``LSTM(X, W, R, ...)`` or ``GRU`` has two weights [directions, gates · hidden, K]; both are seen as [K, N] with all
gates of all directions side by side.

A weight need not be stored as floats: nodes may decode it in every run (:mod:`sparse_onnx.model.encodings`), or the
operator multiplies by integers (:mod:`sparse_onnx.model.integer_operators`). Callers that can read and write such
weights ask for them; for all others they are places to leave alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import SparseOnnxError, UsageError
from sparse_onnx.model.constants import tensor_shape
from sparse_onnx.model.decoding import Decoded, IsLayer, Move, follow, is_lookup, results
from sparse_onnx.model.encodings import DENSE, Affine, Dense, Encoding, Packed, Palette
from sparse_onnx.model.graph import STANDARD_DOMAINS, initializers
from sparse_onnx.model.integer_operators import integer_operator, read_integers
from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.model.nbits import PackedBlocks
from sparse_onnx.sparse_ops.domain import DOMAIN

__all__ = ["CONVOLUTIONS", "DEFAULT_IGNORE", "LINEARS", "RECURRENT", "Selection", "Weight", "find_weights"]

LINEARS = ("MatMul", "Gemm")
CONVOLUTIONS = ("Conv",)
RECURRENT = ("LSTM", "GRU")

DEFAULT_IGNORE = ("re:.*lm_head.*",)
"""The output head of a language model reacts badly to pruning and is left out by default, as the field does."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight matrix and all linears, all convolutions or all recurrent layers that use it.

    ``value`` is the initializer; ``transposed`` says that it is stored as [N, K] (Gemm with transB), as [N, ...], K
    being the product of all axes but the first (Conv), or as [..., K], N being that of the first ``leading`` axes (LSTM
    and GRU). ``encoding`` says what values the stored elements stand for; what nodes make of the initializer then goes
    to the layers by ``moves``, and has there the shape and order that ``transposed`` and ``leading`` tell.
    """

    value: ir.Value
    nodes: tuple[ir.Node, ...]
    transposed: bool
    leading: int = 1
    encoding: Encoding | PackedBlocks = DENSE
    moves: tuple[Move, ...] = ()

    @property
    def name(self) -> str:
        assert self.value.name is not None
        return self.value.name

    @property
    def module(self) -> str:
        return self.nodes[0].metadata_props.get(MODULE_KEY, "")

    @property
    def tensor(self) -> ir.TensorProtocol:
        """What is stored: floats, or integers that stand for some."""
        assert self.value.const_value is not None
        return self.value.const_value

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape that layers see: of convolutions [N, C / group, window...]."""
        if self.moves:
            return self.moves[-1].after
        if isinstance(self.encoding, (Packed, PackedBlocks)):
            return self.encoding.dims
        return tensor_shape(self.tensor)

    @property
    def is_looked_up(self) -> bool:
        """Whether its outputs are also rows of a table of embeddings: a change would reach these, too."""
        return any(is_lookup(use.node, use.idx) for use in self.value.uses())

    @property
    def size(self) -> int:
        """Elements of W, K · N."""
        return math.prod(self.dims)

    @property
    def dtype(self) -> ir.DataType:
        """Of the floats that layers see."""
        if isinstance(self.encoding, Affine | Packed):
            return self.encoding.result
        if isinstance(self.encoding, Palette):
            return self.encoding.codebook.dtype
        return self.encoding.scale.dtype if isinstance(self.encoding, PackedBlocks) else self.tensor.dtype

    @property
    def layer(self) -> str:
        """The operator on floats that does what the layers do."""
        operator = integer_operator(self.nodes[0])
        return self.nodes[0].op_type if operator is None else operator.layer

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        dims = self.dims
        rows, columns = math.prod(dims[: self.leading]), math.prod(dims[self.leading :])
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> np.ndarray:
        """W [K, N]: a view of the stored tensor if it is dense, otherwise the values in float32.

        Raises ModelFileError if a stored element stands for nothing.
        """
        return self.in_order(self._named(self.encoding.decode, self.tensor.numpy()))

    def is_finite(self) -> bool:
        """Whether no element is NaN or Inf in float32."""
        finite = bool(np.isfinite(np.asarray(self.matrix(), np.float32)).all())
        self.release()
        return finite

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """W [K, N] in the shape, order and encoding in which the tensor is stored.

        Nothing is rounded, and what did not change is stored as before: a weight of integers gets the same ones, and
        its zero point for zeros. Raises UsageError for values that the encoding does not have.
        """
        values = np.ascontiguousarray(matrix.T if self.transposed else matrix)
        if isinstance(self.encoding, Dense):
            return values.reshape(self.tensor.shape.numpy())
        return self._named(self.encoding.encode, self._before_moves(values), self.tensor.numpy())

    def nearest(self, matrix: np.ndarray) -> np.ndarray:
        """The values that the encoding has nearest to W [K, N], float32; what is 0 stays 0 where it has a 0."""
        if isinstance(self.encoding, Dense):
            return matrix
        values = self._before_moves(np.ascontiguousarray(matrix.T if self.transposed else matrix))
        return self.in_order(self.encoding.nearest(values))

    def _before_moves(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float32).reshape(self.dims)
        for move in reversed(self.moves):
            values = move.back(values)
        return values

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """What there is one of for each element that is stored, as [K, N]."""
        for move in self.moves:
            values = move(values)
        return values.reshape(self.shape[::-1]).T if self.transposed else values.reshape(self.shape)

    def release(self) -> None:
        """Drop the mapped pages of a tensor that lies in a file; the next read maps them again.

        A mapping lives as long as the last array that was read from it.
        """
        release_mapping(self.tensor)
        self.encoding.release()

    def _named(self, job: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
        """What ``job`` makes of the arrays; its errors name the weight."""
        try:
            return job(*arrays)
        except SparseOnnxError as error:
            raise type(error)(f"{self.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which weights a pass may touch. An entry is a name (of node, initializer or module), an op type, or
    ``re:`` and a regular expression that one of the names must match from the start."""

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def __post_init__(self) -> None:
        for entry in (*self.targets, *self.ignore):
            if entry.startswith("re:"):
                try:
                    re.compile(entry[3:])
                except re.error as error:
                    raise UsageError(f"{entry!r} is not a regular expression: {error}") from error

    def reason_against(self, weight: Weight) -> str | None:
        """Why ``weight`` is not selected, or None if it is."""
        if self.targets and not _matches(self.targets, weight):
            return "not among targets"
        if _matches(self.ignore, weight):
            return "listed in ignore"
        return None

    def unmatched(self, weights: Iterable[Weight]) -> list[str]:
        """Entries of ``targets`` that match no weight: most likely a typing error."""
        known = list(weights)
        return [entry for entry in self.targets if not any(_matches((entry,), weight) for weight in known)]


def _matches(entries: Sequence[str], weight: Weight) -> bool:
    names = {weight.name, weight.module}
    for node in weight.nodes:
        names |= {node.name or "", node.op_type}
    names.discard("")
    return any(
        any(re.match(entry[3:], name) for name in names) if entry.startswith("re:") else entry in names
        for entry in entries
    )


def _weight_input(node: ir.Node, index: int) -> tuple[bool | None, str]:
    """(stored transposed, "") if input ``index`` of ``node`` is the weight of a layer, else (None, reason)."""
    if (operator := integer_operator(node)) is not None and index == operator.weight:
        by_rows = operator.layer == "Conv" or operator.packed or bool(node.attributes.get_int("transB", 0))
        return (None, "Gemm with transA") if node.attributes.get_int("transA", 0) else (by_rows, "")
    if node.domain not in STANDARD_DOMAINS:
        return None, f"used by {node.domain}::{node.op_type}"
    if node.op_type == "MatMul" and index == 1:
        return False, ""
    if node.op_type == "Gemm" and index == 1:
        if node.attributes.get_int("transA", 0):
            return None, "Gemm with transA"
        return bool(node.attributes.get_int("transB", 0)), ""
    if (node.op_type == "Conv" and index == 1) or (node.op_type in RECURRENT and index in (1, 2)):
        return True, ""
    if node.op_type == "MatMul":
        return None, "the constant is the left operand of MatMul"
    return None, f"also used by {node.op_type}"


def _is_weight(node: ir.Node, index: int) -> bool:
    """Whether a node of that kind may have a weight there."""
    if (operator := integer_operator(node)) is not None:
        return index == operator.weight
    return index == 1 or (index == 2 and node.op_type in RECURRENT)


def _is_convolution(node: ir.Node) -> bool:
    operator = integer_operator(node)
    return (node.op_type if operator is None else operator.layer) in CONVOLUTIONS


def _is_depthwise(shape: tuple[int, ...], nodes: Sequence[ir.Node]) -> bool:
    """Whether each output channel sees one of several input channels."""
    return shape[1] == 1 and any(node.attributes.get_int("group", 1) > 1 for node in nodes)


def _shape_reason(shape: tuple[int, ...], nodes: Sequence[ir.Node], depthwise: bool) -> str | None:
    """Why a weight of that shape must stay as it is, or None."""
    if any(node.op_type in RECURRENT for node in nodes):
        if len(nodes) > 1:
            return "shared by an LSTM or GRU and others"
        if len(shape) != 3:
            return f"has rank {len(shape)}, not 3"
    elif any(map(_is_convolution, nodes)):
        if not all(map(_is_convolution, nodes)):
            return "shared by convolutions and linears"
        if len(shape) < 3:
            return f"has rank {len(shape)}, less than 3"
        if not depthwise and _is_depthwise(shape, nodes):
            return "belongs to a depthwise convolution"  # nothing to gain, and too few weights to lose any
    elif len(shape) != 2:
        return f"has rank {len(shape)}, not 2"
    return "is empty" if 0 in shape else None


def _read(value: ir.Value, is_layer: IsLayer) -> Decoded | str:
    """What layers read of an initializer, or the reason why it is to be left alone."""
    if value.is_graph_input():
        return "is also a graph input, so a caller may replace it"
    if value.is_graph_output():
        return "is also a graph output"
    if not any(is_layer(*use) for use in value.uses()):
        return follow(value, is_layer)
    tensor = value.const_value
    if tensor is not None and any(integer_operator(use.node) is not None for use in value.uses()):
        encoding = read_integers(value)
        if isinstance(encoding, str):
            return encoding
        if isinstance(encoding, PackedBlocks):
            return Decoded(value, encoding.dims, encoding)
        return Decoded(value, tensor_shape(tensor), encoding)
    if tensor is None or tensor.dtype not in _FLOATS:
        return f"has dtype {tensor.dtype if tensor is not None else 'unknown'}, not float"
    return Decoded(value, tensor_shape(tensor), DENSE)


def _weight(value: ir.Value, is_layer: IsLayer, *, depthwise: bool, encoded: bool) -> Weight | str:
    """The weight that an initializer holds, or the reason why it is to be left alone."""
    read = _read(value, is_layer)
    if isinstance(read, str):
        return read
    uses = read.operand.uses()
    users = [use.node for use in uses if _is_weight(use.node, use.idx)]
    if reason := _shape_reason(read.shape, users, depthwise):
        return reason
    kinds = [_weight_input(use.node, use.idx) for use in uses]
    reasons = sorted({reason for stored, reason in kinds if stored is None})
    if reasons:
        return "; ".join(reasons)
    if len({stored for stored, _ in kinds}) > 1:
        return "shared by linears that see it transposed and not"
    if not encoded and not isinstance(read.encoding, Dense):
        return f"is quantized: {read.encoding}"
    nodes = tuple(use.node for use in uses)
    leading = 2 if nodes[0].op_type in RECURRENT else 1
    return Weight(value, nodes, bool(kinds[0][0]), leading, read.encoding, read.moves)


def find_weights(
    model: ir.Model,
    op_types: Collection[str] = (*LINEARS, *CONVOLUTIONS, *RECURRENT),
    *,
    depthwise: bool = False,
    encoded: bool = False,
    integers: bool = True,
) -> tuple[list[Weight], list[tuple[str, str]]]:
    """All weights of layers of these types, in graph order, and the (place, reason) of those that must stay.

    Left alone: weights that a caller may override (also a graph input), that are a graph output, that are no
    float matrix or filters, that belong to a depthwise convolution (unless ``depthwise``), or that have a user
    which is no such layer or sees the matrix the other way round (a tied embedding): a change would reach that
    user too. Layers inside functions are left alone as well.

    Weights that are not stored as floats are found if ``encoded``; otherwise they are left alone, and those of
    operators on integers, which are other layers, not looked at. Nor are the latter without ``integers``.
    """

    def is_layer(node: ir.Node, index: int) -> bool:
        operator = integer_operator(node)
        known = (
            node.op_type in op_types
            if operator is None
            else encoded and integers and operator.layer in op_types
        )
        return known and _is_weight(node, index)

    found: list[Weight] = []
    declined: list[tuple[str, str]] = []
    for value in initializers(model):
        read = itertools.chain([value], results(value))
        if not any(is_layer(*use) for operand in read for use in operand.uses()):
            continue
        weight = _weight(value, is_layer, depthwise=depthwise, encoded=encoded)
        if isinstance(weight, str):
            declined.append((value.name or "?", weight))
        else:
            found.append(weight)
    for function in model.functions.values():
        layers = Counter(node.op_type for node in function.all_nodes() if node.op_type in op_types)
        if layers and function.domain != DOMAIN:  # the bodies of our own operators are no layers
            what = ", ".join(f"{count} {op_type}" for op_type, count in layers.items())
            declined.append((f"{function.domain}::{function.name}", f"{what} inside a function"))
    order = {id(node): index for index, node in enumerate(model.graph.all_nodes())}
    found.sort(key=lambda weight: min(order.get(id(node), len(order)) for node in weight.nodes))
    return found, declined
