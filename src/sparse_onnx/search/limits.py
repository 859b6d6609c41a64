"""How far a search goes, and where its trials run."""

from __future__ import annotations

import dataclasses

from sparse_onnx.options import option, require

__all__ = ["Limits"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """A search stops after so many ``trials``, or when another round would take longer than ``minutes`` in all; the
    first round is always made. ``jobs`` trials run at once on this machine, or on the Ray cluster at the address
    ``ray``.

    Raises UsageError for a value out of range.
    """

    trials: int = option(
        16,
        "With goals, and a method without a sparsity or a precision without bits: stop after so many.",
        about="A search stops after so many trials. With goals, the zeros of every layer are searched for where there "
        "is a ``method`` and no ``sparsity``, and its bits where there is a ``precision`` and no ``bits``, see "
        ":mod:`sparse_onnx.search`; ``mask_structure`` may then name several patterns to choose from, with commas.",
        keyword="search_trials",
        least=1,
    )
    minutes: float = option(60.0, "Stop the search then.", keyword="search_minutes", above=0)
    jobs: int = option(
        1, "Trials of a search at once.", about="Trials of a search at once, in processes of this machine."
    )
    ray: str | None = option(None, "Address of a Ray cluster for trials, or auto.")

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
