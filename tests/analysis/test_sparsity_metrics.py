"""Metrics of zeros: small matrices by hand, plain loops, sums over weights, and what is no zero."""

import itertools

import numpy as np
import pytest

from sparse_onnx.analysis.sparsity_metrics import (
    BLOCKS,
    Blocks,
    Metrics,
    clustering_index,
    count_blocks,
    count_neighbours,
    measure,
    row_spread,
)

DIAGONAL = np.diag([1.0, 2.0, 3.0])
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 3), (4, 8), (7, 13), (8, 16), (17, 31)]


def random(shape, density=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.standard_normal(shape), 0).astype(np.float32)


def test_clustering_index_of_a_diagonal_is_four_thirds():
    assert count_neighbours(DIAGONAL) == 1 + 2 + 1
    assert clustering_index(DIAGONAL) == pytest.approx(4 / 3)


def test_clustering_index_of_known_patterns():
    assert clustering_index(np.ones((3, 3))) == pytest.approx((4 * 3 + 4 * 5 + 8) / 9)
    assert clustering_index(np.fliplr(DIAGONAL)) == pytest.approx(4 / 3)
    assert clustering_index(np.diag([1, 0, 1])) == 0
    assert clustering_index(np.ones((1, 4))) == pytest.approx((1 + 2 + 2 + 1) / 4)
    assert clustering_index(np.zeros((3, 3))) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_are_those_of_a_plain_loop(shape):
    W = random(shape)
    K, N = shape
    steps = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]
    found = sum(
        W[k + i, n + j] != 0
        for k, n in zip(*np.nonzero(W), strict=True)
        for i, j in steps
        if 0 <= k + i < K and 0 <= n + j < N
    )
    assert count_neighbours(W) == found


def test_blocks_by_hand():
    """W [K, N]: a block RxC covers R outputs, which are columns, and C inputs, which are rows."""
    W = np.zeros((4, 4))
    W[:, 0] = 1
    assert count_blocks(W, 1, 4) == Blocks(total=4, occupied=1, covered=4, nonzeros=4)
    assert count_blocks(W, 4, 1) == Blocks(total=4, occupied=4, covered=16, nonzeros=4)
    assert count_blocks(W, 4, 4) == Blocks(1, 1, 16, 4)
    assert count_blocks(W, 8, 1) == Blocks(4, 4, 16, 4)
    assert (count_blocks(W, 1, 4).occupancy, count_blocks(W, 1, 4).fill) == (0.25, 1)
    assert (count_blocks(W, 4, 1).occupancy, count_blocks(W, 4, 1).fill) == (1, 0.25)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", BLOCKS.values())
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_are_those_of_a_plain_loop(shape, size, transposed):
    W = random(shape[::-1], 0.1).T if transposed else random(shape, 0.1)
    (R, C), (K, N) = size, shape
    blocks = [W[k : k + C, n : n + R] for k in range(0, K, C) for n in range(0, N, R)]
    occupied = [block for block in blocks if block.any()]
    covered = sum(block.size for block in occupied)
    assert count_blocks(W, R, C) == Blocks(len(blocks), len(occupied), covered, np.count_nonzero(W))


def test_row_variation_by_hand():
    """Non-zeros of the three output channels: 1, 2 and 3 of 3; standard deviation √(2/3), mean 2."""
    W = np.triu(np.ones((3, 3)))
    assert row_spread(W).variation == pytest.approx(np.sqrt(2 / 3) / 2)
    assert row_spread(W.T).variation == pytest.approx(np.sqrt(2 / 3) / 2)
    assert row_spread(np.array([[1.0, 0.0], [1.0, 0.0]])).variation == 1


def test_even_rows_do_not_vary_at_all():
    W = np.tile(np.array([[1.0], [0.0], [0.0]]), (1, 7))
    assert row_spread(W).variation == 0
    assert (row_spread(W) + row_spread(W)).variation == 0
    assert row_spread(np.zeros((3, 4))).variation == 0


@pytest.mark.parametrize("value", [1e-45, np.nan, np.inf, -np.inf])
def test_what_is_no_zero(value):
    W = np.array([[value, 0.0], [0.0, -0.0]], np.float32)
    assert measure(W, 16, 0).nonzeros == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.bool_])
def test_any_type(dtype):
    found = measure(DIAGONAL.astype(dtype), 1, 1)
    assert found == measure(DIAGONAL, 1, 1)


def test_empty_weight():
    found = measure(np.zeros((0, 4), np.float32), 0, 0)
    assert found.to_dict() == {
        "sparsity": 0, "row_variation": 0, "clustering_index": 0, "dense_bytes": 0, "sparse_bytes": 0,
        "bits_per_weight": 0, "blocks": {name: {"occupancy": 0, "fill": 0} for name in BLOCKS},
    }  # fmt: skip
    assert found + measure(DIAGONAL, 1, 1) == measure(DIAGONAL, 1, 1)


def test_document():
    found = measure(DIAGONAL.astype(np.float32), 36, 18).to_dict()
    assert found["sparsity"] == pytest.approx(6 / 9)
    assert found["row_variation"] == 0
    assert found["clustering_index"] == pytest.approx(4 / 3)
    assert found["blocks"]["1x4"] == {"occupancy": 1, "fill": pytest.approx(1 / 3)}
    assert (found["dense_bytes"], found["sparse_bytes"], found["bits_per_weight"]) == (36, 18, 16)


def test_weights_together_are_as_one_of_both():
    """But for what lies across the seam: blocks of whole size there, and neighbours, which are kept apart."""
    first, second = random((8, 16), 0.2), random((8, 24), 0.6, seed=1)
    first[:, -1] = 0
    found = measure(first, 512, 100) + measure(second, 768, 400)
    whole = measure(np.concatenate([first, second], axis=1), 1280, 500)
    assert isinstance(found, Metrics)
    assert found.spread.variation == pytest.approx(whole.spread.variation)
    assert (found.size, found.nonzeros, found.neighbours) == (whole.size, whole.nonzeros, whole.neighbours)
    assert found.blocks == whole.blocks
    assert (found.dense_bytes, found.sparse_bytes) == (1280, 500)


def test_inputs_are_not_written_to():
    W = random((5, 6))
    mask = W != 0
    for array in (W, mask):
        array.flags.writeable = False
    assert measure(W, 1, 1) == measure(mask, 1, 1)
