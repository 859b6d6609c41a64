"""The pruned model beside the dense one, layer by layer: what each layer sees, and what its output should be.

Layers that read the same value are one step. Before a step both models are run up to it, from values that earlier
steps have left in files, so that each part of the model is run once in each. In the pruned one all layers before
the step have the weights that were put there since.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.data.samples import Samples
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.calibration.captures import Capture, View
from sparse_onnx.passes.calibration.layer_output import LayerOutput, find_output
from sparse_onnx.passes.calibration.moments import CrossMoments, Layout, Moments
from sparse_onnx.passes.calibration.order import Order, Part
from sparse_onnx.passes.calibration.rows import Gathered, linear_rows, unfolded_rows
from sparse_onnx.passes.calibration.skeleton import PartSession
from sparse_onnx.passes.calibration.streams import Streams
from sparse_onnx.passes.solvers.statistics import InputStatistics
from sparse_onnx.progress import Progress

__all__ = ["Aim", "Plan", "Step", "TwoStreams"]

_X = ""  # what a layer reads, beside its outputs by the names of their weights


@dataclasses.dataclass(frozen=True, eq=False)
class Aim:
    """What the output of a layer should be, on the rows X that it sees in the pruned model.

    With Y [tokens, N] the output (bias included) that makes what the model reads behind the layer that of the dense
    model: ``pull`` X'Y [K, N] and ``mean`` [N] of Y, float64.
    """

    target: LayerOutput
    pull: np.ndarray
    mean: np.ndarray


@dataclasses.dataclass(frozen=True)
class Step:
    """Weights whose layers read the same value. ``inputs`` has one entry for each group of a convolution; ``aims`` are
    by the name of the weight, and missing where the output cannot be aimed at anything."""

    index: int
    total: int
    weights: tuple[Weight, ...]
    inputs: tuple[InputStatistics, ...]
    aims: Mapping[str, Aim]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step before it is run: its layers in the order of the graph, and the ``targets`` of those that have one, by
    the name of the weight. ``weight_bytes`` are those of the part of the pruned model that is run before it."""

    capture: Capture
    weights: tuple[Weight, ...]
    targets: Mapping[str, LayerOutput]
    weight_bytes: int


