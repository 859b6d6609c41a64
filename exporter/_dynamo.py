"""The call of torch's exporter, quiet and with its failures in one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.exporter._extras import require

__all__ = ["OPSETS", "trace"]

OPSETS = range(18, 24)
"""The opsets that torch's exporter writes by itself; older ones would go through a lossy conversion."""


def trace(
    module: Any, inputs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any] | None, opset: int
) -> ir.Model:
    """Export ``module`` with ``torch.onnx.export(dynamo=True)``; graph inputs have the names of ``inputs``, and
    those of an input that is a list a number behind it.

    Raises UsageError for an opset out of 18..23 and for a module that torch cannot trace.
    """
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} cannot be exported; choose one of {OPSETS[0]} to {OPSETS[-1]}")
    require("onnxscript")
    onnx = require("torch.onnx")
    try:
        with _silence():
            program = onnx.export(
                module,
                kwargs=dict(inputs),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    except Exception as error:  # torch's exporter raises many kinds
        raise UsageError(f"torch cannot export {type(module).__name__}: {_reason(error)}") from error
    model: ir.Model = program.model
    names = [value.name for value in model.graph.inputs]
    expected = [
        leaf
        for name, value in inputs.items()
        for leaf in ([f"{name}_{i}" for i in range(len(value))] if isinstance(value, list) else [name])
    ]
    if names != expected:
        raise UsageError(f"torch exported the inputs {names} instead of {expected}")
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep reports about the exporter's inner life from the user; failures are raised anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: torch wraps it in pages of general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
