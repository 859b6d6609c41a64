"""How sparse each weight shall be so that the model as a whole has the sparsity asked for.

``uniform`` treats all weights alike. ``depth`` makes early weights sparser: later ones that are solved for behind the
pruned ones repair what was lost before them. ``owl`` keeps more where outliers are, ``alpha`` where the spectrum has a
heavy tail, ``error`` where zeros cost most output error. The mean over all elements is always exact.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import Selection, Weight
from sparse_onnx.options import require, unknown
from sparse_onnx.passes.solvers import InputStatistics, SparseGPTSolver, wanda_score
from sparse_onnx.passes.solvers.budget import Budget, smallest
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.passes.solvers.solver import Problem

__all__ = [
    "ALLOCATIONS",
    "NEED_STATISTICS",
    "Allocation",
    "Statistics",
    "allocate",
    "error_curve",
    "explicit",
    "hill_exponent",
    "outlier_share",
    "pruned_columns",
    "water_fill",
]

Allocation = Literal["uniform", "owl", "alpha", "error", "depth"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
NEED_STATISTICS: tuple[Allocation, ...] = ("owl", "error")
"""Those that look at the inputs of the layers."""

Statistics = Callable[[Weight], InputStatistics | None]
"""Statistics of a weight's input (of the first group of a convolution), or None where there are none."""

_LIMIT = 0.98  # a layer that keeps less hardly passes anything on
_DEPTH = 0.0875  # measured on a sentence encoder of 6 blocks at 70 %
_OUTLIER, _OWL_BAND = 5.0, 0.08  # M and λ of the paper
_ALPHA_BAND = 0.3  # ε of the paper
_ERROR_BAND = 0.15
_GRID = np.linspace(-_ERROR_BAND, _ERROR_BAND, 5)
_LEAST = 0.02  # fewer zeros cost nothing that could be measured
_CHANNELS = 64  # of a layer's outputs, to measure an error curve on
_NO_LOSS = 1e-10  # squared relative error that counts as none: float32 gives no less
_FLAT = 0.1  # least slope of log squared error: a flat curve would divide by zero


def allocate(
    method: str, weights: Sequence[Weight], sparsity: float, statistics: Statistics
) -> dict[str, float]:
    """The sparsity of every weight by name; ``weights`` are in graph order.

    All lie in [0, .98] (or up to ``sparsity``, if that is more), and their mean weighted by elements is
    ``sparsity``. ``owl`` and ``error`` call ``statistics`` once for each weight, one at a time. A weight that a
    method cannot judge (no statistics, a spectrum without a tail) stays at ``sparsity``.

    Raises UsageError for an unknown method and a sparsity outside [0, 1).
    """
    if method not in _METHODS:
        raise UsageError(unknown("allocation", method, _METHODS))
    require(0 <= sparsity < 1, "sparsity", sparsity, "at least 0 and less than 1")
    sizes = _sizes(weights)
    if not sizes:
        return {}
    first: dict[str, Weight] = {}
    for weight in weights:
        first.setdefault(weight.name, weight)
    share = _METHODS[method](
        list(first.values()), np.array(list(sizes.values()), np.float64), sparsity, statistics
    )
    return dict(zip(sizes, share.tolist(), strict=True))


