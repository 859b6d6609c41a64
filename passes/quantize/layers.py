"""What passes that quantize activations share: layers by what they read, integers for weights, new nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.graph import Names, add_initializer, input_at, name_of, producer
from sparse_onnx.model.weights import LINEARS, Selection, Weight, find_weights
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.patterns.match import is_scaled
from sparse_onnx.passes.solvers.gptq import GptqQuantizer
from sparse_onnx.passes.solvers.grid import GridOptions, QuantizedMatrix
from sparse_onnx.passes.solvers.ranges import LEVELS
from sparse_onnx.passes.solvers.rounding import RtnQuantizer
from sparse_onnx.passes.solvers.statistics import InputStatistics
from sparse_onnx.running.host import cpu_features, has_integer_dot_products

__all__ = [
    "Builder",
    "chosen_layers",
    "evened_statistics",
    "layers_by_input",
    "quantized_weight",
    "reason_against_integers",
    "resolved_bits",
]

_FIRST_OPSET = 13  # DequantizeLinear with a scale for each channel


def resolved_bits(weight_bits: int | None) -> int:
    """``weight_bits``, or what this machine's integer products are exact with."""
    if weight_bits is not None:
        return weight_bits
    return 8 if has_integer_dot_products(cpu_features()) else 7


def chosen_layers(
    model: ir.Model, selection: Selection, op_types: Sequence[str]
) -> tuple[list[Weight], list[tuple[str, str]]]:
    """The weights of these types that integers can take the place of, and the (place, reason) of all others."""
    version = model.opset_imports.get("", 1)
    if version < _FIRST_OPSET:
        raise UsageError(
            f"needs opset {_FIRST_OPSET} or later, the model has {version}: export it with a later one"
        )
    found, declined = find_weights(model, op_types, depthwise=True)
    for entry in selection.unmatched(found):
        raise UsageError(f"targets: {entry!r} matches no weight, node, module or op type of a layer")
    chosen = []
    for weight in found:
        reason = selection.reason_against(weight) or reason_against_integers(model, weight)
        if reason is None:
            chosen.append(weight)
        else:
            declined.append((weight.name, reason))
    return chosen, declined


def reason_against_integers(model: ir.Model, weight: Weight) -> str | None:
    """Why activations of the layers of ``weight`` cannot be scaled or rounded together, or None."""
    if weight.tensor.dtype != ir.DataType.FLOAT:
        return f"has dtype {weight.tensor.dtype}, not float32"
    if len({id(node.inputs[0]) for node in weight.nodes}) > 1:
        return "shared by layers with different inputs"
    for node in weight.nodes:
        value = node.inputs[0]
        if node.graph is not model.graph:
            return "used in the body of an If, Loop or Scan"
        if value is None or value.const_value is not None:
            return "its input is a constant"
        if node.op_type == "Gemm" and is_scaled(node):
            return "Gemm with alpha or beta"
    return None if weight.is_finite() else "holds NaN or Inf"


def layers_by_input(weights: Sequence[Weight]) -> list[tuple[ir.Value, tuple[Weight, ...]]]:
    """The linears that read the same value together, each convolution by itself, in the order of the graph."""
    groups: dict[tuple[int, int], tuple[ir.Value, list[Weight]]] = {}
    for weight in weights:
        value = weight.nodes[0].inputs[0]
        assert value is not None
        apart = 0 if weight.nodes[0].op_type in LINEARS else id(weight.value)
        groups.setdefault((id(value), apart), (value, []))[1].append(weight)
    return [(value, tuple(own)) for value, own in groups.values()]


def quantized_weight(
    W: np.ndarray,
    bits: int,
    statistics: InputStatistics | None = None,
    *,
    feedback: bool = False,
    threads: int = 1,
) -> QuantizedMatrix:
    """W [K, N] as int8 in ``bits``, symmetric, one scale an output, of the range with the least squared error.

    Inputs count by their power, where ``statistics`` tell it. With ``feedback`` the error of each input is made up for
    by those that follow (GPTQ), as far as the Gram is known.
    """
    grid = GridOptions(bits=bits)
    if feedback and statistics is not None:
        return GptqQuantizer(grid=grid, clip=True, threads=threads).solve(W, statistics)
    return RtnQuantizer(grid=grid, clip=True).solve(W, statistics)


