"""Targets, centred moments and scores, against the data they stand for."""

import numpy as np
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers import (
    aimed_target,
    centred_gram,
    obd_score,
    random_score,
    relative_error,
    ria_score,
    taylor_score,
    wanda_score,
)


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((200, 12)) + 0.5
    sparse = dense + 0.3 * generator.standard_normal(dense.shape)
    return dense, sparse, generator.standard_normal((12, 5)).astype(np.float32)


def test_an_output_that_is_reached_leaves_the_weight(data):
    dense, _, W = data
    gram = dense.T @ dense
    form, target = aimed_target(W, gram, gram @ W.astype(np.float64))
    np.testing.assert_allclose(target, W, rtol=1e-6)
    np.testing.assert_allclose(form, gram + 0.05 * gram.diagonal().mean() * np.eye(12))
    form, target = aimed_target(W, np.zeros((12, 12)), np.zeros(W.shape))
    np.testing.assert_array_equal(target, W)


def test_the_target_brings_the_outputs_together(data):
    dense, sparse, W = data
    wanted = dense @ W
    _, target = aimed_target(W, sparse.T @ sparse, sparse.T @ wanted, 1e-9)
    expected, *_ = np.linalg.lstsq(sparse, wanted, rcond=None)
    np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)
    _, far = aimed_target(W, sparse.T @ sparse, sparse.T @ wanted, 1e9)
    np.testing.assert_allclose(far, W, rtol=1e-5)


def test_the_form_is_the_problem(data):
    """Up to a constant: squared output error plus the pull towards W."""
    dense, sparse, W = data
    wanted, gram = dense @ W, sparse.T @ sparse
    form, target = aimed_target(W, gram, sparse.T @ wanted, 0.1)
    mu = 0.1 * gram.diagonal().mean()
    generator = np.random.default_rng(3)
    gaps = []
    for _ in range(3):
        V = generator.standard_normal(W.shape)
        direct = ((sparse @ V - wanted) ** 2).sum() + mu * ((V - W) ** 2).sum()
        gaps.append(direct - np.trace((target - V).T @ form @ (target - V)))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "weight", "message"), [((11, 11), 0.1, "11, 11"), ((12, 12), 0.0, "above 0")]
)
def test_a_target_that_does_not_fit_is_refused(data, shape, weight, message):
    with pytest.raises(UsageError, match=message):
        aimed_target(data[2], np.zeros(shape), np.zeros((12, 5)), weight)


def test_the_centred_gram_is_that_of_centred_data(data):
    dense = data[0]
    centred = dense - dense.mean(axis=0)
    np.testing.assert_allclose(
        centred_gram(dense.T @ dense, dense.mean(axis=0), len(dense)), centred.T @ centred, atol=1e-9
    )


def test_relative_error_is_that_of_the_outputs(data):
    dense, _, W = data
    pruned = np.round(W)
    expected = np.linalg.norm(dense @ (W - pruned)) / np.linalg.norm(dense @ W)
    assert relative_error(W, pruned, dense.T @ dense) == pytest.approx(expected, rel=1e-9)
    assert relative_error(np.zeros((2, 1)), np.zeros((2, 1)), np.eye(2)) == 0


def test_scores_by_hand():
    W = np.array([[1.0, -2.0], [3.0, 0.0]], np.float32)
    diagonal = np.array([4.0, 1.0])
    np.testing.assert_allclose(wanda_score(W, diagonal), [[2, 4], [3, 0]])
    np.testing.assert_allclose(obd_score(W, diagonal) ** 2, [[2, 8], [4.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(taylor_score(W, np.array([[1.0, 1], [-1, 9]])), [[1, 2], [3, 0]])
    relative = np.array([[1 / 3 + 1 / 4, 2 / 3 + 1], [1 + 3 / 4, 0]])
    np.testing.assert_allclose(
        ria_score(W, diagonal), relative * np.array([[2**0.5 * 1.0], [1.0]]), rtol=1e-6
    )
    drawn = random_score(W, 1)
    assert drawn[1, 1] == 0
    assert (drawn.ravel()[:3] > 0).all()
    np.testing.assert_array_equal(drawn, random_score(W, 1))
    assert not np.array_equal(drawn, random_score(W, 2))
