"""What a solver knows of a layer's input: second moments, mean and count. Made by calibration, read by solvers."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparse_onnx.errors import UsageError

__all__ = ["InputStatistics"]


@dataclasses.dataclass(frozen=True, eq=False)
class InputStatistics:
    """Sums over the calibration tokens X [count, K] of one layer's input.

    ``gram`` is X'X, float32 or float64: the whole matrix [K, K]; or, where that takes too much memory, a tuple
    of the square blocks [b, b] on its diagonal, in order and of any sizes that add up to K; or its diagonal
    [K] alone. ``mean`` [K] is the mean of X, where it is known, and ``count`` the number of tokens, each as often as it
    counts.

    Raises UsageError for shapes or dtypes that do not fit, NaN, Inf, and negative entries on the diagonal.
    """

    gram: np.ndarray | tuple[np.ndarray, ...]
    mean: np.ndarray | None = None
    count: float = 0

    def __post_init__(self) -> None:
        parts = self.gram if isinstance(self.gram, tuple) else (self.gram,)
        if not parts:
            raise UsageError("gram has no block: give at least one")
        for part in parts:
            square = part.ndim == 2 and part.shape[0] == part.shape[1]
            if not square and (part.ndim != 1 or isinstance(self.gram, tuple)):
                raise UsageError(
                    f"gram must be [K, K], its diagonal [K] or a tuple of [b, b], not {part.shape}"
                )
            if part.dtype not in (np.float32, np.float64):
                raise UsageError(f"gram must be float32 or float64, not {part.dtype}")
            if not np.isfinite(part.sum(dtype=np.float64)):
                raise UsageError("gram holds NaN or Inf: the calibration data or the model's activations do")
        if (self.diagonal < 0).any():
            raise UsageError("gram has a negative entry on its diagonal: it is no X'X")
        if self.mean is not None and self.mean.shape != (self.size,):
            raise UsageError(f"mean must be [{self.size}] like the gram, not {self.mean.shape}")
        if self.count < 0:
            raise UsageError(f"count must be at least 0, not {self.count}")

    @property
    def size(self) -> int:
        """K, the number of input channels."""
        return sum(len(block) for block in self.gram) if isinstance(self.gram, tuple) else len(self.gram)

    @property
    def diagonal(self) -> np.ndarray:
        """Sum of squares of every input channel: [K], float64."""
        if isinstance(self.gram, tuple):
            return np.concatenate([block.diagonal() for block in self.gram]).astype(np.float64)
        return np.array(self.gram.diagonal() if self.gram.ndim == 2 else self.gram, np.float64)
