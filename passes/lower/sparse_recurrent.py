"""Lower LSTM and GRU with enough zeros to ``SparseLSTM`` and ``SparseGRU``.

Before::                                       After::

    Y, Y_h, Y_c = LSTM<direction, ...>(            Y, Y_h, Y_c = sparse_onnx.SparseLSTMState<direction, K, N, ...>(
        X, W, R, B, , h0, c0)                          X, stored parts of W and R, h0, c0)

Both weights of a node become sparse, or none. See :mod:`sparse_onnx.passes.patterns.recurrent` for the nodes that can
be, and :mod:`sparse_onnx.passes.lower.lowering` for what is the same for all operators.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.weights import RECURRENT, find_weights
from sparse_onnx.passes.lower.forms import sparse_form
from sparse_onnx.passes.lower.lowering import Candidate, Lowering
from sparse_onnx.passes.patterns.recurrent import match_recurrent

__all__ = ["LowerSparseRecurrent"]


@dataclasses.dataclass(frozen=True)
class LowerSparseRecurrent(Lowering):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-recurrent"
    kind: ClassVar[str] = "recurrent layer"

    @classmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        weights, declined = find_weights(model, RECURRENT)
        by_value = {weight.value: weight for weight in weights}
        candidates, taken = [], set()
        for weight in weights:
            node = weight.nodes[0]
            if node.inputs[1] is not weight.value:
                continue
            other = node.inputs[2] if len(node.inputs) > 2 else None
            recurrent = by_value.get(other) if other is not None else None
            layer = match_recurrent(weight, recurrent, node, model.graph)
            if not isinstance(layer, str):
                candidates.append(Candidate(weight, (layer,), cls.kind, (sparse_form(cls),)))
                taken |= {weight.name, layer.recurrent.name}
            else:
                declined.append((weight.name, layer))
                if recurrent is not None:
                    declined.append((recurrent.name, layer))
        known = taken | {name for name, _ in declined}
        reason = "the other weight of its node is no constant of its own"
        declined += [(weight.name, reason) for weight in weights if weight.name not in known]
        return candidates, declined
