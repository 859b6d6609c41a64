"""The guard: time every candidate, dense against sparse, on this machine, and keep the sparse one where it wins.

Each layer is cut out of the model with the bias, residual and activation that belong to it, and timed at the shape
that it has in the model, as two ONNX Runtime sessions in turn. Between runs a buffer larger than the private caches is
walked over, since in a model the other layers' weights pass through them. Equal layers are timed once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.layer_timing import cut_layer, time_pair
from sparse_onnx.passes.base import Declined
from sparse_onnx.passes.lowering import MIN_SPARSITY, Candidate, Layer, Lowering, Packer
from sparse_onnx.passes.sparse_conv import LowerSparseConv
from sparse_onnx.passes.sparse_matmul import LowerSparseMatMul
from sparse_onnx.runtime import Ratio

__all__ = [
    "LOWERINGS",
    "TABLE_SPARSITY",
    "Decision",
    "decide",
    "decide_by_table",
    "find_candidates",
]

LOWERINGS: tuple[type[Lowering], ...] = (LowerSparseMatMul, LowerSparseConv)
"""Whose candidates the guard decides on."""

TABLE_SPARSITY = 0.65
"""Without a benchmark: from this share of zeros on the sparse kernel was faster on every machine measured."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """Sparse or dense for one candidate. Times are per run of the model, summed over the weight's layers;
    None where they were not measured. ``low`` and ``high`` bound the speedup (middle half of the rounds)."""

    candidate: Candidate
    sparse: bool
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None
    low: float | None = None
    high: float | None = None


def find_candidates(model: ir.Model) -> tuple[list[Candidate], list[Declined]]:
    """The candidates of all lowerings, and the places that they leave alone."""
    candidates, declined = [], []
    for lowering in LOWERINGS:
        found, left = lowering.find_candidates(model)
        candidates += found
        declined += [Declined(lowering.name, place, reason) for place, reason in left]
    return candidates, declined


def decide_by_table(candidates: Sequence[Candidate]) -> list[Decision]:
    """Decide without timing, for a machine that is not this one."""
    decisions: list[Decision] = []
    for c in _companions_last(candidates):
        zeros = f"not timed: {c.sparsity:.1%} zeros"
        if c.companion:
            decisions.append(_alone(c, decisions) or Decision(c, True, "not timed: beside sparse layers"))
        elif c.sparsity >= TABLE_SPARSITY:
            decisions.append(Decision(c, True, f"{zeros}, at least {TABLE_SPARSITY:.0%}"))
        else:
            decisions.append(Decision(c, False, f"{zeros}, fewer than {TABLE_SPARSITY:.0%}"))
    return decisions


def _companions_last(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.companion)


def _alone(companion: Candidate, decisions: Sequence[Decision]) -> Decision | None:
    """The decision against a companion where no other layer of its kind is sparse, or None."""
    if any(d.sparse and d.candidate.lowering is companion.lowering for d in decisions):
        return None
    return Decision(companion, False, f"no {companion.lowering.kind} around it is sparse")


def decide(
    model: ir.Model,
    candidates: Sequence[Candidate],
    shapes: Mapping[str, tuple[int, ...]],
    packer: Packer,
    *,
    threads: int,
    min_speedup: float,
    work: Path,
    progress: Callable[[str], None],
) -> list[Decision]:
    """Time the candidates. ``shapes`` has the shape of every layer's inputs, by the name of the value."""
    measured: dict[tuple[object, ...], Ratio] = {}
    start = time.perf_counter()
    decisions: list[Decision] = []
    for index, candidate in enumerate(_companions_last(candidates)):
        if candidate.companion:
            if (against := _alone(candidate, decisions)) is not None:
                decisions.append(against)
                continue
        elif candidate.sparsity < MIN_SPARSITY:
            reason = f"{candidate.sparsity:.1%} zeros: too few for any sparse kernel"
            decisions.append(Decision(candidate, False, reason))
            continue
        left = (time.perf_counter() - start) / max(1, index) * (len(candidates) - index)
        progress(f"timing {index + 1}/{len(candidates)} {candidate.weight.name} ({left:.0f} s left)")
        weight = candidate.weight
        structure = packer(candidate).attributes["mask_structure"]
        results = []
        for layer in candidate.layers:
            inputs = [shapes[value.name or ""] for value in layer.inputs]
            sparsity = round(candidate.sparsity, 2)
            pattern = (layer.nodes[0].op_type, layer.op_type, layer.bias is not None, str(layer.attributes))
            key = (*pattern, *weight.shape, *inputs, sparsity, structure)
            if key not in measured:
                measured[key] = _measure(model, candidate, layer, packer, inputs, threads=threads, work=work)
            results.append(measured[key])
        decisions.append(_judge(candidate, results, min_speedup))
    return decisions


def _judge(candidate: Candidate, results: Sequence[Ratio], min_speedup: float) -> Decision:
    dense, sparse = (sum(getattr(r, f) for r in results) for f in ("first_ms", "second_ms"))
    speedup = sum(r.median * r.second_ms for r in results) / sparse
    low, high = min(r.low for r in results), max(r.high for r in results)
    wins = speedup >= min_speedup
    verdict = f"{speedup:.2f}x dense ({low:.2f} to {high:.2f})"
    reason = verdict if wins else f"{verdict}, below min_speedup {min_speedup}"
    return Decision(candidate, wins, reason, dense, sparse, low, high)


def _measure(
    model: ir.Model,
    candidate: Candidate,
    layer: Layer,
    packer: Packer,
    shapes: Sequence[tuple[int, ...]],
    *,
    threads: int,
    work: Path,
) -> Ratio:
    dense, feeds = cut_layer(model, layer.inputs, [layer.output], shapes)
    sparse = dense.clone()
    candidate.lowering(layers=(candidate.weight.name,), packer=packer)(sparse)
    return time_pair([dense, sparse], [False, True], feeds, threads=threads, work=work)
