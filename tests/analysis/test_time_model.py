"""From sums over layers to the time of the whole: what anchors determine, and what they leave open."""

import pytest

from sparse_onnx.analysis.time_model import Anchor, Sums, fit


def anchor(dense, sparse, zeros, whole=None, spread=0.01):
    """Of a model with a rest of 4 ms, dense layers at 0.8 and sparse ones at 1.1 of their time alone."""
    return Anchor(
        Sums(dense, sparse, zeros), 4 + 0.8 * dense + 1.1 * sparse if whole is None else whole, spread
    )


def test_exact_times_give_the_model_that_made_them():
    found = fit([anchor(20, 0, 0), anchor(8, 9, 0.3), anchor(0, 12, 0.5), anchor(0, 4, 0.9)])
    assert found.rest_ms == pytest.approx(4, abs=0.05)
    assert found.dense_factor == pytest.approx(0.8, abs=0.005)
    assert found.sparse_factor == pytest.approx(1.1, abs=0.005)
    assert found.milliseconds(Sums(0, 8, 0.7)) == pytest.approx(4 + 8.8, rel=2e-3)
    assert 0.05 <= found.error < 0.06


def test_one_anchor_leaves_the_factors_at_one_and_says_that_it_is_rough():
    found = fit([anchor(20, 0, 0, whole=26)])
    assert (found.rest_ms, found.dense_factor, found.sparse_factor) == pytest.approx((6, 1, 1))
    assert found.milliseconds(Sums(0, 5, 0.9)) == pytest.approx(11)
    assert found.error > 0.1


def test_anchors_are_met_and_what_is_left_is_corrected_between_them():
    anchors = [
        anchor(20, 0, 0),
        anchor(0, 12, 0.5, whole=18.5),
        anchor(0, 8, 0.7, whole=13.5),
        anchor(0, 4, 0.9),
    ]
    found = fit(anchors)
    for each in anchors:
        assert found.milliseconds(each.sums) == pytest.approx(each.whole_ms)
    assert (
        found.error > fit([anchor(20, 0, 0), anchor(0, 12, 0.5), anchor(0, 8, 0.7), anchor(0, 4, 0.9)]).error
    )


def test_noise_widens_the_interval():
    anchors = [(20, 0, 0), (0, 12, 0.5), (0, 4, 0.9)]
    quiet, loud = (fit([anchor(*each, spread=spread) for each in anchors]) for spread in (0.0, 0.2))
    assert quiet.error < 0.06 < loud.error


def test_a_model_is_never_free():
    found = fit([anchor(20, 0, 0, whole=10), anchor(0, 19, 0.5, whole=9), anchor(0, 15, 0.9, whole=1)])
    assert found.milliseconds(Sums(0, 1, 0.95)) > 0
