"""Which outputs of a model can be compared: tensors. Sequences, optional values and the like run and are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from sparse_onnx.errors import UsageError

__all__ = ["check_outputs", "left_out", "tensor_outputs"]

_OTHERS = (
    (ir.SequenceType, "a sequence"),
    (ir.OptionalType, "optional"),
    (ir.SparseTensorType, "a sparse tensor"),
)


def tensor_outputs(model: ir.Model) -> tuple[str, ...]:
    """The names of the outputs that are tensors, and of those whose type the model does not tell."""
    others = left_out(model)
    return tuple(value.name or "" for value in model.graph.outputs if value.name not in others)


def left_out(model: ir.Model) -> Mapping[str, str]:
    """The outputs that are no tensors: their kind by their name."""
    return {
        value.name or "": kind
        for value in model.graph.outputs
        for type_, kind in _OTHERS
        if isinstance(value.type, type_)
    }


def check_outputs(model: ir.Model, say: Callable[[str], None]) -> None:
    """Tell which outputs are left out. Raises UsageError if none is left that could be compared."""
    others = left_out(model)
    if others and not tensor_outputs(model):
        listed = ", ".join(f"{name} is {kind}" for name, kind in others.items())
        raise UsageError(
            f"no output of the model is a tensor ({listed}), so nothing could be compared; "
            "add an output that is one, for instance what the sequence is made of"
        )
    for name, kind in others.items():
        say(f"note: output {name} is {kind}: it is computed as before and left out of comparisons")
