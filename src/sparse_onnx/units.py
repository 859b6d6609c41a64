"""Sizes, times and shares in words, for tables and reports."""

from __future__ import annotations

__all__ = ["format_bytes", "format_ms", "format_number", "format_share"]


def format_bytes(count: float | None) -> str:
    """``count`` bytes in powers of 1000 with one decimal; ``-`` for None."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def format_ms(milliseconds: float | None) -> str:
    """A time with about three significant digits; ``-`` for None."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{milliseconds:.3f} ms"


def format_number(value: float | None) -> str:
    """A small quantity such as an error, with two digits; ``-`` for None."""
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def format_share(value: float | None) -> str:
    """A share in [0, 1] as a percentage; ``-`` for None."""
    return "-" if value is None else f"{value:.1%}"