class TwoStreams:
    """``captures`` say what each of ``weights`` reads. ``dense`` is the dense model, whose values have the names that
    they have in ``model``; None: ``model`` as it is now.

    The graph must stay as it is while this object is used, but for its initializers. Scratch files go to ``work``.
    """

    def __init__(
        self,
        model: ir.Model,
        captures: Mapping[str, Capture],
        weights: Sequence[Weight],
        samples: Samples,
        *,
        mask: str | None,
        threads: int,
        work: Path,
        progress: Callable[[str], None],
        dense: ir.Model | None = None,
    ) -> None:
        self._model, self._dense = model, model.clone() if dense is None else dense
        self._samples, self._mask, self._threads = samples, mask, threads
        self._work, self._say = work, progress
        self._first = next(iter(samples))
        steps = _in_order(model, captures, weights)
        solved = {
            id(node): index for index, (_, own) in enumerate(steps) for weight in own for node in weight.nodes
        }
        self._order = Order(model, solved)
        targets = [self._targets(index, *step) for index, step in enumerate(steps)]
        wanted = [
            {name for view in capture.views for name in view.tensors}
            | {_name(target.residual) for target in own.values() if target.residual is not None}
            for (capture, _), own in zip(steps, targets, strict=True)
        ]
        self._pruned_parts = self._order.parts(wanted, changing=True)
        self.plans = tuple(
            Plan(*step, own, part.weight_bytes)
            for step, own, part in zip(steps, targets, self._pruned_parts, strict=True)
        )

    def _targets(self, index: int, capture: Capture, weights: Sequence[Weight]) -> dict[str, LayerOutput]:
        if len(capture.views) > 1:
            return {}
        found = {
            weight.name: find_output(weight, lambda residual: self._order.is_final(residual, index))
            for weight in weights
        }
        return {name: target for name, target in found.items() if target is not None}

    def steps(self, layouts: Mapping[Capture, Layout]) -> Generator[Step, None, None]:
        """The steps in the order of ``plans``, of which ``layouts`` say what is kept of X'X: aims need all of it.

        The caller puts new tensors into ``weight.value.const_value`` before it asks for the next step. A weight
        that several nodes use on different values has statistics of all of them as they are before its step.
        """
        aimed = [plan.targets if layouts[plan.capture] is Layout.FULL else {} for plan in self.plans]
        wanted = [{_name(target.output) for target in targets.values()} for targets in aimed]
        dense_parts = self._order.parts(wanted, changing=False)
        with (
            contextlib.closing(Streams(self._work)) as pruned,
            contextlib.closing(Streams(self._work)) as dense,
        ):
            for index, (plan, targets) in enumerate(zip(self.plans, aimed, strict=True)):
                own = _Stream(self._model, self._pruned_parts[index], pruned)
                other = _Stream(self._dense, dense_parts[index], dense)
                # No name for the step: its sums would stay in memory until the next step is there.
                yield self._step(index, _Sums(plan, layouts[plan.capture], targets), own, other)

    def _step(self, index: int, sums: _Sums, pruned: _Stream, dense: _Stream) -> Step:
        what = f"calibration of layers {index + 1}/{len(self.plans)}"
        progress = Progress(self._say, what, len(self._samples))
        with self._open(pruned) as run_pruned, self._open(dense) as run_dense:
            for batch, given in enumerate(self._samples):
                mask = given[self._mask] if self._mask is not None else None
                weight = self._samples.weights[batch]
                sums.add(run_pruned(batch, given), run_dense(batch, given), mask, weight)
                progress.step()
        for stream in (pruned, dense):
            stream.streams.keep_only(stream.part.needed)
        inputs, aims = sums.statistics(), sums.aims()
        for name in sorted(sums.targets.keys() - aims.keys()):
            self._say(
                f"calibration: {name}: its result is broadcast or not finite: solved for its own output"
            )
        return Step(index, len(self.plans), sums.plan.weights, inputs, aims)

    @contextlib.contextmanager
    def _open(self, stream: _Stream) -> Iterator[Callable[[int, Feeds], Feeds]]:
        """A function that runs the part on one batch; it gives what the part reads and computes."""
        part, streams = stream.part, stream.streams

        def feeds(batch: int, given: Feeds) -> Feeds:
            kept = [name for name in part.inputs if name not in given]
            return {name: given[name] for name in part.inputs if name in given} | streams.get(batch, kept)

        example = feeds(0, self._first)
        with PartSession(stream.model, part.inputs, part.outputs, example, threads=self._threads) as session:

            def run(batch: int, given: Feeds) -> Feeds:
                values = feeds(batch, given)
                new = session.run(values)
                streams.put(batch, {name: new[name] for name in part.kept})
                return values | new

            yield run


@dataclasses.dataclass(frozen=True)
class _Stream:
    """A part of one of the two models, and the values that earlier parts of it have kept."""

    model: ir.Model
    part: Part
    streams: Streams


