"""The order of inputs for N:M: against all orders where these can be listed, and what any order must satisfy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask
from sparse_onnx.passes.solvers.permutation import input_order, kept_importance

RNG = np.random.default_rng(2)


@pytest.mark.parametrize(("keep", "group"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])
def test_what_is_kept_is_what_masks_keep(keep, group):
    importance = RNG.random((16, 5)).astype(np.float32)
    mask = keep_mask(importance, None, MaskStructure("n:m", (keep, group)))
    assert kept_importance(importance, keep, group) == pytest.approx(importance[mask].sum(), rel=1e-5)


def best_of_all(importance, keep):
    """Of two groups of four: all ways to choose the first."""
    everything = set(range(8))
    orders = [[*some, *sorted(everything - set(some))] for some in itertools.combinations(range(8), 4)]
    return max(kept_importance(importance[order], keep, 4) for order in orders)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_nearly_the_best_of_all_orders(keep):
    gained = possible = 0.0
    for _ in range(40):
        importance = np.exp(RNG.standard_normal((8, 3)) * 2).astype(np.float32)
        before = kept_importance(importance, keep, 4)
        gained += kept_importance(importance[input_order(importance, keep, 4)], keep, 4) - before
        possible += best_of_all(importance, keep) - before
    assert 0.9 * possible < gained <= possible * (1 + 1e-5)


def test_the_large_are_dealt_out():
    """Four loud inputs in one group of four: 2:4 would lose two of them for every output."""
    importance = np.full((16, 6), 0.01, np.float32)
    importance[4:8] = 1
    order = input_order(importance, 2, 4)
    assert all(np.count_nonzero(importance[group, 0] == 1) <= 2 for group in order.reshape(4, 4))


@given(
    st.integers(0, 1000),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_any_order_is_a_permutation_that_keeps_no_less(seed, pattern, groups, outputs):
    keep, group = pattern
    rng = np.random.default_rng(seed)
    importance = rng.random((groups * group, outputs)).astype(np.float32)
    importance[rng.random(len(importance)) < 0.2] = 0
    order = input_order(importance, keep, group)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(importance)))
    np.testing.assert_array_equal(order, input_order(importance, keep, group))
    before, after = (kept_importance(each, keep, group) for each in (importance, importance[order]))
    assert after >= before * (1 - 1e-6)


def test_one_group_has_no_other_order():
    np.testing.assert_array_equal(input_order(RNG.random((4, 3)), 2, 4), np.arange(4))
