"""The order of a weight's inputs in which N:M pruning keeps most: within a group the large should meet the small.

Groups of M inputs swap members in pairs, as long as more is kept: channel permutations for N:M (Pool & Yu 2021), here
with all pairs of groups in turn and every swap of a pair weighed at once: where an input leaves, a group keeps the
N - 1 largest of the others, and of the one that comes and the next largest the larger.
"""

from __future__ import annotations

import numpy as np

__all__ = ["input_order", "kept_importance"]

_OUTPUTS = 96  # of which importance is looked at
_TURNS = 2  # through all pairs of groups, at most
_STILL = 1e-4  # share of the importance; where a turn brings less, it was the last


def kept_importance(importance: np.ndarray, keep: int, group: int) -> float:
    """What N:M keeps of ``importance`` [K, N], not negative: the ``keep`` largest of every ``group`` of inputs."""
    K, N = importance.shape
    ranked = np.partition(importance.reshape(K // group, group, N), group - keep, axis=1)
    return float(ranked[:, group - keep :].sum(dtype=np.float64))


def input_order(importance: np.ndarray, keep: int, group: int) -> np.ndarray:
    """An order [K] of the inputs of a weight in which its groups keep more, or as much.

    ``importance`` [K, N], not negative, is what each element is worth; K is a multiple of ``group``. Within a group
    inputs ascend, and groups by their first. Equal input gives equal orders.
    """
    K, N = importance.shape
    scores = importance[:, np.linspace(0, N - 1, min(N, _OUTPUTS)).round().astype(int)].astype(np.float32)
    groups = np.arange(K).reshape(-1, group)
    count = len(groups)
    if count < 2:
        return np.arange(K)
    for _ in range(_TURNS):
        before = kept_importance(scores[groups.reshape(-1)], keep, group)
        for pairs in _rounds(count):
            _swap(scores, groups, pairs, keep)
        after = kept_importance(scores[groups.reshape(-1)], keep, group)
        if after - before <= _STILL * before:
            break
    groups = np.sort(groups, axis=1)
    return groups[np.argsort(groups[:, 0])].reshape(-1)


def _rounds(count: int) -> list[np.ndarray]:
    """Every two of ``count`` things once: in each round disjoint pairs [pairs, 2], as players of a tournament meet."""
    even = count + count % 2
    ring = np.arange(1, even)
    rounds = []
    for _ in range(even - 1):
        players = np.concatenate([[0], ring])
        pairs = np.stack([players[: even // 2], players[even // 2 :][::-1]], axis=1)
        rounds.append(pairs[(pairs < count).all(axis=1)])
        ring = np.roll(ring, 1)
    return rounds


def _swap(scores: np.ndarray, groups: np.ndarray, pairs: np.ndarray, keep: int) -> None:
    """Make the best swap of one input of every pair of ``groups``, where it keeps more."""
    own = scores[groups[pairs]]  # [pairs, 2, M, N]
    M = own.shape[2]
    ranked = np.sort(own, axis=2)
    last, next_one = ranked[:, :, M - keep], ranked[:, :, M - keep - 1]  # of those that are kept, and are not
    kept = ranked[:, :, M - keep :].sum(axis=(2, 3))
    total = np.zeros((len(pairs), M, M), np.float32)  # the member of the first that leaves, of the second
    for side in range(2):
        others, with_each = own[:, 1 - side], np.empty_like(total)
        for leaves in range(M):
            x = own[:, side, leaves]
            low = np.where(x >= last[:, side], next_one[:, side], last[:, side])
            base = kept[:, side] - np.maximum(x, last[:, side]).sum(axis=1)
            with_each[:, leaves] = base[:, None] + np.maximum(others, low[:, None]).sum(axis=2)
        total += with_each if side == 0 else with_each.transpose(0, 2, 1)
    best = total.reshape(len(pairs), -1).argmax(axis=1)
    first, second = np.divmod(best, M)
    gains = total[np.arange(len(pairs)), first, second] - kept.sum(axis=1)
    some = gains > 1e-6 * kept.sum(axis=1)
    one, other = pairs[some].T
    places = (one, first[some]), (other, second[some])
    groups[places[0]], groups[places[1]] = groups[places[1]], groups[places[0]]
