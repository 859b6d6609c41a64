"""How far the outputs of a model move if one of its weights is another, all others being as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.data.samples import Samples
from sparse_onnx.model.graph import read_values
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.calibration.skeleton import PartSession
from sparse_onnx.progress import Progress
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.outputs import tensor_outputs

__all__ = ["errors_alone"]

_BATCHES = 2  # layers differ by far more than batches do


def errors_alone(
    model: ir.Model,
    weights: Sequence[Weight],
    samples: Samples,
    changed: Callable[[Weight], np.ndarray],
    *,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _message: None,
) -> dict[str, float]:
    """‖Y − Y′‖ / ‖Y‖ by the name of the weight, Y′ being the outputs with ``changed(weight)`` [K, N] in its place.

    Y are the outputs that depend on most of the ``weights``, which are dense: of a language model not its cache. One
    session takes all weights from outside and runs the first batches of ``samples`` once for every weight. NaN counts
    as infinite. Weights inside branches and loops are left out.

    Raises RunError if ONNX Runtime refuses the model.
    """
    weights = [weight for weight in weights if weight.value.graph is model.graph]
    arrays = {weight.name: np.ascontiguousarray(weight.tensor.numpy()) for weight in weights}
    batches = [*itertools.islice(samples, _BATCHES)]
    names = [value.name or "" for value in model.graph.inputs]
    outputs = _deepest(model, arrays)
    example = {**batches[0], **arrays}
    steps = Progress(progress, "rounded alone: layer", len(weights))
    errors: dict[str, float] = {}
    with PartSession(
        model, [*names, *arrays], outputs, example, threads=threads or available_cores()
    ) as session:

        def run(feeds: Feeds) -> Feeds:
            return {name: np.asarray(value, np.float64) for name, value in session.run(feeds).items()}

        reference = [run({**batch, **arrays}) for batch in batches]
        for weight in weights:
            other = weight.stored(np.asarray(changed(weight))).astype(arrays[weight.name].dtype, copy=False)
            found = [run({**batch, **arrays, weight.name: other}) for batch in batches]
            errors[weight.name] = float(np.mean([_distance(reference, found, name) for name in outputs]))
            steps.step()
    for weight in weights:
        weight.release()
    return errors


def _distance(reference: Sequence[Feeds], found: Sequence[Feeds], name: str) -> float:
    change = sum(
        float(((old[name] - new[name]) ** 2).sum()) for old, new in zip(reference, found, strict=True)
    )
    whole = sum(float((old[name] ** 2).sum()) for old in reference)
    distance = float(np.sqrt(change / whole)) if whole > 0 else float(change > 0)
    return distance if np.isfinite(distance) else np.inf


def _deepest(model: ir.Model, weights: Collection[str]) -> list[str]:
    """The tensors among the outputs that most of ``weights`` reach."""
    values = {value.name: value for value in model.graph.outputs}
    reached = {name: _above(values[name]) for name in tensor_outputs(model)}
    counts = {name: sum(weight in above for weight in weights) for name, above in reached.items()}
    most = max(counts.values(), default=0)
    return [name for name, count in counts.items() if count == most]


def _above(output: ir.Value) -> set[str]:
    """The names of the values that ``output`` is computed from."""
    seen: set[ir.Value] = set()
    waiting = [output]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None:
            waiting += read_values(producer)
    return {value.name or "" for value in seen}
