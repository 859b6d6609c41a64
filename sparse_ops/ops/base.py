"""What an operator is: op types with one contract, of which the body in standard operators is a part.

An operator whose weights are stored compressed is a stored format times what it does with W. Its inputs are X, then of
each weight the parts and its bias, then what else it needs. The attributes of a weight are its sizes, ``format`` (one
for all weights) and ``mask_structure``, the pattern of its zeros. Those of a second weight, inputs and attributes, have
a prefix before their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx
import onnx.parser

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats.base import StoredFormat

__all__ = ["BIAS", "Attributes", "Body", "OpType", "Operator", "Shape", "SparseOperator"]

BIAS = "bias"
"""The input behind the parts of each stored weight."""

Attributes = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """An operator without stored weights: ``function_body`` gives that of an op type in standard ops of an opset
    (13..26). Of one that rounds activations, ``exact_body`` gives the same in the domain :data:`.EXACT_DOMAIN`, with
    activations as they are."""

    op_types: tuple[str, ...]
    function_body: Callable[[str, int], onnx.FunctionProto]
    exact_body: Callable[[str, int], onnx.FunctionProto] | None = None


class Body(NamedTuple):
    """What an operator with stored weights does: ``steps`` are the lines of its body, decoders included, that make the
    ``outputs``; ``operands`` are the inputs behind the weights, ``attributes`` those that describe no weight."""

    steps: str
    attributes: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("Y",)


def _tokens(attributes: Attributes, x_shape: Shape) -> int:
    return math.prod(x_shape[:-1])


def _one_linear(op_type: str, N: int, attributes: Attributes) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class SparseOperator:
    """An operator with stored weights.

    Attributes:
        op_types: As they are with the format that adds no word to them.
        body: Of one of these, with weights in a format.
        prefixes: Before the names of inputs and attributes of each weight, in order.
        linears: (op type, N, attributes) to the outputs of each linear that the first weight is made of; () for one.
        rows: (attributes, shape of X) to the vectors of K elements that every weight multiplies in one run.
        at_once: The same to how many of them meet a kernel together: one number where it is the same for all weights,
            else one for each. None: all of ``rows``.
    """

    op_types: tuple[str, ...]
    body: Callable[[str, StoredFormat], Body]
    prefixes: tuple[str, ...] = ("",)
    linears: Callable[[str, int, Attributes], tuple[int, ...]] = _one_linear
    rows: Callable[[Attributes, Shape], int] = _tokens
    at_once: Callable[[Attributes, Shape], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class OpType:
    """An op type of the domain: what its ``operator`` calls ``base``, with weights in ``stored`` if it has any."""

    name: str
    base: str
    operator: Operator | SparseOperator
    stored: StoredFormat | None = None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Before the names of inputs and attributes of each stored weight."""
        return self.operator.prefixes if isinstance(self.operator, SparseOperator) else ()

    def function_body(self, opset: int) -> onnx.FunctionProto:
        """The operator in standard ops of ``opset`` (13..26): what a runtime without our library executes."""
        if isinstance(self.operator, Operator):
            return self.operator.function_body(self.base, opset)
        assert self.stored is not None
        body = self.operator.body(self.base, self.stored)
        inputs, attributes = ["X"], list[str]()
        for prefix in self.prefixes:
            inputs += [prefix + name for name in (*(part.name for part in self.stored.parts), BIAS)]
            attributes += [prefix + name for name in self.stored.sizes]
        text = f"""<domain: "{DOMAIN}", opset_import: ["" : {opset}]>
{self.name} <{", ".join([*attributes, *body.attributes])}>
    ({", ".join([*inputs, *body.operands])}) => ({", ".join(body.outputs)})
{{
    {body.steps}
}}"""
        proto: onnx.FunctionProto = onnx.parser.parse_function(text)
        return proto


def op_types_of(
    operators: Sequence[Operator | SparseOperator], formats: Sequence[StoredFormat]
) -> dict[str, OpType]:
    """Every op type by its name: an operator with stored weights has its own with each format."""
    found = [
        OpType(stored.op_type(base) if stored else base, base, operator, stored)
        for operator in operators
        for stored in (formats if isinstance(operator, SparseOperator) else (None,))
        for base in operator.op_types
    ]
    return {op_type.name: op_type for op_type in found}
