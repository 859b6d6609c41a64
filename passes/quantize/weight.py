"""``quant.weight``: weights of linears, convolutions, LSTM and GRU as integers of few bits.

Before: ``Y = X · W``, W [K, N] floats. After: the same with

    W'[k, n] = (q[k, n] - z[g, n]) · s[g, n],    q, z integers of ``bits`` bits,    g = k // ``group_size``

q stored in ``bits`` bits, s as float16 or float32; see :mod:`sparse_onnx.passes.quantize.encode`. A weight that is zero
is z and stays exactly zero.

``method`` says how q, s and z are found: ``rtn`` rounds to nearest, ``hqq`` searches scales; both need no data.
``awq`` makes weights of loud inputs larger, so that they are rounded more finely, where what makes the inputs can make
them smaller (:mod:`~sparse_onnx.passes.quantize.scales`), and searches the range of every group. ``gptq`` and ``auto``
are given the second moments of each layer's input on calibration data, ``auto`` also what the layer's output should be
to make up for what was lost before, and lets biases take up the shift of the mean.

Behind pruning in the same compilation ``auto`` solves zeros and integers as one problem: pruning has chosen the mask,
and here what it keeps is fitted anew and rounded, aimed at the weights and outputs of the model *before pruning*. What
rounding moves may then make good what pruning lost, and the other way round.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import DEFAULT_IGNORE, Selection, Weight, find_weights
from sparse_onnx.options import require
from sparse_onnx.passes.base import LayerChange, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.calibration.alone import errors_alone
from sparse_onnx.passes.calibration.calibrator import Calibrator
from sparse_onnx.passes.calibration.calibrator import Options as CalibrationOptions
from sparse_onnx.passes.calibration.checkpoint import Checkpoint
from sparse_onnx.passes.calibration.digest import model_digest
from sparse_onnx.passes.calibration.layer_problem import layer_problem, write_bias
from sparse_onnx.passes.calibration.turns import Layer, Order, layers_in_turn
from sparse_onnx.passes.calibration.unseen import UNSEEN_SHARE, add_unseen_tokens
from sparse_onnx.passes.quantize.awq import scale_inputs
from sparse_onnx.passes.quantize.encode import Storage, reason_against_dequantize, write_quantized
from sparse_onnx.passes.solvers import (
    QUANTIZERS,
    DampedQuantizer,
    InputStatistics,
    RtnQuantizer,
    WeightQuantizer,
    refit,
)
from sparse_onnx.passes.solvers.grid import GridOptions, QuantizedMatrix, ScaleType
from sparse_onnx.progress import done_of
from sparse_onnx.running.host import available_cores

__all__ = ["QuantizeWeights"]

Method = Literal["rtn", "hqq", "awq", "gptq", "auto"]

_ORDERS: Mapping[str, Order] = {"awq": "oneshot", "gptq": "sequential", "auto": "asymmetric"}
_WITHOUT_DATA = ("rtn", "hqq")
_FEW_BITS = 4

_KEPT_BITS = 8
_LEAST_DAMPING = 1e-6
_REFIT = 1e-3  # of the right-hand side: a start for integers, which move more than what is left


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """See the module's docstring.

    Attributes:
        method: How integers are found.
        bits: Of an integer, 2 to 8. 5 to 7 take 8 in the file.
        bits_of: Those of single weights, by name, in place of ``bits``. Where ``bits`` are 4 at most, a weight with
            more has a symmetric scale for each output, which products of integers ask for; otherwise groups and zero
            points are as the others have them.
        group_size: Inputs that share a scale, 16 to 256, or 0: all inputs of an output. A weight with fewer inputs is
            left alone. Where the inputs are no multiple, the last group is shorter.
        symmetric: Zero points are 0; otherwise every group has its own.
        scale_type: How scales are stored; None: float16, and with ``dequantize`` the type of the weights.
        storage: ``unpack``, ``dequantize`` or ``float``, see :mod:`~sparse_onnx.passes.quantize.encode`.
        calibration: What layers are solved for, see :mod:`~sparse_onnx.passes.calibration.turns`; None: ``oneshot`` for
            ``awq``, which cannot be ``asymmetric``, ``sequential`` for ``gptq``, ``asymmetric`` for ``auto``. Not for
            methods without data.
        bias_correction: Whether biases take up the shift of the mean; None: as ``auto`` does. Not without data.
        unseen_tokens: The share of the batches that is run once more with half of the tokens drawn from the whole
            vocabulary, see :mod:`~sparse_onnx.passes.calibration.unseen`; None: half with ``auto``, otherwise none.
            Measured at .5: a sentence encoder in 4 bits loses a third less on text of another kind, as much on like
            text; the first layers of a language model in 3 bits lose a quarter less, and half as much again.
        dampening_frac: Added to the diagonal of the Gram, of its mean.
        keep: The share of the layers that get 8 bits all the same, as ``bits_of`` would give them: those that move the
            model's outputs most if they alone are rounded to nearest. Only with data, and fewer than 8 bits.
        targets, ignore: Choose the weights, see :class:`~sparse_onnx.model.weights.Selection`.
    """

    name: ClassVar[str] = "quant.weight"
    stage: ClassVar[Stage] = Stage.QUANTIZE

    method: Method = "hqq"
    bits: int = 4
    bits_of: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    group_size: int = 64
    symmetric: bool = True
    scale_type: ScaleType | None = None
    storage: Storage = "unpack"
    calibration: Order | None = None
    bias_correction: bool | None = None
    unseen_tokens: float | None = None
    dampening_frac: float = 0.01
    keep: float = 0.0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE

    def check(self) -> None:
        _ = self.grid("float32"), self.selection
        for name, bits in self.bits_of.items():
            require(2 <= bits <= 8, f"bits_of[{name!r}]", bits, "2 to 8")
        require(self.dampening_frac >= 0, "dampening_frac", self.dampening_frac, "0 or more")
        require(0 <= self.keep < 1, "keep", self.keep, "in [0, 1)")
        if self.keep and (not self.needs_calibration or self.bits >= _KEPT_BITS):
            raise UsageError(
                f"keep leaves layers in {_KEPT_BITS} bits by what data shows: give fewer, and another method"
            )
        unseen = self.unseen_tokens
        require(unseen is None or 0 <= unseen <= 1, "unseen_tokens", unseen, "in [0, 1]")
        if not self.needs_calibration and (self.calibration is not None or self.bias_correction or unseen):
            raise UsageError(
                f"{self.method} uses no data: give no calibration, no bias_correction and no unseen_tokens"
            )
        if self.method == "awq" and self.order == "asymmetric":
            raise UsageError("awq scales weights, which asymmetric calibration cannot aim at: give another")

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # that of most passes is the same for all options
        return self.method not in _WITHOUT_DATA

    @property
    def selection(self) -> Selection:
        return Selection(self.targets, self.ignore)

    @property
    def order(self) -> Order:
        """What layers are solved for."""
        return self.calibration or _ORDERS[self.method]

    @property
    def corrects_biases(self) -> bool:
        return self.method == "auto" if self.bias_correction is None else self.bias_correction

    @property
    def share_of_unseen(self) -> float:
        """The share of the batches that is run once more with other tokens."""
        default = UNSEEN_SHARE if self.method == "auto" else 0.0
        return default if self.unseen_tokens is None else self.unseen_tokens

    @property
    def sees_pruned_inputs(self) -> bool:
        return self.needs_calibration and self.order != "oneshot"

    def stand_in(self) -> Pass:
        """Plain rounding, which makes files of the same size."""
        if not self.needs_calibration:
            return self
        return dataclasses.replace(
            self, method="rtn", calibration=None, bias_correction=None, unseen_tokens=None, keep=0.0
        )

    def with_bits(self, bits: Mapping[str, int]) -> QuantizeWeights:
        """The pass with these options that gives each weight, by name, its own ``bits``, all solved together, and
        leaves all others alone."""
        return dataclasses.replace(self, targets=tuple(bits), bits_of=dict(bits))

    def grid(self, scale_type: ScaleType) -> GridOptions:
        return GridOptions(self.bits, self.group_size, self.symmetric, scale_type)

    def grid_for(self, weight: Weight) -> GridOptions:
        """The grid of one weight."""
        half = self.storage == "unpack" or weight.tensor.dtype == ir.DataType.FLOAT16
        grid = self.grid(self.scale_type or ("float16" if half else "float32"))
        own = self.bits_of.get(weight.name)
        if own is None:
            return grid
        if self.bits <= _FEW_BITS < own:
            return dataclasses.replace(grid, bits=own, group_size=0, symmetric=True)
        return dataclasses.replace(grid, bits=own)

    def reason_against(self, weight: Weight) -> str | None:
        """Why a weight of floats is left alone; None if it is not."""
        reason = self.selection.reason_against(weight)
        K, group_size = weight.shape[0], self.grid_for(weight).group_size
        if reason is None and group_size > K:
            reason = f"its {K} inputs are fewer than a group of {group_size}"
        if reason is None and not weight.is_finite():
            reason = "holds NaN or Inf"
        return reason

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        chosen, left = self._choose(model)
        kept = self._kept(model, context, chosen) if self.keep else {}
        bits_of = {**self.bits_of, **dict.fromkeys(kept, _KEPT_BITS)}
        job = _Job(dataclasses.replace(self, bits_of=bits_of), model, context, chosen)
        if chosen:
            job.run()
        left += [
            (
                name,
                f"in {_KEPT_BITS} bits, not {self.bits}: rounded alone it moves the outputs by {error:.1%}",
            )
            for name, error in kept.items()
        ]
        declined = [self.declined(place, reason) for place, reason in (*left, *job.declined)]
        statistics: dict[str, int | float] = {
            "weights": len(chosen),
            "changed": len(job.changes),
            "elements": sum(change.size for change in job.changes),
            "bytes": sum(change.nbytes or 0 for change in job.changes),
            "biases": job.biases,
        }
        return PassResult(model, bool(job.changes), statistics, tuple(declined), tuple(job.changes))

    def _kept(self, model: ir.Model, context: PassContext, weights: Sequence[Weight]) -> dict[str, float]:
        """The weights that stay in more bits, and how far the outputs move where each alone does not, worst first."""

        def rounded(weight: Weight) -> np.ndarray:
            solver = RtnQuantizer(grid=self.grid_for(weight), clip=True)
            return solver.solve(np.ascontiguousarray(weight.matrix(), np.float32)).matrix()

        data = context.calibration_for(self.name)
        threads = (data.options or CalibrationOptions()).threads
        errors = errors_alone(
            model, weights, data.samples, rounded, threads=threads, progress=context.progress
        )
        worst = sorted(errors, key=lambda name: -errors[name])[: math.ceil(self.keep * len(weights))]
        return {name: errors[name] for name in worst}

    def _choose(self, model: ir.Model) -> tuple[list[Weight], list[tuple[str, str]]]:
        """The weights to quantize, and (place, reason) of all others."""
        found, left = find_weights(model)
        for entry in self.selection.unmatched(found):
            raise UsageError(f"targets: {entry!r} matches no weight, node, module or op type of a layer")
        for name in self.bits_of.keys() - {weight.name for weight in found}:
            raise UsageError(f"bits_of: {name!r} is no weight of a layer")
        chosen, reasons = [], list(left)
        for weight in found:
            reason = self.reason_against(weight)
            if reason is None:
                chosen.append(weight)
            else:
                reasons.append((weight.name, reason))
        return chosen, reasons


@dataclasses.dataclass(frozen=True)
class _Solved:
    """A weight whose floats are in the model, and what they stand for, kept by the store."""

    weight: Weight
    integers: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol
    options: GridOptions
    zeros_before: int
    error: float | None
    bias: tuple[str, ir.TensorProtocol] | None

    def quantized(self) -> QuantizedMatrix:
        integers, scale, zero = (
            np.array(part.numpy()) for part in (self.integers, self.scale, self.zero_point)
        )
        return QuantizedMatrix(integers, scale, zero, self.options)


class _Job:
    """One run of the pass. Layers are solved with floats in the graph, which calibration runs; what they become is
    written when all are solved."""

    def __init__(
        self,
        options: QuantizeWeights,
        model: ir.Model,
        context: PassContext,
        weights: list[Weight],
    ) -> None:
        self.options, self.model, self.context, self.weights = options, model, context, weights
        self.declined: list[tuple[str, str]] = []
        self.changes: list[LayerChange] = []
        self.biases = 0
        self._start = time.perf_counter()
        self._solved: list[_Solved] = []
        self._checkpoint: Checkpoint | None = None
        self._dense: Mapping[str, Weight] = {}
        given = context.calibration.options if context.calibration is not None else None
        self._threads = (given.threads if given is not None else None) or available_cores()

    def run(self) -> None:
        if self.options.needs_calibration:
            self._calibrated()
        else:
            for weight in self.weights:
                self._solve(Layer(weight, ()))
        while self._solved:
            self._write(self._solved.pop(0))

    def _calibrated(self) -> None:
        options = self.options
        data = self.context.calibration_for(options.name)
        how = data.options or CalibrationOptions()
        samples = add_unseen_tokens(
            self.model, data.samples, options.share_of_unseen, how.mask, self.context.progress
        )
        if options.method == "awq":
            self.declined += scale_inputs(
                self.model,
                self.weights,
                options.grid_for,
                lambda some: Calibrator(
                    self.model, some, samples, how, work=data.work, progress=self.context.progress
                ),
                self.context,
            )
        if data.checkpoint is not None:
            models = [model_digest(model) for model in (self.model, self.context.dense) if model is not None]
            key = f"{' '.join(models)} {data.samples.digest()} {options!r}"
            self._checkpoint = Checkpoint(data.checkpoint, hashlib.sha256(key.encode()).hexdigest())
        dense = self.context.dense
        if dense is not None:
            self._dense = {weight.name: weight for weight in find_weights(dense)[0]}
        calibrator = Calibrator(
            self.model,
            self.weights,
            samples,
            how,
            work=data.work,
            progress=self.context.progress,
            dense=dense,
        )
        self.declined += [
            (name, f"rounded without data, by hqq: {reason}") for name, reason in calibrator.declined
        ]
        for layer in layers_in_turn(
            calibrator,
            self.weights,
            options.order,
            biased=options.corrects_biases,
            statistics=data.statistics,
        ):
            self._solve(layer)
            del layer  # with its sums, before the next ones are made

    def _solve(self, layer: Layer) -> None:
        weight, options = layer.weight, self.options
        done = done_of(len(self._solved), len(self.weights), self._start)
        self.context.progress(f"solving {weight.name} ({done})")
        W = np.ascontiguousarray(weight.matrix(), np.float32)
        grid, aim = options.grid_for(weight), self._aim(layer, W)
        try:
            parts = self._parts(layer, W, aim, grid)
        except UsageError as error:  # a scale that is too large for its type
            self.declined.append((weight.name, str(error)))
            weight.release()
            return
        quantized = QuantizedMatrix.side_by_side(parts)
        after = quantized.matrix()
        known = layer.error(aim, after)
        bias = self._correct_bias(layer, W, after) if self._is_biased(layer) else None
        zeros = int(W.size - np.count_nonzero(W))

        def keep(array: np.ndarray, what: str) -> ir.TensorProtocol:
            return self.context.store(array, f"{weight.name}.{what}")

        self._solved.append(
            _Solved(
                weight,
                keep(quantized.integers, "integers"),
                keep(quantized.scale, "scale"),
                keep(quantized.zero_point, "zero_point"),
                grid,
                zeros,
                known,
                bias,
            )
        )
        weight.release()
        if options.needs_calibration:  # what comes behind sees it
            stored = weight.stored(after).astype(weight.tensor.dtype.numpy(), copy=False)
            weight.value.const_value = self.context.store(stored, weight.name)
        told = "" if known is None else f", error {known:.3f}"
        rest = (
            f", the last group of {W.shape[0] % grid.span(W.shape[0])}"
            if W.shape[0] % grid.span(W.shape[0])
            else ""
        )
        done = done_of(len(self._solved), len(self.weights), self._start)
        self.context.progress(f"solved {weight.name}: {_grid_words(grid)}{rest}{told} ({done})")

    def _aim(self, layer: Layer, W: np.ndarray) -> np.ndarray:
        """The weight [K, N] that is approximated: W itself, or where the layer is aimed at the model before pruning,
        the one that it had there."""
        dense = self._dense.get(layer.weight.name)
        if layer.aim is None or dense is None:
            return W
        matrix = np.ascontiguousarray(dense.matrix(), np.float32)
        dense.release()
        return matrix

    def _parts(
        self, layer: Layer, W: np.ndarray, aim: np.ndarray, grid: GridOptions
    ) -> list[QuantizedMatrix]:
        """The integers of the outputs of every group of a convolution, of one group otherwise."""
        name = layer.weight.name
        if not layer.inputs:
            method = self.options.method if not self.options.needs_calibration else "hqq"
            return [_quantizer(method, grid, 0.0, self._threads).solve(W)]
        kept = self._kept(name, W.shape, grid)
        if kept is not None:
            return [kept]
        parts = []
        for part, statistics in layer.parts(W.shape[1]):
            own, wanted = (np.ascontiguousarray(matrix[:, part]) for matrix in (W, aim))
            parts.append(self._solve_group(layer, own, wanted, statistics, part, grid))
        if self._checkpoint is not None:
            whole = QuantizedMatrix.side_by_side(parts)
            for word, array in (
                ("integers", whole.integers),
                ("scale", whole.scale),
                ("zero", whole.zero_point),
            ):
                self._checkpoint.put(f"{name} {word}", array)
        return parts

    def _kept(self, name: str, shape: tuple[int, ...], grid: GridOptions) -> QuantizedMatrix | None:
        """What an interrupted run has found."""
        if self._checkpoint is None:
            return None
        groups = (grid.groups(shape[0]), shape[1])
        parts = [
            self._checkpoint.get(f"{name} {word}", size)
            for word, size in (("integers", shape), ("scale", groups), ("zero", groups))
        ]
        integers, scale, zero = parts
        if integers is None or scale is None or zero is None:
            return None
        return QuantizedMatrix(integers.astype(grid.dtype), scale, zero.astype(grid.dtype), grid)

    def _solve_group(
        self,
        layer: Layer,
        W: np.ndarray,
        aim: np.ndarray,
        statistics: InputStatistics,
        part: slice,
        grid: GridOptions,
    ) -> QuantizedMatrix:
        biased = self._is_biased(layer)
        problem = layer_problem(aim, statistics, self.options.dampening_frac, layer.aim, part, biased=biased)
        solver = _quantizer(self.options.method, grid, problem.damping, self._threads)
        statistics, target, kept = problem.statistics, problem.target, W != 0
        if target is not None and not kept.all():
            damping = max(problem.damping, _LEAST_DAMPING)
            W = refit(target, statistics, kept, damping=damping, start=W, tolerance=_REFIT)
        return solver.solve(W, statistics, target=target)

    def _is_biased(self, layer: Layer) -> bool:
        return self.options.corrects_biases and layer.has_bias

    def _correct_bias(self, layer: Layer, W: np.ndarray, after: np.ndarray) -> tuple[str, ir.TensorProtocol]:
        assert layer.target is not None
        self.biases += 1
        return write_bias(self.model, layer.target, layer.shifted_bias(W, after), self.context.store)

    def _write(self, solved: _Solved) -> None:
        weight, storage = solved.weight, self.options.storage
        quantized = solved.quantized()
        if storage == "dequantize":
            reason = reason_against_dequantize(self.model, weight, quantized)
            if reason is not None:
                storage = "unpack"
                self.declined.append((weight.name, f"unpacked, not by DequantizeLinear: {reason}"))
        zeros = int(np.count_nonzero(quantized.matrix() == 0))
        write_quantized(self.model, weight, quantized, storage, self.context.store)
        self.changes.append(
            LayerChange(
                weight.name,
                quantized.integers.size,
                solved.zeros_before,
                zeros,
                solved.error,
                solved.bias,
                bits=solved.options.bits,
                group_size=solved.options.group_size,
                nbytes=stored_bytes(weight),
            )
        )


def stored_bytes(weight: Weight) -> int:
    """What the initializers of a weight that was just written take: integers, scales and zero points."""
    node = next(iter(weight.value.uses())).node
    if node in weight.nodes:
        return int(weight.tensor.nbytes)
    inputs = [value for value in node.inputs if value is not None and value.const_value is not None]
    return sum(int(value.const_value.nbytes) for value in inputs if value.const_value is not None)


def _quantizer(method: str, grid: GridOptions, damping: float, threads: int) -> WeightQuantizer:
    if method == "awq":
        return RtnQuantizer(grid=grid, clip=True, threads=threads)
    kind = QUANTIZERS[method]
    if issubclass(kind, DampedQuantizer):
        return kind(grid=grid, damping=damping, threads=threads)
    return kind(grid=grid, threads=threads)


def _grid_words(grid: GridOptions) -> str:
    kind = "" if grid.symmetric else ", asymmetric"
    where = f"in groups of {grid.group_size}" if grid.group_size else "for each output"
    return f"{grid.bits} bits {where}{kind}"
