"""MatMulNBits as ONNX Runtime stores it; what it computes is tested with the other operators on integers."""

import numpy as np
import pytest

from sparse_onnx.model.integer_grid import IntegerGrid
from sparse_onnx.model.nbits import unpack_bits
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits

RNG = np.random.default_rng(3)


def grid(bits, K, N, group_size, *, symmetric=True):
    groups = -(-K // group_size)
    zero_point = np.full((groups, N), 1 << bits - 1, np.uint8)
    if not symmetric:
        zero_point = RNG.integers(0, 1 << bits, (groups, N)).astype(np.uint8)
    integers = RNG.integers(0, 1 << bits, (K, N)).astype(np.uint8)
    scale = RNG.uniform(0.5, 2, (groups, N)).astype(np.float32)
    return IntegerGrid(bits, K, lambda: integers, scale, zero_point, group_size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("K", "group_size", "block"),
    [(64, 32, 32), (64, 16, 16), (96, 48, 16), (100, 100, 128), (70, 32, 32), (300, 256, 128)],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_those_of_the_operator(bits, K, group_size, block, symmetric):
    given = grid(bits, K, 5, group_size, symmetric=symmetric)
    arrays = LowerMatMulNBits.arrays(given)
    blocks = -(-K // block)
    assert arrays["packed"].shape == (5, blocks, block * bits // 8)
    integers = unpack_bits(arrays["packed"], bits, block).reshape(5, -1)
    np.testing.assert_array_equal(integers[:, :K].T, given.integers)
    group = np.arange(blocks) * block // group_size
    np.testing.assert_array_equal(arrays["scales"].reshape(5, blocks).T, given.scale[group])
    if symmetric:
        assert "zero_points" not in arrays
        zero_point = np.full((5, blocks), 1 << bits - 1)
    else:
        zero_point = unpack_bits(arrays["zero_points"].reshape(5, -1), bits, blocks)
        np.testing.assert_array_equal(zero_point.T, given.zero_point[group])
    padding = integers[:, K:] == np.repeat(zero_point, block, axis=1)[:, K:]
    assert padding.all(), "what lies behind K stands for 0"