class _Sums:
    """Running sums for one step: of X, and of X'Y and Y for each weight that has one of ``targets``."""

    def __init__(self, plan: Plan, layout: Layout, targets: Mapping[str, LayerOutput]) -> None:
        self.plan, self.targets = plan, targets
        size = plan.capture.size
        self._moments = [Moments(size, layout) for _ in range(plan.capture.groups)]
        groups = plan.capture.groups
        self._waiting: dict[float, Gathered] = {}
        self._widths = {weight.name: weight.shape[1] for weight in plan.weights if weight.name in targets}
        self._pulls = {
            name: [CrossMoments(size, width // groups) for _ in range(groups)]
            for name, width in self._widths.items()
        }

    def add(self, pruned: Feeds, dense: Feeds, mask: np.ndarray | None, weight: float) -> None:
        """Add a batch of the values of both models, whose rows count as often as ``weight`` says."""
        for view in self.plan.capture.views:
            x = view.array(pruned)
            outputs = self._outputs(view, x, pruned, dense)
            if view.window is None:
                rows = {name: linear_rows(y, mask) for name, y in outputs.items()}
                waiting = self._waiting.setdefault(weight, Gathered())
                self._add_gathered(waiting.add({_X: linear_rows(x, mask), **rows}), weight)
                continue
            outputs = {name: np.moveaxis(y, 1, -1).reshape(-1, y.shape[1]) for name, y in outputs.items()}
            start = 0
            for groups in unfolded_rows(x, view.window):
                end = start + len(groups[0])
                self._add_rows(groups, {name: rows[start:end] for name, rows in outputs.items()}, weight)
                start = end

    def _add_gathered(self, blocks: Iterable[dict[str, np.ndarray]], weight: float) -> None:
        for block in blocks:
            x = block.pop(_X)
            self._add_rows([x], {name: y for name, y in block.items() if name in self._pulls}, weight)

    def statistics(self) -> tuple[InputStatistics, ...]:
        """Call it when all batches are there. Raises UsageError if there was no token, or if a sum is NaN or Inf."""
        for weight, waiting in self._waiting.items():
            self._add_gathered(waiting.rest(), weight)
        return tuple(moments.statistics(self.plan.capture.name) for moments in self._moments)

    def aims(self) -> dict[str, Aim]:
        """The aims that are defined in all batches, and finite: behind the statistics."""
        found = {}
        while self._pulls:
            name, groups = self._pulls.popitem()
            count = groups[0].count
            pulls, totals = zip(*(group.sums() for group in groups), strict=True)
            pull = pulls[0] if len(pulls) == 1 else np.concatenate(pulls, axis=1)
            total = np.concatenate(totals)
            if np.isfinite(pull.sum()) and np.isfinite(total.sum()):
                found[name] = Aim(self.targets[name], pull, total / count)
        return found

    def _outputs(self, view: View, x: np.ndarray, pruned: Feeds, dense: Feeds) -> dict[str, np.ndarray]:
        """Y of each weight, laid out as its layer's output. Aims where a sum with a larger value repeats that output
        are given up."""
        outputs = {}
        for name in list(self._pulls):
            y = _aim(self.targets[name], pruned, dense)
            width = self._widths[name]
            if view.window is None:
                expected = (*x.shape[:-1], width)
            else:
                expected = (len(x), width, *view.window.positions(x.shape[2:]))
            if y.shape == expected:
                outputs[name] = y
            else:
                del self._pulls[name]
        return outputs

    def _add_rows(
        self, groups: Sequence[np.ndarray], outputs: Mapping[str, np.ndarray], weight: float
    ) -> None:
        """Add the rows of X of every group and, side by side with them, those of Y."""
        for moments, rows in zip(self._moments, groups, strict=True):
            moments.add(rows, weight)
        for name, rows in outputs.items():
            width = rows.shape[1] // len(groups)
            for index, (pull, x) in enumerate(zip(self._pulls[name], groups, strict=True)):
                pull.add(x, rows[:, index * width : (index + 1) * width], weight)


def _in_order(
    model: ir.Model, captures: Mapping[str, Capture], weights: Sequence[Weight]
) -> list[tuple[Capture, tuple[Weight, ...]]]:
    """Weights by what they read, in the order of their first node: nothing that a step reads depends on a later one,
    unless a weight is used again behind it."""
    order = {id(node): index for index, node in enumerate(model.graph)}
    steps: dict[Capture, list[Weight]] = {}
    for weight in sorted(weights, key=lambda weight: min(order[id(node)] for node in weight.nodes)):
        steps.setdefault(captures[weight.name], []).append(weight)
    return [(capture, tuple(own)) for capture, own in steps.items()]


def _aim(target: LayerOutput, pruned: Feeds, dense: Feeds) -> np.ndarray:
    """The output wanted of a layer: that of the dense model, less what the residual brings already."""
    wanted = dense[_name(target.output)]
    if target.residual is None:
        return wanted
    residual = pruned[_name(target.residual)]
    # In half precision the difference of two large numbers would have few digits left.
    kind = np.promote_types(wanted.dtype, np.float32)
    with np.errstate(invalid="ignore"):  # Inf - Inf: such an aim is given up
        return np.subtract(wanted, residual, dtype=kind)


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
