"""Verify an optimized model against its original: same inputs, outputs compared, in bounded memory.

One model is open at a time, and outputs wait on disk: three runs (the original, the optimized model with the
kernel library, the optimized model on standard operators only) fit into the memory of one.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx import model_io
from sparse_onnx.comparison import Difference, compare
from sparse_onnx.errors import UsageError, VerificationError
from sparse_onnx.inputs import Feeds, InputSpec, generate, input_specs, read_samples, resolve_shapes
from sparse_onnx.layer_timing import uses_library
from sparse_onnx.predictions import confirm, find_heads, make_probe
from sparse_onnx.report import available_cores
from sparse_onnx.runtime import open_runner, session_budget

__all__ = ["VerifyResult", "verify"]

_SHORT = 17
"""A second size for generated inputs: odd and prime, so that no vector width or tile divides it."""


@dataclasses.dataclass(frozen=True)
class VerifyResult:
    """How far the optimized model's outputs lie from the original's.

    Attributes:
        differences: By how the optimized model was run: ``with_library`` (missing if it holds no operator of
            ours, so that nothing would change) and ``without_library``.
        inputs: One line for each set of inputs that was run.
        skipped: Shapes that the original refuses, each with the reason.
        batches: How many times each model was run.
        max_relative_error: The largest relative error that passes.
    """

    differences: Mapping[str, Difference]
    inputs: tuple[str, ...]
    skipped: tuple[str, ...]
    batches: int
    max_relative_error: float

    @property
    def passed(self) -> bool:
        """True if no difference is above ``max_relative_error`` (NaN is above everything)."""
        return all(d.relative_error <= self.max_relative_error for d in self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no Inf and NaN: None there."""
        return {
            "passed": self.passed,
            "max_relative_error": self.max_relative_error,
            "batches": self.batches,
            "inputs": list(self.inputs),
            "skipped": list(self.skipped),
            **{name: difference.to_dict() for name, difference in self.differences.items()},
        }


