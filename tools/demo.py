"""``sparse-onnx demo``: the main job on a small trained model that ships with the package."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparse_onnx.compilation.groups import Run, Target
from sparse_onnx.document import SPARSE_FORMS
from sparse_onnx.progress import Progress
from sparse_onnx.tools.console import format_option, progress, quiet_option, show
from sparse_onnx.tools.options import option

__all__ = ["command"]

BATCH = 8
"""Windows of 128 bytes in one run: the target that the model is compiled for."""


@click.command(short_help="Run the main job on a small trained model that ships with the package.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the results in this folder.")
@option(Target, "threads", "Threads to compile for.  [default: all cores]")
@option(Run, "overwrite")
@format_option
@quiet_option
def command(
    output: Path | None, threads: int | None, overwrite: bool, output_format: str, quiet: bool
) -> int:
    """Compile a pruned syntax highlighter for Python and compare it with the original on held-out source.

    The model is a transformer of 2.6 million weights that names the class of every byte (keyword, docstring,
    argument name and so on). It was trained on Python's standard library, and nine in ten of its weights were
    pruned while it learned. Without -o, the results are deleted at the end.
    """
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-demo-") as scratch:
        summary = _run(Path(scratch), output, threads, overwrite, quiet)
    code: int = summary["exit_code"]
    return show(_text(summary), summary, output_format, code)


def _run(
    scratch: Path, output: Path | None, threads: int | None, overwrite: bool, quiet: bool
) -> dict[str, Any]:
    """Unpack, optimize, evaluate; the demo as one document."""
    import lzma
    from importlib import resources

    import numpy as np

    import sparse_onnx
    from sparse_onnx.running.host import available_cores

    threads = threads or available_cores()
    assets = resources.files("sparse_onnx.tools") / "demo_model"
    original = scratch / "original.onnx"
    original.write_bytes(lzma.decompress((assets / "model.onnx.xz").read_bytes()))
    trained = json.loads((assets / "results.json").read_text(encoding="utf-8"))
    with progress(quiet) as say:
        with resources.as_file(assets / "held_out.npz") as held_out:
            with np.load(held_out) as file:
                text, classes = file["text"].astype(np.int64), file["classes"]
            result = sparse_onnx.optimize(
                original,
                output or scratch / "optimized",
                input_shapes={"text": (BATCH, text.shape[1])},
                calibration_data=held_out,
                threads=threads,
                overwrite=overwrite,
                command=click.get_current_context().obj,
                progress=say,
            )
        assert result.folder is not None  # only a dry run has none
        optimized = result.folder / "model.onnx"
        accuracy = {
            "before": _accuracy(original, text, classes, threads, say, library=False),
            "after": _accuracy(optimized, text, classes, threads, say, library=True),
        }
    if output is not None:
        shutil.copyfile(original, output / original.name)
    return {
        "exit_code": result.exit_code,
        "folder": None if output is None else str(output),
        "accuracy": accuracy,
        "trained": trained,
        "threads": threads,
        "report": result.report,
    }


def _accuracy(
    path: Path, text: Any, classes: Any, threads: int, say: Callable[[str], None], *, library: bool
) -> float:
    """Share of the bytes ``text`` [windows, 128] for which the model's best class is the right one."""
    from sparse_onnx.running.runtime import open_session

    session = open_session(path, threads=threads, library=library)
    right = 0
    steps = Progress(say, f"right classes of {path.stem}: window", len(text))
    for start in range(0, len(text), BATCH):
        (scores,) = session.run(None, {"text": text[start : start + BATCH]})
        right += int((scores.argmax(-1) == classes[start : start + BATCH]).sum())
        steps.step(len(scores))
    return right / int(classes.size)


def _text(summary: dict[str, Any]) -> str:
    """The table and where the results lie: at most 15 lines."""
    from sparse_onnx.tools.console import table
    from sparse_onnx.units import format_bytes, format_ms

    report, trained, accuracy = summary["report"], summary["trained"], summary["accuracy"]
    totals = report["summary"]
    sparse = sum(row["decision"] in SPARSE_FORMS for row in report["layers"])
    speedup = "-"
    if totals["speedup"] is not None:
        proven = totals["speedup_low"] > 1
        speedup = f"{totals['speedup']:.2f}x {'faster' if proven else 'not proven faster'}"
    smaller = f"{totals['bytes_before'] / totals['bytes_after']:.2f}x smaller"
    batch = f"latency, {BATCH} x 128 bytes, {summary['threads']} threads"
    rows = [
        ["accuracy on held-out source", f"{accuracy['before']:.2%}", f"{accuracy['after']:.2%}", ""],
        [batch, format_ms(totals["dense_ms"]), format_ms(totals["optimized_ms"]), speedup],
        ["size", format_bytes(totals["bytes_before"]), format_bytes(totals["bytes_after"]), smaller],
        ["linear layers on sparse kernels", "0", f"{sparse} of {len(report['layers'])}", ""],
    ]
    where = summary["folder"]
    return "\n".join(
        [
            f"A syntax highlighter for Python; {trained['sparsity']:.0%} of the weights of its layers are zero.",
            "",
            table(rows, ["", "before", "after", "change"]),
            "",
            f"Its twin trained the same way without pruning reached {trained['dense_accuracy']:.2%}; "
            f"always the commonest class: {trained['most_frequent_class']:.2%}.",
            f"Results: {where} (report.html shows every layer)"
            if where
            else "Results were deleted; -o DIR keeps them.",
        ]
    )
