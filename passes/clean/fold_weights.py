"""``clean.fold-weights``: compute the weight of a layer once, not by nodes at every start of a session.

Before::                                       After::

    t = Transpose(weight)                          Y = MatMul(X, weight)        # the new weight, transposed
    Y = MatMul(X, t)

    m = Mul(weight_mask, weight_orig)              Y = Gemm(X, weight)          # the product; masks of pruned
    Y = Gemm(X, m)                                                              # torch modules look like this

Folded are Identity, Transpose, Reshape, Squeeze, Unsqueeze, Slice, Concat, Cast to a float type, and Mul, as
long as all that they start from is constant: initializers and Constant nodes. (Exporters order the gates of an
LSTM by Slice and Concat.) The result takes the name of the weight, without the suffix ``_orig``. Biases are
folded the same way.

Left alone, with the reason: weights that DequantizeLinear or the Gather of a codebook decodes, which would be stored
in several times the bytes (:mod:`sparse_onnx.model.encodings` reads them as they are); weights that a caller may
replace; other operators; and weights that something else still needs: folding would store them twice (an embedding
tied to the output).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.decoding import decodes
from sparse_onnx.model.graph import drop_if_unused, is_standard, value_names
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage

__all__ = ["STAYS_QUANTIZED", "FoldWeights"]

STAYS_QUANTIZED = "quantized: the weight stays as it is stored"

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_FOLDED = ("Cast", "Concat", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_OPERANDS = {"MatMul": (1,), "Gemm": (1,), "Conv": (1,), "LSTM": (1, 2), "GRU": (1, 2)}
"""Where operators have weights."""
_MAX_DEPTH = 32


class _NotFoldedError(Exception):
    """A constant expression that stays as it is; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class _Constant:
    """A value that is constant. Equal ``key``: computed the same way from the same tensors, so equal."""

    key: int
    depth: int = 0


@dataclasses.dataclass(frozen=True)
class _Obstacle:
    """A value that is constant but not folded."""

    reason: str


_Known = dict[ir.Value, _Constant | _Obstacle]


@dataclasses.dataclass(frozen=True)
class FoldWeights(Pass):
    """See the module's docstring. Linears inside model-local functions are left alone."""

    name: ClassVar[str] = "clean.fold-weights"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        known = _constants(model)
        declined: list[Declined] = []
        folded = {"weights": 0, "biases": 0}
        kinds = {"weights": _weight_operands(model), "biases": _bias_operands(model, known)}
        for kind, operands in kinds.items():
            groups: dict[int, list[ir.Value]] = {}
            for value, node in operands:
                constant = known.get(value)
                if isinstance(constant, _Obstacle) and kind == "weights":
                    declined.append(self.declined(node.name or value.name or "?", constant.reason))
                elif isinstance(constant, _Constant):
                    group = groups.setdefault(constant.key, [])
                    if value not in group:
                        group.append(value)
            for values in groups.values():
                reason = _fold(values, model, context, may_grow=kind == "biases")
                if reason is None:
                    folded[kind] += 1
                elif kind == "weights":
                    user = next(iter(values[0].uses())).node
                    declined.append(self.declined(user.name or values[0].name or "?", reason))
        statistics: dict[str, int | float] = {**folded}
        return PassResult(model, any(folded.values()), statistics, tuple(declined))


def _weight_operands(model: ir.Model) -> list[tuple[ir.Value, ir.Node]]:
    """Operands in the place of weights that a node computes."""
    return [
        (value, node)
        for node in model.graph.all_nodes()
        if is_standard(node, *_OPERANDS)
        for index in _OPERANDS[node.op_type]
        if (value := _computed(node, index)) is not None
    ]


def _bias_operands(model: ir.Model, known: _Known) -> list[tuple[ir.Value, ir.Node]]:
    """What a node computes of: third operands of Gemm and Conv, fourth of LSTM and GRU, and what is added to a MatMul
    with a constant."""
    operands = []
    for node in model.graph.all_nodes():
        if is_standard(node, "Gemm", "Conv") and (value := _computed(node, 2)) is not None:
            operands.append((value, node))
        if is_standard(node, "LSTM", "GRU") and (value := _computed(node, 3)) is not None:
            operands.append((value, node))
        if is_standard(node, "Add"):
            for index in (0, 1):
                linear, value = node.inputs[index], _computed(node, 1 - index)
                producer = linear.producer() if linear is not None else None
                if producer is None or value is None or not is_standard(producer, "MatMul"):
                    continue
                if producer.inputs[1] in known:
                    operands.append((value, node))
    return operands


