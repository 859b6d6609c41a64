"""What a decoder is asked for: a module of its own, since options know it before anything else is imported."""

from __future__ import annotations

import dataclasses

__all__ = ["Request"]


@dataclasses.dataclass(frozen=True)
class Request:
    """How many tokens of prompt and new ones a typical request has; at least 1 each."""

    prompt: int = 512
    new: int = 128
