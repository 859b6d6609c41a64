"""Grids: what every one must hold to, whatever its bits, groups and types."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers.clipping import clipped_grid, whole_grid
from sparse_onnx.passes.solvers.grid import Grid, GridOptions, QuantizedMatrix, round_to_grid, stored_scale

OPTIONS = st.builds(
    GridOptions,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([0, 16, 17, 32]),
    symmetric=st.booleans(),
    scale_type=st.sampled_from(["float32", "float16"]),
)


def weights(largest=1e4):
    shapes = st.tuples(st.integers(1, 40), st.integers(1, 4))
    element = st.floats(-largest, largest, width=32) | st.just(0.0)
    return arrays.arrays(np.float32, shapes, elements=element)


@settings(deadline=None, max_examples=200)
@given(W=weights(), options=OPTIONS)
def test_the_whole_range_is_held_and_zero_is_exact(W, options):
    quantized = round_to_grid(W, whole_grid(W, options))
    matrix = quantized.matrix()
    scale, low, high = quantized.grid.levels(len(W))
    assert quantized.integers.dtype == options.dtype
    assert quantized.integers.min() >= options.lowest
    assert quantized.integers.max() <= options.highest
    assert quantized.scale.shape == quantized.zero_point.shape == (options.groups(len(W)), W.shape[1])
    assert (matrix[W == 0] == 0).all()
    assert np.isfinite(matrix).all()
    # Half a step of rounding, another where the zero point was rounded, and what rounding the scale itself clips.
    slack = 1e-6 if options.scale_type == "float32" else 2.0**-11
    reach = np.where(W < 0, -low, high) * scale * slack + 2.0**-25 * options.highest
    step = 0.5 if options.symmetric else 1.0
    assert (np.abs(W - matrix) <= scale * (step + 1e-5) + reach * 1.01).all()


@settings(deadline=None, max_examples=100)
@given(W=weights(), options=OPTIONS)
def test_every_integer_is_the_nearest(W, options):
    grid = whole_grid(W, options)
    scale, low, high = grid.levels(len(W))
    chosen = np.abs(round_to_grid(W, grid).matrix().astype(np.float64) - W)
    for level in range(-(1 << options.bits), 1 << options.bits):
        other = np.abs(np.float64(level) * scale - W)
        allowed = (level >= low) & (level <= high)
        assert (chosen <= other + 1e-6 * (np.abs(W) + scale))[allowed].all()


@settings(deadline=None, max_examples=100)
@given(W=weights(), options=OPTIONS)
def test_points_of_a_grid_stay_where_they_are(W, options):
    grid = whole_grid(W, options)
    once = round_to_grid(W, grid)
    again = round_to_grid(once.matrix(), grid)
    np.testing.assert_array_equal(again.integers, once.integers)


@settings(deadline=None, max_examples=100)
@given(W=weights(), options=OPTIONS, weighted=st.booleans())
def test_a_searched_grid_is_never_worse_than_the_whole_one(W, options, weighted):
    importance = np.linspace(0.5, 4, len(W)) if weighted else None
    c = np.ones(len(W)) if importance is None else importance
    starts = options.starts(len(W))

    def cost(grid):
        change = round_to_grid(W, grid).matrix().astype(np.float64) - W
        return np.add.reduceat(c[:, None] * change**2, starts, axis=0)

    searched, whole = cost(clipped_grid(W, options, importance)), cost(whole_grid(W, options))
    assert (searched <= whole * (1 + 1e-4) + 1e-30).all()


def test_an_outlier_is_clipped_where_that_helps_and_kept_where_it_is_important():
    W = np.linspace(-1, 1, 64, dtype=np.float32)[:, None].copy()
    W[7] = 4
    options = GridOptions(bits=3)
    assert clipped_grid(W, options).scale < 0.8 * whole_grid(W, options).scale
    importance = np.ones(64)
    importance[7] = 1000
    kept = round_to_grid(W, clipped_grid(W, options, importance)).matrix()
    assert abs(kept[7, 0] - 4) < 0.3


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_share_a_scale_and_the_last_may_be_shorter(symmetric):
    W = np.repeat(np.array([1, 10, 100], np.float32), [16, 16, 8])[:, None] * np.array([[1, -1]], np.float32)
    options = GridOptions(bits=4, group_size=16, symmetric=symmetric)
    quantized = round_to_grid(W, whole_grid(W, options))
    assert quantized.scale.shape == (3, 2)
    np.testing.assert_allclose(quantized.matrix(), W, rtol=1e-6)
    np.testing.assert_allclose(quantized.scale[:, 0] * [10, 1, 0.1], quantized.scale[1, 0], rtol=1e-6)
    whole = GridOptions(bits=4, group_size=64, symmetric=symmetric)
    assert whole_grid(W, whole).scale.shape == (1, 2)
    assert whole_grid(W[:1], options).scale.shape == (1, 2)


@pytest.mark.parametrize("scale_type", ["float32", "float16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_are_what_their_type_stores(bits, scale_type):
    W = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)
    options = GridOptions(bits=bits, group_size=16, scale_type=scale_type)
    for grid in (whole_grid(W, options), clipped_grid(W, options)):
        np.testing.assert_array_equal(grid.scale.astype(scale_type).astype(np.float32), grid.scale)


def test_zeros_alone_have_the_scale_one():
    for symmetric in (True, False):
        options = GridOptions(bits=4, group_size=16, symmetric=symmetric)
        for grid in (
            whole_grid(np.zeros((20, 3), np.float32), options),
            clipped_grid(np.zeros((20, 3), np.float32), options),
        ):
            np.testing.assert_array_equal(grid.scale, 1)
            np.testing.assert_array_equal(grid.zero_point, 0)


def test_what_is_too_small_for_a_scale_gets_the_smallest():
    tiny = np.full((4, 1), 1e-45, np.float32)  # denormal
    half = whole_grid(np.full((4, 1), 1e-9, np.float32), GridOptions(scale_type="float16"))
    assert half.scale.item() == 2.0**-24
    single = round_to_grid(tiny, whole_grid(tiny, GridOptions()))
    assert single.scale.item() == np.finfo(np.float32).tiny
    assert not single.matrix().any()


def test_what_is_too_large_for_a_scale_is_an_error():
    W = np.full((4, 1), 8 * 65504.0, np.float32)
    with pytest.raises(
        UsageError, match=r"above 6.55e\+04, the largest float16 scale: store scales as float32"
    ):
        whole_grid(W, GridOptions(scale_type="float16"))
    assert np.isfinite(round_to_grid(W, whole_grid(W, GridOptions())).matrix()).all()
    with pytest.raises(UsageError, match="the largest float32 scale: leave the weight out"):
        whole_grid(np.full((4, 1), 3e38, np.float32), GridOptions(bits=2))
    assert stored_scale(np.array([65504.0]), GridOptions(scale_type="float16")).item() == 65504


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"group_size": 8}, "group_size"),
        ({"group_size": 257}, "group_size"),
        ({"group_size": -1}, "group_size"),
        ({"scale_type": "bfloat16"}, "scale_type"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        GridOptions(**options)


def parts(**changes):
    return {
        "integers": np.zeros((20, 2), np.int8),
        "scale": np.ones((2, 2), np.float32),
        "zero_point": np.zeros((2, 2), np.int8),
        "options": GridOptions(bits=4, group_size=16),
    } | changes


def test_a_matrix_is_what_its_parts_say():
    integers = np.array([[-8, 7], [3, 0]], np.int8)
    scale = np.array([[0.5, 2]], np.float32)
    options = GridOptions(bits=4)
    matrix = QuantizedMatrix(integers, scale, np.zeros((1, 2), np.int8), options).matrix()
    np.testing.assert_array_equal(matrix, [[-4, 14], [1.5, 0]])
    assert matrix.dtype == np.float32
    shifted = QuantizedMatrix(
        np.array([[0], [15], [3]], np.uint8),
        np.array([[2]], np.float32),
        np.array([[3]], np.uint8),
        GridOptions(bits=4, symmetric=False),
    )
    np.testing.assert_array_equal(shifted.matrix(), [[-6], [24], [0]])
    back = shifted.grid.at(np.array([[-3], [12], [0]], np.float32))
    np.testing.assert_array_equal(back.integers, shifted.integers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"integers": np.zeros(3, np.int8)}, r"integers must be \[K, N\]"),
        ({"integers": np.zeros((0, 2), np.int8)}, "not empty"),
        ({"integers": np.full((20, 2), 8, np.int8)}, "integers must lie in -8 to 7"),
        ({"integers": np.zeros((20, 2), np.uint8)}, "integers must be int8"),
        ({"scale": np.ones((1, 2), np.float32)}, r"scale must be \[2, 2\]"),
        ({"scale": np.zeros((2, 2), np.float32)}, "scale must be float32, positive and finite"),
        ({"scale": np.full((2, 2), np.inf, np.float32)}, "scale must be float32, positive and finite"),
        ({"scale": np.ones((2, 2))}, "scale must be float32, positive and finite"),
        ({"zero_point": np.ones((2, 2), np.int8)}, "zero_point must be 0"),
        ({"zero_point": np.ones((2, 3), np.int8)}, r"zero_point must be \[2, 2\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    QuantizedMatrix(**parts())
    with pytest.raises(UsageError, match=message):
        QuantizedMatrix(**parts(**change))


def test_levels_are_zero_where_nothing_is_kept():
    grid = Grid(
        np.ones((1, 2), np.float32), np.array([[3, 0]], np.uint8), GridOptions(bits=4, symmetric=False)
    )
    kept = np.array([[True, False], [False, True]])
    _, low, high = grid.levels(2, kept)
    np.testing.assert_array_equal(low, [[-3, 0], [0, 0]])
    np.testing.assert_array_equal(high, [[12, 0], [0, 15]])
