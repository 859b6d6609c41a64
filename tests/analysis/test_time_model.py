"""From sums over layers to the time of the whole: what anchors determine, what they leave open, and what scatters."""

import math
import statistics

import numpy as np
import pytest

from sparse_onnx.analysis.time_model import Anchor, Sums, fit, make_anchor, scatter


def anchor(dense, sparse, zeros, whole=None, spread=0.01):
    """Of a model with a rest of 4 ms, dense layers at 0.85 and sparse ones at 0.9 of their time alone."""
    return Anchor(
        Sums(dense, sparse, zeros), 4 + 0.85 * dense + 0.9 * sparse if whole is None else whole, spread
    )


EXACT = [anchor(20, 0, 0), anchor(8, 9, 0.3), anchor(0, 12, 0.5), anchor(0, 4, 0.9)]


def test_exact_times_give_the_model_that_made_them():
    found = fit(EXACT)
    assert found.rest_ms == pytest.approx(4, abs=0.1)
    assert found.dense_factor == pytest.approx(0.85, abs=0.01)
    assert found.sparse_factor == pytest.approx(0.9, abs=0.01)
    assert found.milliseconds(Sums(0, 8, 0.7)) == pytest.approx(4 + 7.2, rel=2e-3)
    assert 0.05 <= found.error < 0.06


def test_one_anchor_leaves_the_factors_at_one_and_says_that_it_is_rough():
    found = fit([anchor(20, 0, 0, whole=26)])
    assert (found.rest_ms, found.dense_factor, found.sparse_factor) == pytest.approx((6, 1, 1))
    assert found.milliseconds(Sums(0, 5, 0.9)) == pytest.approx(11)
    assert found.error == 0.15
    assert fit([anchor(20, 0, 0, whole=26)], noise=0.2).error > 2 * 0.2


OFF = [anchor(20, 0, 0), anchor(0, 12, 0.5, whole=19), anchor(0, 8, 0.7, whole=9.5), anchor(0, 4, 0.9)]


def test_what_is_left_is_corrected_where_scatter_does_not_explain_it():
    found = fit([Anchor(each.sums, each.whole_ms, 0.001) for each in OFF])
    for each in OFF:
        assert found.milliseconds(each.sums) == pytest.approx(each.whole_ms, rel=1e-3)
    assert found.error > fit(EXACT).error + 0.02


def test_what_scatter_explains_is_not_corrected():
    found = fit([Anchor(each.sums, each.whole_ms, 0.8) for each in OFF], noise=0.4)
    assert found.corrections == (1, 1, 1, 1)
    assert found.milliseconds(Sums(0, 8, 0.7)) > 10, "as those beside it say"
    halfway = fit([Anchor(each.sums, each.whole_ms, 0.3) for each in OFF], noise=0.1).corrections
    full = fit([Anchor(each.sums, each.whole_ms, 0.0) for each in OFF]).corrections
    assert 1 < halfway[1] < full[1]
    assert full[2] < halfway[2] < 1


def test_noise_widens_the_interval():
    anchors = [(20, 0, 0), (0, 12, 0.5), (0, 4, 0.9)]
    quiet, loud = (fit([anchor(*each, spread=spread) for each in anchors]) for spread in (0.0, 0.2))
    assert quiet.error < 0.06 < 0.19 < loud.error
    sure = [anchor(*each, spread=0.0) for each in anchors]
    assert fit(sure, noise=0.1).error > 2 * 0.1, "the timing that it is compared with scatters, too"


def test_noise_makes_no_layer_free_or_dear():
    """Anchors of nearly equal sums determine next to nothing: the factors stay together."""
    sums = [(90, 4, 0.0), (25, 24, 0.35), (9.5, 24, 0.6), (5, 27, 0.72), (3.2, 26, 0.83)]
    times = [92, 47, 36, 32, 33]
    anchors = [anchor(*each, whole=whole, spread=0.1) for each, whole in zip(sums, times, strict=True)]
    found = fit(anchors, noise=0.08)
    assert found.sparse_factor == pytest.approx(found.dense_factor, abs=0.15)
    assert 0.5 < found.sparse_factor < 1.5


def steep(spread=0.0):
    """Layers that cost 8 ms less inside the model than alone."""
    return [
        anchor(*each, whole=sum(each[:2]) - 8, spread=spread)
        for each in ((40, 0, 0), (0, 30, 0.5), (0, 16, 0.9))
    ]


def test_beyond_the_anchors_time_lies_between_the_line_and_proportion():
    found = fit(steep())
    assert found.rest_ms == pytest.approx(-8, abs=0.1)
    for sums in (Sums(0, 16, 0.9), Sums(0, 20, 0.8), Sums(20, 4, 0.3)):
        assert found.milliseconds(sums) == pytest.approx(sums.dense_ms + sums.sparse_ms - 8, rel=0.02)
        assert found.error_beyond(sums) == 0
    sums = Sums(0, 12, 0.95)
    assert found.milliseconds(sums) == pytest.approx(math.sqrt(4 * 6), rel=0.02)
    assert found.error_beyond(sums) == pytest.approx(math.sqrt(6 / 4) - 1, rel=0.05)
    assert found.milliseconds(Sums(0, 15.99, 0.9)) == pytest.approx(8, rel=0.02), "it does not jump"
    tiny = Sums(0, 1e-3, 0.99)
    assert 0 < found.milliseconds(tiny) < 1e-3
    assert found.error_beyond(tiny) > 1


