"""``sparse-onnx inspect``: what a model holds, and what the compiler can do with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sparse_onnx.tools.console import format_option, table
from sparse_onnx.tools.model_argument import model_file
from sparse_onnx.units import format_bytes, format_share

__all__ = ["command"]

_ROWS, _OPERATORS, _REASONS = 40, 12, 6


@click.command(short_help="Show a model's layers, zeros and sizes, and what can be touched.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help=f"Every weight, not only the {_ROWS} largest.")
@format_option
def command(model: Path, show_all: bool, output_format: str) -> int:
    """Show what MODEL (an .onnx file, or an output folder of `sparse-onnx optimize`) holds.

    Nothing is run, and ONNX Runtime is not needed.
    """
    from sparse_onnx.inspection import inspect_model

    document = inspect_model(model_file(model))
    if output_format == "json":
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return 0
    click.echo("\n\n".join(_sections(document, show_all)))
    return 0


def _sections(document: dict[str, Any], show_all: bool) -> list[str]:
    sections = [_head(document, show_all)]
    if document["weights"]:
        sections.append(_weights(document["weights"], show_all))
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
    operators = [f"{count} {name.removeprefix('ai.onnx::')}" for name, count in document["operators"].items()]
    shown = operators if show_all else operators[:_OPERATORS]
    more = f" and {len(operators) - len(shown)} other kinds" if len(shown) < len(operators) else ""
    lines = [
        ["file", document["file"]],
        ["size", size],
        ["format", f"IR {document['ir_version']}, opset {opsets}"],
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
    largest = sorted(range(len(rows)), key=lambda index: -rows[index]["bytes"])[: None if show_all else _ROWS]
    cells = [
        [
            row["module"] or row["name"],
            row["op_type"],
            " x ".join(str(size) for size in row["shape"]),
            row["dtype"],
            format_share(row["zeros"] / row["size"]),
            format_bytes(row["bytes"]),
            row["state"],
        ]
        for row in (rows[index] for index in sorted(largest))
    ]
    text = table(cells, ["weight", "operator", "shape", "dtype", "zeros", "stored", "state"])
    hidden = len(rows) - len(cells)
    return text + (f"\n{hidden} more weights are not shown; --all shows them" if hidden else "")


def _total(document: dict[str, Any]) -> str:
    total = document["total"]
    text = (
        f"{total['weights']:,} weights in {len(document['weights'])} tensors, {format_share(total['sparsity'])} zeros; "
        f"{total['can_be_sparse']} can be sparse, {total['sparse']} are"
    )
    if total["nan"] or total["inf"]:
        names = [row["name"] for row in document["weights"] if row["nan"] or row["inf"]]
        text += f"\nWarning: {total['nan']} NaN and {total['inf']} Inf values, in {', '.join(names[:5])}"
    return text


def _left_alone(document: dict[str, Any], show_all: bool) -> str:
    reasons = Counter(row["reason"] for row in document["weights"] if row["state"] == "stays")
    reasons.update(place["reason"] for place in document["declined"])
    shown = reasons.most_common(None if show_all else _REASONS)
    lines = [f"{count} left as they are: {reason}" for reason, count in shown]
    if len(shown) < len(reasons):
        lines.append(f"and {len(reasons) - len(shown)} other reasons; --all shows them")
    return "\n".join(lines)
