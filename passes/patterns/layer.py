"""Layers that an operator with a compressed weight can replace, and the candidates that share a weight."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import name_of
from sparse_onnx.model.weights import Weight
from sparse_onnx.sparse_ops.formats.base import ONE_RUN, Outputs, Packed, StoredFormat
from sparse_onnx.sparse_ops.formats.registry import SPARSE_FORMAT

__all__ = ["MIN_SPARSITY", "Layer", "Part", "count_zeros", "layer_kind", "place_reason", "storage_reason"]

MIN_SPARSITY = 0.3
"""Below this share of zeros no sparse kernel was ever faster than dense, on any shape: not worth timing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One weight of a layer. ``prefix`` is before the names of the inputs and attributes that it has in the operator,
    which asks ``outputs`` of its stored form. ``bias`` [N] comes with it; None: what the layer has."""

    weight: Weight
    outputs: Outputs = ONE_RUN
    prefix: str = ""
    bias: np.ndarray | None = None

    def pack(self, stored: StoredFormat = SPARSE_FORMAT) -> Packed:
        """The weight as the operator stores it in that format."""
        return stored.pack(self.weight.matrix(), self.outputs)


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
    def operands(self) -> tuple[ir.Value, ...]:
        """Inputs of the operator that are no stored weights: those of the layer, and what else is no weight."""
        return self.inputs

    @property
    def outputs(self) -> tuple[ir.Value | None, ...]:
        """What the operator's outputs take over from; None: nothing reads that one."""
        return (self.output,)

    @property
    def results(self) -> list[ir.Value]:
        """The outputs that something reads."""
        return [value for value in self.outputs if value is not None]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The weights of the operator in its order, ``weight`` first."""
        return (Part(self.weight, self.stored_outputs),)

    @property
    def attributes(self) -> Mapping[str, int | float | str | Sequence[int]]:
        """Those of the operator that do not describe the stored weight."""
        return {}

    @property
    def numbers(self) -> Mapping[str, int | float]:
        """Attributes of the operator that its time does not depend on."""
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
    def stored_outputs(self) -> Outputs:
        """What the operator asks of the order of the outputs of ``weight``, stored."""
        return ONE_RUN

    @abc.abstractmethod
    def products(self, x_shape: tuple[int, ...]) -> int:
        """How many vectors of K elements the weight multiplies if X has that shape."""


def layer_kind(layer: Layer, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What the time of a layer with inputs of these ``shapes`` depends on, apart from its zeros, the machine and the
    software; as JSON has it."""
    return {
        "dense": [
            [node.domain, node.op_type, sorted([name, str(a.value)] for name, a in node.attributes.items())]
            for node in layer.nodes
        ],
        "operator": layer.op_type,
        "attributes": {
            name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            for name, value in layer.attributes.items()
        },
        "bias": layer.bias is not None,
        "constants": [list(array.shape) for array in layer.constants.values()],
        **{part.prefix + "weight": list(part.weight.shape) for part in layer.parts},
        "inputs": [list(shape) for shape in shapes],
    }


def place_reason(node: ir.Node, main_graph: ir.Graph) -> str | None:
    """Why no node of an own operator can stand where ``node`` does, or None."""
    return (
        None if node.graph is main_graph else "lies in the body of If, Loop or Scan, where it cannot be timed"
    )


def storage_reason(weight: Weight) -> str | None:
    """Why ``weight`` cannot be stored for the sparse kernels, or None."""
    if weight.dtype != ir.DataType.FLOAT:
        return f"has dtype {weight.dtype}; the sparse kernels take FLOAT"
    if weight.size > SPARSE_FORMAT.max_elements:
        most = SPARSE_FORMAT.max_elements
        return f"has {weight.size} elements; the storage format takes at most {most}"
    return None


def count_zeros(weight: Weight) -> tuple[int, int]:
    """How many weights are zero (-0.0 is, NaN is not), and how many are NaN or Inf."""
    matrix = weight.matrix()
    zeros = int(matrix.size - np.count_nonzero(matrix))
    non_finite = int(matrix.size - np.count_nonzero(np.isfinite(matrix)))
    del matrix
    weight.release()
    return zeros, non_finite
