"""What a compilation puts into its report; :mod:`sparse_onnx.document` describes every key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.document import (
    SPARSE_FORMS,
    DeclinedRow,
    DifferenceDocument,
    LayerRow,
    QuantizedRow,
    Report,
    Summary,
    TargetRow,
    UntouchedRow,
    WholeTimes,
    finite,
)
from sparse_onnx.model import model_io
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.quantized_weights import QuantizedWeight
from sparse_onnx.model.stored_weights import sparse_nodes, stored_weights
from sparse_onnx.model.weights import Weight
from sparse_onnx.model.work import NodeWork, sparse_share, untouched
from sparse_onnx.passes.base import Declined, LayerChange
from sparse_onnx.passes.lower.forms import DENSE
from sparse_onnx.progress import Progress
from sparse_onnx.report.environment import write_json
from sparse_onnx.running.requests import Phase
from sparse_onnx.timing.choose import Decision
from sparse_onnx.timing.layers import kernel_of
from sparse_onnx.timing.rounds import Ratio
from sparse_onnx.verification.metrics import MetricResult

__all__ = [
    "declined_rows",
    "kernel_names",
    "layer_rows",
    "quantized_rows",
    "summary",
    "target_rows",
    "times",
    "untouched_rows",
    "write_report",
]


def summary(
    layers: Sequence[LayerRow],
    work: Sequence[NodeWork],
    timing: Ratio | None,
    nbytes: int,
    size: int | None,
    loss: DifferenceDocument | None,
    metric: MetricResult | None,
) -> Summary:
    """The ``summary`` of a report. ``layers`` are its rows, ``work`` is that of all operators, ``timing`` that of the
    whole model, ``nbytes`` and ``size`` are bytes before and after, ``loss`` is the difference from the original's
    outputs, None in a plan."""
    weights = sum(math.prod(row["shape"]) for row in layers)
    zeros = sum(row["sparsity"] * math.prod(row["shape"]) for row in layers)
    lowered = {row["name"] for row in layers if row["decision"] in SPARSE_FORMS}
    whole = times(timing)
    return {
        "dense_ms": whole["dense_ms"],
        "optimized_ms": whole["optimized_ms"],
        "speedup": whole["speedup"],
        "speedup_low": whole["speedup_low"],
        "speedup_high": whole["speedup_high"],
        "bytes_before": nbytes,
        "bytes_after": size,
        "sparsity": zeros / weights if weights else 0.0,
        "sparse_flops_fraction": sparse_share(work, lowered),
        "relative_error": None if loss is None else loss["relative_error"],
        "cosine": None if loss is None else loss["cosine"],
        "metric": None if metric is None else metric.to_dict(),
    }


def untouched_rows(
    layers: Sequence[LayerRow], work: Sequence[NodeWork], declined: Sequence[Declined]
) -> list[UntouchedRow]:
    """The ``untouched`` of a report: what is no layer, by operator and reason. ``declined`` has reasons by place."""
    reasons = {place.place: place.reason for place in declined}
    return [
        {"op_type": row.op_type, "count": row.count, "share": row.share, "reason": row.reason}
        for row in untouched(work, {row["name"] for row in layers}, reasons)
    ]


def quantized_rows(
    weights: Sequence[QuantizedWeight],
    changes: Sequence[LayerChange],
    pruned: Mapping[str, float | None],
    held_out: Mapping[str, float],
) -> list[QuantizedRow]:
    """The ``quantized`` of a report: all ``weights`` of layers that are stored as integers, and tables that ``changes``
    rounded. Errors of outputs are by name: of weights that were ``pruned``, and on ``held_out`` data."""
    rounded = {change.name: change for change in changes}
    found: list[QuantizedRow] = []
    for weight in weights:
        change = rounded.pop(weight.name, None)
        found.append(
            {
                "name": weight.name,
                "module": weight.module,
                "op_type": weight.op_type,
                "elements": weight.size,
                "bits": weight.bits,
                "group_size": weight.group_size,
                "encoding": weight.encoding,
                "bytes": weight.nbytes if change is None else change.nbytes,
                "sparsity": weight.zeros / weight.size,
                "rounded": change is not None,
                "pruned": weight.name in pruned,
                "output_error": pruned.get(weight.name) if change is None else change.error,
                "output_error_held_out": held_out.get(weight.name),
            }
        )
    for change in rounded.values():
        found.append(
            {
                "name": change.name,
                "module": "",
                "op_type": "",
                "elements": change.size,
                "bits": change.bits,
                "group_size": change.group_size,
                "encoding": "",
                "bytes": change.nbytes,
                "sparsity": change.zeros_after / change.size,
                "rounded": True,
                "pruned": change.name in pruned,
                "output_error": change.error,
                "output_error_held_out": held_out.get(change.name),
            }
        )
    return found


def declined_rows(declined: Iterable[Declined]) -> list[DeclinedRow]:
    """The ``declined`` of a report."""
    return [
        {"pass_name": place.pass_name, "place": place.place, "reason": place.reason} for place in declined
    ]


def layer_rows(
    decisions: Sequence[Decision],
    shapes: Mapping[str, tuple[int, ...]] | None,
    before: Mapping[str, ir.TensorProtocol | None],
    errors: Mapping[str, float | None],
    held_out_errors: Mapping[str, float],
    kernels: Mapping[str, str],
    progress: Callable[[str], None] = lambda _line: None,
) -> list[LayerRow]:
    """The ``layers`` of a report. ``shapes`` are those of the layers' inputs, if they are known; ``before`` has the
    weights of the original by name, ``errors`` and ``held_out_errors`` those of the pruned layers' outputs, ``kernels``
    see :func:`kernel_names`."""
    rows: list[LayerRow] = []
    steps = Progress(progress, "layer", len(decisions))
    for decision in decisions:
        candidate = decision.candidate
        for part, (zeros, non_finite) in zip(candidate.parts, candidate.counts, strict=True):
            weight = part.weight
            original = before.get(weight.name)
            first = weight is candidate.weight  # the node is timed as a whole
            row: LayerRow = {
                "name": weight.name,
                "module": weight.module,
                "op_type": weight.nodes[0].op_type,
                "shape": list(weight.shape),
                "rows": None
                if shapes is None
                else sum(layer.products(shapes[layer.inputs[0].name or ""]) for layer in candidate.layers),
                "activations": sorted({layer.activation for layer in candidate.layers}),
                "sparsity": zeros / weight.size,
                "non_finite": non_finite,
                "mask_structure": weight.value.metadata_props.get(STRUCTURE_KEY, "unstructured"),
                "decision": decision.form,
                "reason": decision.reason,
                "kernel": kernels.get(weight.name, decision.form) if decision.lowered else DENSE,
                "times": dict(decision.times) if first else {},
                "speedup_low": decision.low if first else None,
                "speedup_high": decision.high if first else None,
                "close": decision.close,
                "cached": decision.cached,
                "quiet": decision.quiet,
                "output_error": errors.get(weight.name),
                "output_error_held_out": held_out_errors.get(weight.name),
                "relative_error": 0.0 if original is weight.tensor else _weight_error(original, weight),
            }
            rows.append(row)
        steps.step()
    return rows


def kernel_names(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The kernels that a session here computes the sparse layers of ``model``, as it was lowered, with, by the name of
    the layer's weight; ``shapes`` are those of the layers' inputs."""
    found: dict[str, str] = {}
    for node in sparse_nodes(model):
        x = node.inputs[0]
        if x is not None and x.name and x.name in shapes:
            kernel = kernel_of(node, shapes[x.name])
            found |= {name: kernel for weight in stored_weights(node) for name in weight.made_of}
    return found


