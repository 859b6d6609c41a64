"""Bases of the lowerings that give a linear, whose weight has few bits, to operators on integers.

Such operators round *activations* to 8 bits, so their forms are not exact. Ours (:class:`LowerFused`) take bias and
activation along; of others (:class:`LowerProduct`) only the product is replaced, and these stay nodes of their own.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.encodings import Dense
from sparse_onnx.model.graph import Names, add_function, add_initializer, drop_with_makers, input_at
from sparse_onnx.model.integer_grid import IntegerGrid, read_grid
from sparse_onnx.model.metadata_keys import LOWERED_KEY, MODULE_KEY
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import LINEARS, Weight, find_weights
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.lowering import (
    Candidate,
    Lowering,
    PackedTensors,
    Packer,
    match_layers,
)
from sparse_onnx.passes.patterns.layer import Layer
from sparse_onnx.passes.patterns.linear import match_linear
from sparse_onnx.progress import Progress
from sparse_onnx.sparse_ops.domain import EXACT_DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.sparse_ops.ops.base import Operator
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = ["EncodedForm", "LowerEncoded", "LowerFused", "LowerProduct", "reason_against_bytes"]


@dataclasses.dataclass(frozen=True)
class EncodedForm(Form):
    """Integers of ``bits`` bits, zeros among them. ``block`` inputs share a float32 scale and, with ``zero_points``, a
    zero point; 0: all inputs of an output do."""

    bits: int = 8
    block: int = 0
    zero_points: bool = False

    def expected_nbytes(
        self, shape: tuple[int, int], sparsity: float, structure: str, outputs: Outputs
    ) -> float:
        """Without scales."""
        return shape[0] * shape[1] * self.bits / 8

    def scale_nbytes(self, shape: tuple[int, int]) -> float:
        inputs, outputs = shape
        blocks = -(-inputs // self.block) if self.block else 1
        return blocks * outputs * (4 + self.bits / 8 * self.zero_points)


def reason_against_bytes(grid: IntegerGrid) -> str:
    """Why products of bytes cannot take weights on ``grid``; empty if they can."""
    if grid.bits != 8:
        return f"has {grid.bits} bits, not 8"
    if len(grid.scale) != 1 or not grid.symmetric:
        return "has more than one scale for an output, or zero points"
    return ""


class _Nodes:
    """Makes the nodes that take the place of one."""

    def __init__(self, node: ir.Node, names: Names, lowering: str) -> None:
        self._place, self._names, self._lowering = node, names, lowering

    def __call__(
        self, op_type: str, *inputs: ir.Value, outputs: int = 1, domain: str = "", **attributes: int | str
    ) -> list[ir.Value]:
        """The outputs of a new node."""
        name = self._names.new(f"{self._place.name or self._place.op_type}.{op_type}")
        values = [ir.Value(name=self._names.new(f"{name}.output{index}")) for index in range(outputs)]
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)
        node.metadata_props[LOWERED_KEY] = self._lowering
        if module := self._place.metadata_props.get(MODULE_KEY):
            node.metadata_props[MODULE_KEY] = module
        assert self._place.graph is not None
        self._place.graph.insert_before(self._place, node)
        return values


@dataclasses.dataclass(frozen=True)
class LowerEncoded(Lowering):
    """See the module's docstring."""

    kind: ClassVar[str] = "linear"
    op_types: ClassVar[tuple[str, ...]] = LINEARS
    """Of the layers that it looks at."""
    integers: ClassVar[bool] = False
    """Whether weights of operators on integers are looked at."""

    min_sparsity: float = 0.0

    @classmethod
    @abc.abstractmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        """The form of a weight, or the reason why it has none."""

    @classmethod
    @abc.abstractmethod
    def exact_twin(cls, model: ir.Model, node: ir.Node) -> None:
        """Change ``node`` of ``model``, if it is one that rounds activations, so that it does not."""

    @classmethod
    def concerns(cls, weight: Weight) -> bool:
        """Whether layers of ``weight`` are looked at."""
        return True

    @classmethod
    def read(cls, weight: Weight) -> IntegerGrid | str:
        """The integers of ``weight``, or the reason why there are none."""
        return read_grid(weight)

    @classmethod
    def match(cls, weight: Weight, node: ir.Node, graph: ir.Graph, shapes: Shapes) -> Layer | str:
        """The layer that ``node`` (a user of ``weight``) is part of, or the reason why it is none."""
        return match_linear(weight, node, graph, shapes)

    @classmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        weights, _ = find_weights(model, cls.op_types, encoded=True, integers=cls.integers)
        shapes = Shapes(model)
        encoded = [
            weight for weight in weights if not isinstance(weight.encoding, Dense) and cls.concerns(weight)
        ]
        declined: list[tuple[str, str]] = []
        found = []
        for weight, layers in match_layers(
            encoded, lambda weight, node: cls.match(weight, node, model.graph, shapes), declined
        ):
            grid = cls.read(weight)
            form = grid if isinstance(grid, str) else cls.form_of(weight, grid)
            weight.release()
            if isinstance(form, str):
                declined.append((weight.name, form))
            else:
                found.append(Candidate(weight, layers, cls.kind, (form,)))
        return found, declined

    @classmethod
    def layout(cls, candidate: Candidate, form: Form, packer: Packer) -> Mapping[str, int | str]:
        return {"encoding": str(candidate.weight.encoding), **form.lies}


