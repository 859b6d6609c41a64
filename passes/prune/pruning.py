"""What all pruning passes share: choose the weights, mask each, count zeros, and name what was left.

One weight is in memory at a time. Zeros that are already there stay, so a mask structure that a weight had
before holds afterwards too.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import DEFAULT_IGNORE, Selection, Weight, find_weights
from sparse_onnx.passes.base import LayerChange, Pass, PassContext, PassResult, Stage, Zeros
from sparse_onnx.passes.prune.encoded import reason_against_zeros
from sparse_onnx.passes.solvers.masks import (
    MaskStructure,
    Norm,
    below,
    expand,
    find_cut,
    obeys,
    structure_reason,
    unit_scores,
)
from sparse_onnx.progress import done_of

__all__ = ["Pruner", "PruningPass", "choose_weights", "global_masks"]


def choose_weights(
    model: ir.Model,
    selection: Selection,
    structure: MaskStructure,
    spared: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Weight], list[tuple[str, str]]]:
    """The weights that ``selection`` takes and ``structure`` fits, and (place, reason) of all others. ``spared`` has
    the reasons against weights that are to be left alone, by name.

    Raises UsageError if an entry of the targets matches no weight.
    """
    known, declined = find_weights(model, encoded=True)
    against = {weight.name: reason_against_zeros(weight) for weight in known}
    found = [weight for weight in known if against[weight.name] is None]
    declined += [(name, reason) for name, reason in against.items() if reason is not None]
    reasons = dict(declined)
    for entry in selection.unmatched(found):
        if entry in reasons:
            raise UsageError(f"targets: {entry!r} cannot be pruned: it {reasons[entry]}")
        examples = "the model has no linear, convolution, LSTM or GRU with a constant weight"
        if found:
            examples = f"the model has for example {', '.join(repr(weight.name) for weight in found[:8])}"
        raise UsageError(
            f"targets: {entry!r} matches no weight, node, module or op type of a layer; {examples}"
        )
    chosen = []
    for weight in found:
        reason = (
            selection.reason_against(weight)
            or structure_reason(weight.shape, structure)
            or spared.get(weight.name)
        )
        if reason is None:
            chosen.append(weight)
        else:
            declined.append((weight.name, reason))
    return chosen, declined


def global_masks(
    weights: Sequence[Weight],
    score: Callable[[Weight], np.ndarray],
    structure: MaskStructure,
    sparsity: float,
    norm: Norm,
) -> Iterator[np.ndarray]:
    """For each weight in turn, where to keep it (bool [K, N]) if one threshold serves all of them together.

    ``score`` gives the importance of a weight's elements [K, N]; it is called twice for each.
    """

    def units_of(weight: Weight) -> np.ndarray:
        return unit_scores(score(weight), structure, norm)

    def all_units() -> Iterator[np.ndarray]:
        for weight in weights:
            yield units_of(weight)
            weight.release()

    rows, columns = structure.tile((1, 1))
    units = sum(weight.size for weight in weights) // (rows * columns)
    wide = any(weight.tensor.dtype == ir.DataType.DOUBLE for weight in weights)
    cut = find_cut(all_units, round(sparsity * units), np.float64 if wide else np.float32)
    for weight in weights:
        pruned, cut = below(units_of(weight), cut)
        yield expand(~pruned, structure, weight.shape)


class Pruner(Pass):
    """Base of passes that make single weights zero; ``targets`` and ``ignore`` choose the weights, see
    :class:`~sparse_onnx.model.weights.Selection`. The fields are those of the subclasses, in their order."""

    stage: ClassVar[Stage] = Stage.PRUNE
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def check(self) -> None:
        _ = self.selection

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    @property
    def structure(self) -> MaskStructure:
        return MaskStructure()

    @property
    def expected_share(self) -> float | None:
        """The share of zeros that every chosen weight will have; None where that is not known beforehand."""
        return None

    def zeros_of(self, weight: Weight) -> Zeros | None:
        if self.selection.reason_against(weight) is not None:
            return None
        return Zeros(self.expected_share, str(self.structure))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningPass(Pruner):
    """Base of passes that set weights to zero and change nothing else.

    A subclass implements :meth:`keep_masks`, and :attr:`structure`, :meth:`asked_zeros`, :attr:`expected_share` and
    :meth:`reasons_against` where they apply.
    """

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def asked_zeros(self, size: int) -> int | None:
        """How many zeros every weight of ``size`` elements shall have, or None if there is no such number."""
        return None

    def reasons_against(self, weights: Sequence[Weight]) -> Mapping[str, str]:
        """Of chosen weights that the method cannot prune: why, by name."""
        return {}

    @abc.abstractmethod
    def keep_masks(self, weights: Sequence[Weight]) -> Iterator[np.ndarray]:
        """For each weight in turn, where to keep it: bool [K, N]. NaN and Inf must be kept."""

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        weights, left = choose_weights(model, self.selection, self.structure, context.spared)
        against = self.reasons_against(weights)
        declined = [self.declined(place, reason) for place, reason in (*left, *against.items())]
        weights = [weight for weight in weights if weight.name not in against]
        layers: list[LayerChange] = []
        modified, sparser, broken = False, 0, 0
        size = before = after = 0
        start = time.perf_counter()
        for index, (weight, keep) in enumerate(zip(weights, self.keep_masks(weights), strict=True)):
            pruned = _pruned(weight, keep)
            weight.release()
            if pruned.non_finite and self.structure.kind == "n:m" and not obeys(keep, self.structure):
                reason = f"more NaN or Inf values in a group than {self.structure} keeps"
                declined.append(self.declined(weight.name, reason))
                pruned = dataclasses.replace(pruned, stored=None, zeros_after=pruned.zeros_before)
            else:
                modified |= self._write(weight, pruned, context)
                if pruned.non_finite:
                    reason = f"{pruned.non_finite} NaN or Inf values kept"
                    declined.append(self.declined(weight.name, reason))
            asked = self.asked_zeros(keep.size)
            sparser += asked is not None and pruned.zeros_before > asked
            size, broken = size + keep.size, broken + pruned.non_finite
            before, after = before + pruned.zeros_before, after + pruned.zeros_after
            if pruned.stored is not None:
                layers.append(LayerChange(weight.name, keep.size, pruned.zeros_before, pruned.zeros_after))
            share = f"{100 * pruned.zeros_after / keep.size:.1f} % zeros"
            done = done_of(index + 1, len(weights), start)
            context.progress(f"{weight.name}: {self.structure}, {share} ({done})")
        statistics: dict[str, int | float] = {
            "weights": len(weights),
            "changed": len(layers),
            "elements": size,
            "zeros_before": before,
            "zeros_after": after,
            "sparsity": after / size if size else 0.0,
            "already_sparser": sparser,
            "non_finite": broken,
        }
        return PassResult(model, modified, statistics, tuple(declined), tuple(layers))

    def _write(self, weight: Weight, pruned: _Pruned, context: PassContext) -> bool:
        """Put the new weight and the note of its structure into the model; whether that changed anything."""
        changed = pruned.stored is not None
        if pruned.stored is not None:
            weight.value.const_value = context.store(pruned.stored, weight.name)
        known = weight.value.metadata_props.get(STRUCTURE_KEY)
        if self.structure.kind == "unstructured":
            # A structure that is already there outlives unstructured pruning: zeros are only added.
            news = changed and known is None
        else:
            news = pruned.zeros_after > 0 and known != str(self.structure)
        if news:
            weight.value.metadata_props[STRUCTURE_KEY] = str(self.structure)
        return changed or news


@dataclasses.dataclass(frozen=True)
class _Pruned:
    """A weight under a mask; ``stored`` is the new array as the model stores it, None if nothing changed."""

    stored: np.ndarray | None
    zeros_before: int
    zeros_after: int
    non_finite: int


def _pruned(weight: Weight, keep: np.ndarray) -> _Pruned:
    matrix = weight.matrix()
    present = matrix != 0
    zeros_before = matrix.size - int(np.count_nonzero(present))
    lost = int(np.count_nonzero(present & ~keep))
    non_finite = matrix.size - int(np.count_nonzero(np.isfinite(matrix)))
    stored = None
    if lost:
        pruned = np.array(matrix, order="K")
        np.copyto(pruned, 0, where=~keep)
        stored = weight.stored(pruned)
    return _Pruned(stored, zeros_before, zeros_before + lost, non_finite)
