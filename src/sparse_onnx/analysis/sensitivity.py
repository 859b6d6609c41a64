"""What zeros and bits in each layer do to the outputs of the whole model, on real inputs.

Every layer is pruned alone, by Wanda, in one session of the whole model that takes the weights as inputs: the relative
error of the model's outputs against that of the layer's own output is its *gain*. The layer's own error with other
zeros is much cheaper, from the second moments of its input: with SparseGPT as the method, on some of its outputs, and
for other patterns than unstructured in proportion to what Wanda loses with them. Their product is what the layer does
to the whole. What weights of few bits and rounded inputs add to it is measured by :mod:`.rounding`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.rounding import RoundedInputs, added_by_bits, rounded_inputs
from sparse_onnx.data.inputs import Feeds, InputSpec, input_specs, sample_count
from sparse_onnx.data.samples import Samples
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.calibration import Calibrator, Options
from sparse_onnx.passes.calibration.skeleton import PartSession
from sparse_onnx.passes.lower.forms import FLOAT_BITS
from sparse_onnx.passes.prune.allocation import error_curve
from sparse_onnx.passes.quantize.by_bits import UsualGrid
from sparse_onnx.passes.solvers import InputStatistics, wanda_score
from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask, resolve_sparsity, structure_reason
from sparse_onnx.progress import Progress
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.outputs import tensor_outputs
from sparse_onnx.verification.comparison import compare

__all__ = ["Loss", "measure_losses"]

_PROBE = 0.7
"""Zeros with which the gain is measured: enough for an error well above rounding, where it still grows linearly."""

_LEFT = 2 / 3
"""Of the error of layers that are pruned by themselves: what is left where each makes up for those before it."""

_ENCODED = (0.5,)
"""Zeros with which bits are solved for as well: what they add falls slowly with more of them."""

_SAMPLES = 8
_CHANNELS, _TOGETHER = 64, 8


@dataclasses.dataclass(frozen=True)
class Loss:
    """Of one layer: ``errors`` by pattern, the relative errors of its own output at ``sparsities`` (N:M has one), and
    ``gain``, the relative error of the model's worst output for a unit of it. In squares come on top: by bits
    ``encoded``, what they add with each of the shares ``encoded_sparsities`` of zeros, rounding of blocks of inputs
    included, and ``rounded``, what rounding the whole input does."""

    gain: float
    sparsities: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, tuple[float, ...]]
    encoded_sparsities: tuple[float, ...] = ()
    encoded: Mapping[int, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    rounded: float | None = None

    def error(self, choice: Choice) -> float | None:
        """Relative error of the model's outputs where only this layer has these zeros and bits; None where that was not
        measured."""
        return self._error(choice, 1.0)

    def left(self, choice: Choice) -> float | None:
        """What of :meth:`error` is left where other layers have zeros and bits as well. ``auto`` solves each layer
        behind the pruned ones and takes a third of what zeros lose back; what rounding does is too much like noise."""
        return self._error(choice, _LEFT)

    def _error(self, choice: Choice, left: float) -> float | None:
        if choice.structure not in self.errors:
            return None
        known, errors = self.sparsities[choice.structure], self.errors[choice.structure]
        # No error without zeros.
        parts = [left * float(np.interp(choice.sparsity, (0.0, *known), (0.0, *errors)))]
        if choice.bits != FLOAT_BITS:
            if choice.bits not in self.encoded:
                return None
            parts.append(
                float(np.interp(choice.sparsity, self.encoded_sparsities, self.encoded[choice.bits]))
            )
        if choice.activations != FLOAT_BITS:
            if self.rounded is None:
                return None
            parts.append(self.rounded)
        return self.gain * math.hypot(*parts)


def measure_losses(
    model: ir.Model,
    weights: Sequence[Weight],
    samples: Samples,
    options: Options,
    *,
    sparsities: Sequence[float],
    structures: Sequence[str],
    grids: Mapping[int, UsualGrid] | None = None,
    blocks: Mapping[int, int] | None = None,
    by_token: Collection[str] = (),
    work: Path,
    progress: Callable[[str], None],
) -> dict[str, Loss]:
    """The loss of every weight of ``model`` that has statistics, by name; by bits also with weights on ``grids`` and,
    where operators for these round blocks of inputs, their size in ``blocks``. Operators that round all of an input
    have one scale for it, those of the weights ``by_token`` one for every vector.

    Raises UsageError if ORT refuses the model or the samples do not fit it.
    """
    calibrator = Calibrator(model, weights, samples, options, work=work, progress=progress)
    statistics = calibrator.oneshot()
    batches = _first(samples, input_specs(model))
    known = [weight for weight in weights if weight.name in statistics]
    told = Progress(progress, "losses of layers", len(known))
    grids, blocks = grids or {}, blocks or {}
    threads = options.threads or available_cores()
    inputs: dict[str, RoundedInputs] = {}
    if grids:
        inputs = rounded_inputs(model, known, batches, sorted(set(blocks.values())), threads=threads)
    losses = {}
    with _Swapped(model, known, batches[0], threads) as whole:
        reference = [whole.run(feeds, {}) for feeds in batches]
        for weight in known:
            groups = statistics[weight.name]
            W = np.asarray(weight.matrix(), np.float32)
            probe = _wanda(W, groups, MaskStructure(), _PROBE)
            own = _own_error(W, probe, groups)
            found = compare(
                reference, [whole.run(feeds, {weight.name: weight.stored(probe)}) for feeds in batches]
            )
            gain = found.relative_error / own if own and math.isfinite(found.relative_error) else 0.0
            loss = _loss(W, groups[0], len(groups), gain, sparsities, structures)
            losses[weight.name] = _with_bits(
                loss, W, groups, grids, inputs.get(weight.name), blocks, by_token=weight.name in by_token
            )
            del W, probe
            weight.release()
            told.step()
    return losses


def _first(samples: Samples, specs: Sequence[InputSpec]) -> list[Feeds]:
    """The first batches with some samples in all."""
    batches: list[Feeds] = []
    for feeds in samples:
        batches.append(feeds)
        if sum(sample_count(batch, specs) for batch in batches) >= _SAMPLES:
            break
    return batches


class _Swapped:
    """One session of ``model`` in which the ``weights`` are inputs, so that others can take their place."""

    def __init__(self, model: ir.Model, weights: Sequence[Weight], example: Feeds, threads: int) -> None:
        copy = model.clone()
        self._weights = weights
        for weight in weights:
            value = copy.graph.initializers.pop(weight.name)
            value.const_value = None
            copy.graph.inputs.append(value)
        own = {weight.name: weight.tensor.numpy() for weight in weights}
        wanted = {
            value.name or "" for value in copy.graph.inputs if value.name not in copy.graph.initializers
        }
        inputs = [name for name in (*example, *own) if name in wanted]
        outputs = list(tensor_outputs(copy))
        self._own = own
        self._session = PartSession(copy, inputs, outputs, {**example, **own}, threads=threads)

    def run(self, feeds: Feeds, others: Feeds) -> Feeds:
        """The outputs with ``others`` in place of the weights of these names."""
        return self._session.run({**feeds, **self._own, **others})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()
        self._own = {}
        for weight in self._weights:
            weight.release()


def _wanda(
    W: np.ndarray, groups: Sequence[InputStatistics], structure: MaskStructure, sparsity: float | None
) -> np.ndarray:
    """W [K, N] pruned by |w| · ‖x‖, each group of outputs by its own inputs."""
    width = W.shape[1] // len(groups)
    score = np.concatenate(
        [
            wanda_score(W[:, index * width : (index + 1) * width], group.diagonal)
            for index, group in enumerate(groups)
        ],
        axis=1,
    )
    return np.where(keep_mask(score, sparsity, structure), W, np.float32(0))


def _own_error(W: np.ndarray, pruned: np.ndarray, groups: Sequence[InputStatistics]) -> float:
    """The root of the mean over output channels of ‖X(w − w′)‖² / ‖Xw‖², as in
    :func:`sparse_onnx.passes.prune.allocation.error_curve`."""
    width = W.shape[1] // len(groups)
    shares = []
    for index, group in enumerate(groups):
        part = slice(index * width, (index + 1) * width)
        energy, lost = _energy(W[:, part], group), _energy(W[:, part] - pruned[:, part], group)
        shares.append(lost[energy > 0] / energy[energy > 0])
    found = np.concatenate(shares)
    return float(np.sqrt(found.mean())) if found.size else 0.0


def _energy(W: np.ndarray, statistics: InputStatistics) -> np.ndarray:
    """‖Xw‖² of every column of W [K, N]: [N], float64. Inputs whose products are not known count as independent."""
    w, gram = W.astype(np.float64), statistics.gram
    known = isinstance(gram, np.ndarray) and gram.ndim == 2
    moved = gram @ w if known else statistics.diagonal[:, None] * w
    return np.asarray(np.maximum(np.einsum("kn,kn->n", w, moved), 0))


def _loss(
    W: np.ndarray,
    statistics: InputStatistics,
    groups: int,
    gain: float,
    sparsities: Sequence[float],
    structures: Sequence[str],
) -> Loss:
    """Of a layer with that ``gain``, judged by its first group."""
    own = W[:, : W.shape[1] // groups]
    shares = tuple(sparsities)
    solved = np.sqrt(error_curve(own, statistics, np.array(shares)))
    part = own[:, _some_columns(own.shape[1])]
    plain = [
        _own_error(part, _wanda(part, [statistics], MaskStructure(), share), [statistics]) for share in shares
    ]
    known: dict[str, tuple[float, ...]] = {}
    errors: dict[str, tuple[float, ...]] = {}
    for structure in map(MaskStructure.parse, structures):
        if structure_reason((part.shape[0], part.shape[1]), structure) is not None:
            continue
        if structure.kind == "unstructured":
            known[str(structure)], errors[str(structure)] = shares, tuple(map(float, solved))
            continue
        points = (resolve_sparsity(None, structure),) if structure.kind == "n:m" else shares
        found = []
        for share in points:
            given = None if structure.kind == "n:m" else share
            lost = _own_error(part, _wanda(part, [statistics], structure, given), [statistics])
            worse = lost / max(float(np.interp(share, shares, plain)), 1e-12)
            found.append(min(1.0, worse * float(np.interp(share, shares, solved))))
        known[str(structure)], errors[str(structure)] = points, tuple(found)
    return Loss(gain, known, errors)


def _with_bits(
    loss: Loss,
    W: np.ndarray,
    groups: Sequence[InputStatistics],
    grids: Mapping[int, UsualGrid],
    inputs: RoundedInputs | None,
    blocks: Mapping[int, int],
    *,
    by_token: bool,
) -> Loss:
    """``loss`` with what rounding adds, judged by the first group."""
    if not grids:
        return loss
    added = added_by_bits(W[:, : W.shape[1] // len(groups)], groups[0], grids, _ENCODED)
    for bits, errors in added.items():
        if inputs is not None and bits in blocks:
            own = inputs.blocks[blocks[bits]]
            added[bits] = tuple(math.hypot(error, own) for error in errors)
    return dataclasses.replace(
        loss,
        encoded_sparsities=(0.0, *_ENCODED),
        encoded=added,
        rounded=None if inputs is None else inputs.tokens if by_token else inputs.whole,
    )


def _some_columns(count: int) -> np.ndarray:
    """Up to 64 of ``count`` output channels in runs of 8, so that blocks stay whole: their places."""
    if count <= _CHANNELS:
        return np.arange(count)
    starts = np.linspace(0, (count - _TOGETHER) // _TOGETHER, _CHANNELS // _TOGETHER).astype(int) * _TOGETHER
    return (starts[:, None] + np.arange(_TOGETHER)).reshape(-1)
