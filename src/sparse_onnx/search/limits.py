"""How far a search goes, and where its trials run."""

from __future__ import annotations

import dataclasses

from sparse_onnx.options import require

__all__ = ["Limits"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """A search stops after so many ``trials``, or when another round would take longer than ``minutes`` in all; the
    first round is always made. ``jobs`` trials run at once on this machine, or on the Ray cluster at the address
    ``ray``.

    Raises UsageError for a value out of range.
    """

    trials: int = 16
    minutes: float = 60.0
    jobs: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        require(self.trials >= 1, "search_trials", self.trials, "1 or more")
        require(self.minutes > 0, "search_minutes", self.minutes, "above 0")
        require(self.jobs >= 1, "jobs", self.jobs, "1 or more")
        require(
            self.jobs == 1 or self.ray is None,
            "jobs",
            self.jobs,
            "1 with a cluster (--ray), which has its own",
        )
