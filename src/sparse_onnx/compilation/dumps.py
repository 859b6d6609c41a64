"""The model as it is after a pass, written beside the result: for whoever looks for the pass that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.options import unknown
from sparse_onnx.passes.registry import PASSES

__all__ = ["Dumps", "check_dumps"]


def check_dumps(names: Iterable[str]) -> None:
    """Raise UsageError, with the nearest one, unless these are names of passes."""
    known = [cls.name for cls in PASSES]
    for name in names:
        if name not in known:
            raise UsageError(f"dump_after: {unknown('pass', name, known)}")


class Dumps:
    """Called with the name of every pass and the model after it; writes ``after-<pass>.onnx``, with its data file, into
    ``folder`` for the passes ``names``. Where one runs several times, the last time counts."""

    def __init__(self, names: Iterable[str], folder: Path) -> None:
        self._names, self._folder = tuple(dict.fromkeys(names)), folder
        self._written: set[str] = set()

    def __call__(self, name: str, model: ir.Model) -> None:
        if name in self._names:
            model_io.save_model(model, self._folder, name=f"after-{name}")
            self._written.add(name)

    def note_missing(self, say: Callable[[str], None]) -> None:
        """Say which passes did not run."""
        for name in self._names:
            if name not in self._written:
                say(f"note: {name} did not run: there is no model after it")
