"""Differences between outputs: known values, values that are not finite, and things that cannot be compared."""

import math

import numpy as np
import pytest

from sparse_onnx.errors import VerificationError
from sparse_onnx.verification.comparison import Difference, compare

NAN, INF = math.nan, math.inf


def one(reference, candidate, dtype=np.float32):
    return compare([{"Y": np.array(reference, dtype)}], [{"Y": np.array(candidate, dtype)}])


def test_equal_outputs():
    values = [[1.0, -2.0], [0.0, 3.0]]
    assert one(values, values) == Difference(0.0, 0.0, 1.0, 1.0, "Y")


def test_known_values():
    found = one([[3.0, 4.0]], [[3.0, 4.5]])
    assert found.max_abs == 0.5
    assert found.relative_error == pytest.approx(0.1)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert found.top1_agreement == 1


def test_opposite_outputs():
    found = one([[1.0, 2.0]], [[-1.0, -2.0]])
    assert found.relative_error == pytest.approx(2)
    assert found.cosine == pytest.approx(-1)
    assert found.top1_agreement == 0


def test_scaling_changes_the_error_but_not_the_direction():
    found = one([[1.0, 2.0], [3.0, 1.0]], [[2.0, 4.0], [6.0, 2.0]])
    assert found.relative_error == pytest.approx(1)
    assert found.cosine == pytest.approx(1)
    assert found.top1_agreement == 1


def test_cosine_is_a_mean_over_samples_and_top1_over_rows():
    reference = np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    candidate = reference.copy()
    candidate[1, 1] = [0.0, 1.0]
    found = one(reference, candidate)
    assert found.cosine == pytest.approx((1 + 0.5) / 2)
    assert found.top1_agreement == pytest.approx(3 / 4)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 0), (2, 3, 4, 5)])
def test_any_rank(shape):
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape) + 1
    assert one(values, values).relative_error == 0
    if math.prod(shape):
        assert one(values, values * 2).relative_error == pytest.approx(1)


def test_reference_of_zeros():
    assert one([[0.0, 0.0]], [[0.0, 0.0]]) == Difference(0.0, 0.0, 1.0, 1.0, "Y")
    found = one([[0.0, 0.0]], [[0.0, 1e-9]])
    assert found.relative_error == INF
    assert found.cosine == 0


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [([1.0, NAN], [1.0, 2.0]), ([1.0, 2.0], [NAN, 2.0]), ([NAN, 1.0], [1.0, NAN])],
)
def test_nan_in_one_only_is_the_largest_difference(reference, candidate):
    found = one(reference, candidate)
    assert found.relative_error == INF
    assert found.max_abs == INF
    assert found.cosine == 0


def test_nan_in_the_same_places_is_no_difference():
    assert one([1.0, NAN, 3.0], [1.0, NAN, 3.0]).relative_error == 0
    assert one([1.0, NAN, 3.0], [1.0, NAN, 4.0]).relative_error > 0


@pytest.mark.parametrize("value", [INF, -INF])
def test_equal_infinities_are_no_difference(value):
    found = one([1.0, value], [1.0, value])
    assert found.relative_error == 0
    assert found.max_abs == 0
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("reference", "candidate"), [(INF, 1.0), (-INF, 1.0), (INF, -INF), (1.0, INF), (1.0, -INF)]
)
def test_infinity_in_one_only_is_a_large_difference(reference, candidate):
    assert one([1.0, reference], [1.0, candidate]).relative_error >= 0.5


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64, np.uint8])
def test_other_types(dtype):
    assert one([1, 2, 3], [1, 2, 3], dtype).relative_error == 0
    assert one([1, 2, 3], [1, 2, 4], dtype).max_abs == 1


def test_each_unequal_integer_counts_as_one():
    """A token number that is off by a thousand is not worse than one that is off by one."""
    near, far = (one([5, 6, 7, 8], [5, 6, 7, last], np.int64) for last in (9, 9000))
    assert near == far
    assert near.relative_error > 0


def test_bools_must_be_equal():
    assert one([True, False], [True, False], np.bool_).relative_error == 0
    assert one([True, False], [True, True], np.bool_).relative_error > 0


def test_worst_output_is_named():
    reference = {"A": np.ones(4), "B": np.ones(4), "C": np.ones(4)}
    candidate = {"A": np.full(4, 1.1), "B": np.full(4, 1.5), "C": np.ones(4)}
    found = compare([reference], [candidate])
    assert found.worst_output == "B"
    assert found.relative_error == pytest.approx(0.5)
    assert found.max_abs == pytest.approx(0.5)


def test_batches_together_are_as_one_batch():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((7, 3, 5))
    candidate = reference + rng.standard_normal(reference.shape) * np.arange(1, 8)[:, None, None] / 10
    whole = compare([{"Y": reference}], [{"Y": candidate}])
    cuts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    parts = compare([{"Y": reference[c]} for c in cuts], [{"Y": candidate[c]} for c in cuts])
    assert parts.max_abs == whole.max_abs
    for name in ("relative_error", "cosine", "top1_agreement"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))


def test_one_batch_of_zeros_among_others():
    """The error of all batches together: one that is zero in both adds nothing, and divides by nothing."""
    zeros, ones = np.zeros((1, 2)), np.ones((1, 2))
    found = compare([{"Y": zeros}, {"Y": ones}], [{"Y": zeros}, {"Y": ones * 1.5}])
    assert found.relative_error == pytest.approx(0.5)


def test_missing_output():
    with pytest.raises(VerificationError, match="the candidate has no output 'Y'; it has Z"):
        compare([{"Y": np.ones(2)}], [{"Z": np.ones(2)}])


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2)])
def test_other_shape(shape):
    with pytest.raises(VerificationError, match="output 'Y' has shape"):
        compare([{"Y": np.ones(2)}], [{"Y": np.ones(shape)}])


def test_inputs_are_not_written_to():
    reference, candidate = (np.array([1.0, NAN, INF]) for _ in range(2))
    for array in (reference, candidate):
        array.flags.writeable = False
    assert compare([{"Y": reference}], [{"Y": candidate}]).relative_error == 0
