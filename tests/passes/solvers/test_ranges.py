"""Ranges and smoothing against brute force, and histograms against the values that they count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.calibration.histograms import ChannelHistograms
from sparse_onnx.passes.solvers.ranges import CALIBRATORS, LEVELS, Histogram, entropy, minmax, mse, percentile
from sparse_onnx.passes.solvers.smoothing import ChannelRange, rounding_errors, smoothing_scale

RNG = np.random.default_rng(9)


def of(values, bins=2048):
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    return Histogram(low, high, np.histogram(values, bins, (low, high))[0])


def rounding(values, low, high):
    step = (high - low) / (LEVELS - 1)
    zero = np.rint(-low / step)
    return float(
        np.mean(((np.clip(np.rint(values / step) + zero, 0, LEVELS - 1) - zero) * step - values) ** 2)
    )


GAUSS = RNG.standard_normal(200_000)
OUTLIERS = np.concatenate([GAUSS, [40.0, -25.0]])


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("values", [GAUSS, OUTLIERS, np.abs(GAUSS), -np.abs(GAUSS)])
def test_every_range_holds_zero_and_lies_in_what_was_seen(name, values):
    histogram = of(values)
    low, high = CALIBRATORS[name](histogram)
    assert histogram.low <= low <= 0 <= high <= histogram.high
    assert low < high


def test_minmax_is_all():
    assert minmax(of(OUTLIERS)) == (-25.0, 40.0)


def test_percentile_is_a_quantile():
    low, high = percentile(of(GAUSS), 0.99)
    np.testing.assert_allclose([low, high], np.quantile(GAUSS, [0.01, 0.99]), atol=0.02)


@pytest.mark.parametrize("values", [GAUSS, OUTLIERS, np.maximum(GAUSS, 0), RNG.laplace(size=200_000)])
def test_mse_is_as_good_as_the_best_of_many_ranges(values):
    histogram = of(values)
    found = rounding(values, *mse(histogram))
    parts = np.linspace(0.05, 1, 20)
    tried = [
        rounding(values, histogram.low * p, histogram.high * q) for p in parts for q in parts if p + q > 0.1
    ]
    assert found <= 1.05 * min(tried)


def test_entropy_cuts_off_outliers_and_leaves_most():
    low, high = entropy(of(OUTLIERS))
    assert high < 20
    assert (np.clip(GAUSS, low, high) == GAUSS).mean() > 0.98


def test_an_empty_histogram_gives_its_ends():
    empty = Histogram(-1.0, 2.0, np.zeros(64))
    assert all(-1 <= low < high <= 2 for low, high in (function(empty) for function in CALIBRATORS.values()))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_histograms_do_not_depend_on_the_batches(seed, parts):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((60, 4)) * 10.0 ** rng.integers(-4, 5, 4)).astype(np.float32)
    rows[:, 0] = 0
    once, often = ChannelHistograms(4), ChannelHistograms(4)
    once.add(rows)
    for part in np.array_split(rows, parts):
        often.add(part)
    one, other = (histograms.histogram(np.ones(4), np.ones(4)) for histograms in (once, often))
    assert (one.low, one.high) == (other.low, other.high) == (min(rows.min(), 0), max(rows.max(), 0))
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.counts.sum() == np.count_nonzero(rows)
    np.testing.assert_allclose(once.channels.power, (rows.astype(np.float64) ** 2).mean(0), rtol=1e-6)


def test_a_histogram_of_scaled_channels_is_near_that_of_the_scaled_values():
    rows = (RNG.standard_normal((5000, 3)) * [1, 10, 0.1]).astype(np.float32)
    histograms = ChannelHistograms(3)
    histograms.add(rows)
    found = histograms.histogram(np.array([1, 10, 0.1]), np.ones(3))
    scaled = rows / [1, 10, 0.1]
    for share in (0.99, 0.999):
        np.testing.assert_allclose(
            percentile(found, share), np.quantile(scaled, [1 - share, share]), atol=0.1
        )


def test_zeros_do_not_hide_what_else_there_is():
    rows = np.maximum(RNG.standard_normal((20000, 3)), 0).astype(np.float32)
    histograms = ChannelHistograms(3)
    histograms.add(rows)
    found = histograms.histogram(np.ones(3), np.ones(3))
    assert found.counts.sum() == np.count_nonzero(rows)
    for name, function in CALIBRATORS.items():
        low, high = function(found)
        assert low == 0, name
        assert 2.5 < high <= rows.max(), name


def test_a_stride_counts_fewer_rows_and_bounds_all():
    rows = RNG.standard_normal((100, 2)).astype(np.float32)
    histograms = ChannelHistograms(2, stride=7)
    for part in np.array_split(rows, 9):
        histograms.add(part)
    found = histograms.histogram(np.ones(2), np.ones(2))
    assert found.counts.sum() == 2 * 15
    assert (found.low, found.high) == (rows.min(), rows.max())


def test_bad_rows_are_told():
    with pytest.raises(UsageError, match="NaN or Inf"):
        ChannelHistograms(2).add(np.array([[1, np.nan]], np.float32))
    with pytest.raises(UsageError, match="no token"):
        _ = ChannelHistograms(2).channels
    nothing = ChannelHistograms(2)
    nothing.add(np.zeros((3, 2), np.float32))
    assert nothing.histogram(np.ones(2), np.ones(2)) is None


def layer(loud=30.0):
    x = RNG.standard_normal((4000, 24)) * np.exp(RNG.standard_normal(24))
    x[:, 5] *= loud
    W = RNG.standard_normal((24, 12)).astype(np.float32)
    return x, W, ChannelRange(x.min(0), x.max(0), (x**2).mean(0))


def test_rounding_errors_are_those_of_rounded_layers():
    x, W, channels = layer()
    for scale in (np.ones(24), smoothing_scale(W, channels).astype(np.float64)):
        scaled, weight = x / scale, W * scale[:, None]
        low, high = min(scaled.min(), 0), max(scaled.max(), 0)
        step = (high - low) / 255
        zero = np.rint(-low / step)
        of_x = ((np.clip(np.rint(scaled / step) + zero, 0, 255) - zero) * step - scaled) @ weight
        steps = np.abs(weight).max(0) / 127
        of_w = scaled @ (np.rint(weight / steps) * steps - weight)
        measured = [(of_x**2).sum(1).mean(), (of_w**2).sum(1).mean()]
        np.testing.assert_allclose(rounding_errors(W, channels, scale), measured, rtol=0.5)


def test_smoothing_makes_the_error_smaller_and_has_mean_one():
    _, W, channels = layer()
    scale = smoothing_scale(W, channels)
    assert scale.dtype == np.float32
    np.testing.assert_allclose(np.log(scale).mean(), 0, atol=1e-5)
    assert sum(rounding_errors(W, channels, scale.astype(float))) < 0.2 * sum(
        rounding_errors(W, channels, np.ones(24))
    )


def test_channels_that_are_never_seen_or_never_used_have_finite_scales():
    _, W, channels = layer()
    W[3] = 0
    channels.low[4] = channels.high[4] = channels.power[4] = 0
    scale = smoothing_scale(W, channels)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
