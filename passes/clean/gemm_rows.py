"""``clean.gemm-rows``: a linear over rows is one over tokens.

Before, x being [batch, sequence, K]::                 After::

    r = Reshape(x, [-1, K])                                h = MatMul(x, W)
    g = Gemm(r, W, b)                                      Y = Add(h, b)
    Y = Reshape(g, [batch, sequence, N])

``torch.addmm`` is exported like this (GPT-2); the two Reshapes stand between the linear and its activation, the next
linear and the heads of its attention. Conditions: W is [K, N], the Gemm neither transposes nor scales, nothing else
reads g, and the sizes of Y are known to be those of x for all inputs.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.constants import constant_tensor
from sparse_onnx.model.graph import input_at, is_standard, new_name, producer, remove_if_unread
from sparse_onnx.model.shapes import Shapes, agree
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.patterns.match import is_scaled, only_user

__all__ = ["GemmRows"]


@dataclasses.dataclass(frozen=True)
class GemmRows(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "clean.gemm-rows"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        done = 0
        # What the file declares for values in between is left out, as if other inputs were given.
        shapes = Shapes(model, inputs={})
        for node in tuple(model.graph):
            if is_standard(node, "Gemm") and _applies(node, shapes):
                _rewrite(model, node)
                done += 1
        return PassResult(model, done > 0, {"linears": done})


def _applies(gemm: ir.Node, shapes: Shapes) -> bool:
    rows, product = producer(gemm.inputs[0], "Reshape"), gemm.outputs[0]
    tokens = _reshape_after(gemm)
    weight = constant_tensor(gemm.inputs[1])
    bias = input_at(gemm, 2)
    if rows is None or tokens is None or weight is None or len(weight.shape) != 2:
        return False
    if bias is not None and ((constant := constant_tensor(bias)) is None or len(constant.shape) != 1):
        return False
    if is_scaled(gemm) or any(gemm.attributes.get_int(name, 0) for name in ("transA", "transB")):
        return False
    x, y = shapes.dims(rows.inputs[0]), shapes.dims(tokens.outputs[0])
    (K, N), flat = map(int, weight.shape.numpy()), shapes.dims(product)
    return len(x) > 2 and x[-1] == K and len(flat) == 2 and agree(y, (*x[:-1], N))


def _reshape_after(gemm: ir.Node) -> ir.Node | None:
    product = gemm.outputs[0]
    node = only_user(product, "Reshape")
    return node if node is not None and node.inputs[0] is product else None


def _rewrite(model: ir.Model, gemm: ir.Node) -> None:
    before, after = producer(gemm.inputs[0], "Reshape"), _reshape_after(gemm)
    assert before is not None
    assert after is not None
    output, product = after.outputs[0], gemm.outputs[0]
    bias = input_at(gemm, 2)
    nodes = [ir.node("MatMul", [before.inputs[0], gemm.inputs[1]], name=gemm.name)]
    if bias is not None:
        nodes[0].outputs[0].name = new_name(model, f"{product.name}.tokens")
        name = None if gemm.name is None else f"{gemm.name}.bias"
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=name))
    for node in nodes:
        node.metadata_props.update(gemm.metadata_props)
    new = nodes[-1].outputs[0]
    new.type, new.shape, new.doc_string = output.type, output.shape, output.doc_string
    new.metadata_props.update(output.metadata_props)
    model.graph.insert_before(after, nodes)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    output.name, new.name = None, output.name
    for node in (after, gemm, before):
        remove_if_unread(node)