def evened_statistics(statistics: InputStatistics, scale: np.ndarray, noise: float) -> InputStatistics:
    """Of X / s, s = ``scale`` [K], rounded to integers: ``noise`` is the mean square of its rounding error."""
    count = statistics.count
    known = statistics.gram if isinstance(statistics.gram, tuple) else (statistics.gram,)
    parts, start = [], 0
    for part in known:
        own = scale[start : start + len(part)].astype(np.float64)
        start += len(part)
        gram = part / own / (own[:, None] if part.ndim == 2 else own)
        gram[np.diag_indices_from(gram) if part.ndim == 2 else slice(None)] += count * noise
        parts.append(gram)
    return InputStatistics(tuple(parts) if isinstance(statistics.gram, tuple) else parts[0], None, count)


@dataclasses.dataclass(frozen=True)
class Builder:
    """Adds nodes and constants to the main graph of ``model``; nothing else may add values meanwhile."""

    model: ir.Model
    context: PassContext
    names: Names

    @classmethod
    def of(cls, model: ir.Model, context: PassContext) -> Builder:
        return cls(model, context, Names(model))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer called ``name``, or like it."""
        unique = self.names.new(name)
        return add_initializer(self.model.graph, unique, self.context.store(array, unique))

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        before: ir.Node,
        dtype: ir.DataType,
        like: ir.Value | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """The output, called ``name`` or like it, of a new node in front of ``before``; with the shape of ``like``."""
        unique = self.names.new(name)
        output = ir.Value(
            name=unique,
            type=ir.TensorType(dtype),
            shape=like.shape.copy() if like is not None and like.shape is not None else None,
        )
        node = ir.node(op_type, list(inputs), attributes, outputs=[output], name=unique)
        self.model.graph.insert_before(before, node)
        return output

    def rounded(
        self, value: ir.Value, stem: str, ends: tuple[float, float], before: ir.Node
    ) -> tuple[ir.Value, float]:
        """``value`` rounded to 8 bits from ``ends`` low to high and back, by nodes in front of ``before``; and the
        scale."""
        low, high = ends
        step = np.float32((high - low) / (LEVELS - 1))
        zero = np.uint8(np.clip(np.rint(-low / step), 0, LEVELS - 1))
        grid = [
            self.constant(f"{stem}.scale", np.asarray(step)),
            self.constant(f"{stem}.zero_point", np.asarray(zero)),
        ]
        kinds = ir.DataType.UINT8, ir.DataType.FLOAT
        integers = self.node("QuantizeLinear", [value, *grid], f"{stem}.quantized", before, kinds[0], value)
        restored = self.node(
            "DequantizeLinear", [integers, *grid], f"{stem}.restored", before, kinds[1], value
        )
        return restored, float(step)

    def say_zero_points(self, weight: Weight) -> None:
        """Write out the zero points of a weight, which are zeros: without them ONNX Runtime makes no products of
        integers of a Gemm or a convolution."""
        restored = producer(weight.nodes[0].inputs[1], "DequantizeLinear")
        assert restored is not None
        zeros = np.zeros(weight.shape[1], np.int8)
        restored.resize_inputs(3)
        restored.replace_input_with(2, self.constant(f"{weight.name}.zero_point", zeros))

    def first(self, nodes: Iterable[ir.Node]) -> ir.Node:
        """Of some ``nodes`` of the main graph the one that stands before the others."""
        wanted = set(nodes)
        return next(node for node in self.model.graph if node in wanted)

    @staticmethod
    def column(value: ir.Value) -> ir.Value | None:
        """A value with the shape that ``value`` has when its last axis is reduced to 1, if that is known."""
        if value.shape is None or not len(value.shape):
            return None
        return ir.Value(shape=ir.Shape([*value.shape[:-1], 1]))

    def replace(self, node: ir.Node, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` have the users and the name of ``old``, the only output of ``node``, which goes."""
        new.type, new.shape = old.type, old.shape
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)
        old.name, new.name = None, old.name

    def part_bias(self, node: ir.Node) -> None:
        """Add the bias of a Gemm behind it: ONNX Runtime takes integers into a Gemm only without one, or with one of
        integers on a grid of its choice."""
        bias = input_at(node, 2)
        if node.op_type != "Gemm" or bias is None:
            return
        result, name = node.outputs[0], name_of(node)
        node.resize_inputs(2)
        total = ir.node("Add", [result, bias], name=self.names.new(f"{name}.bias"))
        total.metadata_props.update(node.metadata_props)
        new = total.outputs[0]
        new.type, new.shape = result.type, result.shape
        result.replace_all_uses_with(new, replace_graph_outputs=True)
        total.replace_input_with(0, result)
        result.name, new.name = self.names.new(f"{name}.product"), result.name
        self.model.graph.insert_after(node, total)
