"""``prune.gradient``: set the weights to zero on which a loss depends least.

Before: any linear or convolution with the weight W [K, N]. After: the same, with W ∘ mask in place of W.

The gradients come from a file that the exporter writes (``sparse-onnx export --gradients``). With ``order`` "first"
the importance of an element is |w| · mean |∂L/∂w|, the first-order change of the loss when it goes (Molchanov et al.,
Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017); that of a block or an output channel is
the sum over its elements. With "fisher" it is w² · mean (∂L/∂w)², twice the second-order change with the diagonal of
the Fisher information as the curvature (LeCun et al., Optimal Brain Damage, 1990; Theis et al., Faster gaze prediction
with dense networks and Fisher pruning, 2018), again summed over blocks and channels.

Both take the weights for independent of each other, so they foretell little once a layer has lost most inputs of an
output channel: gradients differ far more between channels than within, and one cut for a whole layer empties some. With
``scope`` "row" every output channel gets the same sparsity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.gradient_file import GradientFile, open_gradients
from sparse_onnx.errors import DataError, UsageError
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import PassContext, PassResult
from sparse_onnx.passes.prune.pruning import PruningPass, global_masks
from sparse_onnx.passes.solvers.masks import (
    MaskStructure,
    Norm,
    expand,
    keep_mask,
    resolve_sparsity,
    unit_scores,
)
from sparse_onnx.passes.solvers.scores import taylor_score

__all__ = ["Gradient"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(PruningPass):
    """Prune to ``sparsity`` in [0, 1) with ``mask_structure``; zeros that are already there count.

    ``gradients`` is the path of the file. Weights that it has no entry for are left alone. ``sparsity`` is left out
    for N:M, which implies it. ``scope`` is where the share is kept: in every ``row`` (output channel; channels are
    ranked within their layer all the same), in the ``layer``, or "global", with one threshold for all weights.
    """

    name: ClassVar[str] = "prune.gradient"
    gradients: str
    sparsity: float | None = None
    mask_structure: str = "unstructured"
    scope: Literal["row", "layer", "global"] = "row"
    order: Literal["first", "fisher"] = "fisher"

    @property
    def structure(self) -> MaskStructure:
        return MaskStructure.parse(self.mask_structure)

    def check(self) -> None:
        super().check()
        resolve_sparsity(self.sparsity, self.structure)
        if self.scope == "global" and self.structure.kind in ("n:m", "channel"):
            raise UsageError(f"scope 'global' needs unstructured or block:RxC, not {self.mask_structure}")

    def asked_zeros(self, size: int) -> int | None:
        if self.scope != "layer":
            return None
        return round(resolve_sparsity(self.sparsity, self.structure) * size)

    @property
    def expected_share(self) -> float | None:
        return None if self.scope == "global" else resolve_sparsity(self.sparsity, self.structure)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        result = super().apply(model, context)
        known = {value.name for graph in model.graphs() for value in graph.initializers.values()}
        unknown = [
            self.declined(name, f"is in {self.gradients}, but not in the model")
            for name in sorted(set(self._entries()) - known)
        ]
        return dataclasses.replace(result, declined=(*result.declined, *unknown))

    def reasons_against(self, weights: Sequence[Weight]) -> Mapping[str, str]:
        names = self._entries()
        absent = [weight.name for weight in weights if weight.name not in names]
        if weights and len(absent) == len(weights):
            raise DataError(
                f"{self.gradients} has no entry for any of the {len(weights)} weights to prune, such as "
                f"{absent[0]!r}; it has {', '.join(map(repr, names[:3]))}: is it of this model?"
            )
        return dict.fromkeys(absent, f"has no entry in {self.gradients}")

    def _entries(self) -> tuple[str, ...]:
        with open_gradients(Path(self.gradients)) as file:
            return file.names

    def keep_masks(self, weights: Sequence[Weight]) -> Iterator[np.ndarray]:
        with open_gradients(Path(self.gradients)) as file:
            if self.scope == "global":
                share = resolve_sparsity(self.sparsity, self.structure)
                score_of = functools.partial(self._scores, file=file)
                yield from global_masks(weights, score_of, self.structure, share, self._norm)
                return
            by_row = self.scope == "row" and self.structure.kind in ("unstructured", "block")
            for weight in weights:
                score = self._scores(weight, file)
                if by_row:
                    units = unit_scores(score, self.structure, self._norm)
                    share = resolve_sparsity(self.sparsity, self.structure)
                    yield expand(~_smallest_of_rows(units, share), self.structure, weight.shape)
                else:
                    yield keep_mask(score, self.sparsity, self.structure, self._norm)

    @property
    def _norm(self) -> Norm:
        """By which the scores of a block add up: they are roots with "fisher"."""
        return "l1" if self.order == "first" else "l2"

    def _scores(self, weight: Weight, file: GradientFile) -> np.ndarray:
        if self.order == "first":
            gradient = file.read(weight.name, "grad_abs", weight.shape)
        else:
            gradient = np.sqrt(file.read(weight.name, "fisher", weight.shape))
        W = np.asarray(
            weight.matrix(), np.float64 if weight.tensor.dtype == ir.DataType.DOUBLE else np.float32
        )
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            score = taylor_score(W, gradient)
        # A weight without a gradient still comes behind one that is zero, or more would be zero than asked for.
        return np.where(W == 0, 0, np.maximum(score, np.finfo(score.dtype).tiny)).astype(score.dtype)


def _smallest_of_rows(units: np.ndarray, share: float) -> np.ndarray:
    """Where the ``share`` of smallest scores [K, N] of every output channel is; NaN and Inf are never among them."""
    smallest = np.argsort(units, axis=0, kind="stable")[: round(share * len(units))]
    chosen = np.zeros(units.shape, bool)
    np.put_along_axis(chosen, smallest, True, axis=0)
    return np.asarray(chosen & np.isfinite(units))
