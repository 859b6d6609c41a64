"""What the commands share: options, progress on stderr, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

__all__ = ["format_option", "progress", "quiet_option", "table"]

_CLEAR = "\r\x1b[K"

format_option = click.option(
    "--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="json prints one document on stdout; everything else goes to stderr.",
)  # fmt: skip
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows one line of progress: in place on a terminal, line by line elsewhere. The live line
    is gone at the end, also after an error."""
    live = sys.stderr.isatty()
    if quiet:
        yield lambda _line: None
        return
    try:
        yield lambda line: click.echo(f"{_CLEAR}{line[:110]}" if live else line, err=True, nl=not live)
    finally:
        if live:
            click.echo(_CLEAR, err=True, nl=False)


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
