"""What the statistics of a layer's input accept and refuse."""

import numpy as np
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers import InputStatistics


def test_whole_diagonal_and_blocks_agree_on_size_and_diagonal():
    gram = np.diag([1.0, 2.0, 3.0])
    for form in (gram, gram.diagonal().copy(), (gram[:2, :2], gram[2:, 2:])):
        statistics = InputStatistics(form, np.zeros(3), 5)
        assert statistics.size == 3
        np.testing.assert_array_equal(statistics.diagonal, [1, 2, 3])
        assert statistics.diagonal.dtype == np.float64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gram": np.zeros((2, 3))}, r"gram must be"),
        ({"gram": np.zeros((2, 2, 2))}, r"gram must be"),
        ({"gram": ()}, r"no block"),
        ({"gram": (np.zeros(2),)}, r"gram must be"),
        ({"gram": np.zeros((2, 2), np.int64)}, r"float32 or float64"),
        ({"gram": np.full((2, 2), np.nan)}, r"NaN"),
        ({"gram": -np.eye(2)}, r"negative"),
        ({"gram": np.eye(2), "mean": np.zeros(3)}, r"mean must be \[2\]"),
        ({"gram": np.eye(2), "count": -1}, r"count"),
    ],
)
def test_what_is_no_gram_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        InputStatistics(**fields)
