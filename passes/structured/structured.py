"""What the passes that remove whole units share: find the places, calibrate, choose, fit, and cut the graph."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.graph import input_at
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import DEFAULT_IGNORE, Selection, Weight, find_weights
from sparse_onnx.options import require
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.calibration.calibrator import Calibrator
from sparse_onnx.passes.calibration.layer_output import find_output
from sparse_onnx.passes.solvers.statistics import InputStatistics
from sparse_onnx.passes.structured.groups import Fit, Reader, choose, fit, kept_units
from sparse_onnx.passes.structured.region import Region
from sparse_onnx.passes.structured.surgery import cut_region, shift_bias, write_reader
from sparse_onnx.passes.structured.tracer import Unsuitable, follow

__all__ = ["Seed", "StructuredPass"]


@dataclasses.dataclass(frozen=True)
class Seed:
    """A layer whose input may have units that can go: ``units`` of them along ``axis`` (negative)."""

    node: ir.Node
    axis: int
    units: int
    block: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredPass(Pass):
    """Base of the passes that remove whole units: neurons, heads, channels.

    Attributes:
        sparsity: Share of the units of each layer to remove, in [0, 1).
        multiple_of: What stays is a multiple of it, if there are that many.
        targets, ignore: Choose places by any of their weights, see :class:`~sparse_onnx.model.weights.Selection`.
        dampening_frac: Added to the diagonal of the Gram, of its mean.
        bias_correction: Whether the bias of a layer that reads units takes up the mean of those that go.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    idempotent: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True
    unit: ClassVar[str]
    op_types: ClassVar[tuple[str, ...]]

    sparsity: float | None = None
    multiple_of: int = 8
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    dampening_frac: float = 0.01
    bias_correction: bool = True

    def check(self) -> None:
        Selection(self.targets, self.ignore)
        require(self.sparsity is not None, "sparsity", self.sparsity, "given")
        require(0 <= self._share < 1, "sparsity", self.sparsity, "at least 0 and below 1")
        require(self.multiple_of >= 1, "multiple_of", self.multiple_of, "1 or more")
        require(self.dampening_frac >= 0, "dampening_frac", self.dampening_frac, "0 or more")

    @property
    def _share(self) -> float:
        return self.sparsity or 0.0

    @abc.abstractmethod
    def seeds(self, layers: Mapping[ir.Node, Weight], shapes: Shapes) -> Iterator[Seed]:
        """The places to look at, in the order of the graph."""

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        before = _elements(model)
        regions, left = self._regions(model)
        declined = [self.declined(place, reason) for place, reason in left]
        job = _Job(self, model, context)
        if regions:
            declined += [self.declined(place, reason) for place, reason in job.run(regions)]
        statistics: dict[str, int | float] = {
            "places": job.places,
            "removed": job.removed,
            "units": job.units,
            "elements_before": before,
            "elements_after": _elements(model),
            "error": float(np.mean(job.errors)) if job.errors else 0.0,
        }
        return PassResult(model, job.places > 0, statistics, tuple(declined))

    def _regions(self, model: ir.Model) -> tuple[list[Region], list[tuple[str, str]]]:
        weights, left = find_weights(model, self.op_types, depthwise=True)
        selection = Selection(self.targets, self.ignore)
        for entry in selection.unmatched(weights):
            raise UsageError(f"targets: {entry!r} matches no weight, node, module or op type of a layer")
        layers = {node: weight for weight in weights for node in weight.nodes if node.graph is model.graph}
        shapes = Shapes(model)
        regions: list[Region] = []
        declined = dict(left)
        for weight in weights:
            if any(node not in layers for node in weight.nodes):
                declined[weight.name] = "lies in the body of an If, Loop or Scan"
        known: set[ir.Node] = set()
        for seed in self.seeds(layers, shapes):
            if seed.node in known:
                continue
            value, name = seed.node.inputs[0], layers[seed.node].name
            assert value is not None
            try:
                region = follow(value, seed.axis, seed.units, seed.block, layers, shapes)
            except Unsuitable as error:
                declined[name] = str(error)
                continue
            known |= {weight.nodes[0] for weight, _ in region.readers}
            reason = self._reason_against(region, selection)
            if reason is None:
                regions.append(region)
            else:
                declined[name] = reason
        return regions, list(declined.items())

    def _reason_against(self, region: Region, selection: Selection) -> str | None:
        weights = [*region.writers, *(weight for weight, _ in region.readers)]
        reasons = [selection.reason_against(weight) for weight in weights]
        if "listed in ignore" in reasons:
            return "listed in ignore"
        if None not in reasons:
            return reasons[0]
        if kept_units(region.units, self._share, self.multiple_of) == region.units:
            asked = f"sparsity {self._share:g} and multiple_of {self.multiple_of}"
            return f"of {region.units} {self.unit}, none go at {asked}"
        if not all(weight.is_finite() for weight in weights):
            return "holds NaN or Inf"
        return None


