"""Choose which units of a layer's input go, and fit the weights that read the others: mathematics on arrays.

A *unit* is ``size`` consecutive inputs of a layer Y = X W + b, X [tokens, K], W [K, N]: a neuron, a channel with its
window, a head. With H = X'X (of X minus its mean, where b can take up a shift) plus damping, removing unit u and
fitting all other weights anew adds

    tr(W_u' ([H⁻¹]_uu)⁻¹ W_u)

to the squared error of Y (optimal brain surgeon, Hassibi & Stork 1993, for groups as in Kurtic et al. 2023). The unit
with the least goes first; W and H⁻¹ are then those of the remaining units:

    W ← W − H⁻¹_:u ([H⁻¹]_uu)⁻¹ W_u          H⁻¹ ← H⁻¹ − H⁻¹_:u ([H⁻¹]_uu)⁻¹ H⁻¹_u:
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from sparse_onnx.passes.solvers.correction import centred_gram, centred_power
from sparse_onnx.passes.solvers.gram import damped, inverse
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["Fit", "Reader", "choose", "fit", "kept_units", "rows_of"]

_ROUNDS = 32
_CANDIDATES = 4  # per unit that a round removes


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the units: W [K, N] and what is known of its input, ``size`` = K / units inputs each.

    ``biased``: it has a bias, which takes up the mean of what is removed.
    """

    W: np.ndarray
    statistics: InputStatistics
    size: int
    biased: bool = False

    @property
    def form(self) -> np.ndarray | None:
        """X'X of what the weights have to fit, float64 [K, K]; None where only its diagonal is meaningful."""
        gram, mean = self.statistics.gram, self.statistics.mean
        if isinstance(gram, tuple) or gram.ndim != 2:
            return None
        if mean is not None and self._varying is not None:
            return centred_gram(gram.astype(np.float64), mean, self.statistics.count)
        return gram.astype(np.float64)

    @property
    def power(self) -> np.ndarray:
        """The diagonal of what the weights have to fit, [K]; 0 for inputs that are constant."""
        return self.statistics.diagonal if self._varying is None else self._varying

    @functools.cached_property
    def _varying(self) -> np.ndarray | None:
        """The power of the inputs less their mean, where the bias takes that up and anything is left of it."""
        if not self.biased or self.statistics.mean is None:
            return None
        power = centred_power(self.statistics.diagonal, self.statistics.mean, self.statistics.count)
        return power if power.any() else None


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What a reader becomes: V [kept K, N], what is added to its bias [N], and ‖X W − X V‖ / ‖X W‖."""

    V: np.ndarray
    shift: np.ndarray
    error: float


def kept_units(units: int, sparsity: float, multiple_of: int) -> int:
    """How many of ``units`` stay: the multiple of ``multiple_of`` nearest to their share, at least one multiple."""
    nearest = int(units * (1 - sparsity) / multiple_of + 0.5) * multiple_of
    return min(units, max(nearest, multiple_of))


def rows_of(units: np.ndarray, size: int) -> np.ndarray:
    """The indices of the inputs of ``units``."""
    return np.asarray((np.asarray(units)[:, None] * size + np.arange(size)).reshape(-1))


def choose(readers: Sequence[Reader], count: int, damping: float) -> np.ndarray:
    """The ``count`` units that are missed least by all ``readers`` together, ascending.

    Greedy, in rounds: within a round, exact among the candidates of the lowest scores; all others learn of it
    after the round. Where a Gram is not whole, a unit's score is the power of its inputs times that of their weights.
    """
    units = len(readers[0].W) // readers[0].size
    forms = [reader.form for reader in readers]
    if any(form is None for form in forms):
        scores = sum(
            (reader.power * (reader.W.astype(np.float64) ** 2).sum(axis=1)).reshape(units, -1).sum(axis=1)
            for reader in readers
        )
        return np.sort(np.argsort(scores, kind="stable")[:count])
    states = [
        _State.of(reader, form, damping)
        for reader, form in zip(readers, forms, strict=True)
        if form is not None
    ]
    left = np.arange(units)
    step = -(-count // _ROUNDS) if count else 0
    gone: list[np.ndarray] = []
    while count > 0:
        step = min(step, count)
        ranked = np.argsort(sum(state.scores() for state in states), kind="stable")
        candidates = np.sort(ranked[: _CANDIDATES * step]) if step > 1 else ranked[:1]
        chosen = candidates[_greedy([state.only(candidates) for state in states], step)]
        gone.append(left[chosen])
        states = [state.without(chosen) for state in states]
        left = np.delete(left, chosen)
        count -= step
    return np.sort(np.concatenate(gone)) if gone else np.arange(0)


def _greedy(states: Sequence[_State], count: int) -> np.ndarray:
    """The ``count`` units that go one by one, as indices into those of ``states``."""
    left = np.arange(states[0].units)
    chosen = []
    for _ in range(count):
        best = np.argmin(sum(state.scores() for state in states))
        chosen.append(left[best])
        left = np.delete(left, best)
        states = [state.without(np.array([best])) for state in states]
    return np.array(chosen)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """H⁻¹ [K, K] and W [K, N] of the units that are left, float64, the inputs scaled to a unit diagonal of H."""

    inverse: np.ndarray
    W: np.ndarray
    size: int

    @classmethod
    def of(cls, reader: Reader, form: np.ndarray, damping: float) -> _State:
        matrix, scale = _unit_diagonal(damped(form, damping))
        # Constant inputs go for nothing, however large their weights.
        W = np.where(reader.power[:, None] > 0, reader.W.astype(np.float64), 0.0)
        return cls(inverse(matrix), W * scale[:, None], reader.size)

    @property
    def units(self) -> int:
        return len(self.W) // self.size

    def scores(self) -> np.ndarray:
        """What removing each unit costs: [units]."""
        if self.size == 1:
            return np.asarray((self.W**2).sum(axis=1) / self.inverse.diagonal())
        blocks = self.inverse.reshape(self.units, self.size, self.units, self.size)
        own = blocks[np.arange(self.units), :, np.arange(self.units), :]
        W = self.W.reshape(self.units, self.size, -1)
        return np.asarray((W * np.linalg.solve(own, W)).sum(axis=(1, 2)))

    def only(self, units: np.ndarray) -> _State:
        rows = rows_of(units, self.size)
        return _State(self.inverse[np.ix_(rows, rows)], self.W[rows], self.size)

    def without(self, units: np.ndarray) -> _State:
        gone = rows_of(units, self.size)
        kept = np.delete(np.arange(len(self.W)), gone)
        across = self.inverse[np.ix_(kept, gone)]
        step = np.linalg.solve(self.inverse[np.ix_(gone, gone)], np.hstack([across.T, self.W[gone]]))
        left = self.inverse[np.ix_(kept, kept)] - across @ step[:, : len(kept)]
        return _State(left, self.W[kept] - across @ step[:, len(kept) :], self.size)


def fit(reader: Reader, removed: np.ndarray, damping: float) -> Fit:
    """The best weights without the ``removed`` units: V = W_k + H_kk⁻¹ G_kr W_r, damping drawing V to W_k.

    The bias takes up what the mean of Y loses, if there is one.
    """
    W, form = reader.W.astype(np.float64), reader.form
    gone = rows_of(removed, reader.size)
    kept = np.delete(np.arange(len(W)), gone)
    V = W[kept]
    if form is not None:
        matrix, scale = _unit_diagonal(damped(form, damping)[np.ix_(kept, kept)])
        pull = form[np.ix_(kept, gone)] @ W[gone] / scale[:, None]
        V = V + inverse(matrix) @ pull / scale[:, None]
    change = W.copy()
    change[kept] -= V
    mean = reader.statistics.mean
    shift = mean.astype(np.float64) @ change if reader.biased and mean is not None else np.zeros(W.shape[1])
    return Fit(V.astype(np.float32), shift, _error(reader, form, change, W))


def _error(reader: Reader, form: np.ndarray | None, change: np.ndarray, W: np.ndarray) -> float:
    gram = reader.statistics.gram
    if form is None or isinstance(gram, tuple):
        return float("nan")
    whole = float(np.vdot(W, gram @ W))
    return float(np.sqrt(max(np.vdot(change, form @ change), 0.0) / whole)) if whole > 0 else 0.0


def _unit_diagonal(form: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``form`` with a diagonal of ones, and the [K] that it was divided by on both sides."""
    scale = np.sqrt(np.maximum(form.diagonal(), 0))
    scale[scale == 0] = 1
    matrix = form / scale / scale[:, None]
    matrix[np.diag_indices_from(matrix)] = 1
    return matrix, scale
