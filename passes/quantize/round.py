"""``quant.round``: round weights to the values that an integer of few bits can hold.

Before: any linear ``Y = X · W``, convolution, LSTM or GRU, W [K, N]. After: the same, with W' in place of W,

    W'[:, n] = s[n] · q[:, n],    q = round(W / s) in −t..t,    s[n] = max |W[:, n]| / t,    t = 2^(bits − 1) − 1,

one scale s for every output channel n, halves to even. Zeros stay zero, and what is smaller than s / 2 joins them. The
tensors keep their type and size: the pass shows what so few bits would cost in accuracy, on any runtime.
"""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import DEFAULT_IGNORE, Selection, find_weights
from sparse_onnx.options import require
from sparse_onnx.passes.base import LayerChange, Pass, PassContext, PassResult, Stage
from sparse_onnx.progress import done_of

__all__ = ["Round", "on_grid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round(Pass):
    """Round to ``bits`` bits, 2 to 8, sign included. ``targets`` and ``ignore`` choose the weights, see
    :class:`~sparse_onnx.model.weights.Selection`; one with NaN or Inf is left alone."""

    name: ClassVar[str] = "quant.round"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    bits: int = 8
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def check(self) -> None:
        require(2 <= self.bits <= 8, "bits", self.bits, "2 to 8")
        _ = self.selection

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        found, left = find_weights(model)
        for entry in self.selection.unmatched(found):
            raise UsageError(f"targets: {entry!r} matches no weight, node, module or op type of a layer")
        declined = [self.declined(place, reason) for place, reason in left]
        chosen = []
        for weight in found:
            reason = self.selection.reason_against(weight)
            if reason is None and not weight.is_finite():
                reason = "holds NaN or Inf"
            if reason is None:
                chosen.append(weight)
            else:
                declined.append(self.declined(weight.name, reason))
        layers: list[LayerChange] = []
        start = time.perf_counter()
        for index, weight in enumerate(chosen):
            before = weight.matrix()
            after = on_grid(before, self.bits)
            changed = not np.array_equal(before, after)
            zeros = [int(matrix.size - np.count_nonzero(matrix)) for matrix in (before, after)]
            del before
            if changed:
                stored = weight.stored(after)
                weight.release()
                weight.value.const_value = context.store(stored, weight.name)
                layers.append(LayerChange(weight.name, after.size, zeros[0], zeros[1]))
            context.progress(f"{weight.name}: {self.bits} bits ({done_of(index + 1, len(chosen), start)})")
        statistics: dict[str, int | float] = {"weights": len(chosen), "changed": len(layers)}
        return PassResult(model, bool(layers), statistics, tuple(declined), tuple(layers))


def on_grid(W: np.ndarray, bits: int) -> np.ndarray:
    """W [K, N] of any float type, finite, on the grid of the module's docstring, in the same type. Rounding the result
    once more changes nothing."""
    top = 2 ** (bits - 1) - 1
    wide = W.astype(np.float64)
    largest = np.abs(wide).max(axis=0, keepdims=True)
    scale = np.where(largest > 0, largest / top, 1.0)
    q = np.rint(wide / scale)
    # The largest as they are: top · (largest / top) can differ from largest in the last bit, and so would the scale.
    return np.where(np.abs(q) == top, np.sign(wide) * largest, q * scale).astype(W.dtype)