def _elements(model: ir.Model) -> int:
    """Of all initializers."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return sum(tensor.size for tensor in tensors if tensor is not None)


class _Job:
    """One run of a pass."""

    def __init__(self, options: StructuredPass, model: ir.Model, context: PassContext) -> None:
        self.options, self.model, self.context = options, model, context
        self.places = self.removed = self.units = 0
        self.errors: list[float] = []

    def run(self, regions: Sequence[Region]) -> Iterator[tuple[str, str]]:
        """Remove units from all regions; yields the (place, reason) of those where that cannot be done."""
        data = self.context.calibration_for(self.options.name)
        readers = [weight for region in regions for weight, _ in region.readers]
        calibrator = Calibrator(
            self.model, readers, data.samples, data.options, work=data.work, progress=self.context.progress
        )
        uncalibrated = dict(calibrator.declined)
        # The statistics file belongs to the pass that prunes the result: these are of a larger model.
        known = calibrator.oneshot()
        # From the last on: a layer is then fitted for those of its outputs that stay.
        for number, region in enumerate(reversed(regions)):
            names = [weight.name for weight, _ in region.readers]
            missing = next((name for name in names if name in uncalibrated), None)
            if missing is not None:
                yield missing, uncalibrated[missing]
                continue
            fits = self._remove(region, [known[name][0] for name in names])
            left = kept_units(region.units, self.options._share, self.options.multiple_of)
            errors = ", ".join(f"{found.error:.3f}" for found in fits)
            self.context.progress(
                f"{', '.join(names)}: {left} of {region.units} {self.options.unit} left, error {errors} "
                f"({number + 1}/{len(regions)})"
            )

    def _remove(self, region: Region, statistics: Sequence[InputStatistics]) -> list[Fit]:
        options = self.options
        biases = [_bias_of(weight) if options.bias_correction else None for weight, _ in region.readers]
        readers = [
            Reader(np.asarray(weight.matrix(), np.float32), known, size, bias is not None)
            for (weight, size), known, bias in zip(region.readers, statistics, biases, strict=True)
        ]
        count = region.units - kept_units(region.units, options._share, options.multiple_of)
        removed = choose(readers, count, options.dampening_frac)
        fits = [fit(reader, removed, options.dampening_frac) for reader in readers]
        del readers
        cut_region(self.model, region, removed, self.context)
        for (weight, _), found, bias in zip(region.readers, fits, biases, strict=True):
            write_reader(self.model, weight, found.V, self.context)
            if bias is not None:
                shift_bias(self.model, *bias, found.shift, self.context)
        self.places, self.removed, self.units = (
            self.places + 1,
            self.removed + count,
            self.units + region.units,
        )
        self.errors += [found.error for found in fits]
        return fits


def _bias_of(weight: Weight) -> tuple[ir.Node, int] | None:
    """Which input of which node is the bias of a layer; a convolution without one can get one at no cost."""
    target = find_output(weight, lambda _residual: False)
    if target is not None and target.bias_node is not None:
        return target.bias_node, target.bias_index
    (node,) = weight.nodes
    bare = node.op_type == "Conv" and input_at(node, 2) is None
    return (node, 2) if bare else None
