"""What lowerings share: the layers that an operator with a compressed weight can replace, and replacing them.

A *layer* is a node with a constant weight together with what its operator can compute along: bias, residual,
activation. A *candidate* is a weight and all layers that use it; it is lowered for all of them or for none. Which
candidates to lower is the guard's decision (:mod:`sparse_onnx.passes.guard`); on its own a lowering takes every one
with at least ``min_sparsity`` zeros. With the nodes comes the operator's body as a model-local function, so that the
model still runs without our library.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from sparse_onnx.constants import constant_tensor
from sparse_onnx.errors import UsageError
from sparse_onnx.graph import add_function, add_initializer, drop_if_unused, name_of
from sparse_onnx.metadata_keys import MODULE_KEY, STRUCTURE_KEY
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.options import require
from sparse_onnx.passes.weights import Weight
from sparse_onnx.progress import Progress
from sparse_onnx.sparse_ops import sparse_matmul
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN, VERSION, PackedWeight

__all__ = [
    "MIN_SPARSITY",
    "Candidate",
    "Layer",
    "Lowering",
    "PackedTensors",
    "Packer",
    "count_zeros",
    "layer_kind",
    "match_layers",
]

MIN_SPARSITY = 0.3
"""Below this share of zeros no sparse kernel was ever faster than dense, on any shape: not worth timing."""


@dataclasses.dataclass(frozen=True)
class Layer(abc.ABC):
    """One layer of the graph, up to ``output``. ``nodes`` are what an operator replaces, in the order of the graph and
    the one with the weight first. ``bias`` is a constant of N elements, or None."""

    weight: Weight
    nodes: tuple[ir.Node, ...]
    bias: ir.Value | None
    activation: str
    output: ir.Value

    @property
    def name(self) -> str:
        return name_of(self.nodes[0])

    @property
    @abc.abstractmethod
    def op_type(self) -> str:
        """The operator that computes this layer."""

    @property
    @abc.abstractmethod
    def inputs(self) -> tuple[ir.Value, ...]:
        """What the layer computes from, as the graph has it now: X, and R where the operator has one."""

    @property
    def attributes(self) -> Mapping[str, int | float | Sequence[int]]:
        """Those of the operator that do not describe the stored weight."""
        return {}

    @property
    def constants(self) -> Mapping[str, np.ndarray]:
        """Constant inputs of the operator behind the stored weight and its bias, by their names in the model."""
        return {}

    @property
    def companion(self) -> bool:
        """Whether this is no layer to make sparse, but one that its operator computes faster among sparse ones."""
        return False

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """Outputs in a block of the stored weight."""

    def pack(self) -> PackedWeight:
        """The weight as the operator stores it."""
        return sparse_matmul.pack(self.weight.matrix(), block=self.block)

    @abc.abstractmethod
    def products(self, x_shape: tuple[int, ...]) -> int:
        """How many vectors of K elements the weight multiplies if X has that shape."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A weight that can be lowered, with all its layers. Its elements are read once, when first asked for."""

    weight: Weight
    layers: tuple[Layer, ...]
    lowering: type[Lowering]

    @functools.cached_property
    def _counts(self) -> tuple[int, int]:
        return count_zeros(self.weight)

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self._counts[0] / self.weight.tensor.size

    @property
    def companion(self) -> bool:
        """Lowered if it is faster and others are, whatever its sparsity."""
        return all(layer.companion for layer in self.layers)

    @property
    def non_finite(self) -> int:
        """How many elements are NaN or Inf; they are kept."""
        return self._counts[1]


