"""One-shot pruning with calibration data: choose the weights, gather statistics, solve layer by layer, write.

``calibration`` says what a layer is solved for, see :mod:`sparse_onnx.passes.calibration.turns`.

With ``bias_correction`` the bias of a layer, if it has one, takes up the shift of the mean, and the weights only have
to fit what varies. Weights that cannot be calibrated are pruned by magnitude, and named.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import DEFAULT_IGNORE, Weight
from sparse_onnx.options import require
from sparse_onnx.passes import solvers
from sparse_onnx.passes.base import CalibrationData, LayerChange, Pass, PassContext, PassResult
from sparse_onnx.passes.calibration.calibrator import Calibrator
from sparse_onnx.passes.calibration.calibrator import Options as CalibrationOptions
from sparse_onnx.passes.calibration.checkpoint import Checkpoint
from sparse_onnx.passes.calibration.digest import model_digest
from sparse_onnx.passes.calibration.layer_problem import layer_problem, write_bias
from sparse_onnx.passes.calibration.moments import Layout
from sparse_onnx.passes.calibration.turns import Layer, Order, layers_in_turn
from sparse_onnx.passes.calibration.two_streams import Aim
from sparse_onnx.passes.calibration.unseen import add_unseen_tokens
from sparse_onnx.passes.prune.allocation import NEED_STATISTICS, Allocation, allocate, explicit
from sparse_onnx.passes.prune.encoded import is_encoded, on_grid
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.pruning import Pruner, choose_weights
from sparse_onnx.passes.solvers import InputStatistics, Solver
from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask, resolve_sparsity
from sparse_onnx.progress import done_of

__all__ = ["OneShot"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot(Pruner):
    """Base of the passes that prune with calibration data; see the module's docstring.

    Attributes:
        sparsity: Share of zeros to reach, in [0, 1); N:M implies it.
        mask_structure: ``unstructured``, ``N:M``, ``block:RxC`` or ``channel``.
        scope: Where the share is kept: in every ``row`` (output channel) or in the ``layer``.
        calibration: What layers are solved for.
        allocation: How the zeros are spread over the layers, see :mod:`sparse_onnx.passes.prune.allocation`;
            ``sparsity`` is their mean. N:M leaves nothing to spread.
        sparsities: The share of zeros of some weights, by name or ``re:`` pattern; the others make up for it.
        bias_correction: Whether biases change.
        dampening_frac: Added to the diagonal of the Gram, of its mean.
        unseen_tokens: The share of the batches that is run once more with half of the tokens drawn from the whole
            vocabulary, see :mod:`sparse_onnx.passes.calibration.unseen`; of models that do not read tokens, none.
        preserve_mask: Weights that are zero stay zero; what is left of the budget comes on top, and all are refitted.
            Always so with weights that are stored as integers or by a codebook.
        targets, ignore: Choose the weights, see :class:`~sparse_onnx.model.weights.Selection`.
    """

    idempotent: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True
    takes_shares: ClassVar[bool] = True

    sparsity: float | None = None
    mask_structure: str = "unstructured"
    scope: Literal["row", "layer"] = "layer"
    calibration: Order = "oneshot"
    allocation: Allocation = "uniform"
    sparsities: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    bias_correction: bool = False
    dampening_frac: float = 0.01
    unseen_tokens: float = 0.0
    preserve_mask: bool = False
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    @property
    @abc.abstractmethod
    def solver(self) -> type[Solver]:
        """The method that is applied to each layer."""

    def check(self) -> None:
        super().check()
        resolve_sparsity(self.sparsity, self.structure)
        require(self.dampening_frac >= 0, "dampening_frac", self.dampening_frac, "0 or more")
        require(0 <= self.unseen_tokens <= 1, "unseen_tokens", self.unseen_tokens, "in [0, 1]")
        kind = self.structure.kind
        if kind == "n:m" and (self.allocation != "uniform" or self.sparsities):
            raise UsageError(
                f"mask_structure {self.structure} fixes the zeros of every layer: give no allocation"
            )
        if self.sparsities and self.allocation != "uniform":
            raise UsageError("give sparsities or an allocation, not both")
        require(
            kind in self.solver.structures, "mask_structure", self.mask_structure, "one that the method takes"
        )

    @property
    def structure(self) -> MaskStructure:
        return MaskStructure.parse(self.mask_structure)

    @property
    def expected_share(self) -> float | None:
        alike = self.allocation == "uniform" and not self.sparsities
        return resolve_sparsity(self.sparsity, self.structure) if alike else None

    @property
    def sees_pruned_inputs(self) -> bool:
        return self.calibration != "oneshot"

    def stand_in(self) -> Pass | None:
        """By magnitude, which gives as many zeros in no time."""
        return Magnitude(
            sparsity=self.sparsity,
            mask_structure=self.mask_structure,
            targets=self.targets,
            ignore=self.ignore,
        )

    def with_shares(
        self, shares: Mapping[str, float], structure: str, sizes: Mapping[str, int]
    ) -> tuple[Pass, ...]:
        """One pass, which prunes all of them together."""
        fixed = MaskStructure.parse(structure).kind == "n:m"
        total = sum(sizes[name] for name in shares)
        mean = math.fsum(share * sizes[name] for name, share in shares.items()) / total
        own = dataclasses.replace(
            self,
            mask_structure=structure,
            targets=tuple(shares),
            sparsity=None if fixed else mean,
            sparsities={} if fixed else shares,
        )
        return (own,)

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        weights, left = choose_weights(model, self.selection, self.structure, context.spared)
        declined = [self.declined(place, reason) for place, reason in left]
        if not weights:
            return PassResult(model, False, {"weights": 0}, tuple(declined))
        data = context.calibration_for(self.name)
        finite = []
        for weight in weights:
            if weight.is_finite():
                finite.append(weight)
            else:
                declined.append(self.declined(weight.name, "holds NaN or Inf: not pruned"))
        selected, _ = choose_weights(model, self.selection, self.structure)
        spared = [weight for weight in selected if weight.name in context.spared]
        job = _Job(self, model, context, data, finite, spared)
        for layer in job.layers():
            job.prune(layer)
            del layer  # with its sums, before the next ones are made
        declined += [
            self.declined(name, f"pruned by magnitude: {reason}") for name, reason in job.uncalibrated
        ]
        size = sum(change.size for change in job.changes)
        zeros = sum(change.zeros_after for change in job.changes)
        statistics: dict[str, int | float] = {
            "weights": len(finite),
            "changed": len(job.changes),
            "elements": size,
            "zeros_before": sum(change.zeros_before for change in job.changes),
            "zeros_after": zeros,
            "sparsity": zeros / size if size else 0.0,
            "biases": job.biases,
        }
        changes = tuple(
            change
            for change in job.changes
            if change.zeros_after > change.zeros_before or change.bias is not None
        )
        return PassResult(model, bool(finite), statistics, tuple(declined), changes)


class _Job:
    """One run of a pass."""

    def __init__(
        self,
        options: OneShot,
        model: ir.Model,
        context: PassContext,
        data: CalibrationData,
        weights: list[Weight],
        spared: list[Weight],
    ) -> None:
        self.options, self.model, self.context, self.weights = options, model, context, weights
        self._spared = spared
        self.changes: list[LayerChange] = []
        self.biases = 0
        self._start = time.perf_counter()
        how = data.options or CalibrationOptions()
        if options.solver.needs == "diagonal" and options.allocation != "error" and data.statistics is None:
            how = dataclasses.replace(how, layout=Layout.DIAGONAL)  # a whole Gram takes three times as long
        samples = add_unseen_tokens(model, data.samples, options.unseen_tokens, how.mask, context.progress)
        self._calibrator = Calibrator(model, weights, samples, how, work=data.work, progress=context.progress)
        self.uncalibrated = self._calibrator.declined
        self._statistics_file = data.statistics
        self._checkpoint = None
        if data.checkpoint is not None:
            key = f"{model_digest(model)} {data.samples.digest()} {options!r}"
            self._checkpoint = Checkpoint(data.checkpoint, hashlib.sha256(key.encode()).hexdigest())
        self._known: Mapping[str, Sequence[InputStatistics]] | None = None
        self._sparsity = self._allocate()

    def _allocate(self) -> dict[str, float | None]:
        """The share of zeros of every weight by name; None where the structure implies it."""
        options, sparsity = self.options, self.options.sparsity
        if sparsity is None or options.structure.kind == "n:m":
            return {weight.name: sparsity for weight in self.weights}
        if options.sparsities:
            # Zeros that spared weights do not get are no reason for more in the others.
            return {**explicit([*self.weights, *self._spared], sparsity, options.sparsities)}
        known: Mapping[str, Sequence[InputStatistics]] = {}
        if options.allocation in NEED_STATISTICS:
            known = self._calibrator.oneshot(self._statistics_file)
            if options.calibration == "oneshot":
                self._known = known  # they serve the layers, too

        def statistics(weight: Weight) -> InputStatistics | None:
            return known[weight.name][0] if weight.name in known else None

        return {**allocate(options.allocation, self.weights, sparsity, statistics)}

    def layers(self) -> Iterator[Layer]:
        """The weights in the order in which they are to be pruned, each when its statistics are there."""
        options = self.options
        return layers_in_turn(
            self._calibrator,
            self.weights,
            options.calibration,
            biased=options.bias_correction,
            statistics=self._statistics_file,
            known=self._known,
        )

    def prune(self, layer: Layer) -> None:
        options, weight = self.options, layer.weight
        done = done_of(len(self.changes), len(self.weights), self._start)
        self.context.progress(f"solving {weight.name} ({done})")
        W = np.asarray(weight.matrix(), np.float32)
        if layer.inputs:
            pruned, error, bias = self._solve(layer, W)
        else:
            keep = keep_mask(np.abs(W), self._sparsity[weight.name], options.structure)
            pruned, error, bias = np.where(keep, W, np.float32(0)), None, None
        zeros = int(W.size - np.count_nonzero(pruned))
        before = int(W.size - np.count_nonzero(W))
        del W
        stored = weight.stored(pruned).astype(weight.tensor.dtype.numpy(), copy=False)
        weight.release()
        weight.value.const_value = self.context.store(stored, weight.name)
        if options.structure.kind != "unstructured":
            weight.value.metadata_props[STRUCTURE_KEY] = str(options.structure)
        self.changes.append(LayerChange(weight.name, pruned.size, before, zeros, error, bias))
        self._say(weight, zeros / pruned.size, error)

    def _say(self, weight: Weight, share: float, error: float | None) -> None:
        done, total = len(self.changes), len(self.weights)
        told = "no error known" if error is None else f"error {error:.3f}"
        self.context.progress(
            f"solved {weight.name}: {self.options.structure}, {100 * share:.1f} % zeros, {told} "
            f"({done_of(done, total, self._start)})"
        )

    def _solve(
        self, layer: Layer, W: np.ndarray
    ) -> tuple[np.ndarray, float | None, tuple[str, ir.TensorProtocol] | None]:
        """The pruned weight, and ‖X(W − W′)‖ / ‖XW‖ on X as the layer sees it, where the whole Gram is known. If the
        bias is changed on the way, also what holds it now, and what it was."""
        biased, name = self.options.bias_correction and layer.has_bias, layer.weight.name
        pruned = self._checkpoint.get(name, W.shape) if self._checkpoint is not None else None
        if pruned is None:
            solved = [
                self._solve_group(
                    layer.weight, np.ascontiguousarray(W[:, part]), statistics, layer.aim, part, biased
                )
                for part, statistics in layer.parts(W.shape[1])
            ]
            pruned = np.concatenate(solved, axis=1)
            if is_encoded(layer.weight):
                pruned = on_grid(layer.weight, W, pruned, layer.inputs)
            if self._checkpoint is not None:
                self._checkpoint.put(name, pruned)
        bias = None
        if biased:
            assert layer.target is not None
            self.biases += 1
            bias = write_bias(self.model, layer.target, layer.shifted_bias(W, pruned), self.context.store)
        return pruned, layer.error(W, pruned), bias

    def _solve_group(
        self,
        weight: Weight,
        W: np.ndarray,
        statistics: InputStatistics,
        aim: Aim | None,
        part: slice,
        biased: bool,
    ) -> np.ndarray:
        options, sparsity = self.options, self._sparsity[weight.name]
        problem = layer_problem(W, statistics, options.dampening_frac, aim, part, biased=biased)
        statistics, target, damping = problem.statistics, problem.target, problem.damping
        kind = options.solver
        solver = kind(damping=damping) if issubclass(kind, solvers.DampedSolver) else kind()
        pruned = solver.solve(W, statistics, options.structure, sparsity, options.scope, target=target)
        if not (options.preserve_mask or is_encoded(weight)):
            return pruned
        shape, share = (W.shape[0], W.shape[1]), resolve_sparsity(sparsity, options.structure)
        budget = solvers.Budget.of(shape, options.structure, share, options.scope)
        present = W != 0
        # As many as asked stay, even where the method kept fewer of those that are present.
        score = np.abs(pruned) + 1e-6 * np.abs(W)
        mask = budget.keep(np.where(present, score, 0)) & present
        wanted = W if target is None else target
        return solvers.refit(wanted, statistics, mask, damping=max(damping, 1e-6), start=pruned)