def times(timing: Ratio | None) -> WholeTimes:
    """The times of a whole model as a report has them; None where it was not timed."""
    return {
        "dense_ms": timing.first_ms if timing else None,
        "optimized_ms": timing.second_ms if timing else None,
        "speedup": timing.median if timing else None,
        "speedup_low": timing.low if timing else None,
        "speedup_high": timing.high if timing else None,
    }


def target_rows(
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    weights: Sequence[float] | None,
    timings: Sequence[Ratio],
    phases: Sequence[Phase | None] = (),
) -> list[TargetRow]:
    """The ``targets`` of a report: the whole model at each; ``timings`` are empty where it was not timed, ``phases``
    what a decoder does at each."""
    untold = [None] * len(targets)
    rows: list[TargetRow] = []
    for shapes, weight, timing, phase in zip(
        targets, weights or untold, timings or untold, phases or untold, strict=True
    ):
        whole = times(timing)
        row: TargetRow = {
            "input_shapes": {name: list(shape) for name, shape in shapes.items()},
            "weight": weight,
            "dense_ms": whole["dense_ms"],
            "optimized_ms": whole["optimized_ms"],
            "speedup": whole["speedup"],
            "speedup_low": whole["speedup_low"],
            "speedup_high": whole["speedup_high"],
            "quiet": timing.quiet if timing else None,
        }
        if phase is not None:
            row["phase"], row["tokens"] = phase
            row["dense_tokens_per_second"] = phase.per_second(timing.first_ms) if timing else None
            row["optimized_tokens_per_second"] = phase.per_second(timing.second_ms) if timing else None
        rows.append(row)
    return rows


def write_report(report: Report, folder: Path) -> None:
    """report.json and report.html."""
    from sparse_onnx.report.html import write_html

    write_json(report, folder / "report.json")
    write_html(report, folder / "report.html")


def _weight_error(original: ir.TensorProtocol | None, weight: Weight) -> float | None:
    """‖W − W′‖ / ‖W‖ (Frobenius): the expected relative error of the layer's output on uncorrelated inputs."""
    if original is None:
        return None
    if original.dtype.is_floating_point():
        before, after = np.array(original.numpy(), np.float64), np.array(_as_stored(weight), np.float64)
    else:  # it had few bits before
        before = np.array(weight.encoding.decode(original.numpy()), np.float64)
        after = np.array(weight.encoding.decode(weight.tensor.numpy()), np.float64)
    if before.size != after.size:  # structured pruning took a part of it away
        return None
    norm = float(np.linalg.norm(before))
    error = float(np.linalg.norm(before.reshape(-1) - after.reshape(-1))) / norm if norm else 0.0
    del before, after
    model_io.release_mapping(original)
    weight.release()
    return finite(error)


def _as_stored(weight: Weight) -> np.ndarray:
    """The elements of a weight in the order of one that is stored as floats."""
    return weight.matrix().T if weight.transposed else weight.matrix()
