"""``prune.threshold``: set every weight with |w| < theta to zero.

Before: any linear ``Y = X · W``, W [K, N]. After: the same, with w = 0 wherever |w| < theta.

Right for models trained with a penalty that drives weights close to zero but not onto it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from sparse_onnx.model.weights import Weight
from sparse_onnx.options import require
from sparse_onnx.passes.prune.pruning import PruningPass

__all__ = ["Threshold"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(PruningPass):
    """Prune what is smaller than ``theta`` >= 0 (in the units of the weights)."""

    name: ClassVar[str] = "prune.threshold"
    theta: float

    def check(self) -> None:
        super().check()
        require(self.theta >= 0, "theta", self.theta, "0 or more")

    def keep_masks(self, weights: Sequence[Weight]) -> Iterator[np.ndarray]:
        for weight in weights:
            # float64: a theta rounded to the weight's dtype could fall on the other side of a weight.
            yield ~(np.abs(weight.matrix()) < np.float64(self.theta))
