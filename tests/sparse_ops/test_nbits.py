"""Weights of few bits without their zeros: what is packed is what is unpacked, and nothing else is read."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.formats.nbits import LAYOUTS, join, most_of_16, pack, read

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def scale_of(packed):
    """[groups, N]"""
    by_block = packed.scales.reshape(-(-packed.N // 16), -1, 16)
    return by_block.transpose(1, 0, 2).reshape(by_block.shape[1], -1)[:, : packed.N].astype(np.float32)


def zero_of(packed):
    """[groups, N], or None"""
    return scale_of(dataclasses.replace(packed, scales=packed.zeros)) if packed.layout.zeros else None


@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from(list(LAYOUTS.values())),
    K=st.integers(1, 300),
    N=st.integers(1, 40),
    group=st.sampled_from([16, 32, 64, 128]),
    kept=st.integers(1, 15),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_packing_keeps_every_number(layout, K, N, group, kept, density, seed, packed_levels):
    group = max(group, min(layout.groups))
    packed, levels = packed_levels(K, N, layout, group=group, kept=kept, density=density, seed=seed)
    packed.validate()
    np.testing.assert_array_equal(packed.levels(), levels)
    assert packed.nonzero() == np.count_nonzero(levels)
    sizes = {name: value for name, value in packed.attributes().items() if name != "format"}
    known = read(layout, sizes, list(packed.arrays().values()))
    np.testing.assert_array_equal(known.levels(), levels)
    assert np.abs(packed.unpack() - levels).max() <= np.abs(levels).max()  # scales are 0 to 2
    again = pack(levels, scale_of(packed), group, layout, zero_of(packed))
    for name, array in packed.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
    np.testing.assert_array_equal(
        packed.unpack(), levels.astype(np.float32) * scale_of(packed)[np.arange(K) // group]
    )


@pytest.mark.parametrize(("density", "bytes_each"), [(0.5, 0.375), (0.3, 0.275), (0.2, 0.225)])
def test_a_bitmap_takes_a_bit_a_weight_and_four_for_each_that_is_kept(density, bytes_each, packed_levels):
    packed, levels = packed_levels(1024, 256, LAYOUTS["bitmap4"], group=128, density=density)
    nbytes = packed.nbytes - packed.scales.nbytes
    assert nbytes / levels.size == pytest.approx(bytes_each, abs=0.01)
    assert packed.scales.nbytes == levels.size * 2 // 128


def test_n_of_16_takes_a_byte_for_each_that_is_kept(packed_levels):
    packed, levels = packed_levels(1024, 256, LAYOUTS["n_of_16"], kept=6)
    assert packed.values.nbytes == levels.size * 6 // 16


@every_layout
def test_a_large_weight_is_packed_part_by_part(layout, monkeypatch, packed_levels):
    whole, _ = packed_levels(130, 70, layout)
    monkeypatch.setattr("sparse_onnx.sparse_ops.formats.nbits._AT_ONCE", 130 * 32)
    parts, _ = packed_levels(130, 70, layout)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, parts.arrays()[name])


@every_layout
def test_what_a_layout_cannot_hold_is_refused(layout, packed_levels):
    packed, levels = packed_levels(64, 16, layout)
    scale = scale_of(packed)
    odd = scale.copy()
    for bad in (0.1, 0.0, -1.0, np.inf, np.nan, 1e6):
        odd[0, 3] = bad
        with pytest.raises(ValueError, match="float16"):
            pack(levels, odd, 64, layout, zero_of(packed))
    for level in (layout.middle, -layout.middle - 1):
        wide = 2 * level if layout.zeros else level
        with pytest.raises(ValueError, match=f"levels of {layout.bits} bits"):
            pack(np.where(levels == 0, 0, wide), scale, 64, layout, zero_of(packed))
    with pytest.raises(ValueError, match="groups"):
        pack(levels, scale, 48, layout)
    with pytest.raises(ValueError, match="groups"):
        pack(levels, scale[:, 1:], 64, layout)


def test_n_of_16_keeps_as_many_as_the_fullest_sixteen_has(packed_levels):
    layout = LAYOUTS["n_of_16"]
    packed, levels = packed_levels(64, 16, layout, kept=5)
    assert packed.kept == most_of_16(levels != 0) == 5
    assert packed.values.size == 5 * 4 * 16
    levels[:16, 2] = 1
    with pytest.raises(ValueError, match="15 of 16"):
        pack(levels, scale_of(packed), 64, layout)
    levels[3, 2] = 0
    assert pack(levels, scale_of(packed), 64, layout).kept == 15
    assert pack(0 * levels, scale_of(packed), 64, layout).kept == 1


def changed(packed, **arrays):
    return dataclasses.replace(packed, **arrays)


@every_layout
def test_damaged_tensors_are_refused(layout, packed_levels):
    packed, _ = packed_levels(70, 20, layout)
    packed.validate()
    infinite, negative = packed.scales.copy(), packed.scales.copy()
    infinite[3], negative[3] = np.inf, -0.0
    damaged = [
        changed(packed, values=packed.values[:-1]),
        changed(packed, values=np.append(packed.values, np.uint8(0))),
        changed(packed, scales=packed.scales[:-1]),
        changed(packed, scales=infinite),
        changed(packed, scales=negative),
        changed(packed, group=48),
        changed(packed, N=packed.N + 16),
        changed(packed, K=packed.K + 64),
    ]
    if layout.zeros:
        damaged += [
            changed(packed, zeros=packed.zeros[1:]),
            changed(packed, zeros=packed.zeros | np.uint8(16)),
        ]
    if layout.masks:
        full = packed.masks.copy()
        full[:8] = 255
        damaged += [changed(packed, masks=packed.masks[:-1]), changed(packed, masks=full)]
    else:
        doubled = packed.values.copy()
        doubled[1] = doubled[0]
        damaged += [changed(packed, values=doubled), changed(packed, kept=16), changed(packed, kept=0)]
    for one in damaged:
        with pytest.raises(FormatError):
            one.unpack()


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(list(LAYOUTS.values())),
    K=st.integers(1, 200),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    last=st.integers(1, 40),
)
def test_joined_linears_are_the_weight_of_all_side_by_side(layout, K, blocks, last, packed_levels):
    sizes = [16 * count for count in blocks] + [last]
    options = {"group": 64, "kept": 16 if K < 16 else 5, "density": 0.5}
    parts = [packed_levels(K, n, layout, seed=seed, **options) for seed, n in enumerate(sizes)]
    if len({packed.kept for packed, _ in parts}) > 1:  # few inputs: one of them keeps fewer
        with pytest.raises(ValueError, match="join"):
            join([packed for packed, _ in parts])
        return
    whole = join([packed for packed, _ in parts])
    np.testing.assert_array_equal(whole.levels(), np.hstack([levels for _, levels in parts]))
    np.testing.assert_array_equal(whole.unpack(), np.hstack([packed.unpack() for packed, _ in parts]))


def test_what_does_not_fit_is_not_joined(packed_levels):
    one, _ = packed_levels(64, 32, LAYOUTS["bitmap4"])
    for other in (
        packed_levels(64, 32, LAYOUTS["bitmap8"])[0],
        packed_levels(64, 32, LAYOUTS["bitmap4_zeros"])[0],
        packed_levels(65, 32, LAYOUTS["bitmap4"])[0],
        packed_levels(64, 32, LAYOUTS["bitmap4"], group=32)[0],
    ):
        with pytest.raises(ValueError, match="join"):
            join([one, other])
    narrow, _ = packed_levels(64, 20, LAYOUTS["bitmap4"])
    assert join([one, narrow]).N == 52
    with pytest.raises(ValueError, match="whole blocks"):
        join([narrow, one])


@every_layout
def test_vectors_that_are_none_of_the_format_are_not_read(layout, packed_levels):
    packed, _ = packed_levels(70, 20, layout)
    sizes = {name: value for name, value in packed.attributes().items() if name != "format"}
    arrays = list(packed.arrays().values())
    for name in sizes:
        with pytest.raises(FormatError, match="must be positive"):
            read(layout, {**sizes, name: 0}, arrays)
    for place, array in enumerate(arrays):
        for bad in (array[None], array.astype(np.int32)):
            with pytest.raises(FormatError, match="must be a vector of"):
                read(layout, sizes, [*arrays[:place], bad, *arrays[place + 1 :]])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_are_refused_or_a_weight(data, packed_levels):
    """Nothing but a FormatError comes of a file that says anything."""
    layout = data.draw(st.sampled_from(list(LAYOUTS.values())))
    K, N = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 40))
    packed, _ = packed_levels(K, N, layout, kept=data.draw(st.integers(1, 15)))
    sizes = {name: value for name, value in packed.attributes().items() if name != "format"}
    arrays = {name: array.copy() for name, array in packed.arrays().items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*sizes, *arrays]))
        if name in sizes:
            step = data.draw(st.sampled_from([-64, -1, 1, 16, 64, 2**31, -(2**40)]))
            sizes[name] += step
        elif data.draw(st.booleans()):
            arrays[name] = arrays[name][: data.draw(st.integers(0, arrays[name].size))]
        elif arrays[name].size:
            raw = arrays[name].view(np.uint8)
            raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(layout, sizes, list(arrays.values()))
        matrix = found.unpack()
        stored = found.nonzero()
    except FormatError:
        return
    assert matrix.shape == (sizes["K"], sizes["N"])
    assert np.isfinite(matrix).all()
    assert 0 <= stored <= matrix.size