def _computed(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.producer() is not None else None


def _constants(model: ir.Model) -> _Known:
    """Every value that does not depend on an input of the model, in one walk through the graph."""
    keys: dict[object, int] = {}
    known: _Known = {}

    def constant(identity: object, depth: int = 0) -> _Constant:
        return _Constant(keys.setdefault(identity, len(keys)), depth)

    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.is_graph_input():
                known[value] = _Obstacle(f"{value.name} is also a graph input, so a caller may replace it")
            else:
                known[value] = constant(value)
    for node in model.graph.all_nodes():
        inputs = [known.get(value) if value is not None else None for value in node.inputs]
        if is_standard(node, "Constant"):
            if "value" in node.attributes:
                known[node.outputs[0]] = constant(node.outputs[0])
            continue
        has_subgraph = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        if None in inputs or not inputs or has_subgraph:  # a subgraph may read any value around it
            continue
        obstacles = [value for value in inputs if isinstance(value, _Obstacle)]
        operands = [value for value in inputs if isinstance(value, _Constant)]
        depth = 1 + max((value.depth for value in operands), default=0)
        for output in node.outputs:
            if is_standard(node, "DequantizeLinear"):
                known[output] = _Obstacle(STAYS_QUANTIZED)
            elif decodes(node, 1):
                known[output] = _Obstacle("a codebook: the weight stays as it is stored")
            elif obstacles:
                known[output] = obstacles[0]
            elif not is_standard(node, *_FOLDED):
                known[output] = _Obstacle(f"computed by {node.op_type} from constants, which is not folded")
            elif depth > _MAX_DEPTH:
                known[output] = _Obstacle(f"computed by more than {_MAX_DEPTH} nodes in a row")
            else:
                attributes = sorted((name, str(item.value)) for name, item in node.attributes.items())
                keys_of_operands = [value.key for value in operands]
                known[output] = constant((node.op_type, *keys_of_operands, *attributes), depth)
    return known


def _fold(values: Sequence[ir.Value], model: ir.Model, context: PassContext, *, may_grow: bool) -> str | None:
    """Replace ``values``, which are computed the same way, by one initializer; the reason if they must stay."""
    nodes = list(_nodes_behind(values))
    leaves = _leaves(values, nodes)
    weight = _weight(leaves)
    reason, array = None, np.empty(0)
    joined = any(is_standard(node, "Concat") for node in nodes)
    for leaf in [leaf for leaf in leaves if _tensor(leaf).dtype in _FLOATS] if joined else [weight]:
        if blocker := _other_use(leaf, values, set(nodes)):
            reason = f"{leaf.name} {blocker}: folding would store it twice"
            break
    else:
        try:
            array = _evaluate(values[0])
            if not may_grow and array.size > sum(_tensor(leaf).size for leaf in leaves):
                reason = "would grow when folded"
        except _NotFoldedError as error:
            reason = str(error)
    for leaf in leaves:
        if leaf.const_value is not None:
            release_mapping(leaf.const_value)
    if reason is None:
        _replace(values, weight, array, model, context)
    return reason


def _replace(
    values: Sequence[ir.Value], weight: ir.Value, array: np.ndarray, model: ir.Model, context: PassContext
) -> None:
    """Put ``array`` in place of ``values``, and remove the nodes and tensors behind them."""
    nodes = list(_nodes_behind(values))
    leaves = _leaves(values, nodes)
    graph, old_name = weight.graph, weight.name or ""
    assert isinstance(graph, ir.Graph)  # functions are not walked
    name = old_name.removesuffix("_orig")
    if name != old_name and name in value_names(model):
        name = old_name  # which is free, since the old weight goes
    metadata = dict(weight.metadata_props)
    folded = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=context.store(array, name),
    )
    folded.metadata_props.update(metadata)
    for value in values:
        value.replace_all_uses_with(folded)
    for node in reversed(nodes):
        if not any(output.uses() for output in node.outputs) and node.graph is not None:
            node.graph.remove(node, safe=True)
    for leaf in leaves:
        drop_if_unused(leaf)
    graph.register_initializer(folded)


def _nodes_behind(values: Sequence[ir.Value]) -> Iterator[ir.Node]:
    """The nodes that compute ``values`` from constants, each after the nodes that it needs."""
    seen: set[ir.Node] = set()

    def visit(value: ir.Value) -> Iterator[ir.Node]:
        node = value.producer()
        if node is None or node in seen:
            return
        seen.add(node)
        for operand in node.inputs:
            if operand is not None:
                yield from visit(operand)
        yield node

    for value in values:
        yield from visit(value)


