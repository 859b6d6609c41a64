"""``prune.random``: set weights chosen by chance to zero, the baseline that any other method must beat.

Before: any linear ``Y = X · W``, W [K, N]. After: the same, with W ∘ mask in place of W.

Every non-zero element draws a uniform score, and the lowest go as in ``prune.magnitude`` (blocks and channels
by the L2 norm of their scores, so those that already hold zeros tend to go first). The draw depends only on
``seed`` and the weight's name, not on the order or number of other weights.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from sparse_onnx.model.weights import Weight
from sparse_onnx.options import require
from sparse_onnx.passes.prune.pruning import PruningPass
from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask, resolve_sparsity

__all__ = ["Random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(PruningPass):
    """Prune to ``sparsity`` in [0, 1) with ``mask_structure``; zeros that are there stay and count."""

    name: ClassVar[str] = "prune.random"
    sparsity: float | None = None
    mask_structure: str = "unstructured"
    seed: int = 0

    @property
    def structure(self) -> MaskStructure:
        return MaskStructure.parse(self.mask_structure)

    def check(self) -> None:
        super().check()
        resolve_sparsity(self.sparsity, self.structure)
        require(self.seed >= 0, "seed", self.seed, "0 or more")

    def asked_zeros(self, size: int) -> int | None:
        return round(self.expected_share * size)

    @property
    def expected_share(self) -> float:
        return resolve_sparsity(self.sparsity, self.structure)

    def keep_masks(self, weights: Sequence[Weight]) -> Iterator[np.ndarray]:
        for weight in weights:
            yield keep_mask(_scores(weight, self.seed), self.sparsity, self.structure)


def _scores(weight: Weight, seed: int) -> np.ndarray:
    """Uniform in (0, 1] [K, N] float32; 0 where the weight is zero, Inf where it is NaN or Inf."""
    matrix = weight.matrix()
    generator = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
    scores = 1 - generator.random(matrix.shape, np.float32)
    scores[matrix == 0] = 0
    scores[~np.isfinite(matrix)] = np.inf
    return scores
