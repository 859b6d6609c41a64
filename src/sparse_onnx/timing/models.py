"""Time whole models: the original against what was made of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.running.machine_load import OtherLoad
from sparse_onnx.running.runtime import of_our_making, open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing.rounds import Ratio, interleave, ratio

__all__ = ["time_models"]


@of_our_making()
def time_models(
    pair: Sequence[tuple[ir.Model, Path]],
    feeds: Sequence[Feeds],
    bench: Workbench,
    *,
    rounds: int = 15,
    seconds: float = 8.0,
) -> list[Ratio]:
    """Time the original against a compiled model, each with its file, in turn: a ratio for each of ``feeds``. There are
    fewer than ``rounds`` rounds where they take more than ``seconds`` for each of ``feeds``.

    The original has run on ``feeds``: VerificationError if ONNX Runtime refuses the compiled one."""
    (original, source), (compiled, written) = pair
    with (
        open_runner(original, bench, source, library=False, timed=True) as dense,
        open_runner(compiled, bench, written, library=True, timed=True) as sparse,
    ):
        runs = [
            functools.partial(runner.milliseconds, values) for values in feeds for runner in (dense, sparse)
        ]
        load = OtherLoad()
        if dense.whole and sparse.whole:
            found = interleave(runs, rounds=rounds, seconds=seconds * len(feeds), progress=bench.progress)
        else:
            found = [[run()] for run in runs]
    quiet = load.spared(bench.threads)
    return [ratio(first, second, quiet=quiet) for first, second in zip(found[::2], found[1::2], strict=True)]
