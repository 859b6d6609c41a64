"""Text with file names in it, for files and terminals that hold no other text than Unicode."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """``text`` with the bytes of file names that Python could not decode in this locale read as UTF-8, and those that
    are no UTF-8 replaced by U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
