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
from sparse_onnx.model.graph import drop_if_unused, is_standard, new_name
from sparse_onnx.model.shapes import Shapes, agree
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage

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
    rows, product = _reshape_before(gemm), gemm.outputs[0]
    tokens = _reshape_after(gemm)
    weight = constant_tensor(gemm.inputs[1])
    bias = constant_tensor(gemm.inputs[2]) if len(gemm.inputs) > 2 else None
    if rows is None or tokens is None or weight is None or len(weight.shape) != 2:
        return False
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None and (bias is None or len(bias.shape) != 1):
        return False
    if any(gemm.attributes.get_int(name, 0) for name in ("transA", "transB")) or any(
        gemm.attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta")
    ):
        return False
    x, y = shapes.dims(rows.inputs[0]), shapes.dims(tokens.outputs[0])
    (K, N), flat = map(int, weight.shape.numpy()), shapes.dims(product)
    return len(x) > 2 and x[-1] == K and len(flat) == 2 and agree(y, (*x[:-1], N))


def _reshape_before(gemm: ir.Node) -> ir.Node | None:
    node = gemm.inputs[0].producer() if gemm.inputs[0] is not None else None
    return node if node is not None and is_standard(node, "Reshape") else None


def _reshape_after(gemm: ir.Node) -> ir.Node | None:
    uses, product = gemm.outputs[0].uses(), gemm.outputs[0]
    node = next(iter(uses)).node if len(uses) == 1 and not product.is_graph_output() else None
    if node is None or not is_standard(node, "Reshape") or node.graph is not gemm.graph:
        return None
    return node if node.inputs[0] is product else None


def _rewrite(model: ir.Model, gemm: ir.Node) -> None:
    before, after = _reshape_before(gemm), _reshape_after(gemm)
    assert before is not None
    assert after is not None
    output, product = after.outputs[0], gemm.outputs[0]
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    nodes = [ir.node("MatMul", [before.inputs[0], gemm.inputs[1]], name=gemm.name)]
    if bias is not None:
        nodes[0].outputs[0].name = new_name(model, f"{product.name}.tokens")
        name = None if gemm.name is None else f"{gemm.name}.bias"
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=name))
    for node in nodes:
        node.metadata_props.update(gemm.metadata_props)
    new, shape = nodes[-1].outputs[0], after.inputs[1]
    new.type, new.shape, new.doc_string = output.type, output.shape, output.doc_string
    new.metadata_props.update(output.metadata_props)
    model.graph.insert_before(after, nodes)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    output.name, new.name = None, output.name
    model.graph.remove([after, gemm], safe=True)
    if not before.outputs[0].uses() and not before.outputs[0].is_graph_output():
        rows = before.inputs[1]
        model.graph.remove(before, safe=True)
        _drop(rows)
    _drop(shape)


def _drop(value: ir.Value | None) -> None:
    if value is not None and value.producer() is None:
        drop_if_unused(value)
