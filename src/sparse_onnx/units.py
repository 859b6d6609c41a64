"""Sizes, times and shares in words, for tables and reports."""

from __future__ import annotations

import math
import re

__all__ = ["format_bytes", "format_error", "format_ms", "format_number", "format_share", "parse_size"]

_FACTORS: dict[str, int] = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


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


def format_error(value: float | None) -> str:
    """A relative error: in percent from 0.1 % on, below that as a power of ten; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.1%}" if value >= 0.001 else format_number(value)


def format_share(value: float | None) -> str:
    """A share in [0, 1] as a percentage; ``-`` for None."""
    return "-" if value is None else f"{value:.1%}"


def format_rounded(share: float | None) -> str:
    """A share in [0, 1] in whole percent, where nothing and everything are exact; ``not known`` for None."""
    if share is None:
        return "not known"
    if 0 < share < 1:
        return "<1%" if share < 0.005 else ">99%" if share >= 0.995 else f"{share:.0%}"
    return f"{share:.0%}"


def parse_size(size: float | str, whole: int) -> int:
    """Bytes: ``size`` is a share of ``whole`` (0.4 or "40%"), or a size with its unit ("120MB", "1.5 GiB").

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]+|%|)", str(size).strip().lower())
    if match is None:
        raise ValueError(f"{size!r} is no size")
    number, unit = float(match[1]), match[2]
    share = number / 100 if unit == "%" else number if not unit else None
    if share is not None and 0 < share <= 1:
        return math.floor(share * whole)
    if share is not None or unit not in _FACTORS or not 1 <= number * _FACTORS[unit] < 1e18:
        raise ValueError(f"{size!r} is no size")
    return math.floor(number * _FACTORS[unit])
