"""What the commands show: progress on stderr, tables, sizes and times in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import click

__all__ = ["format_bytes", "format_ms", "format_option", "progress_line", "quiet_option", "table"]

format_option = click.option(
    "--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="json prints one document on stdout; everything else goes to stderr.",
)  # fmt: skip
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")


def progress_line(quiet: bool) -> Callable[[str], None]:
    """A function that shows one line of progress: in place on a terminal, line by line elsewhere."""
    if quiet:
        return lambda _line: None
    if sys.stderr.isatty():
        return lambda line: click.echo(f"\r\x1b[K{line[:110]}", err=True, nl=False)
    return lambda line: click.echo(line, err=True)


def end_progress(quiet: bool) -> None:
    """Leave the terminal's live line."""
    if not quiet and sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


def format_bytes(count: float | None) -> str:
    """A size in words; "-" if it is not known."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def format_ms(milliseconds: float | None) -> str:
    """A time in words; "-" if it is not known."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{milliseconds:.3f} ms"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    every = [list(header)] if header else []
    every += [list(row) for row in rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))] if every else []
    lines = []
    for row in every:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
