"""Mask structures and budget, against plain loops and stable sorting."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers.masks import (
    Cut,
    MaskStructure,
    below,
    expand,
    find_cut,
    keep_mask,
    obeys,
    resolve_sparsity,
    structure_reason,
    unit_scores,
)

TWO_OF_FOUR = MaskStructure("n:m", (2, 4))
DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


def lowest(scores, count):
    """The oracle of all selections: the ``count`` lowest finite |scores|, the first of equals first."""
    flat = np.abs(np.asarray(scores, np.float64).ravel())
    order = [i for i in np.argsort(flat, kind="stable") if np.isfinite(flat[i])]
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(scores))


@pytest.mark.parametrize(
    "text", ["unstructured", "channel", "1:2", "2:4", "8:16", "block:4x1", "block:1x1", "block:32x8"]
)
def test_a_structure_is_written_as_it_is_read(text):
    assert str(MaskStructure.parse(text)) == text


def test_blocks_have_a_short_form():
    assert MaskStructure.parse("1x4") == MaskStructure.parse("block:1x4") == MaskStructure("block", (1, 4))


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("3:2", "2:3"),
        ("0:4", "1:4"),
        ("4:4", "3:4"),
        ("0:0", "1:2"),
        ("02:4", "2:4"),
        ("2:4 ", "2:4"),
        ("2:4:8", "2:4"),
        ("block:0x4", "block:1x4"),
        ("blok:4x1", "block:4x1"),
        ("4x1x1", "block:4x1"),
        ("4 x 1", "block:4x1"),
        ("Unstructured", "unstructured"),
        ("unstructred", "unstructured"),
        ("chanel", "channel"),
        ("", "unstructured"),
        ("12345:4", "4:1234"),
        ("9" * 5000, "unstructured"),
    ],
)
def test_a_wrong_structure_is_named_with_the_nearest_form(text, nearest):
    with pytest.raises(UsageError, match="mask_structure") as caught:
        MaskStructure.parse(text)
    assert f"the nearest is {nearest!r}" in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("sparsity", "structure", "expected"),
    [
        (0.0, MaskStructure(), 0.0),
        (0.999, MaskStructure(), 0.999),
        (None, TWO_OF_FOUR, 0.5),
        (0.5, TWO_OF_FOUR, 0.5),
        (0.333, MaskStructure("n:m", (2, 3)), 1 - 2 / 3),
        (None, MaskStructure("n:m", (1, 4)), 0.75),
    ],
)
def test_sparsity_is_given_or_implied(sparsity, structure, expected):
    assert resolve_sparsity(sparsity, structure) == expected


@pytest.mark.parametrize(
    ("sparsity", "structure", "message"),
    [
        (None, MaskStructure(), "needs a sparsity"),
        (1.0, MaskStructure(), "below 1"),
        (-0.1, MaskStructure("channel"), "at least 0"),
        (0.75, TWO_OF_FOUR, "implies sparsity 0.5, not 0.75"),
    ],
)
def test_a_sparsity_that_does_not_fit_is_refused(sparsity, structure, message):
    with pytest.raises(UsageError, match=message):
        resolve_sparsity(sparsity, structure)


@pytest.mark.parametrize(
    ("text", "shape", "fits"),
    [
        ("unstructured", (7, 5), True),
        ("channel", (7, 5), True),
        ("2:4", (8, 5), True),
        ("2:4", (6, 8), False),
        ("block:4x1", (7, 8), True),
        ("block:4x1", (8, 7), False),
        ("block:1x4", (8, 7), True),
        ("block:1x4", (7, 8), False),
    ],
)
def test_which_shapes_a_structure_fits(text, shape, fits):
    structure = MaskStructure.parse(text)
    reason = structure_reason(shape, structure)
    assert (reason is None) == fits
    if not fits:
        assert text in reason
        with pytest.raises(ValueError, match=text):
            keep_mask(np.ones(shape, np.float32), None if ":" in text and "b" not in text else 0.5, structure)


shapes = st.tuples(st.integers(1, 19), st.integers(1, 19))
# Few different values, so that ties are the rule, and the corners of the format.
few = st.sampled_from(
    [0.0, -0.0, 0.5, -0.5, 1.0, 1.5, 1e-40, 3e38, float("nan"), float("inf"), -float("inf")]
)


@settings(max_examples=150, deadline=None)
@given(
    scores=hnp.arrays(np.float32, shapes, elements=few | st.floats(-2, 2, width=32)),
    sparsity=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from(DTYPES),
)
def test_unstructured_masks_are_those_of_a_stable_sort(scores, sparsity, dtype):
    with np.errstate(over="ignore"):
        scores = scores.astype(dtype)
    scores.flags.writeable = False
    keep = keep_mask(scores, sparsity)
    count = round(sparsity * scores.size)
    np.testing.assert_array_equal(~keep, lowest(scores, count))
    finite = np.isfinite(scores)
    assert np.count_nonzero(~keep) == min(count, np.count_nonzero(finite))
    assert keep[~finite].all()
    np.testing.assert_array_equal(keep_mask(np.asfortranarray(scores), sparsity), keep)


def test_float64_scores_are_told_apart_beyond_float32():
    scores = np.array([[1 + 1e-12, 1.0, 1 + 2e-12, 1 - 1e-12]])
    np.testing.assert_array_equal(keep_mask(scores, 0.5), [[True, False, True, False]])


def test_more_elements_than_are_looked_at_together():
    scores = np.random.default_rng(0).integers(0, 50, (1100, 1000)).astype(np.float32)
    np.testing.assert_array_equal(~keep_mask(scores, 0.37), lowest(scores, round(0.37 * scores.size)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sparsity=st.floats(0, 1, exclude_max=True), norm=st.sampled_from(["l1", "l2"]))
def test_blocks_go_as_a_whole_by_their_norm(data, sparsity, norm):
    R, C = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    n, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    # Multiples of 1/4: sums are exact, whatever their order.
    scores = (
        data.draw(hnp.arrays(np.int8, (k * C, n * R), elements=st.integers(-9, 9))).astype(np.float32) / 4
    )
    keep = keep_mask(scores, sparsity, MaskStructure("block", (R, C)), norm)
    norms = np.zeros((k, n))
    for i in range(k):
        for j in range(n):
            block = np.abs(scores[i * C : (i + 1) * C, j * R : (j + 1) * R])
            norms[i, j] = block.sum() if norm == "l1" else (block**2).sum()
    pruned = lowest(norms, round(sparsity * norms.size))
    np.testing.assert_array_equal(~keep, np.kron(pruned, np.ones((C, R), bool)))


def test_l1_and_l2_rank_blocks_differently():
    scores = np.array([[3.0, 0.0, 2.0, 2.0]], np.float32)
    pairs = MaskStructure("block", (2, 1))
    assert keep_mask(scores, 0.5, pairs, "l1").tolist() == [[False, False, True, True]]
    assert keep_mask(scores, 0.5, pairs, "l2").tolist() == [[True, True, False, False]]


def test_a_channel_is_all_inputs_of_one_output():
    scores = np.array([[1, 5, 2], [1, 0, 4]], np.float32)
    keep = keep_mask(scores, 1 / 3, MaskStructure("channel"))
    assert keep.tolist() == [[False, True, True], [False, True, True]]


def test_a_block_with_nan_or_inf_is_kept():
    scores = np.array([[np.nan, 0, 5, 5, 0, np.inf]], np.float32)
    assert keep_mask(scores, 0.9, MaskStructure("block", (2, 1))).tolist() == [
        [True, True, False, False, True, True]
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_n_of_m_keeps_the_highest_of_each_group(data):
    group = data.draw(st.integers(2, 9))
    keep_count = data.draw(st.integers(1, group - 1))
    k, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    scores = data.draw(hnp.arrays(np.float32, (k * group, n), elements=st.sampled_from([0, 1, -1, 2, 2.5])))
    structure = MaskStructure("n:m", (keep_count, group))
    keep = keep_mask(scores, None, structure)
    for i in range(k):
        for j in range(n):
            rows = slice(i * group, (i + 1) * group)
            np.testing.assert_array_equal(~keep[rows, j], lowest(scores[rows, j], group - keep_count))
    assert obeys(keep, structure)


def test_n_of_m_keeps_every_nan_and_says_so():
    scores = np.array([[np.nan, 1], [np.nan, 2], [np.inf, 3], [0, np.nan]], np.float32)
    keep = keep_mask(scores, None, TWO_OF_FOUR)
    assert keep.tolist() == [[True, False], [True, False], [True, True], [False, True]]
    assert not obeys(keep, TWO_OF_FOUR)
    assert obeys(keep[:, 1:], TWO_OF_FOUR)


@settings(max_examples=60, deadline=None)
@given(
    arrays=st.lists(hnp.arrays(np.float32, shapes, elements=few), min_size=1, max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_a_cut_through_many_arrays_is_that_of_their_concatenation(arrays, share, dtype):
    total = np.concatenate([array.ravel() for array in arrays])
    count = round(share * total.size)
    cut = find_cut(lambda: iter(arrays), count, dtype)
    masks = []
    for array in arrays:
        mask, cut = below(array, cut)
        assert mask.shape == array.shape
        masks.append(mask.ravel())
    np.testing.assert_array_equal(np.concatenate(masks), lowest(total, count))


@pytest.mark.parametrize("count", [0, 3])
def test_a_cut_through_nothing_finite_is_empty(count):
    scores = np.full((2, 2), np.nan, np.float32)
    assert find_cut(lambda: [scores], count) == Cut(0, 0)
    assert find_cut(list, count) == Cut(0, 0)


@pytest.mark.parametrize(
    "structure", [MaskStructure("block", (2, 3)), MaskStructure("channel"), MaskStructure()]
)
def test_expand_undoes_unit_scores(structure):
    units = unit_scores(np.ones((6, 4), np.float32), structure)
    spread = expand(units, structure, (6, 4))
    assert spread.shape == (6, 4)
    assert np.unique(spread).size == 1
