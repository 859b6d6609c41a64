"""``sparse-onnx optimize``: the main job."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from sparse_onnx.tools.console import (
    fix_input_option,
    format_option,
    if_any,
    input_shape_option,
    input_value_option,
    other_work,
    progress,
    quiet_option,
    show,
    table,
)
from sparse_onnx.units import format_bytes, format_ms, format_rounded

__all__ = ["command", "summary_table"]


def _numbers(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: write numbers with commas between them, e.g. 3,1") from None


@click.command(short_help="Compile a model into a smaller, faster, verified one.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write (required unless --dry-run)."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML recipe; the other options override it.")
@click.option(
    "--method",
    help="Pruning method. With --calibration-data: auto (the most accurate), alps, admm, sparsegpt, wanda, ria, "
    "taylor, iht, omp, lasso. Without: magnitude, random, threshold.",
)
@click.option("--sparsity", type=float, help="Share of zeros to reach, in [0, 1).")
@click.option(
    "--mask-structure",
    help="unstructured, N:M (keep N of M), or block:RxC; several with commas for a search to choose from.",
)
@click.option("--scope", help="Where the share of zeros is kept: row, layer or global, as the method has it.")
@click.option("--theta", type=float, help="For method threshold: smaller absolute values become zero.")
@click.option(
    "--gradients",
    type=click.Path(path_type=Path),
    help="For method gradient: a file of `export --gradients`.",
)
@click.option(
    "--targets",
    multiple=True,
    callback=if_any,
    help="Layers to prune: name, op type, or re:REGEX; repeatable.",
)
@click.option(
    "--ignore",
    multiple=True,
    callback=if_any,
    help="Layers to leave alone: name, op type, or re:REGEX; repeatable.",
)
@click.option(
    "--calibration-data",
    help="Real inputs: an .npz, a folder of .npz, module:function, or a text file (with --tokenizer).",
)
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Folder with the tokenizer of a text file."
)
@click.option("--num-calibration-samples", type=click.IntRange(1), help="Use so many.  [default: all]")
@click.option("--batch-size", type=click.IntRange(1), help="Samples that are run together.  [default: 4]")
@click.option("--calibration", help="oneshot, sequential or asymmetric.  [default: as the method has it]")
@click.option(
    "--allocation", help="Zeros over layers: uniform, depth, owl, alpha or error.  [default: uniform]"
)
@click.option("--bias-correction/--no-bias-correction", default=None, help="Whether biases change.")
@click.option("--dampening-frac", type=float, help="Added to the diagonal of the Gram.  [default: 0.01]")
@click.option(
    "--statistics", type=click.Path(path_type=Path), help="File for the statistics of oneshot calibration."
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Folder for finished layers: run again with it after an interruption.",
)
@input_shape_option("to decide and time for", several=True)
@input_value_option
@fix_input_option
@click.option(
    "--shape-weights",
    callback=_numbers,
    help="3,1,..: decide by the weighted mean time over several shapes.  [default: by the worst]",
)
@click.option(
    "--threads", type=click.IntRange(1), help="Threads to decide and time for.  [default: all cores]"
)
@click.option(
    "--min-speedup", type=float, help="A layer becomes sparse from this speedup on.  [default: 1.02]"
)
@click.option(
    "--keep-pruned/--no-keep-pruned",
    default=None,
    help="Whether layers that stay dense keep their zeros, for another runtime.  [default: they keep or get back their "
    "original weights]",
)
@click.option(
    "--max-compiler-error",
    type=float,
    help="Relative error against the pruned dense model, at most, unless rounding explains more.  [default: 0.0001]",
)
@click.option(
    "--metric",
    help="accuracy, recall, f1, recall@K, perplexity, token_agreement, cosine, or your own module:function.",
)
@click.option(
    "--metric-data", help="What it is measured on.  [default: the calibration data that is held out]"
)
@click.option("--labels", help="The array of that data with the labels.")
@click.option("--metric-output", help="The output that the metric is of.")
@click.option("--max-drop", type=float, help="Goal: what the metric may lose; without one, 1 - cosine.")
@click.option("--target-speedup", type=float, help="Goal: the whole model so many times faster, at least.")
@click.option(
    "--target-size", help="Goal: files of at most 0.5 (or 50%) of the original files, or of 120MB, say."
)
@click.option("--seed", type=int, help="Of generated inputs and random pruning.  [default: 0]")
@click.option(
    "--benchmark/--no-benchmark",
    default=True,
    help="Decide by timing, or by a table, for another machine.  [default: by timing]",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="File with timings of earlier runs.  [default: in the user's cache folder, or $SPARSE_ONNX_CACHE]",
)
@click.option(
    "--timing-table",
    type=click.Path(path_type=Path),
    help="With --no-benchmark: decide by this file of `analyze --save-table`, made on the target machine.",
)
@click.option("--no-timing-cache", is_flag=True, help="Time everything anew, and keep nothing.")
@click.option(
    "--search-trials",
    type=click.IntRange(1),
    help="With a method, goals and no sparsity: stop after so many.  [default: 16]",
)
@click.option(
    "--search-minutes", type=click.FloatRange(0, min_open=True), help="Stop the search then.  [default: 60]"
)
@click.option("--jobs", type=int, help="Trials of a search at once.  [default: 1]")
@click.option("--ray", help="Address of a Ray cluster for trials, or auto.")
@click.option("--dry-run", is_flag=True, help="Show the plan and the resolved recipe; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder.")
@format_option
@quiet_option
def command(
    model: Path,
    output: Path | None,
    timing_cache: Path | None,
    no_timing_cache: bool,
    output_format: str,
    quiet: bool,
    **options: Any,
) -> int:
    """Compile MODEL (an .onnx file or a Hugging Face folder) into the folder given with -o.

    Without pruning options the zeros that the model already has are used. Goals (--max-drop, --target-speedup,
    --target-size) are gates: exit code 4 says that one was missed; the best so far is written all the same. With a
    --method and goals but no --sparsity, the zeros of every layer are searched for.
    """
    from sparse_onnx.api import optimize

    context = click.get_current_context()
    if output is None and not options["dry_run"]:
        raise click.UsageError("say where to write with -o DIR (or --dry-run)", context)
    if timing_cache is not None and no_timing_cache:
        raise click.UsageError("give --timing-cache or --no-timing-cache, not both", context)
    options["timing_cache"] = timing_cache or not no_timing_cache
    with progress(quiet) as say:
        result = optimize(model, output or Path(), command=context.obj, progress=say, **options)
    show(summary_table(result.report), result.report, output_format, result.exit_code)
    if missed := [gate["text"] for gate in result.report["goal"]["gates"] if gate["met"] is False]:
        click.echo(f"Goal not met: {'; '.join(missed)}. The best so far was written.", err=True)
    if result.folder is not None and (said := _outcome(result.report["summary"])):
        click.echo(said, err=True)
    if result.folder is not None and not quiet:
        click.echo(f"Written to {result.folder} (report.html shows every layer).", err=True)
    return result.exit_code


def _outcome(summary: dict[str, Any]) -> str:
    """What is to be said where the result is not proven faster."""
    if summary["written"] == "original":
        return "No layer is faster in sparse form: the dense model was written."
    if summary["written"] == "pruned":
        return "No layer is faster in sparse form: the pruned model was written, dense (--keep-pruned)."
    if summary["speedup"] is None or summary["speedup_low"] > 1:
        return ""
    from sparse_onnx.compilation.whole_model import speed_sentence

    said = speed_sentence(summary["speedup"], summary["speedup_low"], summary["speedup_high"])
    return f"{said[:1].upper()}{said[1:]}. It was written as compiled."


def summary_table(report: dict[str, Any]) -> str:
    """The closing table: at most 15 lines."""
    summary, layers = report["summary"], report["layers"]
    sparse = [row for row in layers if row["decision"] == "sparse"]
    uncounted = any(row["share"] is None for row in report.get("untouched", ()))
    rows = [["", "before", "after", "change"]]
    if summary["speedup"] is not None:
        interval = f"{summary['speedup']:.2f}x ({summary['speedup_low']:.2f}-{summary['speedup_high']:.2f})"
        rows.append(["latency", format_ms(summary["dense_ms"]), format_ms(summary["optimized_ms"]), interval])
    after = summary["bytes_after"]
    ratio = f"{summary['bytes_before'] / after:.2f}x smaller" if after else "-"
    rows.append(["size", format_bytes(summary["bytes_before"]), format_bytes(after), ratio])
    rows.append(["zeros in linears", "", f"{summary['sparsity']:.1%}", ""])
    rows.append(
        [
            "layers sparse",
            "",
            f"{len(sparse)} of {len(layers)}",
            f"{format_rounded(summary['sparse_flops_fraction'])} of {'counted ' if uncounted else ''}work",
        ]
    )
    checks = report["verification"]
    if checks:
        exact, alone = (
            math.inf if checks[way]["relative_error"] is None else checks[way]["relative_error"]
            for way in ("against_pruned_dense", "without_library")
        )
        rows.append(["error, compiled against pruned dense", "", f"{exact:.1e}", "with library"])
        rows.append(["", "", f"{alone:.1e}", "without"])
        if summary["relative_error"] is not None:
            drift = f"cosine {summary['cosine']:.4f}"
            rows.append(["error, against the original", "", f"{summary['relative_error']:.1e}", drift])
    if (metric := summary.get("metric")) is not None:
        before, after, drop = (
            "inf" if metric[k] is None else f"{metric[k]:.4g}" for k in ("before", "after", "drop")
        )
        rows.append([f"{metric['name']}, {metric['samples']} samples", before, after, f"drop {drop}"])
    from sparse_onnx.compilation.worth_pruning import NO_KERNEL

    reasons = Counter(_short(row["reason"]) for row in layers if row["decision"] == "dense")
    reasons.update(
        _short(place["reason"])
        for place in report["declined"]
        if NO_KERNEL not in place["reason"]  # a lowering says the same
    )
    text = table(rows[1:], rows[0])
    if broken := sum(row["non_finite"] for row in layers):
        text += f"\n{broken} weights are NaN or Inf and were kept"
    if others := other_work(report.get("untouched", ())):
        text += f"\n{others}"
    for reason, count in reasons.most_common(3):
        text += f"\nkept dense: {count} x {reason}"
    from sparse_onnx.report.notes import run_notes

    return "\n".join([text, *run_notes(report)])


def _short(reason: str) -> str:
    """Reasons without their numbers, so that equal ones can be counted."""
    if "below min_speedup" in reason:
        return "not faster"
    return reason.split(": ", 1)[-1] if "zeros: " in reason else reason
