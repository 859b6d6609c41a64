"""Runs of a compilation whose outputs others are held against: the pruned dense model's and the original's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.compilation.inputs import Inputs
from sparse_onnx.compilation.load import Source
from sparse_onnx.data.inputs import Feeds
from sparse_onnx.document import Level
from sparse_onnx.model import model_io
from sparse_onnx.model.probe import shapes_in, with_shape_outputs
from sparse_onnx.model.work import NodeWork, Work
from sparse_onnx.passes.lower.lowering import Candidate
from sparse_onnx.progress import Progress
from sparse_onnx.running.input_choice import explaining_guesses
from sparse_onnx.running.runtime import Runner, open_runner

__all__ = ["DenseRun", "OriginalRun", "run_all", "run_dense", "run_original"]


@dataclasses.dataclass(frozen=True)
class DenseRun:
    """What a run of the pruned dense model tells.

    Attributes:
        outputs: Of every sample.
        shapes: Of all layers' inputs at every target, by the name of the value.
        work: Of all operators at the first target.
        level: ONNX Runtime's optimizations with which it ran.
    """

    outputs: tuple[Feeds, ...]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    work: tuple[NodeWork, ...]
    level: Level


@dataclasses.dataclass(frozen=True)
class OriginalRun:
    """The outputs of the original on every sample, and ONNX Runtime's optimizations with which it ran."""

    outputs: tuple[Feeds, ...]
    level: Level


def run_dense(
    source: Source, inputs: Inputs, model: ir.Model, candidates: Sequence[Candidate], samples: Sequence[Feeds]
) -> DenseRun:
    """Run the pruned dense model at every target and on ``samples``, real ones; generated ones are those of the
    targets."""
    layers = [layer for candidate in candidates for layer in candidate.layers]
    names = {value.name or "" for layer in layers for value in layer.inputs}
    work = Work(model, {name: array.shape for name, array in inputs.timed[0].items()})
    names |= work.unknown()
    with open_runner(with_shape_outputs(model, names), source.bench, library=False) as runner:
        source.bench.progress("running the dense model")
        with explaining_guesses(inputs.choices):
            timed = [shapes_in(runner.run(feeds)) for feeds in inputs.timed]
        counted = work.count(timed[0][1])
        told = [] if inputs.generated else run_all(runner, samples, "batch", source.bench.progress)
        outputs = [shapes_in(output)[0] for output in told] or [own for own, _ in timed]
        return DenseRun(tuple(outputs), tuple(shapes for _, shapes in timed), counted, runner.level)


def run_original(source: Source, samples: Sequence[Feeds]) -> OriginalRun:
    """Run the original, as it lies in its file."""
    original = model_io.load_model(source.path)
    with open_runner(original, source.bench, source.path, library=False) as runner:
        outputs = run_all(runner, samples, "the original", source.bench.progress)
        return OriginalRun(tuple(outputs), runner.level)


def run_all(
    runner: Runner, samples: Sequence[Feeds], what: str, progress: Callable[[str], None]
) -> list[Feeds]:
    """The outputs of every batch."""
    steps = Progress(progress, what, len(samples))
    outputs = []
    for feeds in samples:
        outputs.append(runner.run(feeds))
        steps.step()
    return outputs
