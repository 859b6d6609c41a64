"""What the commands share: options, progress on stderr, and results on stdout."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

from sparse_onnx.printable import printable
from sparse_onnx.tools.live_line import LiveLine, display_width
from sparse_onnx.units import format_rounded

__all__ = [
    "format_option",
    "other_work",
    "progress",
    "quiet_option",
    "show",
    "table",
]

_WIDTH = 60  # characters of operators in one line

format_option = click.option(
    "--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="json prints one document on stdout; everything else goes to stderr.",
)  # fmt: skip
quiet_option = click.option("--quiet", is_flag=True, help="Nothing but errors on stderr.")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows one line of progress on stderr, see :class:`LiveLine`; nothing if ``quiet``.

    Inside, stdout is not for the work: what libraries, user code and child processes print goes to stderr, or nowhere
    if ``quiet``, so that stdout holds the result alone.
    """
    with contextlib.ExitStack() as stack:
        if quiet:
            sink = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(_stdout_to(sink.fileno()))
            stack.enter_context(contextlib.redirect_stdout(sink))
            yield lambda _line: None
        else:
            stack.enter_context(_stdout_to(2))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield stack.enter_context(LiveLine())


@contextlib.contextmanager
def _stdout_to(descriptor: int) -> Iterator[None]:
    """File descriptor 1, which child processes and native code write to, leads to ``descriptor``."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing to keep clean
        yield
        return
    try:
        os.dup2(descriptor, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def show(text: str, document: Mapping[str, Any], output_format: str, exit_code: int = 0) -> int:
    """Write a command's result to stdout, ``text`` or ``document`` with the exit code; returns the exit code."""
    if output_format == "json":
        whole = {**document, "exit_code": exit_code}
        text = json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False)
        click.echo(json.dumps(json.loads(printable(text)), indent=2))
    else:
        click.echo(text)
    return exit_code


def other_work(untouched: Sequence[Mapping[str, Any]]) -> str:
    """One line about the operators that no sparse kernel takes, as ``untouched`` of a report has them: with their
    shares of all work, where these are known. Empty if there is none."""
    shares: dict[str, float | None] = {}
    for row in untouched:
        before = shares.get(row["op_type"], 0.0)
        shares[row["op_type"]] = None if before is None or row["share"] is None else before + row["share"]
    ordered = sorted(shares.items(), key=lambda item: (item[1] is None, -(item[1] or 0)))
    named = [op_type if share is None else f"{op_type} {format_rounded(share)}" for op_type, share in ordered]
    shown = list(
        itertools.takewhile(lambda text: len(text) <= _WIDTH, itertools.accumulate(named, "{}, {}".format))
    )
    if not shown:
        return ""
    more = f" and {len(named) - len(shown)} other operators" if len(shown) < len(named) else ""
    return f"no sparse kernel for (share of work): {shown[-1]}{more}"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    every = [list(header)] if header else []
    every += [list(row) for row in rows]
    widths = [max(display_width(row[i]) for row in every) for i in range(len(every[0]))] if every else []
    lines = []
    for row in every:
        padding = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + padding[0], *(pad + cell for pad, cell in zip(padding[1:], row[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