@dataclasses.dataclass(frozen=True)
class PackedTensors:
    """A packed weight as stored tensors: what the nodes of all its layers share."""

    tensors: Mapping[str, ir.TensorProtocol]
    attributes: Mapping[str, int | str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Packer:
    """Packs each weight once, however often it is asked for, through the store of a pass context."""

    def __init__(self, context: PassContext) -> None:
        self._context = context
        self._packed: dict[str, PackedTensors] = {}

    def __call__(self, candidate: Candidate) -> PackedTensors:
        weight = candidate.weight
        if weight.name not in self._packed:
            packed = candidate.layers[0].pack()
            weight.release()
            structure = weight.value.metadata_props.get(STRUCTURE_KEY, "unstructured")
            self._packed[weight.name] = PackedTensors(
                {
                    name: self._context.store(array, f"{weight.name}.{name}")
                    for name, array in packed.arrays().items()
                },
                {**packed.attributes(), "mask_structure": structure},
            )
        return self._packed[weight.name]


def layer_kind(layer: Layer, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What the time of a layer with inputs of these ``shapes`` depends on, apart from its zeros, the machine and the
    software; as JSON has it."""
    return {
        "dense": [
            [node.domain, node.op_type, sorted([name, str(a.value)] for name, a in node.attributes.items())]
            for node in layer.nodes
        ],
        "sparse": layer.op_type,
        "attributes": {
            name: list(value) if isinstance(value, Sequence) else value
            for name, value in layer.attributes.items()
        },
        "bias": layer.bias is not None,
        "constants": [list(array.shape) for array in layer.constants.values()],
        "weight": list(layer.weight.shape),
        "inputs": [list(shape) for shape in shapes],
    }


def count_zeros(weight: Weight) -> tuple[int, int]:
    """How many weights are zero (-0.0 is, NaN is not), and how many are NaN or Inf."""
    matrix = weight.matrix()
    zeros = int(matrix.size - np.count_nonzero(matrix))
    non_finite = int(matrix.size - np.count_nonzero(np.isfinite(matrix)))
    del matrix
    weight.release()
    return zeros, non_finite


_L = TypeVar("_L", bound=Layer)


def match_layers(
    weights: Sequence[Weight], match: Callable[[Weight, ir.Node], _L | str], declined: list[tuple[str, str]]
) -> list[tuple[Weight, tuple[_L, ...]]]:
    """The weights of which every user is a layer, with these. Of the others ``declined`` gets the first reason."""
    found = []
    for weight in weights:
        layers: list[_L] = []
        for node in weight.nodes:
            layer = match(weight, node)
            if isinstance(layer, str):
                declined.append((weight.name, layer))
                break
            layers.append(layer)
        else:
            found.append((weight, tuple(layers)))
    return found


@dataclasses.dataclass(frozen=True)
class Lowering(Pass):
    """Base of the passes that put operators with compressed weights into a model.

    Attributes:
        min_sparsity: Share of zeros, in [0, 1], from which on a weight is lowered.
        layers: Names of the weights to lower, whatever their sparsity; None: decide by ``min_sparsity``.
        packer: Shares packed weights with the caller; None: a new one.
    """

    stage: ClassVar[Stage] = Stage.LOWER
    kind: ClassVar[str]
    """What its layers are called, in the singular."""

    min_sparsity: float = 0.6
    layers: tuple[str, ...] | None = None
    packer: Packer | None = dataclasses.field(default=None, repr=False, compare=False)

    def check(self) -> None:
        require(0 <= self.min_sparsity <= 1, "min_sparsity", self.min_sparsity, "in [0, 1]")

    @classmethod
    @abc.abstractmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        """Weights that the kernels could take, whatever their sparsity, and (place, reason) of the others."""

    @staticmethod
    @abc.abstractmethod
    def function_body(op_type: str, opset: int) -> onnx.FunctionProto:
        """The operator in standard ops."""

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        packer = self.packer or Packer(context)
        candidates, left = self.find_candidates(model)
        declined = [Declined(self.name, place, reason) for place, reason in left]
        lowered: list[Candidate] = []
        for candidate in sorted(candidates, key=lambda candidate: candidate.companion):
            name = candidate.weight.name
            if self.layers is not None:
                wanted = name in self.layers
            elif candidate.companion:
                wanted = bool(lowered)
                if not wanted:
                    declined.append(self.declined(name, f"no {self.kind} around it is lowered"))
            else:
                wanted = candidate.sparsity >= self.min_sparsity
                if not wanted:
                    reason = f"{candidate.sparsity:.1%} zeros, fewer than {self.min_sparsity:.1%}"
                    declined.append(self.declined(name, reason))
            if wanted:
                lowered.append(candidate)
        if self.layers is not None and (unknown := set(self.layers) - {c.weight.name for c in lowered}):
            raise UsageError(
                f"{self.name}: cannot lower {', '.join(sorted(unknown))}: no such weight of a {self.kind}"
            )
        packing = Progress(context.progress, f"packing for {self.name}", len(lowered))
        for candidate in lowered:
            _lower(model, candidate, packer(candidate), context)
            packing.step()
        if lowered:
            for op_type in sorted({layer.op_type for c in lowered for layer in c.layers}):
                add_function(model, self.function_body(op_type, model.opset_imports[""]), VERSION)
        count = sum(len(candidate.layers) for candidate in lowered)
        statistics: dict[str, int | float] = {"weights": len(lowered), f"{self.kind}s": count}
        return PassResult(model, bool(lowered), statistics, tuple(declined))


def _lower(model: ir.Model, candidate: Candidate, packed: PackedTensors, context: PassContext) -> None:
    name = candidate.weight.name
    stored = [_initializer(model.graph, f"{name}.{key}", tensor) for key, tensor in packed.tensors.items()]
    for layer in candidate.layers:
        bias = _bias(model.graph, layer, context)
        x, *others = layer.inputs
        for key, array in layer.constants.items():
            others.append(_initializer(model.graph, key, context.store(array, key)))
        output = ir.Value(
            name=layer.output.name,
            type=layer.output.type,
            shape=layer.output.shape,
            doc_string=layer.output.doc_string,
        )
        output.metadata_props.update(layer.output.metadata_props)
        node = ir.node(
            layer.op_type,
            [x, *stored, bias, *others],
            {**layer.attributes, **packed.attributes},
            domain=DOMAIN,
            outputs=[output],
            name=layer.nodes[0].name,
        )
        if module := layer.nodes[0].metadata_props.get(MODULE_KEY):
            node.metadata_props[MODULE_KEY] = module
        # Not before the first node: a residual may be computed between the two.
        model.graph.insert_before(layer.nodes[-1], node)
        layer.output.replace_all_uses_with(output, replace_graph_outputs=True)
        layer.output.name = None
        output.name = node.outputs[0].name
        model.graph.remove(layer.nodes, safe=False)
        unused = [value for old in layer.nodes for value in old.inputs if value is not None]
        for old in layer.nodes:
            for index in range(len(old.inputs)):
                old.replace_input_with(index, None)
        for value in dict.fromkeys(unused):
            drop_if_unused(value)


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer ``name``, which layers may share: a new one if there is none."""
    return graph.initializers[name] if name in graph.initializers else add_initializer(graph, name, tensor)


def _bias(graph: ir.Graph, layer: Layer, context: PassContext) -> ir.Value:
    """The operator's bias [N]: the layer's own, or zeros that all layers of this width share."""
    n = layer.weight.shape[1]
    if layer.bias is None:
        name = f"{DOMAIN}.zeros.{n}"
        return _initializer(graph, name, ir.tensor(np.zeros(n, np.float32), name=name))
    tensor = constant_tensor(layer.bias)
    assert tensor is not None
    if len(tensor.shape) == 1 and layer.bias.is_initializer():
        return layer.bias
    name = f"{layer.bias.name}.{n}"
    return _initializer(graph, name, context.store(tensor.numpy().reshape(n), name))