class _Stored(Protocol):
    """A packed weight: its parts in the order of the operator's inputs, and its attributes."""

    def arrays(self) -> dict[str, np.ndarray]: ...

    def attributes(self) -> dict[str, int | str]: ...


@dataclasses.dataclass(frozen=True)
class LowerFused(LowerEncoded):
    """Of those whose operator, one of ours, computes a whole layer."""

    rounds: ClassVar[bool] = True

    @classmethod
    @abc.abstractmethod
    def pack(cls, candidate: Candidate, grid: IntegerGrid) -> _Stored:
        """The weight as the operator stores it."""

    @classmethod
    @abc.abstractmethod
    def op_type(cls, base: str, grid: IntegerGrid) -> str:
        """The op type that does with such a weight what ``base`` does with one of floats."""

    def packed(self, candidate: Candidate, packer: Packer, context: PassContext) -> PackedTensors:
        weight = candidate.weight
        grid = self.read(weight)
        assert isinstance(grid, IntegerGrid)
        packed = self.pack(candidate, grid)
        weight.release()
        tensors = {
            name: context.store(array, f"{weight.name}.{name}") for name, array in packed.arrays().items()
        }
        return PackedTensors(
            lambda base: self.op_type(base, grid), tuple(tensors), tensors, packed.attributes()
        )

    @classmethod
    def exact_twin(cls, model: ir.Model, node: ir.Node) -> None:
        """The same operator in float32, by a function of its own."""
        operator = OP_TYPES[node.op_type].operator
        assert isinstance(operator, Operator)
        assert operator.exact_body is not None
        add_function(model, operator.exact_body(node.op_type, model.opset_imports[""]), VERSION)
        node.domain = EXACT_DOMAIN


@dataclasses.dataclass(frozen=True)
class LowerProduct(LowerEncoded):
    """Of those that replace the product alone."""

    domains: ClassVar[Mapping[str, int]] = {}
    """Operator sets that the nodes need beside the standard one."""

    @classmethod
    @abc.abstractmethod
    def arrays(cls, grid: IntegerGrid) -> Mapping[str, np.ndarray]:
        """What the operators store, by name."""

    @classmethod
    @abc.abstractmethod
    def product(
        cls,
        node: Callable[..., list[ir.Value]],
        x: ir.Value,
        grid: IntegerGrid,
        stored: Mapping[str, ir.Value],
    ) -> ir.Value:
        """x [.., K] times the weight, float32 [.., N], by new nodes."""

    def put(
        self, model: ir.Model, candidates: Sequence[Candidate], packer: Packer, context: PassContext
    ) -> None:
        packing = Progress(context.progress, f"packing for {self.name}", len(candidates))
        names = Names(model)
        for candidate in candidates:
            self._put_one(model.graph, candidate, names, context)
            packing.step()
        if candidates:
            model.graph.opset_imports.update(self.domains)

    def _put_one(self, graph: ir.Graph, candidate: Candidate, names: Names, context: PassContext) -> None:
        weight = candidate.weight
        grid = read_grid(weight)
        assert isinstance(grid, IntegerGrid)
        arrays = self.arrays(grid)
        stem = names.stem(weight.name, [f".{key}" for key in arrays])
        stored = {}
        for key, array in arrays.items():
            tensor = context.store(np.ascontiguousarray(array), f"{stem}.{key}")
            stored[key] = add_initializer(graph, f"{stem}.{key}", tensor)
        weight.release()
        for layer in candidate.layers:
            old, (x,) = layer.nodes[0], layer.inputs
            make = _Nodes(old, names, self.name)
            new = self.product(make, x, grid, stored)
            bias = input_at(old, 2) if old.op_type == "Gemm" else None
            if bias is not None:
                (new,) = make("Add", new, bias)
            output = old.outputs[0]
            new.type, new.shape = output.type, output.shape
            output.replace_all_uses_with(new, replace_graph_outputs=True)
            new.name, output.name = output.name, None
            operand = old.inputs[1]
            graph.remove(old, safe=True)
            if operand is not None:
                drop_with_makers(operand)
