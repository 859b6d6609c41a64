"""Exact budget within a budget, against stable sorting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparse_onnx.passes.solvers.budget import Budget, smallest
from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask, obeys

SCORES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]),
)


@settings(deadline=None)
@given(score=SCORES, share=st.floats(0, 1))
def test_the_smallest_of_the_layer_the_first_of_equals_first(score, share):
    count = round(share * score.size)
    expected = np.zeros(score.size, bool)
    expected[np.argsort(score.ravel(), kind="stable")[:count]] = True
    np.testing.assert_array_equal(smallest(score, count).ravel(), expected)


@settings(deadline=None)
@given(score=SCORES, data=st.data())
def test_the_smallest_of_each_column(score, data):
    K, N = score.shape
    count = data.draw(hnp.arrays(np.int64, N, elements=st.integers(0, K)))
    expected = np.zeros(score.shape, bool)
    for column in range(N):
        expected[np.argsort(score[:, column], kind="stable")[: count[column]], column] = True
    np.testing.assert_array_equal(smallest(score, count), expected)


@pytest.mark.parametrize("structure", ["unstructured", "block:2x4", "block:1x3", "channel"])
def test_layer_scope_is_that_of_the_data_free_passes(structure):
    score = np.random.default_rng(0).standard_normal((12, 10)).astype(np.float32)
    parsed = MaskStructure.parse(structure)
    own = Budget.of(score.shape, parsed, 0.45, "layer").keep(score)
    np.testing.assert_array_equal(own, keep_mask(score, 0.45, parsed))


def test_row_scope_has_the_same_zeros_in_every_output_channel():
    score = np.random.default_rng(0).standard_normal((12, 10))
    keep = Budget.of(score.shape, MaskStructure(), 0.6, "row").keep(score)
    np.testing.assert_array_equal((~keep).sum(axis=0), round(0.6 * 12))
    blocks = Budget.of(score.shape, MaskStructure("block", (2, 3)), 0.5, "row").keep(score)
    np.testing.assert_array_equal((~blocks).sum(axis=0), 6)


def test_a_relaxed_budget_grows_to_the_whole():
    score = np.random.default_rng(0).standard_normal((8, 3))
    for structure in (MaskStructure(), MaskStructure("n:m", (1, 4))):
        whole = Budget.of(score.shape, structure, 0.75, "layer")
        zeros = [int((~whole.relaxed(share).keep(score)).sum()) for share in (0, 0.4, 0.7, 1)]
        assert zeros[0] == 0
        assert zeros == sorted(zeros)
        assert zeros[-1] == int((~whole.keep(score)).sum()) == 18
    assert obeys(whole.keep(score), MaskStructure("n:m", (1, 4)))
    row = Budget.of(score.shape, MaskStructure(), 0.75, "row").relaxed(0.5)
    np.testing.assert_array_equal((~row.keep(score)).sum(axis=0), 3)
