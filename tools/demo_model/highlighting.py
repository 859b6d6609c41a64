"""Python source with the class of every byte: the data that the demo's model learns from and is judged by."""

from __future__ import annotations

import io
import keyword
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["CLASSES", "WINDOW", "is_held_out", "label", "standard_library", "windows"]

CLASSES = (
    "space",
    "keyword",
    "name",
    "called name",
    "defined name",
    "attribute",
    "argument name",
    "number",
    "string",
    "docstring",
    "comment",
    "operator",
)
# From Python 3.12 on, an f-string is a token for each literal part.
_STRINGS = {tokenize.STRING} | {
    getattr(tokenize, name)
    for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    if hasattr(tokenize, name)
}
WINDOW = 128
"""Bytes that the model sees at once."""

_INDEX = {name: index for index, name in enumerate(CLASSES)}
_LAYOUT = (
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENCODING,
)


def standard_library() -> Iterator[tuple[str, bytes]]:
    """(name, source) of every ASCII module of the standard library in a fixed order, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not left_out & set(name.parts):
            source = path.read_bytes()
            if source.isascii():
                yield name.as_posix(), source


def is_held_out(name: str) -> bool:
    """Whether a module is kept for the evaluation: one in twelve, by its name alone."""
    return zlib.crc32(name.encode()) % 12 == 0


def label(source: bytes) -> np.ndarray:
    """The class of every byte of ASCII Python source, uint8. Raises SyntaxError or TokenError for anything else."""
    starts = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    classes = np.zeros(len(source), np.uint8)
    tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    depth = 0
    solid: list[tokenize.TokenInfo] = []  # the tokens so far that are no layout
    for index, token in enumerate(tokens):
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        after = tokens[index + 1].string if index + 1 < len(tokens) else ""
        name = _class_of(
            token, solid[-1] if solid else None, tokens[index - 1] if index else None, after, depth
        )
        if name is not None:
            begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
            classes[begin:end] = _INDEX[name]
        if token.type not in _LAYOUT:
            solid.append(token)
    return classes


def _class_of(
    token: tokenize.TokenInfo,
    before: tokenize.TokenInfo | None,
    neighbour: tokenize.TokenInfo | None,
    after: str,
    depth: int,
) -> str | None:
    """``before`` is the last token that is no layout, ``neighbour`` the last of any kind."""
    if token.type == tokenize.COMMENT:
        return "comment"
    if token.type == tokenize.NUMBER:
        return "number"
    if token.type == tokenize.OP:
        return "operator"
    if token.type in _STRINGS:
        opens = neighbour is None or neighbour.type in _LAYOUT
        return "docstring" if opens and depth == 0 else "string"
    if token.type != tokenize.NAME:
        return None
    if keyword.iskeyword(token.string):
        return "keyword"
    if before is not None and before.string in ("def", "class"):
        return "defined name"
    if after == "(":
        return "called name"
    if before is not None and before.string == ".":
        return "attribute"
    if depth and after == "=":
        return "argument name"
    return "name"


def windows(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Text and classes [windows, WINDOW] uint8 of the files that are (not) held out, without overlap."""
    texts, classes = [], []
    for name, source in standard_library():
        if is_held_out(name) == held_out and len(source) >= WINDOW:
            try:
                labels = label(source)
            except (SyntaxError, tokenize.TokenError):
                continue
            length = len(source) // WINDOW * WINDOW
            texts.append(np.frombuffer(source, np.uint8)[:length].reshape(-1, WINDOW))
            classes.append(labels[:length].reshape(-1, WINDOW))
    return np.concatenate(texts), np.concatenate(classes)
