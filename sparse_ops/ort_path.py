"""Paths for ONNX Runtime, which takes text in UTF-8 and nothing else."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["native_path"]


@contextlib.contextmanager
def native_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """``path`` as ONNX Runtime opens it, for as long as it opens it.

    Python's text of a path depends on the locale: without UTF-8 in it, other characters than ASCII are surrogates. The
    bytes decide. Where they are no UTF-8, symbolic links in a temporary folder stand for the file and its neighbours,
    among them its external data, or for the folder.
    """
    if _is_utf8(os.fspath(path)):
        yield os.fsencode(path).decode("utf-8")
        return
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as links:
        yield os.fsencode(_link(Path(os.path.abspath(path)), Path(links))).decode("utf-8")


def _link(path: Path, links: Path) -> Path:
    """``path`` by another name, in the folder ``links``."""
    alias = links / "linked"
    if path.is_dir():
        alias.symlink_to(path, target_is_directory=True)
    elif _is_utf8(path.name):
        alias.symlink_to(path.parent, target_is_directory=True)
        alias /= path.name
    else:
        for entry in filter(_is_utf8, os.listdir(path.parent)):
            (links / entry).symlink_to(path.parent / entry)
        alias = links / f"{links.name}{path.suffix}"
        alias.symlink_to(path)
    return alias


def _is_utf8(name: str) -> bool:
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
