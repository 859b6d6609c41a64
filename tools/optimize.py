"""``sparse-onnx optimize``: the main job."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sparse_onnx.compilation.groups import Calibration, Goal, Prune, Quantize, Run, Target
from sparse_onnx.document import SPARSE_FORMS
from sparse_onnx.search.limits import Limits
from sparse_onnx.tools.console import format_option, other_work, progress, quiet_option, show, table
from sparse_onnx.tools.options import options
from sparse_onnx.units import format_bytes, format_ms, format_rounded

__all__ = ["command", "summary_table", "token_rows"]


@click.command(short_help="Compile a model into a smaller, faster, verified one.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write (required unless --dry-run)."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML recipe; the other options override it.")
@options(Prune, "method", "sparsity", "mask_structure", "scope", "theta", "gradients", "targets", "ignore")
@options(Quantize, "bits", "group_size")
@options(Target, "precision")
@options(Calibration, "data", "tokenizer", "num_calibration_samples", "batch_size")
@options(Prune, "calibration", "allocation", "bias_correction", "dampening_frac")
@options(Calibration, "statistics", "checkpoint")
@options(Target, "shapes", "input_values", "fixed_inputs", "weights", "prompt_tokens", "new_tokens")
@options(Target, "threads")
@options(Goal, "min_speedup", "keep_pruned", "max_compiler_error")
@options(Goal, "metric", "metric_data", "labels", "metric_output")
@options(Goal, "max_drop", "target_speedup", "target_size")
@options(Calibration, "seed")
@options(Run, "settings", "benchmark", "timing_cache", "timing_table")
@click.option("--no-timing-cache", is_flag=True, help="Time everything anew, and keep nothing.")
@options(Limits, "trials", "minutes", "jobs", "ray")
@options(Run, "bundle", "dump_after", "dry_run", "overwrite")
@format_option
@quiet_option
def command(
    model: Path,
    output: Path | None,
    timing_cache: Path | None,
    no_timing_cache: bool,
    output_format: str,
    quiet: bool,
    **given: Any,
) -> int:
    """Compile MODEL (an .onnx file or a Hugging Face folder) into the folder given with -o.

    Without pruning options the zeros that the model already has are used. Goals (--max-drop, --target-speedup,
    --target-size) are gates: exit code 4 says that one was missed; the best so far is written all the same. With goals
    the zeros of every layer are searched for where there is a --method and no --sparsity, and its bits where there is a
    --precision (auto, int8 or int4) and no --bits.
    """
    from sparse_onnx.api import optimize

    context = click.get_current_context()
    if output is None and not given["dry_run"]:
        raise click.UsageError("say where to write with -o DIR (or --dry-run)", context)
    if timing_cache is not None and no_timing_cache:
        raise click.UsageError("give --timing-cache or --no-timing-cache, not both", context)
    given["timing_cache"] = timing_cache or not no_timing_cache
    with progress(quiet) as say:
        result = optimize(model, output or Path(), command=context.obj, progress=say, **given)
    show(summary_table(result.report), result.report, output_format, result.exit_code)
    if missed := [gate["text"] for gate in result.report["goal"]["gates"] if gate["met"] is False]:
        click.echo(f"Goal not met: {'; '.join(missed)}. The best so far was written.", err=True)
    if result.folder is not None and (said := _outcome(result.report["summary"])):
        click.echo(said, err=True)
    if result.folder is not None and not quiet:
        click.echo(f"Written to {result.folder} (report.html shows every layer).", err=True)
    return result.exit_code


def _outcome(summary: Mapping[str, Any]) -> str:
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


def summary_table(report: Mapping[str, Any]) -> str:
    """The closing table: at most 15 lines."""
    summary, layers = report["summary"], report["layers"]
    sparse = [row for row in layers if row["decision"] in SPARSE_FORMS]
    others = Counter(row["decision"] for row in layers if row["decision"] not in ("dense", "sparse"))
    uncounted = any(row["share"] is None for row in report.get("untouched", ()))
    rows = [["", "before", "after", "change"]]
    if summary["speedup"] is not None:
        interval = f"{summary['speedup']:.2f}x ({summary['speedup_low']:.2f}-{summary['speedup_high']:.2f})"
        rows.append(["latency", format_ms(summary["dense_ms"]), format_ms(summary["optimized_ms"]), interval])
    rows += token_rows(report.get("targets", ()))
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
    rows += [[f"layers in {form}", "", f"{count} of {len(layers)}", ""] for form, count in others.items()]
    checks = report["verification"]
    if checks:
        exact, alone = (
            math.inf if checks[way]["relative_error"] is None else checks[way]["relative_error"]
            for way in ("against_pruned_dense", "without_library")
        )
        rows.append(["error, compiled against pruned dense", "", f"{exact:.1e}", "with library"])
        rows.append(["", "", f"{alone:.1e}", "without"])
        if (rounded := checks.get("rounded_activations")) is not None and rounded[
            "relative_error"
        ] is not None:
            rows.append(
                [
                    "of activations in 8 bits",
                    "",
                    f"{rounded['relative_error']:.1e}",
                    "no fault of the compiler",
                ]
            )
        if summary["relative_error"] is not None:
            drift = f"cosine {summary['cosine']:.4f}"
            rows.append(["error, against the original", "", f"{summary['relative_error']:.1e}", drift])
    if (metric := summary.get("metric")) is not None:
        before, after, drop = (
            "inf" if metric[k] is None else f"{metric[k]:.4g}" for k in ("before", "after", "drop")
        )
        rows.append([f"{metric['name']}, {metric['samples']} samples", before, after, f"drop {drop}"])
    from sparse_onnx.compilation.worth_pruning import NO_KERNEL, NO_USE
    from sparse_onnx.passes.clean.fold_weights import STAYS_QUANTIZED

    reasons = Counter(_short(row["reason"]) for row in layers if row["decision"] == "dense")
    reasons.update(
        _short(place["reason"])
        for place in report["declined"]
        if NO_KERNEL not in place["reason"]  # a lowering says the same
        and NO_USE not in place["reason"]  # nor is it dense
        and place["reason"] != STAYS_QUANTIZED  # which is no reason to stay dense
    )
    useless = sum(NO_USE in place["reason"] for place in report["declined"])
    text = table(rows[1:], rows[0])
    if broken := sum(row["non_finite"] for row in layers):
        text += f"\n{broken} weights are NaN or Inf and were kept"
    if work := other_work(report.get("untouched", ())):
        text += f"\n{work}"
    for reason, count in reasons.most_common(3):
        text += f"\nkept dense: {count} x {reason}"
    if useless:
        text += f"\nnot pruned: {useless} x faster in a form that makes no use of zeros"
    from sparse_onnx.report.notes import run_notes

    return "\n".join([text, *run_notes(report)])


def token_rows(targets: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a decoder: what is waited for the first token, and how many follow in a second."""
    rows = []
    for target in targets:
        if target.get("phase") is None or target["speedup"] is None:
            continue
        interval = f"{target['speedup']:.2f}x ({target['speedup_low']:.2f}-{target['speedup_high']:.2f})"
        if target["phase"] == "prefill":
            what = f"first token, {target['tokens']} of prompt"
            cells = [format_ms(target[key]) for key in ("dense_ms", "optimized_ms")]
        else:
            what = "tokens a second, decode"
            keys = ("dense_tokens_per_second", "optimized_tokens_per_second")
            cells = [f"{target[key]:.1f}" for key in keys]
        rows.append([what, *cells, interval])
    return rows


def _short(reason: str) -> str:
    """Reasons without their numbers, so that equal ones can be counted."""
    if "below min_speedup" in reason:
        return "not faster"
    return reason.split(": ", 1)[-1] if "zeros: " in reason else reason
