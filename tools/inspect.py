"""``sparse-onnx inspect``: what a model holds, and what the compiler can do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sparse_onnx.tools.console import format_option, other_work, progress, quiet_option, show, table
from sparse_onnx.tools.model_argument import model_file
from sparse_onnx.units import format_bytes, format_share

__all__ = ["command"]

_ROWS, _OPERATORS, _REASONS = 10, 12, 3


@click.command(short_help="Show a model's layers, zeros and sizes, and what can be touched.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help=f"Every weight, not only the {_ROWS} largest.")
@click.option(
    "--metrics", is_flag=True, help="How the zeros lie, and the size in sparse form; always there in json."
)
@format_option
@quiet_option
def command(model: Path, show_all: bool, metrics: bool, output_format: str, quiet: bool) -> int:
    """Show what MODEL (an .onnx file, or an output folder of `sparse-onnx optimize`) holds.

    Nothing is run, and ONNX Runtime is not needed.
    """
    from sparse_onnx.analysis.inspection import inspect_model

    with progress(quiet) as say:
        document = inspect_model(model_file(model), metrics=metrics or output_format == "json", progress=say)
    return show("\n\n".join(_sections(document, show_all)), document, output_format)


def _sections(document: dict[str, Any], show_all: bool) -> list[str]:
    sections = [_head(document, show_all)]
    if document["weights"]:
        sections.append(_weights(document["weights"], show_all))
    if document["total"].get("metrics"):
        sections.append(_metrics(document, show_all))
    sections.append(_total(document))
    if left := _left_alone(document, show_all):
        sections.append(left)
    return sections


def _head(document: dict[str, Any], show_all: bool) -> str:
    size = (
        f"{format_bytes(document['file_bytes'])} on disk, {format_bytes(document['weight_bytes'])} of weights"
    )
    if document["large"]:
        size += " (more than 2 GB: needs its external data file)"
    opsets = ", ".join(f"{domain} {version}" for domain, version in document["opsets"].items())
    read_as = f", read as {document['read_as_opset']}" if document["read_as_opset"] else ""
    operators = [f"{count} {name.removeprefix('ai.onnx::')}" for name, count in document["operators"].items()]
    shown = operators if show_all else operators[:_OPERATORS]
    more = f" and {len(operators) - len(shown)} other kinds" if len(shown) < len(operators) else ""
    lines = [
        ["file", document["file"]],
        ["size", size],
        ["format", f"IR {document['ir_version']}, opset {opsets}{read_as}"],
        *([["producer", document["producer"]]] if document["producer"] else []),
        *(["input", text] for text in document["inputs"]),
        *(["output", text] for text in document["outputs"]),
        ["operators", ", ".join(shown) + more if operators else "none"],
        *(["custom", _custom(row)] for row in document["custom_operators"]),
    ]
    return "\n".join(f"{label:<10} {text}" for label, text in lines)


def _custom(row: dict[str, Any]) -> str:
    body = "; runs without it, too" if row["known"] and row["body"] else ""
    return f"{row['count']} {row['domain']}::{row['op_type']}, run by {row['run_by']}{body}"


def _weights(rows: Sequence[dict[str, Any]], show_all: bool) -> str:
    shown = rows if show_all else _largest(rows)
    cells = [
        [
            row["module"] or row["name"],
            row["op_type"],
            " x ".join(str(size) for size in row["shape"]),
            row["dtype"],
            format_share(row["sparsity"]),
            format_bytes(row["bytes"]),
            row["state"],
        ]
        for row in shown
    ]
    text = table(cells, ["weight", "operator", "shape", "dtype", "zeros", "stored", "state"])
    return text + _hidden(rows, shown)


def _largest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the most bytes, in their order."""
    chosen = sorted(range(len(rows)), key=lambda index: -rows[index]["bytes"])[:_ROWS]
    return [rows[index] for index in sorted(chosen)]


def _hidden(rows: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> str:
    hidden = len(rows) - len(shown)
    return f"\n{hidden} more weights are not shown; --all shows them" if hidden else ""


def _metrics(document: dict[str, Any], show_all: bool) -> str:
    rows = [row for row in document["weights"] if row["metrics"]]
    shown = rows if show_all else _largest(rows)
    named = [(row["module"] or row["name"], row["metrics"]) for row in shown]
    blocks = list(document["total"]["metrics"]["blocks"])
    cells = [
        [
            name,
            format_share(metrics["sparsity"]),
            f"{metrics['row_variation']:.2f}",
            f"{metrics['clustering_index']:.2f}",
            *(format_share(metrics["blocks"][size]["occupancy"]) for size in blocks),
            format_bytes(metrics["dense_bytes"]),
            format_bytes(metrics["sparse_bytes"]),
            f"{metrics['bits_per_weight']:.1f}",
        ]
        for name, metrics in (*named, ("all of them", document["total"]["metrics"]))
    ]
    occupied = [f"{size} in use" for size in blocks]
    header = ["zeros of", "share", "variation", "clustering", *occupied, "dense", "sparse", "bits/weight"]
    return table(cells, header) + _hidden(rows, shown)


def _total(document: dict[str, Any]) -> str:
    total = document["total"]
    text = (
        f"{total['weights']:,} weights in {len(document['weights'])} tensors, {format_share(total['sparsity'])} zeros; "
        f"{total['can_be_sparse']} can be sparse, {total['sparse']} are"
    )
    if rows := [row for row in document["weights"] if row["state"] == "quantized"]:
        from sparse_onnx.model.quantized_weights import describe

        zeros = sum(row["zeros"] for row in rows) / sum(row["size"] for row in rows)
        text += f"\n{describe([row['bits'] for row in rows], zeros)}"
    if document["not_counted"]:
        others = Counter(row["dtype"] for row in document["not_counted"])
        size = format_bytes(sum(row["bytes"] for row in document["not_counted"]))
        text += (
            f"\nnot counted, for zero has no fixed meaning in them: {sum(others.values())} tensors "
            f"({', '.join(others)}) of {size}"
        )
    if total["nan"] or total["inf"]:
        names = [row["name"] for row in document["weights"] if row["nan"] or row["inf"]]
        text += f"\nWarning: {total['nan']} NaN and {total['inf']} Inf values, in {', '.join(names[:5])}"
    return text


def _left_alone(document: dict[str, Any], show_all: bool) -> str:
    reasons = Counter(row["reason"] for row in document["weights"] if row["state"] in ("stays", "quantized"))
    reasons.update(place["reason"] for place in document["declined"])
    shown = reasons.most_common(None if show_all else _REASONS)
    lines = [f"{count} left as they are: {reason}" for reason, count in shown]
    if others := other_work(document["untouched"]):
        lines.insert(0, others)
    if len(shown) < len(reasons):
        lines.append(f"and {len(reasons) - len(shown)} other reasons; --all shows them")
    return "\n".join(lines)
