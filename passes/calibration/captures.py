"""Which tensors a layer's statistics are taken from: each distinct input once, whatever the number of its users."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array
from sparse_onnx.model.decoding import decodes
from sparse_onnx.model.graph import name_of, new_name, producer
from sparse_onnx.model.integer_operators import input_grid
from sparse_onnx.model.weights import CONVOLUTIONS, RECURRENT, Weight
from sparse_onnx.passes.calibration.rows import Dequantized, Recurrence
from sparse_onnx.passes.patterns.conv_window import ConvWindow

__all__ = ["Capture", "View", "find_captures"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class View:
    """The rows that one node multiplies: those of the value ``tensor``, what ``window`` sees of it, or those of a
    ``recurrence``. With a ``grid`` the value has integers, which stand for floats."""

    tensor: str
    window: ConvWindow | None = None
    recurrence: Recurrence | None = None
    grid: Dequantized | None = None

    def __str__(self) -> str:
        if self.recurrence is not None:
            return f"{self.tensor} {self.recurrence}"
        name = self.tensor if self.grid is None else f"{self.tensor} {self.grid}"
        return name if self.window is None else f"{name} through {self.window}"

    def array(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The value, in floats."""
        x = values[self.tensor]
        return x if self.grid is None else self.grid.floats(x, values)

    @property
    def tensors(self) -> tuple[str, ...]:
        """All values that the rows are made of."""
        others = self.recurrence or self.grid
        return (self.tensor, *(others.tensors if others is not None else ()))


@dataclasses.dataclass(frozen=True)
class Capture:
    """One X: the views whose rows are summed (several where a weight is shared), ``size`` = K channels each, for
    every one of ``groups`` groups: those of a convolution, or the directions of a recurrent weight."""

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

    The recurrent weight of an LSTM or GRU sees the states that the node makes; if it does not give all of them yet, it
    does from now on. (A GRU whose reset gate goes before its product multiplies a part of the weight with them times
    that gate; the states stand for that.)
    """
    captures: dict[str, Capture] = {}
    declined: list[tuple[str, str]] = []
    for weight in weights:
        reason = next((found for node in weight.nodes if (found := _reason_against(model, node))), None)
        if reason is not None:
            declined.append((weight.name, f"{reason}: no calibration, only a method without data fits"))
            continue
        if weight.nodes[0].op_type in RECURRENT:
            view, directions = _recurrent_view(model, weight, weight.nodes[0])
            captures[weight.name] = Capture((view,), weight.shape[0], directions)
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
    if (grid := input_grid(node)) is not None:
        return (
            None if _is_one(grid.scale) and _is_one(grid.zero_point) else "its input has more than one scale"
        )
    if value.dtype is not None and value.dtype not in _FLOATS:
        return f"its input has dtype {value.dtype}, which NumPy does not know"
    return None


def _is_one(value: ir.Value | None) -> bool:
    """Whether a scale or zero point is a single number, as far as the graph tells."""
    if value is None or producer(value, "DynamicQuantizeLinear") is not None:
        return True
    array = constant_array(value)
    return array is not None and array.size == 1


def _leads_to(weight: Weight, value: ir.Value | None) -> bool:
    """Whether ``value`` is the weight, as nodes decode it."""
    while value is not None and value is not weight.value:
        node = value.producer()
        value = None if node is None else node.inputs[int(decodes(node, 1))]
    return value is not None


def _grid(node: ir.Node) -> Dequantized | None:
    """What the integers that ``node`` reads stand for; None: it reads floats."""
    if (grid := input_grid(node)) is None:
        return None
    given = {"scale": grid.scale, "zero_point": grid.zero_point}
    values = {key: value for key, value in given.items() if value is not None}
    constants = {
        value.name or "": array for value in values.values() if (array := constant_array(value)) is not None
    }
    return Dequantized(**{key: value.name for key, value in values.items()}, constants=constants)


def _recurrent_view(model: ir.Model, weight: Weight, node: ir.Node) -> tuple[View, int]:
    """What the weight of an LSTM or GRU sees, and in how many directions."""
    states = _leads_to(weight, node.inputs[2])
    if states and not node.outputs[0].name:
        node.outputs[0].name = new_name(model, f"{name_of(node)}.states")
    seen = node.outputs[0] if states else node.inputs[0]
    assert seen is not None
    assert seen.name is not None
    others = dict(zip(("lengths", "initial"), (*node.inputs[4:6], None, None), strict=False))
    if not states:
        others["initial"] = None
    given = {key: value for key, value in others.items() if value is not None}
    constants = {
        value.name or "": array for value in given.values() if (array := constant_array(value)) is not None
    }
    recurrence = Recurrence(
        states,
        node.attributes.get_string("direction", "forward") == "reverse",
        **{key: value.name for key, value in given.items()},
        constants=constants,
    )
    return View(seen.name, None, recurrence), weight.dims[0] if states else 1


def _view(weight: Weight, node: ir.Node) -> View:
    value = node.inputs[0]
    assert value is not None
    assert value.name is not None
    window = None
    if weight.layer in CONVOLUTIONS:
        window = ConvWindow.of(node, weight.dims[2:])
    return View(value.name, window, grid=_grid(node))
