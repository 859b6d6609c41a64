"""Lower linears with enough zeros to ``SparseMatMul``.

Before::                                       After::

    h = MatMul(X, W)                               Y = sparse_onnx.SparseMatMulGelu<K, N, chunk, block, ...>(
    b = Add(h, bias)                                   X, W.values, W.offsets, W.counts, W.rows, bias)
    Y = Gelu(b)

together with the operator's body as a model-local function, so that the model still runs without our library.
Which layers to lower is the guard's decision (:mod:`sparse_onnx.passes.guard`); on its own this pass lowers every
linear with at least ``min_sparsity`` zeros. A weight is lowered for all its linears or for none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.graph import drop_if_unused
from sparse_onnx.metadata_keys import MODULE_KEY, STRUCTURE_KEY
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.linear_pattern import Linear, match_linear
from sparse_onnx.passes.options import require
from sparse_onnx.passes.weights import Weight, find_weights
from sparse_onnx.sparse_ops import sparse_matmul

__all__ = ["Candidate", "LowerSparseMatMul", "PackedTensors", "Packer", "count_zeros", "find_candidates"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A weight that can be lowered, with all its linears. Its elements are read once, when first asked for."""

    weight: Weight
    linears: tuple[Linear, ...]

    @functools.cached_property
    def _counts(self) -> tuple[int, int]:
        return count_zeros(self.weight)

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self._counts[0] / self.weight.tensor.size

    @property
    def non_finite(self) -> int:
        """How many elements are NaN or Inf; they are kept."""
        return self._counts[1]


@dataclasses.dataclass(frozen=True)
class PackedTensors:
    """A packed weight as stored tensors: what the nodes of all its linears share."""

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

    def __call__(self, weight: Weight) -> PackedTensors:
        if weight.name not in self._packed:
            packed = sparse_matmul.pack(weight.matrix())
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


def count_zeros(weight: Weight) -> tuple[int, int]:
    """How many weights are zero (-0.0 is, NaN is not), and how many are NaN or Inf."""
    matrix = weight.matrix()
    zeros = int(matrix.size - np.count_nonzero(matrix))
    non_finite = int(matrix.size - np.count_nonzero(np.isfinite(matrix)))
    del matrix
    weight.release()
    return zeros, non_finite


def find_candidates(model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Weights that the kernels could take, whatever their sparsity, and (place, reason) of the others."""
    weights, declined = find_weights(model)
    candidates = []
    for weight in weights:
        linears = []
        for node in weight.nodes:
            match = match_linear(weight, node, model.graph)
            if isinstance(match, str):
                declined.append((weight.name, match))
                break
            linears.append(match)
        else:
            candidates.append(Candidate(weight, tuple(linears)))
    return candidates, declined


@dataclasses.dataclass(frozen=True)
class LowerSparseMatMul(Pass):
    """See the module's docstring.

    Attributes:
        min_sparsity: Share of zeros, in [0, 1], from which on a weight is lowered.
        layers: Names of the weights to lower, whatever their sparsity; None: decide by ``min_sparsity``.
        packer: Shares packed weights with the caller; None: a new one.
    """

    name: ClassVar[str] = "lower.sparse-matmul"
    stage: ClassVar[Stage] = Stage.LOWER

    min_sparsity: float = 0.6
    layers: tuple[str, ...] | None = None
    packer: Packer | None = dataclasses.field(default=None, repr=False, compare=False)

    def check(self) -> None:
        require(0 <= self.min_sparsity <= 1, "min_sparsity", self.min_sparsity, "in [0, 1]")

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        packer = self.packer or Packer(context)
        candidates, left = find_candidates(model)
        declined = [Declined(self.name, place, reason) for place, reason in left]
        lowered = []
        for candidate in candidates:
            name = candidate.weight.name
            if self.layers is not None:
                wanted = name in self.layers
            else:
                wanted = candidate.sparsity >= self.min_sparsity
                if not wanted:
                    reason = f"{candidate.sparsity:.1%} zeros, fewer than {self.min_sparsity:.1%}"
                    declined.append(self.declined(name, reason))
            if wanted:
                lowered.append(candidate)
        if self.layers is not None and (unknown := set(self.layers) - {c.weight.name for c in lowered}):
            raise UsageError(
                f"{self.name}: cannot lower {', '.join(sorted(unknown))}: no such weight of a linear"
            )
        for index, candidate in enumerate(lowered):
            context.progress(f"lowering {index + 1}/{len(lowered)} {candidate.weight.name}")
            _lower(model, candidate, packer(candidate.weight), context)
        if lowered:
            _add_functions(model)
        linears = sum(len(candidate.linears) for candidate in lowered)
        return PassResult(
            model, bool(lowered), {"weights": len(lowered), "linears": linears}, tuple(declined)
        )


def _lower(model: ir.Model, candidate: Candidate, packed: PackedTensors, context: PassContext) -> None:
    name = candidate.weight.name
    stored = [_initializer(model.graph, f"{name}.{key}", tensor) for key, tensor in packed.tensors.items()]
    for linear in candidate.linears:
        bias = _bias(model.graph, linear, context)
        output = ir.Value(
            name=linear.output.name,
            type=linear.output.type,
            shape=linear.output.shape,
            doc_string=linear.output.doc_string,
        )
        output.metadata_props.update(linear.output.metadata_props)
        node = ir.node(
            sparse_matmul.OP_TYPES[linear.activation],
            # Not linear.x: that may be the replaced output of a layer lowered before this one.
            [linear.nodes[0].inputs[0], *stored, bias],
            dict(packed.attributes),
            domain=sparse_matmul.DOMAIN,
            outputs=[output],
            name=linear.nodes[0].name,
        )
        if module := linear.nodes[0].metadata_props.get(MODULE_KEY):
            node.metadata_props[MODULE_KEY] = module
        model.graph.insert_before(linear.nodes[0], node)
        linear.output.replace_all_uses_with(output, replace_graph_outputs=True)
        linear.output.name = None
        output.name = node.outputs[0].name
        model.graph.remove(linear.nodes, safe=False)
        for old in linear.nodes:
            for index in range(len(old.inputs)):
                old.replace_input_with(index, None)
        if linear.bias is not None:
            drop_if_unused(linear.bias)
    drop_if_unused(candidate.weight.value)


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(list(tensor.shape.numpy())),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _bias(graph: ir.Graph, linear: Linear, context: PassContext) -> ir.Value:
    """The operator's bias [N]: the layer's own, or zeros that all layers of this width share."""
    n = linear.weight.shape[1]
    if linear.bias is None:
        name = f"{sparse_matmul.DOMAIN}.zeros.{n}"
        return _initializer(graph, name, ir.tensor(np.zeros(n, np.float32), name=name))
    tensor = linear.bias.const_value
    assert tensor is not None
    if len(tensor.shape) == 1 and linear.bias.is_initializer():
        return linear.bias
    name = f"{linear.bias.name}.{n}"
    return _initializer(graph, name, context.store(tensor.numpy().reshape(n), name))


def _add_functions(model: ir.Model) -> None:
    opset = model.opset_imports[""]
    model.opset_imports[sparse_matmul.DOMAIN] = sparse_matmul.VERSION
    used: Iterable[str] = {
        node.op_type for node in model.graph.all_nodes() if node.domain == sparse_matmul.DOMAIN
    }
    for op_type in sorted(used):
        function = ir.serde.deserialize_function(sparse_matmul.function_body(op_type, opset))
        model.functions[function.identifier()] = function
