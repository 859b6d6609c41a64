"""How fast a machine is."""

import numpy as np

from sparse_onnx.tools.machine import read_bandwidth, together


def test_together_adds_what_all_threads_find():
    assert together(lambda index: float(index), 4) == 6.0


def test_bandwidth_counts_every_array():
    """Whatever the speed: it is finite, positive, and every array was read at least once."""
    arrays = [np.ones(1000), np.ones(1000)]
    assert 0 < read_bandwidth(arrays, 0.0) < 1e15
