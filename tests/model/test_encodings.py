"""The arithmetic of encodings: exact round trips on every grid, and nothing rounded in silence."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sparse_onnx.errors import ModelFileError, UsageError
from sparse_onnx.model.encodings import (
    DENSE,
    Affine,
    Palette,
    dequantize,
    find_in_codebook,
    quantize,
    restore,
    spread,
)

INTEGERS = [
    dtype for dtype in ir.DataType if dtype.name in ("INT4", "UINT4", "INT2", "UINT2", "INT8", "UINT8")
]
WIDE = [ir.DataType.INT16, ir.DataType.UINT16]
SCALES = [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16]
# Normal numbers of the narrowest type of scale, and far from where products leave it.
SIZES = {
    ir.DataType.FLOAT: (1e-30, 1e30),
    ir.DataType.FLOAT16: (1e-4, 100),
    ir.DataType.BFLOAT16: (1e-30, 1e30),
}


def integers_of(draw, dtype, shape):
    numbers = draw(npst.arrays(np.int32, shape, elements=st.integers(int(dtype.min), int(dtype.max))))
    return numbers.astype(dtype.numpy())


def scales_of(draw, dtype, shape):
    low, high = SIZES[dtype]
    sizes = npst.arrays(np.float64, shape, elements=st.floats(low, high))
    signs = draw(npst.arrays(np.float64, shape, elements=st.sampled_from([1.0, 1.0, -1.0])))
    return (draw(sizes) * signs).astype(dtype.numpy())


@st.composite
def affine(draw, dtypes=(*INTEGERS, *WIDE), scales=tuple(SCALES)):
    """An encoding and integers of it, of sizes around odd edges."""
    shape = draw(npst.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9))
    dtype, scale_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(scales))
    axis = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    block_size, parameters = 0, ()
    if axis is not None:
        block_size = draw(st.sampled_from([0, 1, 2, 3, shape[axis], shape[axis] + 1]))
        blocks = -(-shape[axis] // block_size) if block_size else 0
        parameters = (*shape[:axis], blocks, *shape[axis + 1 :]) if block_size else (shape[axis],)
    scale = ir.tensor(scales_of(draw, scale_dtype, parameters))
    zero_point = draw(st.sampled_from([None, 0]))
    if zero_point is not None:
        zero_point = ir.tensor(integers_of(draw, dtype, parameters))
    encoding = Affine(dtype, scale, zero_point, axis, block_size, scale_dtype)
    return encoding, integers_of(draw, dtype, shape)


def expected(encoding, integers):
    """Element by element, in float64."""
    values = np.empty(integers.shape)
    scale = encoding.scale.numpy().astype(np.float64)
    zero = (
        np.zeros(scale.shape)
        if encoding.zero_point is None
        else encoding.zero_point.numpy().astype(np.float64)
    )
    for place in np.ndindex(integers.shape):
        if encoding.axis is None:
            where = ()
        elif encoding.block_size:
            at = list(place)
            at[encoding.axis] //= encoding.block_size
            where = tuple(at)
        else:
            where = (place[encoding.axis],)
        values[place] = (float(integers[place]) - zero[where]) * scale[where]
    return values


@given(affine(dtypes=tuple(INTEGERS)))
def test_values_are_those_of_float64(case):
    """The product of so few bits and a scale has one rounding."""
    encoding, integers = case
    exact = expected(encoding, integers).astype(np.float32).astype(encoding.result.numpy())
    values = encoding.decode(integers)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, exact.astype(np.float32))


@given(affine(dtypes=tuple(INTEGERS), scales=(ir.DataType.FLOAT, ir.DataType.FLOAT16)))
def test_integers_come_back_from_their_values_alone(case):
    """Where a float has more bits than an integer, no two integers stand for one value."""
    encoding, integers = case
    scale, zero_point = encoding.grid(integers.shape)
    values = dequantize(integers, scale, zero_point, encoding.result)
    back, missing = restore(values, scale, zero_point, encoding.dtype, encoding.result)
    assert not missing.any()
    assert back.dtype == integers.dtype
    np.testing.assert_array_equal(back.astype(int), integers.astype(int))


@given(affine())
def test_values_come_back_from_any_grid(case):
    encoding, integers = case
    scale, zero_point = encoding.grid(integers.shape)
    values = dequantize(integers, scale, zero_point, encoding.result)
    back, missing = restore(values, scale, zero_point, encoding.dtype, encoding.result)
    assert not missing.any()
    np.testing.assert_array_equal(dequantize(back, scale, zero_point, encoding.result), values)


@given(affine(), st.data())
def test_what_stays_keeps_its_integer_and_a_zero_is_the_zero_point(case, data):
    encoding, integers = case
    values = encoding.decode(integers)
    gone = data.draw(npst.arrays(bool, integers.shape))
    pruned = np.where(gone, np.float32(0), values)
    stored = encoding.encode(pruned, integers)
    assert stored.dtype == integers.dtype
    zero = np.broadcast_to(encoding.grid(integers.shape)[1].astype(int), integers.shape)
    np.testing.assert_array_equal(stored.astype(int), np.where(gone, zero, integers.astype(int)))
    np.testing.assert_array_equal(encoding.decode(stored), pruned)


@given(affine(scales=(ir.DataType.FLOAT,)), st.data())
def test_rounded_floats_go_to_the_nearest_value_and_stay_where_they_are_on_the_grid(case, data):
    encoding, integers = case
    encoding = Affine(
        encoding.dtype,
        encoding.scale,
        encoding.zero_point,
        encoding.axis,
        encoding.block_size,
        encoding.result,
        True,
    )
    scale, zero_point = (np.broadcast_to(x, integers.shape) for x in encoding.grid(integers.shape))
    on_grid = dequantize(integers, scale, zero_point, encoding.result)
    shift = data.draw(npst.arrays(np.float32, integers.shape, elements=st.floats(-0.4375, 0.4375, width=32)))
    stored = on_grid + shift * scale
    np.testing.assert_array_equal(encoding.decode(stored), on_grid)
    np.testing.assert_array_equal(encoding.encode(on_grid, stored), stored)
    zeros = encoding.encode(np.zeros(integers.shape, np.float32), stored)
    np.testing.assert_array_equal(encoding.decode(zeros), 0)


@given(affine(scales=(ir.DataType.FLOAT,)), st.data())
def test_too_large_is_the_largest(case, data):
    encoding, integers = case
    scale, zero_point = (np.broadcast_to(x, integers.shape) for x in encoding.grid(integers.shape))
    values = np.copysign(np.float32(np.inf), scale)
    assert (quantize(values, scale, zero_point, encoding.dtype) == encoding.dtype.max).all()
    assert (quantize(-values, scale, zero_point, encoding.dtype) == encoding.dtype.min).all()
    nothing = np.full(integers.shape, np.nan, np.float32)
    np.testing.assert_array_equal(
        quantize(nothing, scale, zero_point, encoding.dtype), zero_point.astype(int)
    )


@pytest.mark.parametrize("ties", [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2)])
def test_ties_go_to_the_even_integer(ties):
    value, integer = ties
    one, zero = np.float32(1), np.int8(0)
    assert quantize(np.float32([value]), one, zero, ir.DataType.INT8) == integer


@pytest.mark.parametrize("scale", [0.0, np.inf, np.nan, 1e-45, 3e38])
def test_strange_scales_change_nothing_that_did_not_change(scale):
    integers = np.arange(-3, 4, dtype=np.int8)
    encoding = Affine(
        ir.DataType.INT8, ir.tensor(np.float32(scale)), ir.tensor(np.int8(2)), None, 0, ir.DataType.FLOAT
    )
    values = encoding.decode(integers)
    np.testing.assert_array_equal(encoding.encode(values, integers), integers)


@pytest.mark.parametrize("value", [0.3, 12.8, -13.0, np.nan, np.inf])
def test_values_off_the_grid_are_refused(value):
    encoding = Affine(ir.DataType.INT8, ir.tensor(np.float32(0.1)), None, None, 0, ir.DataType.FLOAT)
    integers = np.zeros((3, 2), np.int8)
    values = np.zeros((3, 2), np.float32)
    values[1, 1] = value if value != 0.3 else 0.34
    with pytest.raises(UsageError, match=r"1 of 6 values, .* are not on the grid of INT8 with one scale"):
        encoding.encode(values, integers)


def test_the_last_block_may_be_shorter():
    scales = np.float32([[1, 2], [3, 4]])
    np.testing.assert_array_equal(spread(scales, (3, 2), 0, 2), [[1, 2], [1, 2], [3, 4]])
    np.testing.assert_array_equal(spread(scales, (2, 3), 1, 2), [[1, 1, 2], [3, 3, 4]])
    np.testing.assert_array_equal(spread(scales[:1], (3, 2), 0, 2**62), [[1, 2], [1, 2], [1, 2]])


@st.composite
def palettes(draw):
    size = draw(st.integers(1, 20))
    floats = st.floats(-4, 4, width=16)
    codebook = draw(npst.arrays(np.float32, size, elements=floats)).astype(
        draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    )
    dtype = draw(
        st.sampled_from([ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT4])
    )
    low = -size if dtype.is_signed() else 0
    shape = draw(npst.array_shapes(max_dims=3, max_side=7))
    numbers = draw(npst.arrays(np.int32, shape, elements=st.integers(low, min(size - 1, 15))))
    return codebook, numbers.astype(dtype.numpy())


@given(palettes())
def test_indices_stand_for_values_of_the_codebook(case):
    codebook, indices = case
    encoding = Palette(ir.tensor(codebook))
    values = encoding.decode(indices)
    assert values.dtype == np.float32
    for place in np.ndindex(indices.shape):
        assert values[place] == np.float32(codebook[int(indices[place])])
    same = encoding.encode(values, indices)
    assert same.dtype == indices.dtype
    np.testing.assert_array_equal(same, indices)
    backwards = np.ascontiguousarray(values.reshape(-1)[::-1]).reshape(values.shape)
    np.testing.assert_array_equal(encoding.decode(encoding.encode(backwards, indices)), backwards)


def test_a_palette_with_a_zero_can_be_pruned_and_one_without_refuses():
    indices = np.uint8([[1, 2], [3, 1]])
    pruned = np.float32([[0.5, 0], [2, 0]])
    with_zero = Palette(ir.tensor(np.float32([0, 0.5, 1, 2])))
    np.testing.assert_array_equal(with_zero.encode(pruned, indices), [[1, 0], [3, 0]])
    without = Palette(ir.tensor(np.float32([-1, 0.5, 1, 2])))
    with pytest.raises(UsageError, match="2 of 4 values, 0 for example, are not in its codebook of 4 values"):
        without.encode(pruned, indices)


@pytest.mark.parametrize("index", [4, 255, -5])
def test_indices_outside_of_the_codebook_are_told(index):
    encoding = Palette(ir.tensor(np.zeros(4, np.float32)))
    with pytest.raises(ModelFileError, match=f"index {index} lies outside of its codebook of 4 values"):
        encoding.decode(np.array([0, index], np.int64))


def test_an_empty_codebook_has_nothing():
    values = np.zeros((2, 2), np.float32)
    assert find_in_codebook(values, np.zeros(0, np.float32), ir.DataType.UINT8)[1].all()


def test_what_an_index_cannot_reach_is_not_there():
    codebook = np.arange(20, dtype=np.float32)
    _, missing = find_in_codebook(np.float32([15, 16]), codebook, ir.DataType.UINT4)
    assert missing.tolist() == [False, True]


def test_dense_is_as_it_is():
    stored = np.zeros((2, 3), np.float16)
    assert DENSE.decode(stored) is stored
    assert DENSE.encode(stored, stored) is stored


@pytest.mark.parametrize(
    ("axis", "block_size", "rounded", "words"),
    [
        (None, 0, False, "INT4 with one scale"),
        (1, 0, False, "INT4 with a scale for each index of axis 1"),
        (0, 32, False, "INT4 with a scale for 32 elements along axis 0"),
        (None, 0, True, "floats rounded to INT4 in every run, with one scale"),
    ],
)
def test_what_an_encoding_is_called(axis, block_size, rounded, words):
    scale = ir.tensor(np.float32(1))
    encoding = Affine(ir.DataType.INT4, scale, None, axis, block_size, ir.DataType.FLOAT, rounded)
    assert str(encoding) == words
    assert str(Palette(ir.tensor(np.zeros(16, np.float32)))) == "indices into a codebook of 16 values"