def explicit(weights: Sequence[Weight], sparsity: float, given: Mapping[str, float]) -> dict[str, float]:
    """The sparsity of every weight by name: as ``given``; weights that no entry names share what is left alike.

    An entry is a name or a ``re:`` pattern as in :class:`~sparse_onnx.model.weights.Selection`; of several that
    name a weight the first counts. The mean weighted by elements is ``sparsity``.

    Raises UsageError for values outside [0, 1), an entry that names no weight that is left for it, and values
    that ``sparsity`` cannot be the mean of.
    """
    require(0 <= sparsity < 1, "sparsity", sparsity, "at least 0 and less than 1")
    sizes = _sizes(weights)
    named: dict[str, float] = {}
    for entry, value in given.items():
        require(0 <= value < 1, f"sparsity of {entry!r}", value, "at least 0 and less than 1")
        chosen = Selection((entry,), ())
        matched = {weight.name for weight in weights if chosen.reason_against(weight) is None}
        if not matched - named.keys():
            why = (
                "only weights that earlier entries name" if matched else "no weight, node, module or op type"
            )
            raise UsageError(f"allocation: {entry!r} matches {why}; the weights are {_some(list(sizes))}")
        named |= dict.fromkeys(matched - named.keys(), float(value))
    rest = sum(size for name, size in sizes.items() if name not in named)
    zeros = sparsity * sum(sizes.values()) - sum(value * sizes[name] for name, value in named.items())
    if not rest:
        if abs(zeros) > 1e-9 * sum(sizes.values()):
            mean = sparsity - zeros / sum(sizes.values())
            raise UsageError(
                f"allocation: every weight is given, with a mean of {mean:.10f}, but sparsity is {sparsity}: make "
                "them agree, or leave weights out that take up the difference"
            )
        return {name: named[name] for name in sizes}
    wanted, limit = zeros / rest, max(_LIMIT, sparsity)
    left = min(max(wanted, 0.0), limit)
    if abs(wanted - left) * rest > 1e-9 * sum(sizes.values()):  # more than rounding
        change = "lower" if wanted < 0 else "higher"
        raise UsageError(
            f"allocation: with these values the other weights would need a sparsity of {wanted:.4f} for "
            f"a mean of {sparsity}, beyond 0 to {limit}: give {change} values"
        )
    return {name: named.get(name, left) for name in sizes}


def water_fill(
    start: np.ndarray,
    sizes: np.ndarray,
    mean: float,
    low: np.ndarray,
    high: np.ndarray,
    rate: np.ndarray | float = 1.0,
) -> np.ndarray:
    """clip(start + rate · t, low, high) with the one t for which its mean, weighted by ``sizes``, is ``mean``.

    All arrays are [n]; ``sizes`` and ``rate`` are positive, ``low`` ≤ ``high``. The total is piecewise linear and
    rises with t, so t is found exactly between two of the points where an entry meets a limit. Raises ValueError
    unless ``mean`` lies between the means of ``low`` and ``high``.
    """
    share = sizes / sizes.sum()
    floor, ceiling = float(share @ low), float(share @ high)
    if not floor - 1e-12 <= mean <= ceiling + 1e-12:
        raise ValueError(f"a mean of {mean} is not within the limits, {floor} to {ceiling}")

    def filled(t: float) -> np.ndarray:
        return np.clip(start + rate * t, low, high)

    def total(t: float) -> float:
        return float(share @ filled(t))

    points = np.sort(np.concatenate([(low - start) / rate, (high - start) / rate]))
    index = bisect.bisect_left(points, mean, key=total)
    if index in (0, len(points)):
        return filled(float(points[min(index, len(points) - 1)]))
    before, after = float(points[index - 1]), float(points[index])
    below, above = total(before), total(after)
    return filled(before + (after - before) * (mean - below) / (above - below))


def outlier_share(W: np.ndarray, diagonal: np.ndarray, times: float = _OUTLIER) -> float:
    """Share of the entries of |w| · sqrt(G_ii) that exceed ``times`` their mean (Yin et al. 2024, eq. 1).

    W is [K, N], ``diagonal`` G_ii [K].
    """
    score = wanda_score(W, diagonal)
    return float(np.mean(score > times * score.mean(dtype=np.float64)))


