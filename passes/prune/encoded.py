"""What pruning needs of weights that are stored as integers or by a codebook: zeros that exist, and values on the grid.

A weight stays as it is encoded: pruned elements become the zero point, scales do not change, and what a method makes of
the others is rounded to the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparse_onnx.model.encodings import Dense, Palette
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["is_encoded", "on_grid", "reason_against_zeros"]


def is_encoded(weight: Weight) -> bool:
    """Whether the weight is not stored as floats."""
    return not isinstance(weight.encoding, Dense)


def reason_against_zeros(weight: Weight) -> str | None:
    """Why a weight that is encoded cannot be pruned, or None if it can."""
    encoding = weight.encoding
    if isinstance(encoding, Dense):
        return None
    if weight.is_looked_up:
        return "is tied to a table of embeddings, which would lose the same elements"
    if isinstance(encoding, Palette):
        values = np.asarray(encoding.codebook.numpy(), np.float32)
        encoding.release()
        if not np.isfinite(values).all():
            return "has NaN or Inf in its codebook"
        return None if (values == 0).any() else "has no zero in its codebook"
    scale = np.asarray(encoding.scale.numpy(), np.float32)
    encoding.release()
    with np.errstate(invalid="ignore"):
        good = np.isfinite(scale) & (scale > 0)
    return None if good.all() else f"has a scale that is {scale[~good].reshape(-1)[0]:g}, not positive"


def on_grid(
    weight: Weight, W: np.ndarray, pruned: np.ndarray, inputs: Sequence[InputStatistics]
) -> np.ndarray:
    """Values that the encoding of ``weight`` has for ``pruned`` [K, N], what a method made of W [K, N]; float32.

    The zeros of ``pruned`` stay. Each output takes the nearest values or, where its outputs on the ``inputs`` (one for
    each group) are nearer to those of ``pruned`` then, the ones that it had.
    """
    rounded = np.where(pruned != 0, weight.nearest(pruned), np.float32(0))
    before = np.where(pruned != 0, W, np.float32(0))
    width = W.shape[1] // len(inputs)
    for index, statistics in enumerate(inputs):
        part = slice(index * width, (index + 1) * width)
        errors = [_errors(x[:, part] - pruned[:, part], statistics.gram) for x in (rounded, before)]
        rounded[:, part] = np.where(errors[0] <= errors[1], rounded[:, part], before[:, part])
    return rounded


def _errors(change: np.ndarray, gram: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """‖Xc‖² of every column c of ``change`` [K, N], from X'X, its diagonal blocks or its diagonal: [N]."""
    errors, start = np.zeros(change.shape[1]), 0
    for block in gram if isinstance(gram, tuple) else (gram,):
        rows = change[start : start + len(block)]
        start += len(block)
        product = block @ rows if block.ndim == 2 else block[:, None] * rows
        errors += np.einsum("kn,kn->n", rows, product)
    return errors
