"""A ``torch.nn.Module`` to ONNX."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparse_onnx.errors import UsageError
from sparse_onnx.exporter._dynamic_axes import Inputs, larger_or_smaller, named_axes, traceable
from sparse_onnx.exporter._extras import require
from sparse_onnx.exporter._inference_copy import inference_copy
from sparse_onnx.exporter._pipeline import ExportResult, export_frozen

__all__ = ["export_torch"]


def export_torch(
    module: Any,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    opset: int = 20,
    progress: Callable[[str], None] = lambda _line: None,
) -> ExportResult:
    """Export a torch module as it computes in evaluation mode, and check the result against torch.

    ``example_inputs``: tensors, in the order of ``forward`` (tuple) or by name (mapping).
    ``dynamic_shapes``: as torch takes it, ``{"x": {0: "batch"}}`` or ``({0: "batch"},)``; inputs that a
    mapping leaves out are static, and axes of one name have one size. ``input_names`` and ``output_names``
    replace, in order, the names that torch gives. ``progress`` is called with one line of text at every step.

    Pruning masks and parametrizations are multiplied out; the module itself stays as it is. The model is run
    in ONNX Runtime at the example shapes and, where axes have names, at other sizes of these.

    Raises UsageError for inputs that do not fit or a module that torch cannot export, HostError when a
    package is missing, VerificationError when an output differs by more than 1e-4 of its largest value.
    """
    torch = require("torch")
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"export_torch() takes a torch.nn.Module, not {type(module).__name__}")
    inputs = _by_name(module, example_inputs)
    shapes = _shapes_by_name(inputs, dynamic_shapes)
    axes = named_axes(shapes)
    frozen = inference_copy(module)
    cases = [inputs]
    if axes:
        cases += [other for other in larger_or_smaller(inputs, axes) if _runs(frozen, other)][:1]
    return export_frozen(
        frozen,
        traceable(inputs, axes),
        dynamic_shapes=shapes if any(shapes.values()) else None,
        input_names=list(input_names or ()),
        output_names=list(output_names or ()),
        opset=opset,
        cases=cases,
        progress=progress,
    )


def _by_name(module: Any, example: tuple[Any, ...] | Mapping[str, Any]) -> Inputs:
    """The example inputs by the names of ``forward``'s parameters, in their order."""
    torch = require("torch")
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(**example) if isinstance(example, Mapping) else signature.bind(*example)
    except TypeError as error:
        raise UsageError(f"the example inputs do not fit {type(module).__name__}.forward: {error}") from error
    inputs: Inputs = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        inputs.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"example input {name!r} is {type(value).__name__}, not one tensor; "
                "wrap the module in one whose forward() takes tensors only"
            )
    return inputs


def _shapes_by_name(
    inputs: Inputs, dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None
) -> dict[str, Any]:
    if dynamic_shapes is None:
        return dict.fromkeys(inputs)
    if not isinstance(dynamic_shapes, Mapping):
        if len(dynamic_shapes) != len(inputs):
            raise UsageError(f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(inputs)} inputs")
        dynamic_shapes = dict(zip(inputs, dynamic_shapes, strict=True))
    if unknown := set(dynamic_shapes) - set(inputs):
        raise UsageError(f"dynamic_shapes names {sorted(unknown)}; the inputs are {list(inputs)}")
    return {name: dynamic_shapes.get(name) for name in inputs}


def _runs(module: Any, inputs: Inputs) -> bool:
    torch = require("torch")
    try:
        with torch.no_grad():
            module(**inputs)
    except Exception:  # whatever a module raises for sizes that it was not made for
        return False
    return True
