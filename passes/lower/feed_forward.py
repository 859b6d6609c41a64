"""Fuse two linears of ours in a row into one operator, so that what is between them never leaves the caches: of floats,
or of bytes.

The MLP of a transformer, gated ones included, and a weight of low rank as its two factors::

    Before                                         After

    h = SparseMatMulGelu(X, W, b)                  Y = SparseFeedForwardGelu(X, W, b, V, c)
    Y = SparseMatMul(h, V, c)

Conditions: nothing but the second linear reads the output of the first, as its activations; the second has no
activation of its own. The stored tensors stay what they are, shared with other nodes or not. See
:mod:`sparse_onnx.sparse_ops.ops.sparse_feed_forward` and :mod:`sparse_onnx.sparse_ops.ops.int8_feed_forward` for the
operators; :mod:`.merge_linears`, which makes one operator
of gate and up projection, goes before.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.byte_weights import ByteWeight, byte_weight
from sparse_onnx.model.graph import is_read_once, name_of
from sparse_onnx.model.own_operators import drop_unused_functions, put_in_place
from sparse_onnx.model.stored_weights import StoredWeight, stored_weights
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.lower.guard import Guard
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

    guard: Guard | None = dataclasses.field(default=None, repr=False, compare=False)
    """Asked of linears of bytes; None: all pairs are fused."""

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        declined: list[Declined] = []
        pairs = 0
        for first in tuple(model.graph):
            # In the order of the graph: of three linears in a row, the first two are one operator.
            second = _reader(first)
            if second is None:
                continue
            if problem := _problem(first, second) or self._slower(model, first, second):
                declined.append(self.declined(name_of(first), problem))
            else:
                _fuse(model, first, second)
                pairs += 1
        if pairs:
            drop_unused_functions(model)
        return PassResult(model, bool(pairs), {"pairs": pairs}, tuple(declined))

    def _slower(self, model: ir.Model, first: ir.Node, second: ir.Node) -> str:
        """Why the two stay apart."""
        if self.guard is None or not isinstance(_linear(first), ByteWeight):
            return ""
        return self.guard(model, (first, second), second.outputs, FuseFeedForward())


def _linear(node: ir.Node) -> StoredWeight | ByteWeight | None:
    """The one weight of a linear of ours that there are pairs for."""
    stored = stored_weights(node)
    weight = stored[0] if len(stored) == 1 else byte_weight(node)
    if weight is None or weight.base not in PAIRS:
        return None
    return weight if weight.op_type(PAIRS[weight.base]) in OP_TYPES else None


def _reader(first: ir.Node) -> ir.Node | None:
    """The plain linear that reads the output of ``first`` as its activations, if that could be its first one."""
    if _linear(first) is None:
        return None
    readers = (use.node for use in first.outputs[0].uses() if use.idx == 0)
    return next((node for node in readers if (down := _linear(node)) and down.base == _PLAIN), None)


def _problem(first: ir.Node, second: ir.Node) -> str | None:
    """Why the two cannot be one operator."""
    if not is_read_once(first.outputs[0]):
        return f"its output is used by more than {name_of(second)}"
    if first.graph is not second.graph:
        return f"{name_of(second)} is in another graph"
    weight, down = _linear(first), _linear(second)
    assert weight is not None
    assert down is not None
    hidden = weight.shape[1] // 2 if weight.base in GATES.values() else weight.shape[1]
    if down.shape[0] != hidden:
        return f"it has {hidden} outputs, and {name_of(second)} takes {down.shape[0]}"
    if not weight.reads_alike(down):
        return f"its weight is stored as {weight.variant}, and that of {name_of(second)} as {down.variant}"
    return None


def _fuse(model: ir.Model, first: ir.Node, second: ir.Node) -> None:
    weight = _linear(first)
    assert weight is not None
    op_type = weight.op_type(PAIRS[weight.base])
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
