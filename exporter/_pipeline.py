"""What every source shares: trace, tidy, compare with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from sparse_onnx.exporter._dynamo import trace
from sparse_onnx.exporter._parity import check_parity, leaves
from sparse_onnx.exporter._tidy import tidy

__all__ = ["ExportResult", "export_frozen"]


@dataclass(frozen=True)
class ExportResult:
    """An exported model and how it was checked.

    model: may share memory with the module that it came from; save it before training that further.
    max_abs_difference: largest absolute difference between ONNX Runtime and torch on any output.
    shapes: the input shapes that were compared: one mapping from input name to shape for each run.
    """

    model: ir.Model
    max_abs_difference: float
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]


def export_frozen(
    module: Any,
    example: Mapping[str, Any],
    *,
    dynamic_shapes: Mapping[str, Any] | None,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
    cases: Sequence[Mapping[str, Any]],
    progress: Callable[[str], None],
) -> ExportResult:
    """Export a module in its inference form, inputs by keyword, and compare it with torch on ``cases``."""
    progress("tracing the module with torch.export")
    model = trace(module, example, dynamic_shapes, opset)
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    tidy(model, state, input_names, output_names)
    progress(f"comparing with torch at {len(cases)} sizes")
    distance = check_parity(model, module, cases)
    names = [value.name or "" for value in model.graph.inputs]
    shapes = tuple(
        {name: tuple(tensor.shape) for name, tensor in zip(names, leaves(case), strict=True)}
        for case in cases
    )
    return ExportResult(model, distance, shapes)
