"""``sparse-onnx verify``: an optimized model against its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.errors import VerificationError
from sparse_onnx.tools.console import format_option, input_shape_option, progress, quiet_option, show, table
from sparse_onnx.tools.model_argument import model_file
from sparse_onnx.units import format_number, format_share

if TYPE_CHECKING:
    from sparse_onnx.verification import VerifyResult

__all__ = ["command", "predictions_table", "result_table"]


@click.command(short_help="Compare an optimized model with its original.")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("optimized", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), help=".npz with real inputs; generated ones if absent."
)
@click.option(
    "--max-relative-error", type=float, default=1e-4, show_default=True, help="Largest that passes."
)
@input_shape_option("of generated inputs")
@click.option("--threads", type=click.IntRange(1), help="Threads to run with.  [default: all cores]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of generated inputs.")
@format_option
@quiet_option
def command(
    original: Path,
    optimized: Path,
    output_format: str,
    quiet: bool,
    **options: Any,
) -> int:
    """Run ORIGINAL and OPTIMIZED on the same inputs and compare their outputs.

    Both are .onnx files or output folders of `sparse-onnx optimize`. OPTIMIZED is run with the kernel library
    and without it. Exit code 3 if an output differs by more than --max-relative-error.
    """
    from sparse_onnx.verification import verify

    with progress(quiet) as say:
        result = verify(model_file(original), model_file(optimized), progress=say, **options)
    text = "\n\n".join(filter(None, (result_table(result), predictions_table(result))))
    code = show(text, result.to_dict(), output_format, 0 if result.passed else VerificationError.exit_code)
    if not quiet:
        for line in result.skipped:
            click.echo(f"Not run, as the original refuses it: {line}", err=True)
        if result.passed:
            click.echo(f"Verified on {'; '.join(result.inputs)}.", err=True)
    if not result.passed:
        click.echo(f"Error: {_failure(result)}", err=True)
    return code


def result_table(result: VerifyResult) -> str:
    """One row for each way in which the optimized model was run."""
    rows = [
        [
            name.replace("_", " "),
            format_number(difference.relative_error),
            format_number(difference.max_abs),
            f"{difference.cosine:.6f}",
            format_share(difference.top1_agreement),
            difference.worst_output,
        ]
        for name, difference in result.differences.items()
    ]
    header = [
        "optimized model",
        "relative error",
        "largest difference",
        "cosine",
        "same top-1",
        "worst output",
    ]
    return table(rows, header)


def predictions_table(result: VerifyResult) -> str:
    """One row for each way and each output that holds logits; "" if none does."""
    rows = [
        [
            name.replace("_", " "),
            found.output,
            format_number(found.kl_divergence),
            format_share(found.top1_agreement),
            "-" if found.reference_perplexity is None else f"{found.reference_perplexity:.4g}",
            "-" if found.candidate_perplexity is None else f"{found.candidate_perplexity:.4g}",
        ]
        for name, difference in result.differences.items()
        for found in difference.predictions
    ]
    header = ["optimized model", "logits", "KL divergence", "same top-1", "perplexity before", "after"]
    return table(rows, header) if rows else ""


def _failure(result: VerifyResult) -> str:
    name, worst = max(result.differences.items(), key=lambda item: item[1].relative_error)
    return (
        f"relative error {format_number(worst.relative_error)} at output {worst.worst_output!r}, run "
        f"{name.replace('_', ' ')}; allowed {result.max_relative_error:g}. For a pruned model this is the "
        "compression loss: to check the compiler alone, compare against the pruned dense model; to accept the "
        "loss, raise --max-relative-error."
    )
