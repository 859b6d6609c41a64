"""What each layer loses with so many zeros: the squared relative error of its output, on real inputs or none.

The error that the model makes in the end is not known before it is pruned. It is taken as the sum over layers, each
weighed by how much the model's output moves when that layer alone is pruned, where that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sparse_onnx.passes.allocation import error_curve
from sparse_onnx.passes.masks import MaskStructure, keep_mask, structure_reason
from sparse_onnx.passes.solvers import InputStatistics, SparseGPT, Wanda
from sparse_onnx.passes.solvers.solver import Solver
from sparse_onnx.passes.weights import Weight

__all__ = ["layer_losses", "losses"]

_GROUPS, _WIDTH = 8, 8  # output channels that are looked at: groups that hold whole blocks


def losses(
    weights: Sequence[Weight],
    structures: Sequence[str],
    sparsities: Sequence[float],
    statistics: Callable[[Weight], InputStatistics | None],
    progress: Callable[[str], None],
) -> dict[str, dict[tuple[str, float], float]]:
    """For each weight, what it loses by (structure, sparsity): see :func:`layer_losses`."""
    found = {}
    for index, weight in enumerate(weights):
        groups = weight.nodes[0].attributes.get_int("group", 1)
        W = np.asarray(weight.matrix()[:, : weight.shape[1] // groups], np.float32)
        found[weight.name] = layer_losses(W, statistics(weight), structures, sparsities)
        weight.release()
        progress(f"error curve {index + 1}/{len(weights)}: {weight.name}")
    return found


def layer_losses(
    W: np.ndarray,
    statistics: InputStatistics | None,
    structures: Sequence[str],
    sparsities: Sequence[float],
) -> dict[tuple[str, float], float]:
    """Squared relative output error of W [K, N] by (structure, sparsity), for the structures that fit it.

    With ``statistics`` of its inputs: by SparseGPT, blocks by Wanda, on 64 output channels. Without: of pruning by
    magnitude, as if the inputs were uncorrelated and alike.
    """
    table: dict[tuple[str, float], float] = {}
    shape = (W.shape[0], W.shape[1])
    for structure in map(MaskStructure.parse, structures):
        if structure_reason(shape, structure) is not None:
            continue
        if structure.kind == "n:m":
            keep, group = structure.size
            shares: Sequence[float] = (1 - keep / group,)
        else:
            shares = sparsities
        if statistics is None:
            errors: Sequence[float] = [_by_magnitude(W, structure, share) for share in shares]
        elif structure.kind == "unstructured":
            errors = error_curve(W, statistics, np.asarray(shares)).tolist()
        else:
            errors = [_solved(W, statistics, structure, share) for share in shares]
        table |= {(str(structure), share): error for share, error in zip(shares, errors, strict=True)}
    return table


def _by_magnitude(W: np.ndarray, structure: MaskStructure, share: float) -> float:
    keep = keep_mask(np.abs(W), None if structure.kind == "n:m" else share, structure)
    energy = float(np.square(W, dtype=np.float64).sum())
    return float(np.square(W[~keep], dtype=np.float64).sum()) / energy if energy else 0.0


def _solved(W: np.ndarray, statistics: InputStatistics, structure: MaskStructure, share: float) -> float:
    starts = np.unique(np.linspace(0, max(W.shape[1] - _WIDTH, 0), _GROUPS).astype(int) // _WIDTH * _WIDTH)
    columns = np.concatenate([np.arange(start, min(start + _WIDTH, W.shape[1])) for start in starts])
    part = np.ascontiguousarray(W[:, columns])
    if structure_reason((part.shape[0], part.shape[1]), structure) is not None:
        part = W  # blocks wider than what was taken
    solver: Solver = SparseGPT() if structure.kind in SparseGPT.structures else Wanda()
    pruned = solver.solve(part, statistics, structure, None if structure.kind == "n:m" else share)
    return _relative(part, part - pruned, statistics)


def _relative(W: np.ndarray, change: np.ndarray, statistics: InputStatistics) -> float:
    """The mean over output channels of ‖X(w − w′)‖² / ‖Xw‖², as in :func:`.error_curve`; from what of X'X is known."""
    lost, energy = np.zeros(W.shape[1]), np.zeros(W.shape[1])
    start = 0
    for gram in statistics.gram if isinstance(statistics.gram, tuple) else (statistics.gram,):
        rows = slice(start, start := start + len(gram))
        lost += _energy(change[rows], gram)
        energy += _energy(W[rows], gram)
    loud = energy > 0
    return float(np.clip(lost[loud] / energy[loud], 0, 1).mean()) if loud.any() else 0.0


def _energy(W: np.ndarray, gram: np.ndarray) -> np.ndarray:
    w = W.astype(np.float64)
    return np.asarray(np.einsum("kn,kn->n", w, gram @ w if gram.ndim == 2 else gram[:, None] * w))
