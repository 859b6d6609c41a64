"""Which tensors a layer's statistics are taken from: each distinct input once, whatever the number of its users."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.passes.calibration.rows import Window
from sparse_onnx.passes.weights import CONVOLUTIONS, Weight

__all__ = ["Capture", "View", "find_captures"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class View:
    """The rows that one node multiplies: those of the value ``tensor``, or what ``window`` sees of it."""

    tensor: str
    window: Window | None = None

    def __str__(self) -> str:
        return self.tensor if self.window is None else f"{self.tensor} through {self.window}"


@dataclasses.dataclass(frozen=True)
class Capture:
    """One X: the views whose rows are summed (several where a weight is shared), ``size`` = K channels each, for
    every one of ``groups`` groups."""

    views: tuple[View, ...]
    size: int
    groups: int = 1

    @property
    def name(self) -> str:
        return " + ".join(str(view) for view in self.views)


def find_captures(
    model: ir.Model, weights: Sequence[Weight]
) -> tuple[dict[str, Capture], list[tuple[str, str]]]:
    """The capture of each weight by name, and the (weight, reason) of those that cannot be calibrated.

    Weights with the same input, such as those of query, key and value, have equal captures. A weight that several
    nodes use has one view for each distinct input.
    """
    captures: dict[str, Capture] = {}
    declined: list[tuple[str, str]] = []
    for weight in weights:
        reason = next((found for node in weight.nodes if (found := _reason_against(model, node))), None)
        if reason is not None:
            declined.append((weight.name, f"{reason}: no calibration, only a method without data fits"))
            continue
        views = tuple(sorted({_view(weight, node) for node in weight.nodes}, key=str))
        groups = {view.window.groups if view.window else 1 for view in views}
        if len(groups) > 1:
            declined.append((weight.name, "shared by convolutions with different groups: no calibration"))
            continue
        captures[weight.name] = Capture(views, weight.shape[0], groups.pop())
    return captures, declined


def _reason_against(model: ir.Model, node: ir.Node) -> str | None:
    value = node.inputs[0]
    if node.graph is not model.graph:
        return "used in the body of an If, Loop or Scan"
    if value is None or value.const_value is not None:
        return "its input is a constant"
    if value.dtype is not None and value.dtype not in _FLOATS:
        return f"its input has dtype {value.dtype}, which NumPy does not know"
    return None


def _view(weight: Weight, node: ir.Node) -> View:
    value = node.inputs[0]
    assert value is not None
    assert value.name is not None
    window = None
    if node.op_type in CONVOLUTIONS:
        window = Window.of(node, tuple(int(size) for size in weight.tensor.shape.numpy()[2:]))
    return View(value.name, window)
