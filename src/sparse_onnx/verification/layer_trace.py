"""Where two models come apart: their values inside compared, layer by layer in the order of the graph.

Values are matched by name; passes and lowerings keep the names of what they leave. Two errors are taken of each:

- ``relative_error``: of the value that flows through the candidate, with all that was lost before it;
- ``own_error``: of the value that the candidate's layer computes from the *reference's* values, so that nothing but the
  layer itself is in it. A layer is all nodes between matched values.

An error that a layer makes shows in its own error and in no other's, however many layers amplify it later. The *jump*
is the first layer whose own error is above a threshold.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.model.graph import Names
from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.model.probe import shapes_in, with_shape_outputs
from sparse_onnx.running.recording import record
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.verification.comparison import compare
from sparse_onnx.verification.yardstick import MARGIN

__all__ = ["LayerTrace", "TracedLayer", "trace_layers"]

_CHUNK_BYTES = 256 << 20
"""Of values that one run gives out: bounds the memory."""

_MAX_BATCHES = 4
"""How many of the batches are run: values inside are many times what comes out."""

_NAME = "sparse_onnx.reference."
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
# What moves values without computing belongs to the layer behind it.
_MOVES = ("Constant", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Expand")
# Without a declared type, the outputs of these may be no tensors.
_MAYBE_NO_TENSOR = ("If", "Loop", "Scan", "Optional", "SplitToSequence", "SequenceMap")


@dataclasses.dataclass(frozen=True)
class TracedLayer:
    """A node of the candidate and the value of both models that it computes, of several the one with the largest error
    of its own; the errors as in the module's docstring. ``rounding`` is the relative error of the reference against
    itself, if that was measured, see :mod:`.yardstick`."""

    name: str
    node: str
    op_type: str
    module: str
    relative_error: float
    own_error: float
    rounding: float = 0.0

    def describe(self) -> str:
        """The module that the node came from, else its own name, and the operator."""
        return f"{self.module or self.node} [{self.op_type}]"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no Inf and NaN: None there."""
        values = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """All matched layers in the order of the candidate's graph.

    Attributes:
        reference: What the candidate was compared with, in words.
        layers: Those of which both models hold the value.
        threshold: Of the own error, for :attr:`jump`.
        batches: How many were run.
    """

    reference: str
    layers: tuple[TracedLayer, ...]
    threshold: float
    batches: int

    @property
    def jump(self) -> TracedLayer | None:
        """The first layer whose own error is above the threshold and what rounding explains."""
        return next(
            (
                layer
                for layer in self.layers
                if not layer.own_error <= max(self.threshold, MARGIN * layer.rounding)
            ),
            None,
        )

    @property
    def largest(self) -> TracedLayer | None:
        """The layer with the largest own error; None if there is no error at all."""
        worst = max(self.layers, key=lambda layer: layer.own_error, default=None)
        return worst if worst is not None and worst.own_error > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``jump`` and ``largest`` are names of values."""
        jump, largest = self.jump, self.largest
        return {
            "reference": self.reference,
            "threshold": self.threshold,
            "batches": self.batches,
            "jump": None if jump is None else jump.name,
            "largest": None if largest is None else largest.name,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def trace_layers(
    reference: ir.Model,
    candidate: ir.Model,
    batches: Sequence[Feeds],
    bench: Workbench,
    *,
    threshold: float,
    library: bool,
    title: str = "reference",
    moved: ir.Model | None = None,
) -> LayerTrace:
    """Compare the values inside two models on the same inputs.

    One model is open at a time, the values of a quarter of a gigabyte at most are computed together, and what waits
    lies in ``bench.work``.

    Args:
        reference, candidate: With the same inputs.
        batches: Of which the first four are run.
        bench: What they are run with.
        threshold: Of the own error, for the jump.
        library: Whether the candidate is run with the kernel library.
        title: What the reference is, in words.
        moved: The reference with its rounding drawn anew, see :func:`.yardstick.perturbed`: to tell what rounding does.

    Raises:
        UsageError: ONNX Runtime refuses a model.
    """
    batches, quiet = batches[:_MAX_BATCHES], bench.quietly()
    sizes = _matched(reference, candidate, batches, quiet, library=library)
    errors: dict[str, tuple[float, float, float]] = {}
    done = 0
    for names in _chunks(sizes):
        bench.progress(f"comparing layers {done + 1} to {done + len(names)} of {len(sizes)}")
        done += len(names)
        folder = bench.work / "trace"
        folder.mkdir()
        forced, fed = _forced(candidate, names, sizes)
        wanted = _with_outputs(reference, {*names, *fed.values()})
        expected, _ = record(wanted, None, batches, folder / "expected", quiet, library=False)
        found, _ = record(
            _with_outputs(candidate, names), None, batches, folder / "found", quiet, library=library
        )
        inputs = [
            {**feeds, **{name: values[source] for name, source in fed.items()}}
            for feeds, values in zip(batches, expected, strict=True)
        ]
        for value in forced.graph.inputs:
            if value.name in fed:
                value.type = ir.TensorType(ir.DataType.from_numpy(inputs[0][value.name].dtype))
        own, _ = record(forced, None, inputs, folder / "own", quiet, library=library)
        again = expected
        if moved is not None:
            again, _ = record(
                _with_outputs(moved, names), None, batches, folder / "again", quiet, library=False
            )
        for name in names:
            if expected[0][name].dtype.kind != "f":  # its type was not told
                continue
            parts = [[{name: values[name]} for values in run] for run in (expected, found, own, again)]
            flowing, alone, rounding = (compare(parts[0], part).relative_error for part in parts[1:])
            errors[name] = flowing, alone, rounding if math.isfinite(rounding) else 0.0
        del expected, found, own, again, inputs
        shutil.rmtree(folder)
    layers = tuple(
        TracedLayer(
            name, node.name or name, node.op_type, node.metadata_props.get(MODULE_KEY, ""), *errors[name]
        )
        for node in candidate.graph
        if (name := _worst_output(node, errors))
    )
    return LayerTrace(title, layers, threshold, len(batches))


def _worst_output(node: ir.Node, errors: Mapping[str, tuple[float, float, float]]) -> str:
    """The output with the largest own error, by name; "" if none was compared."""
    names = [value.name for value in node.outputs if value.name is not None and value.name in errors]
    return max(names, key=lambda name: errors[name][1], default="")


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """The values of the main graph that can be compared, by name."""
    found = {}
    for node in model.graph:
        for value in node.outputs:
            typed = value.dtype is not None
            comparable = value.dtype in _FLOATS if typed else node.op_type not in _MAYBE_NO_TENSOR
            if comparable and value.name and node.op_type not in _MOVES:
                found[value.name] = value
    inner = {value.name for graph in model.graph.subgraphs() for value in graph.outputs}
    return {name: value for name, value in found.items() if name not in inner}


def _matched(
    reference: ir.Model,
    candidate: ir.Model,
    batches: Sequence[Feeds],
    bench: Workbench,
    *,
    library: bool,
) -> dict[str, int]:
    """Names of the values that both models have, with equal shapes, and their bytes; in the candidate's order."""
    known = _values(reference)
    names = [name for name in _values(candidate) if name in known]
    largest = max(batches, key=lambda feeds: sum(array.size for array in feeds.values()))
    shapes = []
    for model, kernels in ((reference, False), (candidate, library)):
        probe = with_shape_outputs(model, names)
        with open_runner(probe, bench, library=kernels) as runner:
            shapes.append(shapes_in(runner.run(largest))[1])
    return {name: 8 * math.prod(shapes[0][name]) for name in names if shapes[0][name] == shapes[1][name]}


