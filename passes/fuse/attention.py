"""Fuse attention into ``sparse_onnx.Attention``, which takes the projections as they are.

Before, in every form of :mod:`sparse_onnx.passes.patterns.attention`, which also says what Q, K and V are::

    Y = Reshape(Transpose[0,2,1,3](MatMul(Softmax[-1](MatMul(Q, K) · scale + mask), V)))

After, H being the number of heads::

    Y = sparse_onnx.AttentionMasked<num_heads = H, scale>(q, k, v, mask)

or ``Attention`` without a mask. The operator broadcasts, so that an Expand in front of a mask goes. Several
masks are added up, and ``Where(keep, S, fill)`` becomes ``Where(keep, 0, fill)``, once for all layers that share
them. A mask that is known to keep everything is dropped. Where NaN among the weights becomes 0, the operator is
``AttentionMaskedNanToZero``; without a mask there is no NaN.

Keys and values that exist only per head, [B, H, Sk, D], go into ``AttentionSplit`` as they are, and queries, too,
into ``AttentionHeads``, each without and with ``Masked`` and ``MaskedNanToZero``.

The model still runs without our library, since the operators' bodies come along as functions.

A dimension that was symbolic stays so, and what broadcasts still does: an Expand goes, and a mask that keeps
everything is dropped, only where that is known to change no shape.
Fully masked rows keep their result: a fill of at most -1e30 absorbs every score below 1e22, and the
operator and Softmax agree on rows of -Inf (NaN, or 0 if that is what becomes of NaN) and of equal scores (the mean).

ONNX ``Attention`` nodes stay: they are fused already, and ONNX Runtime 1.24 and 1.31 give fully masked rows
different results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import (
    Names,
    add_function,
    add_initializer,
    all_graphs,
    drop_if_unused,
    is_standard,
    name_of,
)
from sparse_onnx.model.shapes import Run, Shapes
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.patterns.attention import Attention, is_attention, match_attention
from sparse_onnx.sparse_ops import attention
from sparse_onnx.sparse_ops.attention import DOMAIN, Signature

__all__ = ["FuseAttention"]

_OP_TYPES = {signature: op_type for op_type, signature in attention.OP_TYPES.items()}
_OPSETS = range(13, 27)  # those that the operators' bodies can be written in


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """See the module's docstring. Attentions in subgraphs and functions are left alone.

    Attributes:
        runs: Shapes that runs of the model have shown, for where inference knows none; see :class:`Shapes`.
    """

    name: ClassVar[str] = "fuse.attention"
    stage: ClassVar[Stage] = Stage.FUSE

    runs: tuple[Run, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        found, declined = list[Attention](), list[Declined]()
        opset = model.opset_imports.get("", 1)
        shapes: Shapes | None = None  # a model without attentions needs no shape inference
        for graph in all_graphs(model):
            for node in graph:
                match: Attention | str
                if is_standard(node, "Attention"):
                    match = "is fused already, as ONNX Attention"
                elif not is_attention(node):
                    continue
                elif graph is not model.graph:
                    match = "lies in a function or in the body of If, Loop or Scan"
                elif opset not in _OPSETS:
                    match = f"opset {opset} is none of {_OPSETS[0]} to {_OPSETS[-1]}"
                else:
                    shapes = shapes or Shapes(model, runs=self.runs)
                    match = match_attention(node, shapes)
                if isinstance(match, str):
                    declined.append(self.declined(name_of(node), match))
                else:
                    found.append(match)
        if found:
            rewriter = _Rewriter(model, opset)
            for match in found:
                rewriter.fuse(match)
        statistics: dict[str, int | float] = {"found": len(found) + len(declined), "fused": len(found)}
        return PassResult(model, bool(found), statistics, tuple(declined))


class _Rewriter:
    """Puts the fused operators into the main graph; what several of them need is made once."""

    def __init__(self, model: ir.Model, opset: int) -> None:
        self._model, self._graph, self._opset = model, model.graph, opset
        self._names = Names(model)
        self._biases: dict[object, ir.Value] = {}
        self._constants: dict[tuple[int, ...] | float, ir.Value] = {}
        self._replaced: dict[ir.Value, ir.Value] = {}

    def fuse(self, match: Attention) -> None:
        old, softmax = match.output, match.softmax
        last = old.producer()
        assert last is not None
        inputs = [self._now(x) for x in (match.q, match.k, match.v)]
        if match.masks:
            inputs.append(self._bias(match))
        signature = Signature(match.split, bool(match.masks), match.heads_apart, match.nan_to_zero)
        op_type = _OP_TYPES[signature]
        attributes = {"num_heads": match.heads, "scale": match.scale}
        fused = ir.node(op_type, inputs, attributes, domain=DOMAIN, name=softmax.name)
        add_function(self._model, attention.function_body(op_type, self._opset), attention.VERSION)
        nodes = [fused]
        if match.split_to is not None:
            shape = self._constant((0, 0, *match.split_to))
            nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
        for node in nodes:
            node.metadata_props.update(softmax.metadata_props)
        for node in nodes[:-1]:
            node.outputs[0].name = self._names.new(f"{old.name}.{node.op_type}")
        new = nodes[-1].outputs[0]
        new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
        new.metadata_props.update(old.metadata_props)
        self._graph.insert_before(last, nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._replaced[old] = new
        old.name, new.name = None, old.name
        _remove_unused(last)

    def _now(self, value: ir.Value) -> ir.Value:
        """``value``, or what an earlier fusion put in its place."""
        return self._replaced.get(value, value)

    def _bias(self, match: Attention) -> ir.Value:
        """The sum of all masks, in front of the Softmax; it broadcasts to [B, H, Sq, Sk]."""
        key = tuple(mask.key for mask in match.masks)
        if key in self._biases:
            return self._biases[key]
        bias: ir.Value | None = None
        for mask in match.masks:
            value = self._now(mask.value)
            if mask.fill is not None:
                kept = bias if bias is not None else self._constant(0.0)
                choices = [kept, mask.fill] if mask.keep else [mask.fill, kept]
                bias = self._insert(match.softmax, "Where", [value, *choices])
            else:
                bias = value if bias is None else self._insert(match.softmax, "Add", [bias, value])
        assert bias is not None
        self._biases[key] = bias
        return bias

    def _insert(self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value]) -> ir.Value:
        node = ir.node(op_type, inputs)
        node.outputs[0].name = self._names.new(f"{before.outputs[0].name}.{op_type}")
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, content: tuple[int, ...] | float) -> ir.Value:
        if content not in self._constants:
            array = np.array(content, np.int64 if isinstance(content, tuple) else np.float32)
            label = "_".join(map(str, content)) if isinstance(content, tuple) else f"{content:g}"
            name = self._names.new(f"{FuseAttention.name}.{label}")
            self._constants[content] = add_initializer(self._graph, name, ir.tensor(array, name=name))
        return self._constants[content]


def _remove_unused(node: ir.Node) -> None:
    """Remove ``node``, and with it everything before it that nothing else needs."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        node.graph.remove(node, safe=True)
        for value in dict.fromkeys(inputs):
            if (producer := value.producer()) is not None:
                waiting.append(producer)
            else:
                drop_if_unused(value)
