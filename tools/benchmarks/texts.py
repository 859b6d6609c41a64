"""English text of several kinds that needs no network: passages to calibrate on, and others to judge by.

``topics`` every Python has; the others are files of packages of Debian and its relatives.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["KINDS", "available", "passages"]

_FORTUNES, _WORDNET = Path("/usr/share/games/fortunes"), Path("/usr/share/wordnet")
_REFERENCE = Path("/usr/share/debian-reference")


def _topics() -> Iterator[str]:
    """The help topics of Python."""
    from pydoc_data.topics import topics

    yield from (topics[key] for key in sorted(topics))


def _quotations() -> Iterator[str]:
    """All but the pictures made of characters."""
    for path in sorted(_FORTUNES.glob("*")):
        if path.suffix not in (".dat", ".u8") and "art" not in path.name.split("-"):
            yield path.read_text("utf-8", "replace").replace("\n%\n", " ")


def _glosses() -> Iterator[str]:
    """What stands behind the bar of every line but those of the licence."""
    for path in sorted(_WORDNET.glob("data.*")):
        for line in path.read_text("utf-8", "replace").splitlines():
            if not line.startswith("  ") and "|" in line:
                yield line.partition("|")[2].strip()


def _reference() -> Iterator[str]:
    for path in sorted(_REFERENCE.glob("debian-reference.en.txt*")):
        content = path.read_bytes()
        yield (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")


KINDS: dict[str, tuple[Callable[[], Iterator[str]], str]] = {
    "topics": (_topics, ""),
    "quotations": (_quotations, "fortunes"),
    "glosses": (_glosses, "wordnet-base"),
    "reference": (_reference, "debian-reference-en"),
}
"""By name: what gives the text, and the package that it is in."""


def passages(kind: str = "topics", words: int = 90, seed: int = 0) -> list[str]:
    """Passages of so many words each, shuffled. SystemExit where the text is not there, with the package to install."""
    parts, package = KINDS[kind]
    text = " ".join(re.sub(r"\s+", " ", part) for part in parts()).split(" ")
    found = [" ".join(text[i : i + words]) for i in range(0, len(text) - words, words)]
    if not found:
        raise SystemExit(f"no text of the kind {kind}: apt-get install {package}")
    random.Random(seed).shuffle(found)
    return found


def available() -> list[str]:
    """The kinds whose text is on this machine."""
    return [kind for kind, (parts, _) in KINDS.items() if next(parts(), None) is not None]