def _chunks(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, in runs of a bounded number of bytes."""
    held, chunk = 0, list[str]()
    for name, size in sizes.items():
        if chunk and held + size > _CHUNK_BYTES:
            yield chunk
            held, chunk = 0, list[str]()
        held, chunk = held + size, [*chunk, name]
    if chunk:
        yield chunk


def _with_outputs(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A copy of ``model`` that gives these values of its main graph out, and nothing else."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in values if name in names)
    RemoveUnusedNodesPass()(copy)
    return copy


def _forced(
    candidate: ir.Model, names: Sequence[str], matched: Collection[str]
) -> tuple[ir.Model, dict[str, str]]:
    """A copy of ``candidate`` that gives ``names`` out and reads every matched value from an input instead of from the
    node that computes it; and the matched value that each of these inputs stands for."""
    copy = candidate.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    fed, free = {}, Names(copy)
    for name in matched:
        stand_in = ir.Value(name=free.new(f"{_NAME}{name}"))
        values[name].replace_all_uses_with(stand_in)
        fed[stand_in] = name
    copy.graph.outputs.extend(values[name] for name in names)
    RemoveUnusedNodesPass()(copy)
    used = {value: name for value, name in fed.items() if value.uses()}
    copy.graph.inputs.extend(used)
    return copy, {value.name or "": name for value, name in used.items()}
