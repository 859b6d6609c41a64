"""What every run of a model needs of its surroundings, as one value that goes from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

__all__ = ["Workbench"]


def _silent(_line: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Workbench:
    """Where models are run and how.

    Attributes:
        threads: Intra-op threads of the sessions, 1 or more.
        work: Folder for scratch files.
        budget: Bytes of weights that one session may hold; None: as many as
            :func:`sparse_onnx.running.runtime.session_budget` says of the model that is run.
        progress: Called with one line of text now and then.
    """

    threads: int
    work: Path
    budget: int | None = None
    progress: Callable[[str], None] = _silent

    def quietly(self) -> Workbench:
        """The same, where nobody is told of progress."""
        return dataclasses.replace(self, progress=_silent)
