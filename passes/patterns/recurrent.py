"""Recognise an LSTM or a GRU whose two weights can be stored sparse: what the operator of ours computes.

Conditions: W and R are constants of this node alone; B is constant or absent; activations are the default ones; there
are no peepholes, no clip, no coupled gates and no batch in front (layout 1); an LSTM has both initial states or none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, is_constant
from sparse_onnx.model.graph import input_at, is_read
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.patterns.layer import Layer, Part, place_reason, storage_reason
from sparse_onnx.passes.patterns.match import float32_constant
from sparse_onnx.sparse_ops.ops.sparse_recurrent import (
    CELLS,
    DIRECTIONS,
    PREFIX,
    Signature,
    operator_name,
    recurrent_outputs,
)

__all__ = ["Recurrent", "match_recurrent"]

_ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}
_STATES = {"LSTM": (5, 6), "GRU": (5,)}
"""The inputs of a node that hold its initial state."""


@dataclasses.dataclass(frozen=True)
class Recurrent(Layer):
    """An LSTM or a GRU of the graph; ``weight`` is W, which multiplies X, and ``recurrent`` is R."""

    recurrent: Weight
    signature: Signature

    @property
    def node(self) -> ir.Node:
        return self.nodes[0]

    @property
    def op_type(self) -> str:
        return operator_name(self.signature)

    @property
    def operands(self) -> tuple[ir.Value, ...]:
        values = [input_at(self.node, index) for index in (0, 4, *_STATES[self.node.op_type])]
        return tuple(value for value in values if value is not None)

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        return tuple(value for value in self.operands if not is_constant(value))

    @property
    def outputs(self) -> tuple[ir.Value | None, ...]:
        made = [value if is_read(value) else None for value in self.node.outputs]
        return tuple((*made, None, None, None)[: len(self.signature.outputs)])

    @property
    def attributes(self) -> Mapping[str, int | float | str | Sequence[int]]:
        direction = {"direction": self.node.attributes.get_string("direction", "forward")}
        if self.node.op_type == "LSTM":
            return direction
        reset = self.node.attributes.get_int("linear_before_reset", 0)
        return {**direction, "linear_before_reset": reset}

    @property
    def parts(self) -> tuple[Part, ...]:
        gates = recurrent_outputs(self.recurrent.shape[0])
        if self.bias is None:
            return Part(self.weight), Part(self.recurrent, gates, PREFIX)
        biases = constant_array(self.bias)  # of each direction first those of W, then those of R
        assert biases is not None
        of_input, of_recurrence = (
            np.ascontiguousarray(half).reshape(-1) for half in np.split(biases, 2, axis=1)
        )
        return (
            Part(self.weight, bias=of_input),
            Part(self.recurrent, gates, PREFIX, of_recurrence),
        )

    def products(self, x_shape: tuple[int, ...]) -> int:
        return x_shape[0] * x_shape[1]


def match_recurrent(
    weight: Weight, recurrent: Weight | None, node: ir.Node, main_graph: ir.Graph
) -> Recurrent | str:
    """``node``, an LSTM or GRU with the weight W and the recurrent weight R, or the reason why it stays.

    ``recurrent`` is None if R is no weight that a pass may touch.
    """
    if reason := place_reason(node, main_graph):
        return reason
    if recurrent is None:
        return "the other weight of its node is no constant of its own"
    for one in (weight, recurrent):
        if reason := storage_reason(one):
            return reason
        if len(one.nodes) > 1:
            return "is shared by several nodes"
    x, cell = input_at(node, 0), node.op_type
    if x is None or is_constant(x):
        return "has a constant activation"
    if reason := _unusual(node):
        return f"is an {cell} with {reason}" if cell == "LSTM" else f"is a {cell} with {reason}"
    directions = DIRECTIONS.get(node.attributes.get_string("direction", "forward"))
    hidden = recurrent.shape[0]
    outputs = CELLS[cell] * hidden
    for one in (weight, recurrent):
        if tuple(one.tensor.shape.numpy()[:2]) != (directions, outputs):
            return "has a shape that does not fit its node"
    bias = input_at(node, 3)
    if bias is not None and not _is_bias(bias, (directions, 2 * outputs)):
        return f"is of a node whose B is no constant [{directions}, {2 * outputs}]"
    if len({input_at(node, index) is None for index in _STATES[cell]}) > 1:
        return "is an LSTM with only one of its initial states"
    lengths = input_at(node, 4)
    if lengths is not None and lengths.dtype is None:
        lengths.type = ir.TensorType(ir.DataType.INT32)  # the standard knows no other
    made = [value for value in node.outputs if is_read(value)]
    if not made:
        return "is of a node whose outputs nothing reads"
    signature = Signature(cell, lengths is not None, input_at(node, _STATES[cell][0]) is not None)
    return Recurrent(weight, (node,), bias, "none", made[0], recurrent, signature)


def _is_bias(value: ir.Value, shape: tuple[int | None, int]) -> bool:
    tensor = float32_constant(value)
    return tensor is not None and tuple(tensor.shape.numpy()) == shape


def _unusual(node: ir.Node) -> str | None:
    """What an LSTM or GRU has that the operator of ours does not know."""
    attributes, usual = node.attributes, _ACTIVATIONS[node.op_type]
    if node.op_type == "LSTM" and input_at(node, 7) is not None:
        return "peepholes"
    if attributes.get_int("layout", 0):
        return "layout 1"
    if attributes.get_int("input_forget", 0):
        return "coupled input and forget gates"
    if "clip" in attributes:
        return "clip"
    if "activation_alpha" in attributes or "activation_beta" in attributes:
        return "parameters of its activations"
    given = [name.lower() for name in attributes.get_strings("activations", ())]
    if given and any(name != usual[place % len(usual)] for place, name in enumerate(given)):
        return f"activations other than {', '.join(name.capitalize() for name in usual)}"
    return None
