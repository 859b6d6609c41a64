"""``sparse-onnx report``: the page of a run from its report.json, or two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sparse_onnx.tools.console import format_option, quiet_option, show, table

__all__ = ["command", "comparison_text"]


@click.command(short_help="Rebuild the page of a run, or compare two runs.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The page to write.  [default: report.html in RUN]",
)
@format_option
@quiet_option
def command(run: Path, other: Path | None, output: Path | None, output_format: str, quiet: bool) -> int:
    """Write the page for RUN again, from its report.json alone: the model is not touched.

    With OTHER, compare OTHER (B) against RUN (A) instead: speed, size, accuracy, decisions, recipe and machine; a
    page of it is written if -o says where. RUN and OTHER are output folders of `sparse-onnx optimize`, or a
    report.json.
    """
    from sparse_onnx.model.storage import write_whole
    from sparse_onnx.report.html import render_comparison, render_html
    from sparse_onnx.report.schema import read_report
    from sparse_onnx.report.view.verdict import verdict

    report = read_report(run)
    document: Mapping[str, Any]
    target: Path | None
    if other is None:
        target = output or (run if run.is_dir() else run.parent) / "report.html"
        found = verdict(report)
        document, page = report, render_html(report)
        text = "\n".join((f"{found.word}: {found.sentence}", *found.notes))
        warnings: list[str] = []
    else:
        from sparse_onnx.report.comparison import compare_reports

        document = compare_reports(report, read_report(other))
        target, page = output, render_comparison(document)
        text, warnings = comparison_text(document, run, other), document["warnings"]
    if target is not None:
        with write_whole(target) as file:
            file.write(page.encode("utf-8"))
    code = show(text, document, output_format)
    if not quiet:
        for line in warnings:
            click.echo(f"Warning: {line}", err=True)
        if target is not None:
            click.echo(f"Written to {target}.", err=True)
    return code


def comparison_text(comparison: dict[str, Any], run: Path, other: Path) -> str:
    """What differs, in at most 15 lines."""
    from sparse_onnx.report.comparison import comparison_rows, comparison_verdict

    found = comparison_verdict(comparison)
    decisions = [
        f"{row['module'] or row['name']}: {row['a']} -> {row['b']}{' (a close call)' if row['close'] else ''}"
        for row in comparison["decisions"]
    ]
    recipe = [f"{row['key']}: {_plain(row['a'])} -> {_plain(row['b'])}" for row in comparison["recipe"]]
    return "\n".join(
        [
            f"{found.word}. {found.sentence}",
            table(
                comparison_rows(comparison), ["", f"A: {_short(run)}", f"B: {_short(other)}", "B against A"]
            ),
            *_some("layers that ship otherwise", decisions),
            *_some("other values in the recipe", recipe),
        ]
    )


def _some(what: str, lines: list[str]) -> list[str]:
    """One line: how many differences there are, and the first."""
    if not lines:
        return []
    return [f"{len(lines)} {what}{': ' if len(lines) == 1 else ', first '}{lines[0]}"]


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)


def _short(path: Path) -> str:
    name = path.name if path.is_dir() else path.parent.name
    return f"{'...' if len(name) > 20 else ''}{name[-20:]}" or str(path)
