"""Fuse two sparse linears in a row into one operator, so that what is between them never leaves the caches.

The MLP of a transformer, gated ones included, and a weight of low rank as its two factors::

    Before                                         After

    h = SparseMatMulGelu(X, W, b)                  Y = SparseFeedForwardGelu(X, W, b, V, c)
    Y = SparseMatMul(h, V, c)

Conditions: nothing but the second linear reads the output of the first, as its activations; the second has no
activation of its own. The stored tensors stay what they are, shared with other nodes or not. See
:mod:`sparse_onnx.sparse_ops.ops.sparse_feed_forward` for the operators; :mod:`.merge_linears`, which makes one operator
of gate and up projection, goes before.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.graph import is_read_once, name_of
from sparse_onnx.model.own_operators import base_type, drop_unused_functions, is_ours, put_in_place
from sparse_onnx.model.stored_weights import stored_weights
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.ops import sparse_matmul
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES
from sparse_onnx.sparse_ops.ops.sparse_feed_forward import PAIRS, PREFIX
from sparse_onnx.sparse_ops.ops.sparse_matmul_split import GATES

__all__ = ["FuseFeedForward"]

_PLAIN = sparse_matmul.OP_TYPES["none"]


@dataclasses.dataclass(frozen=True)
class FuseFeedForward(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.feed-forward"
    stage: ClassVar[Stage] = Stage.LOWER
    in_recipes: ClassVar[bool] = False

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        declined: list[Declined] = []
        pairs = 0
        for first in tuple(model.graph):
            # In the order of the graph: of three linears in a row, the first two are one operator.
            second = _reader(first)
            if second is None:
                continue
            if problem := _problem(first, second):
                declined.append(self.declined(name_of(first), problem))
            else:
                _fuse(model, first, second)
                pairs += 1
        if pairs:
            drop_unused_functions(model)
        return PassResult(model, bool(pairs), {"pairs": pairs}, tuple(declined))


def _reader(first: ir.Node) -> ir.Node | None:
    """The plain linear that reads the output of ``first`` as its activations, if that could be its first one."""
    if not is_ours(first, *PAIRS):
        return None
    readers = (use.node for use in first.outputs[0].uses() if use.idx == 0)
    return next((node for node in readers if is_ours(node, _PLAIN)), None)


def _problem(first: ir.Node, second: ir.Node) -> str | None:
    """Why the two cannot be one operator."""
    if not is_read_once(first.outputs[0]):
        return f"its output is used by more than {name_of(second)}"
    if first.graph is not second.graph:
        return f"{name_of(second)} is in another graph"
    (weight,), (down,) = stored_weights(first), stored_weights(second)
    hidden = weight.shape[1] // 2 if is_ours(first, *GATES.values()) else weight.shape[1]
    if down.shape[0] != hidden:
        return f"it has {hidden} outputs, and {name_of(second)} takes {down.shape[0]}"
    if weight.stored is not down.stored or not weight.stored.reads_alike(weight.variant, down.variant):
        return f"its weight is stored as {weight.variant}, and that of {name_of(second)} as {down.variant}"
    return None


def _fuse(model: ir.Model, first: ir.Node, second: ir.Node) -> None:
    (weight,) = stored_weights(first)
    op_type = weight.stored.op_type(PAIRS[base_type(first)])
    own = {name: attribute.value for name, attribute in first.attributes.items()}
    others = {PREFIX + name: a.value for name, a in second.attributes.items() if name != "format"}
    node = ir.node(op_type, [*first.inputs, *second.inputs[1:]], {**own, **others}, domain=DOMAIN)
    put_in_place(
        model,
        node,
        OP_TYPES[op_type].function_body(model.opset_imports[""]),
        linears=(first, second),
        nodes=(first, second),
        place=second,
        outputs=second.outputs,
    )
