"""Run a model on batches and keep its outputs on disk, so that those of several models can wait for one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.document import Level
from sparse_onnx.errors import UsageError
from sparse_onnx.running.runtime import LEVELS, open_runner
from sparse_onnx.running.workbench import Workbench

__all__ = ["record"]


def record(
    model: ir.Model,
    path: Path | None,
    batches: Sequence[Feeds],
    folder: Path,
    bench: Workbench,
    *,
    library: bool,
    required: int | None = None,
    level: Level = LEVELS[0],
) -> tuple[list[Feeds], dict[int, str]]:
    """The outputs of every batch, as arrays mapped from files in ``folder``, which is made.

    Args:
        model: What to run; ``path`` is its file if it has one.
        batches: One dictionary of inputs each.
        bench: What it is run with.
        library: Whether the kernel library is registered.
        required: So many batches at the beginning must run, others may be refused; their indices come back with the
            reason. None: all must run.
        level: ONNX Runtime's graph optimizations, one of :data:`.runtime.LEVELS`.

    Raises:
        UsageError: ONNX Runtime refuses the model or a batch that must run, or an output is no tensor of numbers.
    """
    folder.mkdir()
    results: list[Feeds] = []
    refused: dict[int, str] = {}
    with open_runner(model, bench, path, library=library, level=level) as runner:
        for index, feeds in enumerate(batches):
            try:
                outputs = runner.run(feeds)
            except UsageError as error:
                if required is None or index < required:
                    raise
                refused[index] = str(error)
                continue
            mapped = {}
            for position, (name, value) in enumerate(outputs.items()):
                if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiubc":
                    raise UsageError(
                        f"{path or 'the model'}: output {name!r} is no tensor of numbers: cannot be compared"
                    )
                file = folder / f"{index}-{position}.npy"
                np.save(file, value)
                mapped[name] = np.load(file, mmap_mode="r")
            results.append(mapped)
    return results, refused
