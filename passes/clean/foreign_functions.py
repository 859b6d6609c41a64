"""``clean.foreign-functions``: let functions of a model that happen to be in our domain keep their bodies.

Before::                                       After::

    Y = sparse_onnx.Attention(X)                   Y = sparse_onnx.model.Attention(X)

Operators of ours are model-local functions, too, and a kernel that is registered wins over a body: so a function that
is not one of them, by its name, inputs, outputs or attributes, moves to a domain that nothing else uses.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.graph import all_graphs
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = ["ForeignFunctions"]


@dataclasses.dataclass(frozen=True)
class ForeignFunctions(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "clean.foreign-functions"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        foreign = [
            function
            for function in model.functions.values()
            if function.domain == DOMAIN and not _is_ours(function)
        ]
        if foreign:
            _move(model, foreign)
        return PassResult(model, bool(foreign), {"functions": len(foreign)})


def _is_ours(function: ir.Function) -> bool:
    """Whether a function has the signature of an operator of ours; bodies differ from version to version."""
    if function.name not in OP_TYPES or function.overload:
        return False
    body = OP_TYPES[function.name].function_body(17)
    ours = list(body.input), list(body.output), set(body.attribute)
    names = [[value.name for value in values] for values in (function.inputs, function.outputs)]
    return (*names, set(function.attributes)) == ours


def _move(model: ir.Model, functions: list[ir.Function]) -> None:
    graphs = all_graphs(model)
    used = {node.domain for graph in graphs for node in graph} | set(model.opset_imports)
    used.update(function.domain for function in model.functions.values())
    domain, count = f"{DOMAIN}.model", 1
    while domain in used:
        domain, count = f"{DOMAIN}.model{count}", count + 1
    called = {function.identifier() for function in functions}
    for graph in graphs:
        for node in graph:
            if node.op_identifier() in called:
                node.domain = domain
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if DOMAIN in imports:
            imports[domain] = imports[DOMAIN]
    for function in functions:
        del model.functions[function.identifier()]
        function.domain = domain
        model.functions[function.identifier()] = function