def verify(
    original: str | Path,
    optimized: str | Path,
    *,
    data: str | Path | None = None,
    max_relative_error: float = 1e-4,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> VerifyResult:
    """Run both models on the same inputs and compare their outputs. Of outputs that hold logits the predictions are
    compared too; on real text, perplexity as well if the original is a causal language model.

    Args:
        original, optimized: ``.onnx`` files.
        data: An .npz with real inputs, one array an input, samples along the first axis. Without it inputs
            are generated: at the target shapes, and again at smaller odd ones where dimensions are symbolic.
        max_relative_error: ‖optimized − original‖ / ‖original‖ of the worst output, at most, to pass.
        input_shapes: Target shapes of generated inputs, by input name.
        threads: Intra-op threads; None: all cores of this process.
        seed: Of generated inputs.
        progress: Called with one line of text at every step.

    Raises:
        VerificationError: The models differ in their inputs, or in the names or shapes of their outputs.
        UsageError: A wrong argument or data file, or a model that ONNX Runtime refuses.
        HostError: onnxruntime or the kernel library is missing.
    """
    if not max_relative_error >= 0:
        raise UsageError(f"max_relative_error must be 0 or more, not {max_relative_error}")
    say = progress or (lambda _line: None)
    paths = (Path(original), Path(optimized))
    models = (model_io.load_model(paths[0]), model_io.load_model(paths[1]))
    specs = input_specs(models[0])
    _check_interfaces(models, specs)
    given = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    if data is not None and given:
        raise UsageError("give real inputs or input shapes, not both: the shapes are those of the data")
    count = threads or available_cores()
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as scratch:
        work = Path(scratch)
        if data is not None:
            batches = read_samples(Path(data), specs)
            tried = [f"{data}: {len(batches)} batches"]
        else:
            shapes, guessed = resolve_shapes(specs, given)
            for name, size in guessed.items():
                say(f"dimension {name} is taken as {size}; say --input-shape for another")
            both = [shapes, _other_shapes(specs, shapes)]
            batches = [generate(specs, s, seed + i) for i, s in enumerate(both) if i == 0 or s != shapes]
            tried = [f"generated: {_describe(feeds)}" for feeds in batches]
        heads = find_heads(models[0])
        probe = make_probe(heads, batches[0]) if data is not None else None
        say("running the original")
        reference, skipped = _run(
            models[0],
            paths[0],
            batches if probe is None else [*batches, probe.feeds],
            work / "original",
            threads=count,
            library=False,
            optional=data is None,
        )
        heads = confirm(heads, probe, reference[0], {} if probe is None else reference.pop())
        batches = [feeds for index, feeds in enumerate(batches) if index not in skipped]
        ran = tuple(line for index, line in enumerate(tried) if index not in skipped)
        refused = tuple(f"{tried[index]}: {reason}" for index, reason in skipped.items())
        differences = {}
        ways = ("with_library", "without_library") if uses_library(models[1]) else ("without_library",)
        for name in ways:
            say(f"running the optimized model {name.replace('_', ' ')}")
            library = name == "with_library"
            outputs, _ = _run(models[1], paths[1], batches, work / name, threads=count, library=library)
            differences[name] = compare(reference, outputs, heads, batches)
            del outputs
    return VerifyResult(differences, ran, refused, len(batches), max_relative_error)


def _check_interfaces(models: Sequence[ir.Model], specs: Sequence[InputSpec]) -> None:
    other = {spec.name: spec for spec in input_specs(models[1])}
    names = {spec.name for spec in specs}
    if names != other.keys():
        raise VerificationError(f"the models differ in their inputs: {_only(names, set(other))}")
    for spec in specs:
        same = other[spec.name]
        if spec.dtype != same.dtype or len(spec.shape) != len(same.shape):
            raise VerificationError(
                f"the models differ in an input: {spec.describe()} in the original, "
                f"{same.describe()} in the optimized"
            )
    outputs = [{value.name or "" for value in model.graph.outputs} for model in models]
    if outputs[0] != outputs[1]:
        raise VerificationError(f"the models differ in their outputs: {_only(*outputs)}")


def _only(first: set[str], second: set[str]) -> str:
    parts = [
        f"{', '.join(sorted(names))} only in the {where}"
        for names, where in ((first - second, "original"), (second - first, "optimized"))
        if names
    ]
    return "; ".join(parts)


def _other_shapes(
    specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """``shapes`` with a batch of one made two and long dimensions made short, where the model leaves them open.

    Axes after the second stay: what heights and widths a network takes depends on its strides.
    """
    return {
        spec.name: tuple(map(_other_size, spec.shape, shapes[spec.name], itertools.count())) for spec in specs
    }


def _other_size(dim: int | str | None, size: int, position: int) -> int:
    if isinstance(dim, int) or position > 1:
        return size
    return 2 if size == 1 and position == 0 else min(size, _SHORT)


def _run(
    model: ir.Model,
    path: Path,
    batches: Sequence[Feeds],
    folder: Path,
    *,
    threads: int,
    library: bool,
    optional: bool = False,
) -> tuple[list[Feeds], dict[int, str]]:
    """The outputs of every batch, as arrays mapped from files in ``folder``.

    ``optional``: batches after the first may be refused; their indices come back with the reason.
    """
    folder.mkdir()
    results: list[Feeds] = []
    refused: dict[int, str] = {}
    budget = session_budget(model_io.weight_bytes(model))
    with open_runner(
        model, threads=threads, library=library, budget=budget, work=folder, path=path
    ) as runner:
        for index, feeds in enumerate(batches):
            try:
                outputs = runner.run(feeds)
            except UsageError as error:
                if not optional or index == 0:
                    raise
                refused[index] = str(error)
                continue
            mapped = {}
            for position, (name, value) in enumerate(outputs.items()):
                if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiubc":
                    raise UsageError(f"{path}: output {name!r} is no tensor of numbers: cannot be compared")
                file = folder / f"{index}-{position}.npy"
                np.save(file, value)
                mapped[name] = np.load(file, mmap_mode="r")
            results.append(mapped)
    return results, refused


def _describe(feeds: Feeds) -> str:
    return ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