def test_a_rest_above_zero_is_believed_everywhere():
    found = fit(EXACT)
    assert found.milliseconds(Sums(0, 1, 0.98)) == pytest.approx(4.9, rel=0.02)
    assert found.error_beyond(Sums(0, 1, 0.98)) == found.error_beyond(Sums(0, 0, 0)) == 0


def test_a_model_is_never_free():
    found = fit([anchor(20, 0, 0, whole=10), anchor(0, 19, 0.5, whole=9), anchor(0, 15, 0.9, whole=1)])
    assert found.milliseconds(Sums(0, 1, 0.95)) > 0


def test_scatter_is_that_of_the_repetitions_whatever_they_are_of():
    assert scatter([[2.0, 2.0], [3.0, 3.0, 3.0]]) == 0
    assert scatter([[2.0], [3.0], []]) == scatter([]) == 0
    both = [math.exp(0.1), math.exp(-0.1)]
    assert scatter([both]) == pytest.approx(math.sqrt(2) * 0.1)
    assert scatter([both, [5 * value for value in both]]) == pytest.approx(math.sqrt(2) * 0.1)
    rng = np.random.default_rng(0)
    groups = [level * np.exp(rng.normal(0, 0.05, 3)) for level in np.linspace(1, 4, 2000)]
    assert scatter(groups) == pytest.approx(0.05, rel=0.05)


def test_an_anchor_is_as_sure_as_its_repetitions():
    sums = Sums(0, 10, 0.8)
    few, many = (make_anchor(sums, 40, [2.0, 2.1, 1.6] * n, 0.1) for n in (1, 12))
    assert few.whole_ms == many.whole_ms == 20
    assert few.spread == pytest.approx(math.sqrt(12) * many.spread)
    assert 1.96 * 0.1 / math.sqrt(3) < few.spread < 1.5 * 1.96 * 0.1
    assert make_anchor(sums, 40, [2.0, 2.0, 2.0], 0.0).spread == 0


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.06, 0.1])
def test_the_interval_holds_another_timing(noise):
    """Models whose sessions scatter by ``noise``, timed as analyze does it (three sessions an anchor), and once more as
    optimize does it."""
    rng = np.random.default_rng(1)
    true = {0.0: (126.0, 0.0), 0.5: (0.0, 118.0), 0.7: (0.0, 99.0), 0.8: (0.0, 74.0), 0.9: (0.0, 51.0)}
    inside, errors = [], []
    for _ in range(300):
        dense_ms = 126.0
        timed = []
        for zeros, (dense, sparse) in true.items():
            speedup = dense_ms / (dense + sparse - 8)
            timed.append((Sums(dense, sparse, zeros), speedup, speedup * np.exp(rng.normal(0, noise, 3))))
        found = scatter([speedups for _, _, speedups in timed])
        model = fit([make_anchor(sums, dense_ms, list(s), found) for sums, _, s in timed], found)
        for sums, speedup, _ in timed[1:]:
            again = speedup * math.exp(rng.normal(0, noise))
            predicted = dense_ms / model.milliseconds(sums)
            inside.append(predicted / (1 + model.error) <= again <= predicted * (1 + model.error))
        errors.append(model.error)
    assert np.mean(inside) > 0.9
    # No wider than it has to be.
    assert statistics.median(errors) < 0.055 + 3.5 * noise


EIGHT = Anchor(Sums(2, 0, 0, {8: 6.0}), 4 + 0.85 * 2 + 1.5 * 6, 0.01)


def test_few_bits_have_the_factor_that_their_anchor_leaves_and_floats_stay_as_they_are():
    plain, both = fit(EXACT), fit([EIGHT, *EXACT])
    assert both.encoded == {8: pytest.approx(1.5, abs=0.01)}
    assert both.milliseconds(EIGHT.sums) == pytest.approx(EIGHT.whole_ms)
    for sums in (Sums(20, 0, 0), Sums(0, 8, 0.7), Sums(0, 1, 0.99)):
        assert both.milliseconds(sums) == plain.milliseconds(sums)
        assert both.error_beyond(sums) == plain.error_beyond(sums)
    assert both.error == plain.error
    assert (both.factor(8), both.factor(4)) == (both.encoded[8], both.sparse_factor)
    assert plain.milliseconds(Sums(0, 0, 0, {4: 6.0})) == pytest.approx(4 + 0.9 * 6, rel=0.01)


def test_few_bits_lie_on_the_line_where_the_rest_is_below_zero():
    """Floats meet proportion there; the line of few bits ends at their anchor."""
    floats = [
        Anchor(Sums(dense, 0, zeros), dense - 3, 0.01) for dense, zeros in ((20, 0), (15, 0.5), (10, 0.8))
    ]
    small = Anchor(Sums(0, 0, 0, {4: 2.0}), 1.0, 0.01)
    found = fit([*floats, small])
    assert found.rest_ms < 0
    assert found.milliseconds(small.sums) == pytest.approx(1.0)
    assert found.error_beyond(small.sums) == 0


def test_an_anchor_faster_than_all_the_rest_costs_something_still():
    found = fit([*EXACT, Anchor(Sums(0, 0, 0, {8: 6.0}), 1.0, 0.01)])
    assert found.encoded[8] == 0.05
