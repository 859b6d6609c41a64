"""``prune.magnitude``: set the weights of smallest absolute value to zero.

Before: any linear ``Y = X · W``, W [K, N]. After: the same, with W ∘ mask in place of W.

The importance of an element is |w|, that of a block or an output channel the ``norm`` of its elements
(S. Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015; H. Li et al.,
Pruning Filters for Efficient ConvNets, 2017, for norms of groups). With ``scope`` "layer" every weight gets
the same sparsity; with "global" one threshold serves all selected weights together, so layers of large
weights keep more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import Pass
from sparse_onnx.passes.prune.pruning import PruningPass, global_masks
from sparse_onnx.passes.solvers.masks import MaskStructure, Norm, keep_mask, resolve_sparsity

__all__ = ["Magnitude"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(PruningPass):
    """Prune to ``sparsity`` in [0, 1) with ``mask_structure``; zeros that are already there count.

    ``sparsity`` is left out for N:M, which implies it. ``norm`` matters for blocks and channels only.
    """

    name: ClassVar[str] = "prune.magnitude"
    takes_shares: ClassVar[bool] = True
    sparsity: float | None = None
    mask_structure: str = "unstructured"
    scope: Literal["layer", "global"] = "layer"
    norm: Norm = "l2"

    @property
    def structure(self) -> MaskStructure:
        return MaskStructure.parse(self.mask_structure)

    def check(self) -> None:
        super().check()
        resolve_sparsity(self.sparsity, self.structure)
        if self.scope == "global" and self.structure.kind in ("n:m", "channel"):
            why = (
                "is the same in every layer"
                if self.structure.kind == "n:m"
                else "has another size in every layer"
            )
            raise UsageError(f"scope 'global' needs unstructured or block:RxC: {self.mask_structure} {why}")

    def asked_zeros(self, size: int) -> int | None:
        share = self.expected_share
        return None if share is None else round(share * size)

    @property
    def expected_share(self) -> float | None:
        return None if self.scope == "global" else resolve_sparsity(self.sparsity, self.structure)

    def with_shares(
        self, shares: Mapping[str, float], structure: str, sizes: Mapping[str, int]
    ) -> tuple[Pass, ...]:
        """One pass for each share."""
        fixed = MaskStructure.parse(structure).kind == "n:m"
        return tuple(
            dataclasses.replace(
                self,
                mask_structure=structure,
                targets=tuple(name for name in shares if shares[name] == share),
                sparsity=None if fixed else share,
            )
            for share in dict.fromkeys(shares.values())
        )

    def keep_masks(self, weights: Sequence[Weight]) -> Iterator[np.ndarray]:
        if self.scope == "global":
            share = resolve_sparsity(self.sparsity, self.structure)
            yield from global_masks(weights, _magnitude, self.structure, share, self.norm)
            return
        for weight in weights:
            yield keep_mask(_magnitude(weight), self.sparsity, self.structure, self.norm)


def _magnitude(weight: Weight) -> np.ndarray:
    return np.asarray(np.abs(weight.matrix()))
