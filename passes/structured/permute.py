"""``permute.neurons``: put hidden neurons in the order in which N:M pruning of what reads them keeps most.

Before, an MLP with h neurons::                After, with an order o of them::

    u = act(X W1 + b1)                           u = act(X W1[:, o] + b1[o])
    Y = u W2 + b2                                Y = u W2[o] + b2

The model computes the same; any elementwise ``act``, gated ones too. N:M keeps N of M consecutive inputs of each output
of W2: where loud and quiet neurons lie together, fewer weights that matter meet in a group. The order is that of
:mod:`~sparse_onnx.passes.solvers.permutation`. It stands in front of ``prune.*`` with the same ``mask_structure``.

Layers of a sentence encoder in a better order, pruned by ``auto``, lose on held-out text 2 to 12 % less with 2:4 and 1
to 11 % less with 4:8; the second linear of an MLP 3 %. Blocks of 1x2 gain 0 to 3 %, of 1x4 1 to 6 %: they are not
offered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.weights import DEFAULT_IGNORE, LINEARS, Selection
from sparse_onnx.options import require
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.calibration.calibrator import Calibrator
from sparse_onnx.passes.solvers.gram import removal_form, unit_form
from sparse_onnx.passes.solvers.masks import MaskStructure, structure_reason
from sparse_onnx.passes.solvers.permutation import input_order, kept_importance
from sparse_onnx.passes.solvers.statistics import InputStatistics
from sparse_onnx.passes.structured.ffn import hidden_neurons
from sparse_onnx.passes.structured.region import Region
from sparse_onnx.passes.structured.structured import find_regions, selected
from sparse_onnx.passes.structured.surgery import reorder_region

__all__ = ["PermuteNeurons"]

_DAMPING = 0.05
_WORTH = 0.98  # of what is lost: less is not worth other weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class PermuteNeurons(Pass):
    """See the module's docstring.

    Attributes:
        mask_structure: N:M, as the pass that prunes will have it.
        targets, ignore: Choose places by any of their weights, see :class:`~sparse_onnx.model.weights.Selection`.
    """

    name: ClassVar[str] = "permute.neurons"
    stage: ClassVar[Stage] = Stage.PERMUTE
    idempotent: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True

    mask_structure: str = "2:4"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def check(self) -> None:
        require(self.structure.kind == "n:m", "mask_structure", self.mask_structure, "N:M, such as 2:4")
        _ = self.selection

    @property
    def structure(self) -> MaskStructure:
        return MaskStructure.parse(self.mask_structure)

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        regions, left = find_regions(
            model,
            LINEARS,
            self.selection,
            lambda layers, _shapes: hidden_neurons(layers),
            self._reason_against,
        )
        declined = [self.declined(place, reason) for place, reason in left]
        statistics: dict[str, int | float] = {"places": 0, "neurons": 0}
        if not regions:
            return PassResult(model, False, statistics, tuple(declined))
        data = context.calibration_for(self.name)
        readers = [weight for region in regions for weight, _ in region.readers]
        calibrator = Calibrator(
            model, readers, data.samples, data.options, work=data.work, progress=context.progress
        )
        known = calibrator.oneshot()
        uncalibrated = dict(calibrator.declined)
        for region in regions:
            names = [weight.name for weight, _ in region.readers]
            reason = next((uncalibrated[name] for name in names if name in uncalibrated), None)
            order = None if reason else self._order(region, [known[name][0] for name in names], context)
            if order is None:
                declined.append(self.declined(names[0], reason or "its inputs lie well as they are"))
                continue
            reorder_region(model, region, order, context)
            statistics["places"] += 1
            statistics["neurons"] += region.units
        return PassResult(model, statistics["places"] > 0, statistics, tuple(declined))

    def _reason_against(self, region: Region) -> str | None:
        if reason := selected(region, self.selection):
            return reason
        if any(size != 1 for _, size in region.readers):
            return "a neuron is more than one of its inputs"
        shapes = [weight.shape for weight, _ in region.readers]
        if reason := next(filter(None, (structure_reason(shape, self.structure) for shape in shapes)), None):
            return reason
        weights = [*region.writers, *(weight for weight, _ in region.readers)]
        return None if all(weight.is_finite() for weight in weights) else "holds NaN or Inf"

    def _order(
        self, region: Region, statistics: Sequence[InputStatistics], context: PassContext
    ) -> np.ndarray | None:
        """The order in which the readers keep most together, or None where that is hardly more than they do."""
        keep, group = self.structure.size
        importance = np.concatenate(
            [
                _importance(weight.matrix(), own)
                for (weight, _), own in zip(region.readers, statistics, strict=True)
            ],
            axis=1,
        )
        order = input_order(importance, keep, group)
        whole = importance.sum(dtype=np.float64)
        before, after = (
            whole - kept_importance(each, keep, group) for each in (importance, importance[order])
        )
        if not after < _WORTH * before:
            return None
        context.progress(
            f"{region.readers[0][0].name}: {self.structure} loses {after / before:.0%} of before"
        )
        return order


def _importance(W: np.ndarray, statistics: InputStatistics) -> np.ndarray:
    """What each weight [K, N] costs once the others make up for it, or at once where the Gram is not whole; float32."""
    gram = statistics.gram
    scale = np.sqrt(statistics.diagonal)[:, None]
    if isinstance(gram, np.ndarray) and gram.ndim == 2 and gram.any():
        scale = removal_form(unit_form(gram, _DAMPING)).scale
    return np.square(np.asarray(W, np.float32) * np.asarray(scale, np.float32))
