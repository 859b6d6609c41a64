"""``sparse-onnx verify``: an optimized model against its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.compilation.groups import Calibration, Goal, Target
from sparse_onnx.errors import VerificationError
from sparse_onnx.tools.console import format_option, progress, quiet_option, show, table
from sparse_onnx.tools.model_argument import model_file
from sparse_onnx.tools.options import option
from sparse_onnx.units import format_number, format_share
from sparse_onnx.verification.tolerance import MAX_COMPILER_ERROR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparse_onnx.verification.verify import VerifyResult

__all__ = ["command", "layers_table", "metric_table", "predictions_table", "result_table"]

_SHOWN_OUTPUTS = 4  # of a model with more, the worst one is shown
_SHOWN_LAYERS = 8


@click.command(short_help="Compare an optimized model with its original.")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("optimized", type=click.Path(path_type=Path))
@click.option(
    "--data",
    help="Real inputs: an .npz, a folder of .npz, module:function, or a text file (with --tokenizer); generated ones "
    "if absent.",
)
@option(Calibration, "tokenizer")
@click.option("--num-samples", type=click.IntRange(1), help="Use so many of the data.  [default: all]")
@option(Target, "shapes", "NAME:DIM,DIM,.. of generated inputs; repeatable, also for several shapes.")
@option(Target, "input_values")
@option(Goal, "max_compiler_error", default=MAX_COMPILER_ERROR)
@click.option(
    "--max-relative-error",
    type=float,
    help="Relative error against the original, at most.  [default: 0.0001 if no other loss is judged]",
)
@click.option("--max-abs-error", type=float, help="Largest difference from the original, at most.")
@click.option("--min-cosine", type=float, help="Mean cosine to the original, at least.")
@click.option("--min-top1-agreement", type=float, help="Share of rows with the original's top-1, at least.")
@click.option("--max-kl", type=float, help="KL divergence from the original's predictions, at most (nats).")
@option(Goal, "metric")
@option(Goal, "labels", "The array of the data with the labels of the metric.")
@option(Goal, "metric_output")
@option(Goal, "max_drop", "What the metric may lose; without --metric, 1 - cosine.")
@click.option(
    "--layers/--no-layers",
    default=None,
    help="Find the layer where the error comes from.  [default: if a threshold is missed]",
)
@option(Target, "threads", "Threads to run with.  [default: all cores]")
@option(Calibration, "seed", "Of generated inputs.", default=0)
@format_option
@quiet_option
def command(
    original: Path,
    optimized: Path,
    output_format: str,
    quiet: bool,
    **given: Any,
) -> int:
    """Run ORIGINAL and OPTIMIZED on the same inputs and compare their outputs.

    Both are .onnx files or output folders of `sparse-onnx optimize`. OPTIMIZED is run with the kernel library
    and without it. Two differences are judged apart: against the pruned dense model that OPTIMIZED stands for (the
    compiler's error) and against ORIGINAL (the loss). Exit code 3 if a threshold is missed.
    """
    from sparse_onnx.verification.verify import verify

    with progress(quiet) as say:
        result = verify(model_file(original), model_file(optimized), progress=say, **given)
    tables = (result_table, predictions_table, metric_table, layers_table)
    text = "\n\n".join(filter(None, (make(result) for make in tables)))
    code = show(text, result.to_dict(), output_format, 0 if result.passed else VerificationError.exit_code)
    if not quiet:
        for line in result.skipped:
            click.echo(f"Not run, as the original refuses it: {line}", err=True)
        if result.passed:
            click.echo(f"Verified on {'; '.join(result.inputs)}.", err=True)
    if not result.passed:
        click.echo(f"Error: {' '.join(_failure(result))}", err=True)
    return code


def result_table(result: VerifyResult) -> str:
    """One row for each model it is compared with, each way in which the optimized model was run, and each output."""
    rows = []
    for reference, differences in (
        ("pruned dense", result.against_pruned_dense),
        ("original", result.against_original),
    ):
        for way, difference in differences.items():
            outputs = difference.outputs
            if len(outputs) > _SHOWN_OUTPUTS:
                outputs = tuple(x for x in outputs if x.worst_output == difference.worst_output)
            rows += [
                [
                    reference,
                    way.replace("_", " "),
                    format_number(found.relative_error),
                    format_number(found.max_abs),
                    f"{found.cosine:.6f}",
                    format_share(found.top1_agreement),
                    found.worst_output,
                ]
                for found in outputs
            ]
    header = [
        "against",
        "run",
        "relative error",
        "largest difference",
        "cosine",
        "same top-1",
        "output",
    ]
    return table(rows, header)


def predictions_table(result: VerifyResult) -> str:
    """One row for each way and each output that holds logits, against the original; "" if none does."""
    rows = [
        [
            way.replace("_", " "),
            found.output,
            format_number(found.kl_divergence),
            format_share(found.top1_agreement),
            "-" if found.reference_perplexity is None else f"{found.reference_perplexity:.4g}",
            "-" if found.candidate_perplexity is None else f"{found.candidate_perplexity:.4g}",
        ]
        for way, difference in result.against_original.items()
        for found in difference.predictions
    ]
    header = ["optimized model", "logits", "KL divergence", "same top-1", "perplexity before", "after"]
    return table(rows, header) if rows else ""


def metric_table(result: VerifyResult) -> str:
    """The metric before and after; "" without one."""
    if (found := result.metric) is None:
        return ""
    values = [f"{found.before:.5g}", f"{found.after:.5g}", f"{found.drop:.4g}", str(found.samples)]
    return table([[found.name, *values]], ["metric", "before", "after", "drop", "samples"])


def layers_table(result: VerifyResult) -> str:
    """The layers with the largest errors of their own, in the order of the graph; "" if none were compared."""
    if result.trace is None or not result.trace.layers:
        return ""
    layers, jump = result.trace.layers, result.trace.jump
    largest = sorted(layers, key=lambda layer: -layer.own_error)[:_SHOWN_LAYERS]
    rows = [
        [
            layer.describe() + (" <- the first above the threshold" if layer is jump else ""),
            format_number(layer.own_error),
            format_number(layer.relative_error),
        ]
        for layer in layers
        if layer in largest or layer is jump
    ]
    return table(rows, [f"layer, against the {result.trace.reference}", "own error", "with all before"])


def _failure(result: VerifyResult) -> Iterator[str]:
    """What was missed, what that means, and where it comes from."""
    misses = result.misses
    yield "; ".join(map(str, misses)) + "."
    wrong = any(miss.threshold == "max_compiler_error" for miss in misses)
    if wrong:
        yield "The result is not what its own weights say, whatever was pruned: a fault of the compiler or the file."
    elif result.against_pruned_dense:
        exact = max(found.relative_error for found in result.against_pruned_dense.values())
        yield (
            f"The compiler is exact ({format_number(exact)} against the pruned dense model): this is the compression "
            "loss."
        )
        if [miss.threshold for miss in misses] == ["max_relative_error"]:
            yield "To accept it, say how much: --max-relative-error, --min-cosine, --max-drop, ..."
    if result.trace is not None and (layer := result.trace.jump if wrong else result.trace.largest):
        what = "It begins at" if wrong else "The largest error of one layer is that of"
        yield f"{what} {layer.describe()}: {format_number(layer.own_error)} on its own."
