"""What lowerings share: the layers that an operator with a compressed weight can replace, and replacing them.

A *layer* is a node with a constant weight together with what its operator can compute along: bias, residual,
activation. A *candidate* is a weight and all layers that use it, with the *forms* that it could get
(:mod:`sparse_onnx.passes.lower.forms`); it is lowered for all of them or for none. An LSTM or GRU has two weights, the
*parts* of its layer, which are lowered together; the candidate is that of the first. Which candidates to lower is the
guard's decision (:mod:`sparse_onnx.timing.choose`); on its own a lowering takes every one with at least
``min_sparsity`` zeros. With the nodes comes the operator's body as a model-local function, so that the model still runs
without our library.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.constants import constant_tensor
from sparse_onnx.model.encodings import Dense
from sparse_onnx.model.graph import Names, add_function, add_initializer, drop_with_makers
from sparse_onnx.model.metadata_keys import LOWERED_KEY, MODULE_KEY, STRUCTURE_KEY
from sparse_onnx.model.own_operators import drop_unused_functions
from sparse_onnx.model.weights import Weight
from sparse_onnx.options import require
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.patterns.layer import Layer, Part, count_zeros
from sparse_onnx.progress import Progress
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import StoredFormat
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = ["Candidate", "Lowerer", "Lowering", "PackedTensors", "Packer", "match_layers"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A weight that can be lowered, with all its layers. Elements are read once, when first asked for.

    ``kind`` is what its layers are called, in the singular; ``forms`` are those that it can get beside dense.
    """

    weight: Weight
    layers: tuple[Layer, ...]
    kind: str
    forms: tuple[Form, ...]

    def allowed_forms(self, allowed: Collection[str] = ()) -> tuple[Form, ...]:
        """The forms that may be considered: those that keep the numbers, and the others that are ``allowed``."""
        return tuple(form for form in self.forms if form.exact or form.name in allowed)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The weights that are lowered together, ``weight`` first: all its layers have the same."""
        return self.layers[0].parts

    @property
    def names(self) -> tuple[str, ...]:
        """Of all weights that are lowered together; by the first one the candidate is known."""
        return tuple(part.weight.name for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N) of all parts as one matrix, which multiplies what each of them does side by side."""
        return sum(part.weight.shape[0] for part in self.parts), self.weight.shape[1]

    @functools.cached_property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """Zeros, and elements that are NaN or Inf, of every part; the latter are kept."""
        return tuple(count_zeros(part.weight) for part in self.parts)

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return sum(zeros for zeros, _ in self.counts) / math.prod(self.shape)

    def refusal(self, form: Form) -> str:
        """Why the weight is not worth timing in ``form``; empty if it is.

        One that has few bits must not become larger: it has them for its size.
        """
        reason = form.refusal(self.sparsity)
        if reason or isinstance(self.weight.encoding, Dense):
            return reason
        structure = self.weight.value.metadata_props.get(STRUCTURE_KEY, "unstructured")
        outputs = self.parts[0].outputs
        larger = (
            form.expected_nbytes(self.weight.shape, self.sparsity, structure, outputs)
            > self.weight.tensor.nbytes
        )
        return f"larger as {form.name} than as {self.weight.encoding}" if larger else ""

    @property
    def companion(self) -> bool:
        """Lowered if it is faster and others of its kind are, whatever its sparsity."""
        return all(layer.companion for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class PackedTensors:
    """Packed weights as stored tensors, by the names of the inputs: what the nodes of all layers share. ``op_type``
    names the operator with such weights, ``parts`` are the names of the inputs of one, in order."""

    op_type: Callable[[str], str]
    parts: tuple[str, ...]
    tensors: Mapping[str, ir.TensorProtocol]
    attributes: Mapping[str, int | str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Packer:
    """Packs each weight once for each form, however often it is asked for, through the store of a pass context."""

    def __init__(self, context: PassContext) -> None:
        self._context = context
        self._packed: dict[tuple[str, str], PackedTensors] = {}

    def __call__(self, candidate: Candidate, form: Form) -> PackedTensors:
        key = candidate.weight.name, form.name
        if key not in self._packed:
            tensors: dict[str, ir.TensorProtocol] = {}
            attributes: dict[str, int | str] = {}
            for part in candidate.parts:
                self._pack(part, form.stored, tensors, attributes)
            names = tuple(part.name for part in form.stored.parts)
            self._packed[key] = PackedTensors(form.stored.op_type, names, tensors, attributes)
        return self._packed[key]

    def _pack(
        self,
        part: Part,
        stored: StoredFormat,
        tensors: dict[str, ir.TensorProtocol],
        attributes: dict[str, int | str],
    ) -> None:
        weight, packed = part.weight, part.pack(stored)
        weight.release()
        for name, array in packed.arrays().items():
            tensors[part.prefix + name] = self._context.store(array, f"{weight.name}.{name}")
        own = packed.attributes()
        attributes["format"] = own.pop("format")
        own["mask_structure"] = weight.value.metadata_props.get(STRUCTURE_KEY, "unstructured")
        attributes.update((part.prefix + name, value) for name, value in own.items())


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
    in_recipes: ClassVar[bool] = False
    kind: ClassVar[str]
    """What its layers are called, in the singular."""
    rounds: ClassVar[bool] = False
    """Whether its operators round activations, which exact twins of theirs do not."""

    min_sparsity: float = 0.6
    layers: tuple[str, ...] | None = None
    packer: Packer | None = dataclasses.field(default=None, repr=False, compare=False)

    def check(self) -> None:
        require(0 <= self.min_sparsity <= 1, "min_sparsity", self.min_sparsity, "in [0, 1]")

    @classmethod
    @abc.abstractmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        """Weights that the kernels could take, whatever their sparsity, each with the one form that this lowering
        makes, and (place, reason) of the others."""

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
        self.put(model, lowered, packer, context)
        if lowered:
            drop_unused_functions(model)
        count = sum(len(candidate.layers) for candidate in lowered)
        statistics: dict[str, int | float] = {"weights": len(lowered), f"{self.kind}s": count}
        return PassResult(model, bool(lowered), statistics, tuple(declined))

    def put(
        self, model: ir.Model, candidates: Sequence[Candidate], packer: Packer, context: PassContext
    ) -> None:
        """Replace the layers of ``candidates`` in ``model``."""
        packing = Progress(context.progress, f"packing for {self.name}", len(candidates))
        lowerer = Lowerer(model, context)
        for candidate in candidates:
            for node in lowerer.lower(candidate, self.packed(candidate, packer, context)):
                if self.rounds:
                    node.metadata_props[LOWERED_KEY] = self.name
            packing.step()
        for op_type in sorted(lowerer.op_types):
            add_function(model, OP_TYPES[op_type].function_body(model.opset_imports[""]), VERSION)

    def packed(self, candidate: Candidate, packer: Packer, context: PassContext) -> PackedTensors:
        """The weights of ``candidate`` as its operators store them."""
        (form,) = candidate.forms
        return packer(candidate, form)

    @classmethod
    def layout(cls, candidate: Candidate, form: Form, packer: Packer) -> Mapping[str, int | str]:
        """What the time of ``candidate`` in its ``form`` depends on beside shapes and zeros: how its weights lie."""
        return packer(candidate, form).attributes


class Lowerer:
    """Puts operators into the main graph; what several of them need is made once."""

    def __init__(self, model: ir.Model, context: PassContext) -> None:
        self._graph, self._context, self._names = model.graph, context, Names(model)
        self.op_types: set[str] = set()
        self._zeros: dict[int, ir.Value] = {}
        self._biases: dict[ir.Value, ir.Value] = {}

    def lower(self, candidate: Candidate, packed: PackedTensors) -> list[ir.Node]:
        """The new nodes, one for each layer of ``candidate``."""
        graph, made = self._graph, []
        stored = {part.prefix: self._stored(part, packed) for part in candidate.parts}
        for layer in candidate.layers:
            x, *others = layer.operands
            weights = [
                value for part in layer.parts for value in (*stored[part.prefix], self._bias(layer, part))
            ]
            for key, array in layer.constants.items():
                others.append(self._add(key, array))
            op_type = packed.op_type(layer.op_type)
            self.op_types.add(op_type)
            node = ir.node(
                op_type,
                [x, *weights, *others],
                {**layer.attributes, **layer.numbers, **packed.attributes},
                domain=DOMAIN,
                outputs=[self._output(layer, index) for index in range(len(layer.outputs))],
                name=layer.nodes[0].name,
            )
            if module := layer.nodes[0].metadata_props.get(MODULE_KEY):
                node.metadata_props[MODULE_KEY] = module
            # Not before the first node: a residual may be computed between the two.
            graph.insert_before(layer.nodes[-1], node)
            for old, new in zip(layer.outputs, node.outputs, strict=True):
                if old is not None:
                    old.replace_all_uses_with(new, replace_graph_outputs=True)
                    new.name, old.name = old.name, None
            graph.remove(layer.nodes, safe=False)
            unused = [value for gone in layer.nodes for value in gone.inputs if value is not None]
            for gone in layer.nodes:
                for index in range(len(gone.inputs)):
                    gone.replace_input_with(index, None)
            for value in dict.fromkeys(unused):
                drop_with_makers(value)
            made.append(node)
        return made

    def _add(self, wanted: str, array: np.ndarray) -> ir.Value:
        name = self._names.new(wanted)
        return add_initializer(self._graph, name, self._context.store(array, name))

    def _stored(self, part: Part, packed: PackedTensors) -> list[ir.Value]:
        """What holds the weight, which all layers of a candidate share."""
        name = self._names.stem(part.weight.name, [f".{key}" for key in packed.parts])
        return [
            add_initializer(self._graph, f"{name}.{key}", packed.tensors[part.prefix + key])
            for key in packed.parts
        ]

    def _output(self, layer: Layer, index: int) -> ir.Value:
        """A value for an output of the operator, like the one that it takes over from if there is one."""
        old = layer.outputs[index]
        if old is None:
            float32 = ir.TensorType(ir.DataType.FLOAT)
            return ir.Value(name=self._names.new(f"{layer.name}.output{index}"), type=float32)
        new = ir.Value(name=old.name, type=old.type, shape=old.shape, doc_string=old.doc_string)
        new.metadata_props.update(old.metadata_props)
        return new

    def _bias(self, layer: Layer, part: Part) -> ir.Value:
        """The bias [N] of a part: its own, the layer's, or zeros that all layers of this width share."""
        if part.bias is not None:
            return self._add(f"{part.weight.name}.bias", part.bias)
        n, bias = layer.weight.shape[1], layer.bias
        if bias is None:
            if n not in self._zeros:
                self._zeros[n] = self._add(f"{DOMAIN}.zeros.{n}", np.zeros(n, np.float32))
            return self._zeros[n]
        tensor = constant_tensor(bias)
        assert tensor is not None
        if len(tensor.shape) == 1 and bias.is_initializer():
            return bias
        if bias not in self._biases:
            self._biases[bias] = self._add(f"{bias.name}.{n}", tensor.numpy().reshape(n))
        return self._biases[bias]