def _leaves(values: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """The tensors that everything starts from: initializers and outputs of Constant nodes."""
    touched = [*values, *(operand for node in nodes for operand in node.inputs if operand is not None)]
    leaves = dict.fromkeys(
        value for value in touched if (node := value.producer()) is None or is_standard(node, "Constant")
    )
    return list(leaves)


def _weight(leaves: Sequence[ir.Value]) -> ir.Value:
    """The tensor that the others scale, mask or shape: the largest of floats, not of ones and zeros."""
    floats = [leaf for leaf in leaves if _tensor(leaf).dtype in _FLOATS] or list(leaves)
    largest = max(_tensor(leaf).size for leaf in floats)
    equals = [leaf for leaf in floats if _tensor(leaf).size == largest]
    if len(equals) > 1:
        equals = [leaf for leaf in equals if not _is_mask(_tensor(leaf).numpy())] or equals
    return equals[0]


def _is_mask(array: np.ndarray) -> bool:
    return bool(((array == 0) | (array == 1)).all())


def _other_use(weight: ir.Value, values: Sequence[ir.Value], nodes: set[ir.Node]) -> str | None:
    """Who needs ``weight`` other than for ``values``, or None."""
    frontier = [weight]
    while frontier:
        value = frontier.pop()
        if value.is_graph_output():
            return "is also a graph output"
        if value in values:
            continue
        for use in value.uses():
            if use.node not in nodes:
                return f"is also used by {use.node.op_type}"
            frontier += use.node.outputs
    return None


def _tensor(leaf: ir.Value) -> ir.TensorProtocol:
    node = leaf.producer()
    tensor = leaf.const_value if node is None else node.attributes["value"].as_tensor()
    assert tensor is not None
    return tensor


def _evaluate(value: ir.Value) -> np.ndarray:
    """The array of a constant expression, contiguous and not shared with any tensor of the model."""
    done: dict[ir.Value, np.ndarray] = {}
    for node in _nodes_behind([value]):
        inputs = [
            done[operand] if operand in done else _tensor(operand).numpy()
            for operand in node.inputs
            if operand is not None
        ]
        if not is_standard(node, "Constant"):
            done[node.outputs[0]] = _OPERATORS[node.op_type](node, inputs)
    return np.array(done[value] if value in done else _tensor(value).numpy(), order="C")


def _cast(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    to = ir.DataType(node.attributes["to"].as_int())
    source = ir.DataType.from_numpy(inputs[0].dtype)
    if to not in _FLOATS:
        raise _NotFoldedError(f"cast to {to}, which is no float type")
    if source not in _FLOATS and not _is_mask(inputs[0]):
        raise _NotFoldedError(f"stored as {source} and cast to {to}: a quantized weight stays as stored")
    with np.errstate(over="ignore"):  # as the Cast itself: what is too large becomes Inf
        cast: np.ndarray = inputs[0].astype(to.numpy())
    return cast


def _multiply(_node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    shape = np.broadcast_shapes(inputs[0].shape, inputs[1].shape)
    if math.prod(shape) > max(inputs[0].size, inputs[1].size):
        raise _NotFoldedError("an outer product, which would grow when folded")
    with np.errstate(all="ignore"):  # as the Mul itself: Inf and NaN go through
        product: np.ndarray = np.multiply(inputs[0], inputs[1])
    return product


def _concat(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(inputs, axis=node.attributes["axis"].as_int())


def _slice(_node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    data, starts, ends, *rest = inputs
    axes = rest[0] if rest else np.arange(len(starts))
    steps = rest[1] if len(rest) > 1 else np.ones(len(starts), np.int64)
    if (steps < 1).any():
        raise _NotFoldedError("a Slice that goes backwards")
    parts = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        parts[axis] = slice(int(start), int(end), int(step))
    return data[tuple(parts)]


def _reshape(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    data = inputs[0]
    wanted: list[int] = inputs[1].tolist()
    if not node.attributes.get_int("allowzero", 0):
        wanted = [data.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return data.reshape(wanted)


def _squeeze(_node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.squeeze(inputs[0], tuple(inputs[1].tolist()) if len(inputs) > 1 else None)


def _transpose(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.transpose(inputs[0], node.attributes.get_ints("perm"))


_OPERATORS: dict[str, Callable[[ir.Node, list[np.ndarray]], np.ndarray]] = {
    "Cast": _cast,
    "Concat": _concat,
    "Identity": lambda _node, inputs: inputs[0],
    "Mul": _multiply,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": lambda _node, inputs: np.expand_dims(inputs[0], tuple(inputs[1].tolist())),
}
