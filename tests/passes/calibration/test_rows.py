"""Rows that wait until there are enough of them."""

import numpy as np
import pytest

from sparse_onnx.passes.calibration.rows import Gathered


@pytest.mark.parametrize(
    "sizes", [[1, 2, 3], [2047, 1, 1], [2048, 5], [1024, 1025, 3000], [5000, 7, 0, 3], [700] * 9]
)
def test_gathered_rows_are_all_there_and_in_order(sizes):
    gathered, found = Gathered(), []
    start = 0
    for size in sizes:
        rows = np.arange(start, start + size, dtype=np.float32)
        blocks = gathered.add({"x": rows[:, None] * [1, 2], "y": rows[:, None]})
        found += [{name: part.copy() for name, part in block.items()} for block in blocks]
        start += size
    found += [{name: part.copy() for name, part in block.items()} for block in gathered.rest()]
    assert not list(gathered.rest())
    x, y = (np.concatenate([block[name] for block in found]) for name in "xy")
    np.testing.assert_array_equal(x, np.arange(start)[:, None] * [1, 2])
    np.testing.assert_array_equal(y, np.arange(start)[:, None])
    assert all(len(block["x"]) == len(block["y"]) <= max(2048, *sizes) for block in found)


def test_gathered_rows_of_another_kind_do_not_mix():
    gathered = Gathered()
    assert not list(gathered.add({"x": np.ones((3, 2), np.float32), "y": np.ones((3, 1), np.float32)}))
    (first,) = gathered.add({"x": np.full((4, 2), 2, np.float32)})
    assert {name: part.shape for name, part in first.items()} == {"x": (3, 2), "y": (3, 1)}
    (second,) = gathered.add({"x": np.full((1, 2), 3, np.float64)})
    assert second["x"].dtype == np.float32
    np.testing.assert_array_equal(second["x"], np.full((4, 2), 2))
    (third,) = gathered.rest()
    assert third["x"].dtype == np.float64
