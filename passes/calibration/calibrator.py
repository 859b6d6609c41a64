"""Run a model on calibration data and collect what solvers need of every layer's input.

*One shot*: all layers from one pass over the dense model. *Block by block*: the model is cut where few values pass; a
block's statistics are those behind the blocks pruned so far, and its new weights are in place before the next
block is run (2 passes over the model). *Step by step*: layers that read the same value at a time, with the dense
model beside the pruned one (1 pass over each).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import RECURRENT, Weight
from sparse_onnx.passes.calibration.blocks import Block, Cutter
from sparse_onnx.passes.calibration.captures import Capture, View, find_captures
from sparse_onnx.passes.calibration.digest import model_digest
from sparse_onnx.passes.calibration.histograms import ChannelHistograms
from sparse_onnx.passes.calibration.memory import (
    Demand,
    Sweep,
    activation_bytes,
    divide,
    fitting,
)
from sparse_onnx.passes.calibration.moments import Layout, Moments
from sparse_onnx.passes.calibration.record import Record
from sparse_onnx.passes.calibration.rows import channel_rows, linear_rows, unfolded_rows
from sparse_onnx.passes.calibration.skeleton import PartSession
from sparse_onnx.passes.calibration.spill import Loader, Spill, Statistics, at_hand
from sparse_onnx.passes.calibration.statistics_file import Header
from sparse_onnx.passes.calibration.streams import Streams
from sparse_onnx.passes.calibration.two_streams import Plan, Step, TwoStreams
from sparse_onnx.progress import Progress
from sparse_onnx.running.host import available_cores, available_memory
from sparse_onnx.running.runtime import session_budget
from sparse_onnx.units import format_bytes

__all__ = ["BlockStatistics", "Calibrator", "Options"]

_TOKENS_PER_CHANNEL = 8
_COUNTED_ROWS = (
    16384  # of a histogram: enough for the share of values beyond any range that is worth choosing
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to calibrate.

    ``layout`` is the most that is kept of X'X. ``memory_budget`` (bytes; None: half of what is available) bounds sums,
    activations and weights together. ``mask`` names the input [B, S] whose zeros are padding; None: there is none.
    ``checkpoint_batches``: an interrupted run that writes a statistics file loses at most so many batches.
    """

    layout: Layout = Layout.FULL
    memory_budget: int | None = None
    mask: str | None = "attention_mask"
    threads: int | None = None
    checkpoint_batches: int = 16

    def __post_init__(self) -> None:
        for name in ("memory_budget", "threads", "checkpoint_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"calibration: {name} must be at least 1, not {value}")


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """One block of the model, ready to be solved: its weights, and the statistics of each by name."""

    index: int
    total: int
    weights: tuple[Weight, ...]
    statistics: Statistics


class Calibrator:
    """Calibration of ``weights`` of ``model`` on ``samples``; scratch files go to ``work``. ``dense`` is what layers
    are aimed at step by step, ``model`` with other initializers; None: the model as it is then.

    ``declined`` lists the (weight, reason) of those that cannot be calibrated: only a method without data fits them.
    The graph must stay as it is while this object is used, but for the weights, and for nodes put behind a layer
    whose last output keeps the name of the old one.

    Raises UsageError if the mask that was asked for does not fit the model.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Sequence[Weight],
        samples: Samples,
        options: Options | None = None,
        *,
        work: Path,
        progress: Callable[[str], None] = lambda _message: None,
        dense: ir.Model | None = None,
    ) -> None:
        self._model, self._samples, self._work, self._say = model, samples, work, progress
        self._dense = dense
        self._first = next(iter(samples))
        self._options = options or Options()
        self._threads = self._options.threads or available_cores()
        self.captures, self.declined = find_captures(model, weights)
        self._weights = [weight for weight in weights if weight.name in self.captures]
        for name, reason in self.declined:
            progress(f"note: calibration: {name}: {reason}")
        self._mask = _mask_name(model, self._options.mask, progress)
        self._budget = self._options.memory_budget or available_memory() // 2

    # -- one shot ---------------------------------------------------------------------------------------------

    def oneshot(self, file: Path | None = None, weights: Sequence[Weight] | None = None) -> Statistics:
        """The statistics of all weights, or of those given, in the model as it is now.

        Where not all Grams fit into memory, they lie in files in ``work`` and are read when they are asked for.
        With ``file``, finished statistics of the same model and data are read from it, unfinished ones continued, and
        the result is written to it.
        """
        known = {weight.name for weight in self._weights}
        chosen = [
            weight for weight in (self._weights if weights is None else weights) if weight.name in known
        ]
        captures = self._distinct(chosen)
        if not captures:
            return Statistics({})
        record = None
        if file is not None and self._samples.weighted:
            raise UsageError(
                f"{file}: statistics of weighted data are not kept in a file: leave one of them out"
            )
        if file is not None:
            header = Header(
                model_digest(self._model), (self._samples.digest(),), len(self._samples), self._mask, ()
            )
            record = Record(file, header, self._options.checkpoint_batches)
        stages = self._stages(chosen)
        results: dict[Capture, Loader] = {}
        streams = Streams(self._work)
        spill = Spill(self._work)
        try:
            for index, block in enumerate(stages):
                what = f"calibration {index + 1}/{len(stages)}" if len(stages) > 1 else "calibration"
                results |= self._collect(
                    block, streams, what, spill, outputs=block.outputs, record=record, alone=len(stages) == 1
                )
                _drop(streams, stages, index)
        except BaseException:
            spill.close()
            raise
        finally:
            streams.close()
        if record is not None:
            record.finish(captures)
        return Statistics({weight.name: results[self.captures[weight.name]] for weight in chosen})

    def _stages(self, weights: Sequence[Weight]) -> list[Block]:
        """The whole model as one block if its weights and Grams fit into memory, else as few blocks as do."""
        limit = min(session_budget(model_io.weight_bytes(self._model)), self._budget // 2)

        def fits(block: Block) -> bool:
            demands = self._demands(self._distinct(block.weights))
            needed = sum(demand.nbytes for demand in demands)
            return block.weight_bytes <= limit and needed + block.weight_bytes <= self._budget

        return Cutter(self._model, weights).blocks(fits)

    def _distinct(self, weights: Sequence[Weight]) -> list[Capture]:
        return list(dict.fromkeys(self.captures[weight.name] for weight in weights))

    # -- ranges -----------------------------------------------------------------------------------------------

    def ranges(self, results: Mapping[str, str] | None = None) -> dict[str, ChannelHistograms]:
        """Histograms of every value that a linear or a convolution reads, by its name: of the last axis for linears, of
        the channels for convolutions. One pass over the data, in as few stages as fit into memory.

        ``results`` are values that convolutions make, by the names of their weights: of these, too.
        """
        made = results or {}
        found: dict[str, ChannelHistograms] = {}
        streams = Streams(self._work)
        stages = self._stages(self._weights)
        try:
            for index, block in enumerate(stages):
                views = {
                    view.tensor: view
                    for weight in block.weights
                    for view in self.captures[weight.name].views
                    if view.recurrence is None
                }
                own = {made[weight.name] for weight in block.weights if weight.name in made} - views.keys()
                wanted = list(
                    dict.fromkeys((*sorted((views.keys() | own) - set(block.inputs)), *block.outputs))
                )
                what = f"ranges {index + 1}/{len(stages)}" if len(stages) > 1 else "ranges"
                progress = Progress(self._say, what, len(self._samples))
                with self._open(block, wanted, streams) as session:
                    for batch, given in enumerate(self._samples):
                        feeds = self._feeds(block, streams, batch, given)
                        values = feeds | session.run(feeds)
                        if block.outputs:
                            streams.put(batch, {name: values[name] for name in block.outputs})
                        mask = given[self._mask] if self._mask is not None else None
                        for name in (*views, *sorted(own)):
                            images = name in own or views[name].window is not None
                            rows = channel_rows(values[name], mask, images=images)
                            if name not in found:
                                expected = len(rows) * len(self._samples)
                                found[name] = ChannelHistograms(rows.shape[1], 1 + expected // _COUNTED_ROWS)
                            found[name].add(rows)
                        progress.step()
                _drop(streams, stages, index)
        finally:
            streams.close()
        return found

    # -- block by block ---------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[BlockStatistics]:
        """The blocks of the model in order, each with statistics of the model as it is pruned so far.

        The caller puts new tensors into ``weight.value.const_value`` before it asks for the next block.
        """
        if not self._weights:
            return
        plan = Cutter(self._model, self._weights).blocks()
        if len(plan) == 1:
            self._say("calibration: no place found to cut the model: all of it is one block")
        streams, spill = Streams(self._work), Spill(self._work)
        try:
            for index, block in enumerate(plan):
                what = f"calibration of block {index + 1}/{len(plan)}"
                yield BlockStatistics(
                    index,
                    len(plan),
                    block.weights,
                    self._by_name(block, self._collect(block, streams, what, spill)),
                )
                spill.close()  # until the next block
                if block.outputs:
                    self._propagate(block, streams, f"running pruned block {index + 1}/{len(plan)}")
                _drop(streams, plan, index)
        finally:
            streams.close()
            spill.close()

    def _by_name(self, block: Block, results: Mapping[Capture, Loader]) -> Statistics:
        return Statistics({weight.name: results[self.captures[weight.name]] for weight in block.weights})

    def _propagate(self, block: Block, streams: Streams, what: str) -> None:
        """Run a block with the weights that it has now."""
        progress = Progress(self._say, what, len(self._samples))
        with self._open(block, block.outputs, streams) as session:
            for batch, given in enumerate(self._samples):
                streams.put(batch, session.run(self._feeds(block, streams, batch, given)))
                progress.step()

    # -- step by step -----------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Layers that read the same value, in order: statistics of the model as it is pruned so far, and what makes
        up for what was lost before; see :class:`~sparse_onnx.passes.calibration.two_streams.TwoStreams`.

        The dense model is the one that was given, or the model as it is when this method is called. The caller puts
        new tensors into ``weight.value.const_value`` before it asks for the next step, and keeps of a step what it
        needs: the sums of two steps may not fit into memory together. Weights are in the order of the graph; those of
        recurrent layers are left out: what they see is made by the weight itself, and nothing aims at it.
        """
        weights = [weight for weight in self._weights if weight.nodes[0].op_type not in RECURRENT]
        if not weights:
            return iter(())
        streams = TwoStreams(
            self._model,
            self.captures,
            weights,
            self._samples,
            mask=self._mask,
            threads=self._threads,
            work=self._work,
            progress=self._say,
            dense=self._dense,
        )
        demands = [self._fitting_step(plan) for plan in streams.plans]
        plan, demand = max(
            zip(streams.plans, demands, strict=True), key=lambda pair: pair[1].nbytes + pair[0].weight_bytes
        )
        self._say(
            f"calibration: {len(demands)} steps of {len(self._samples)} batches, the dense model beside the pruned "
            f"one; memory about {format_bytes(demand.sums())} for sums, {format_bytes(demand.activation)} for "
            f"activations, {format_bytes(2 * plan.weight_bytes)} for weights"
        )
        steps = streams.steps({demand.capture: demand.layout for demand in demands})
        # A loop would hold the sums of a step until those of the next one are there.
        return map(functools.partial(self._warned, demands), steps)

    def _warned(self, demands: Sequence[Demand], step: Step) -> Step:
        self._warn_if_few(demands[step.index], step.inputs[0].count)
        return step

    def _fitting_step(self, plan: Plan) -> Demand:
        """What one step needs, in a layout that fits into the budget; a change of it is told."""
        K = plan.capture.size
        widths = {weight.name: weight.shape[1] for weight in plan.weights if weight.name in plan.targets}
        aims = [
            Capture((View(target.output.name or ""),), widths[name]) for name, target in plan.targets.items()
        ]
        activation, *of_aims = activation_bytes([plan.capture, *aims], self._shapes, self._first)
        demand = Demand(
            plan.capture,
            self._options.layout,
            activation + 2 * sum(of_aims),  # what is wanted, what is there, and their difference
            8 * K * sum(widths.values()) + 4 * K * max(widths.values(), default=0),
        )
        room = max(self._budget - 2 * plan.weight_bytes, self._budget // 4)
        return fitting(demand, room, self._say)

    # -- running ----------------------------------------------------------------------------------------------

    def _open(self, block: Block, outputs: Sequence[str], streams: Streams) -> PartSession:
        example = self._feeds(block, streams, 0, self._first)
        return PartSession(self._model, block.inputs, outputs, example, threads=self._threads)

    def _feeds(self, block: Block, streams: Streams, batch: int, given: Feeds) -> Feeds:
        """What ``block`` reads: inputs of the model, and values that earlier blocks have left."""
        missing = [name for name in block.inputs if name not in given]
        return {name: given[name] for name in block.inputs if name in given} | streams.get(batch, missing)

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        given = {name: array.shape for name, array in self._first.items()}
        return given | Shapes(self._model, inputs=given).sizes()

    def _demands(self, captures: Sequence[Capture]) -> list[Demand]:
        activations = activation_bytes(captures, self._shapes, self._first)
        return [
            Demand(capture, self._options.layout, nbytes)
            for capture, nbytes in zip(captures, activations, strict=True)
        ]

    def _collect(
        self,
        block: Block,
        streams: Streams,
        what: str,
        spill: Spill,
        *,
        outputs: Sequence[str] = (),
        record: Record | None = None,
        alone: bool = True,
    ) -> dict[Capture, Loader]:
        """The statistics of one block, in as many passes over the data as fit into memory.

        ``outputs`` go to the streams in the first pass. With several passes, or if the block is not ``alone``, the
        results go to ``spill``.
        """
        demands = self._demands(self._distinct(block.weights))
        passes, said = divide(demands, max(self._budget - block.weight_bytes, self._budget // 4))
        for line in said:
            self._say(line)
        results: dict[Capture, Loader] = {}
        for number, group in enumerate(passes):
            name = what if len(passes) == 1 else f"{what}, pass {number + 1}/{len(passes)}"
            self._say(
                f"{name}: {len(self._samples)} batches, {len(group.demands)} inputs of layers; memory about "
                f"{format_bytes(group.sums)} for sums, {format_bytes(group.activations)} for activations, "
                f"{format_bytes(block.weight_bytes)} for weights"
            )
            kept = outputs if number == 0 else ()
            sums = self._run_pass(block, group, streams, name, outputs=kept, record=record)
            for demand in group.demands:
                groups = [part.statistics(demand.capture.name) for part in sums.pop(demand.capture)]
                self._warn_if_few(demand, groups[0].count)
                keep = at_hand if len(passes) == 1 and alone else spill.put
                results[demand.capture] = keep(groups)
        return results

    def _run_pass(
        self,
        block: Block,
        group: Sweep,
        streams: Streams,
        what: str,
        *,
        outputs: Sequence[str],
        record: Record | None,
    ) -> dict[Capture, list[Moments]]:
        sums: dict[Capture, list[Moments]] = {}
        done: dict[Capture, int] = {}  # batches
        for demand in group.demands:
            capture, layout = demand.capture, demand.layout
            restored = record.restore(capture, layout) if record is not None else None
            empty = [Moments(capture.size, layout) for _ in range(capture.groups)]
            sums[capture], done[capture] = restored or (empty, 0)
        tensors = {name for capture in sums for view in capture.views for name in view.tensors}
        wanted = list(dict.fromkeys((*sorted(tensors - set(block.inputs)), *outputs)))
        total = len(self._samples)
        start = 0 if outputs else min(done.values())
        if start == total:
            return sums
        progress = Progress(self._say, what, total - start)
        with self._open(block, wanted, streams) as session:
            for batch, given in enumerate(self._samples):
                if batch < start:
                    continue
                feeds = self._feeds(block, streams, batch, given)
                values = feeds | session.run(feeds)
                if outputs:
                    streams.put(batch, {name: values[name] for name in outputs})
                mask = given[self._mask] if self._mask is not None else None
                due = [capture for capture in sums if done[capture] == batch]
                for capture in due:
                    _add(sums[capture], capture, values, mask, self._samples.weights[batch])
                    done[capture] += 1
                del values, feeds
                if record is not None and due:
                    record.keep(sums, done, force=batch + 1 == total)
                progress.step()
        return sums

    def _warn_if_few(self, demand: Demand, count: float) -> None:
        size = demand.capture.size
        if demand.layout is not Layout.DIAGONAL and count < _TOKENS_PER_CHANNEL * size:
            self._say(
                f"warning: calibration: {count:.0f} tokens for the {size} channels of {demand.capture.name}; "
                f"{_TOKENS_PER_CHANNEL * size} or more give better weights"
            )


def _add(
    sums: Sequence[Moments], capture: Capture, values: Feeds, mask: np.ndarray | None, weight: float
) -> None:
    """Add the rows of one batch that ``capture`` sees of ``values``; each counts as often as ``weight`` says."""
    for view in capture.views:
        x = view.array(values)
        if view.recurrence is not None:
            for moments, rows in zip(sums, view.recurrence.rows(x, values, mask), strict=True):
                moments.add(rows, weight)
            continue
        if view.window is None:
            sums[0].add(linear_rows(x, mask), weight)
            continue
        for groups in unfolded_rows(x, view.window):
            for moments, rows in zip(sums, groups, strict=True):
                moments.add(rows, weight)


def _drop(streams: Streams, blocks: Sequence[Block], index: int) -> None:
    """Delete what no block after ``index`` reads."""
    streams.keep_only({name for block in blocks[index + 1 :] for name in block.inputs})


def _mask_name(model: ir.Model, asked: str | None, say: Callable[[str], None]) -> str | None:
    """The input that marks padding, or None; ``asked`` must be there and fit, unless it is the default."""
    if asked is None:
        return None
    value = next((value for value in model.graph.inputs if value.name == asked), None)
    fits = (
        value is not None
        and value.dtype is not None
        and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL)
        and value.shape is not None
        and len(value.shape) == 2
    )
    if fits:
        return asked
    if asked != Options.mask:
        names = ", ".join(value.name or "" for value in model.graph.inputs)
        raise UsageError(
            f"calibration: mask {asked!r} must be an integer input [B, S]; the inputs are {names}"
        )
    if value is not None:
        say(f"note: calibration: {asked} is no integer input [B, S]: padding is not left out")
    return None