def hill_exponent(W: np.ndarray) -> float:
    """Hill's estimate of the power law that the upper half of the eigenvalues of W'W follows (Lu et al. 2024).

    1 + k / Σ ln(λ_i / λ_min) over the k largest of the eigenvalues above 0. NaN where they are all equal or fewer
    than two: no tail to be seen. W is [K, N].
    """
    matrix = np.asarray(W if W.shape[0] <= W.shape[1] else W.T, np.float64)
    values = np.linalg.eigvalsh(matrix @ matrix.T)  # ascending
    values = values[values > max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float32).eps]
    tail = np.log(values[len(values) // 2 :])
    spread = float((tail - tail[0]).sum()) if len(values) > 1 else 0.0
    return 1 + len(tail) / spread if spread > 1e-6 * len(tail) else float("nan")


def error_curve(W: np.ndarray, statistics: InputStatistics, sparsities: np.ndarray) -> np.ndarray:
    """Squared relative output error of W [K, N] at each of ``sparsities`` [S]: [S], float64.

    The mean over output channels n of ‖X(w_n − w′_n)‖² / ‖Xw_n‖², channels without output left out: a channel's scale
    can be moved into the next layer, so a loud channel must not hide the others. Measured with SparseGPT on at
    most 64 channels spread over the layer; all sparsities are solved for at once, side by side, so that the Gram
    is inverted once. Each channel has the zeros that a ranking of |w| · sqrt(G_ii) in the layer gives it.
    """
    part, changes = pruned_columns(W, statistics, sparsities)
    change = np.concatenate(changes, axis=1)
    loss, energy = np.zeros(change.shape[1]), np.zeros(part.shape[1])
    start = 0
    for gram in statistics.gram if isinstance(statistics.gram, tuple) else (statistics.gram,):
        rows = slice(start, start := start + len(gram))
        loss += _energy(change[rows], gram)
        energy += _energy(part[rows], gram)
    loud = energy > 0
    if not loud.any():
        return np.zeros(len(sparsities))
    relative = loss.reshape(len(sparsities), -1)[:, loud] / energy[loud]
    return np.asarray(np.clip(relative.mean(axis=1), 0, 1))


def pruned_columns(
    W: np.ndarray, statistics: InputStatistics, sparsities: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The channels of W [K, N] that :func:`error_curve` looks at, [K, C] float32, inputs without power being 0, and
    what each of ``sparsities`` takes from them, [K, C] float32 each."""
    columns = np.unique(np.linspace(0, W.shape[1] - 1, _CHANNELS).round().astype(int))
    part = W[:, columns] * (statistics.diagonal > 0)[:, None]
    score = wanda_score(part, statistics.diagonal)
    pruned = np.concatenate([smallest(score, round(share * score.size)) for share in sparsities], axis=1)
    side_by_side = np.tile(part, (1, len(sparsities))).astype(np.float32)
    change = np.empty_like(side_by_side)
    start = 0
    for gram in statistics.gram if isinstance(statistics.gram, tuple) else (statistics.gram,):
        rows = slice(start, start := start + len(gram))
        change[rows] = _change(side_by_side[rows], gram, pruned[rows])
    return part, np.split(change, len(sparsities), axis=1)


def _change(W: np.ndarray, gram: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """W − W′ with as many zeros in each column as ``pruned`` has; on a diagonal [K] these are the best ones."""
    if gram.ndim == 1 or not W.any():
        return np.where(pruned, W, np.float32(0))
    budget = Budget(MaskStructure(), np.count_nonzero(pruned, axis=0))
    return np.asarray(W - SparseGPTSolver().approximate(Problem(W, gram, budget, "row")))


def _energy(W: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """‖Xw‖² of every column of W [K, N], from X'X [K, K] or its diagonal [K]: [N], float64."""
    w = W.astype(np.float64)
    return np.asarray(np.einsum("kn,kn->n", w, gram @ w if gram.ndim == 2 else gram[:, None] * w))


def _sizes(weights: Sequence[Weight]) -> dict[str, int]:
    """Elements by name; branches of a graph may each have a weight of one name, which then share a sparsity."""
    sizes: dict[str, int] = {}
    for weight in weights:
        sizes[weight.name] = sizes.get(weight.name, 0) + weight.size
    return sizes


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")


def _measured(
    weights: Sequence[Weight], measure: Callable[[Weight, np.ndarray], float | tuple[float, ...]]
) -> np.ndarray:
    """``measure`` of every weight and its W [K, N] float32 (of its first group): [n]; one W is in memory at a time."""
    values = []
    for weight in weights:
        groups = weight.nodes[0].attributes.get_int("group", 1)
        values.append(
            measure(weight, np.asarray(weight.matrix()[:, : weight.shape[1] // groups], np.float32))
        )
        weight.release()
    return np.array(values, np.float64)


def _between(score: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scores mapped linearly onto [low, high]; NaN, and scores that are all equal, onto the middle."""
    known = score[np.isfinite(score)]
    if not len(known) or known.max() == known.min():
        return np.full(len(score), (low + high) / 2)
    mapped = low + (high - low) * ((score - known.min()) / (known.max() - known.min()))
    return np.where(np.isfinite(score), mapped, (low + high) / 2)


def _fill(
    start: np.ndarray,
    sizes: np.ndarray,
    sparsity: float,
    band: float = 1.0,
    rate: np.ndarray | float = 1.0,
    judged: np.ndarray | bool = True,
) -> np.ndarray:
    """:func:`water_fill` within ``band`` of ``sparsity`` and the limits for all; what is not ``judged`` stays there."""
    limit = max(_LIMIT, sparsity)
    low = np.where(judged, max(sparsity - band, 0.0), np.full(len(sizes), sparsity))
    high = np.where(judged, min(sparsity + band, limit), np.full(len(sizes), sparsity))
    return water_fill(start, sizes, sparsity, low, high, rate)


def _uniform(
    weights: Sequence[Weight], sizes: np.ndarray, sparsity: float, statistics: Statistics
) -> np.ndarray:
    return np.full(len(sizes), sparsity)


def _depth(
    weights: Sequence[Weight], sizes: np.ndarray, sparsity: float, statistics: Statistics
) -> np.ndarray:
    """Falls linearly with the position in the graph."""
    return _fill(sparsity + _between(-np.arange(len(sizes)), -_DEPTH, _DEPTH), sizes, sparsity)


def _owl(weights: Sequence[Weight], sizes: np.ndarray, sparsity: float, statistics: Statistics) -> np.ndarray:
    """More outliers, denser, within λ of the mean (Yin et al. 2024); the paper's layers are blocks, here weights."""

    def measure(weight: Weight, W: np.ndarray) -> float:
        known = statistics(weight)
        return float("nan") if known is None else outlier_share(W, known.diagonal)

    outliers = _measured(weights, measure)
    start = sparsity + _between(-outliers, -_OWL_BAND, _OWL_BAND)
    return _fill(start, sizes, sparsity, _OWL_BAND, judged=np.isfinite(outliers))


def _alpha(
    weights: Sequence[Weight], sizes: np.ndarray, sparsity: float, statistics: Statistics
) -> np.ndarray:
    """In proportion to 1 − ε to 1 + ε from the heaviest tail to the lightest (Lu et al. 2024)."""
    exponents = _measured(weights, lambda _weight, W: hill_exponent(W))
    judged = np.isfinite(exponents)
    factor = _between(exponents, 1 - _ALPHA_BAND, 1 + _ALPHA_BAND)
    mean = np.average(factor, weights=sizes * judged) if judged.any() else 1.0
    return _fill(sparsity * factor / mean, sizes, sparsity, judged=judged)


def _error(
    weights: Sequence[Weight], sizes: np.ndarray, sparsity: float, statistics: Statistics
) -> np.ndarray:
    """Minimise the sum over layers of the squared relative output error e², fitted as exp(a + b·s).

    All layers count alike, whatever their size: small relative errors of layers behind each other add up in
    squares. With a Lagrange multiplier exp(t) for the zeros, b·exp(a + b·s) = size · exp(t), so
    s = (t + ln(size / b) − a) / b: :func:`water_fill` has the t that fits, and so the exact minimum of a convex sum.
    """
    limit = max(_LIMIT, sparsity)
    grid = np.unique(np.clip(sparsity + _GRID, _LEAST, limit))

    def measure(weight: Weight, W: np.ndarray) -> tuple[float, float]:
        known = statistics(weight)
        if known is None:
            return float("nan"), 1.0
        logs = np.log(np.maximum(error_curve(W, known, grid), _NO_LOSS))
        slope = max(float(np.polyfit(grid, logs, 1)[0]), _FLAT)
        return float(logs.mean() - slope * grid.mean()), slope

    a, b = _measured(weights, measure).T
    judged = np.isfinite(a)
    start = np.where(judged, (np.log(sizes / sizes.mean() / b) - a) / b, 0.0)
    return _fill(start, sizes, sparsity, _ERROR_BAND, 1 / b, judged)


_METHODS: dict[str, Callable[[Sequence[Weight], np.ndarray, float, Statistics], np.ndarray]] = {
    "uniform": _uniform,
    "owl": _owl,
    "alpha": _alpha,
    "error": _error,
    "depth": _depth,
}
