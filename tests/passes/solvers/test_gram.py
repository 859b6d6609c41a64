"""Factors and inverses of damped Grams, against NumPy's."""

import numpy as np
import pytest

from sparse_onnx.passes.solvers.gram import inverse, inverse_factor


@pytest.mark.parametrize("size", [1, 2, 95, 96, 97, 193, 250])
def test_factor_and_inverse_of_a_positive_definite_matrix(size):
    X = np.random.default_rng(size).standard_normal((3 * size + 5, size))
    form = X.T @ X / len(X)
    expected = np.linalg.inv(form)
    assert inverse(form) == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert inverse_factor(form) == pytest.approx(np.linalg.cholesky(expected).T, rel=1e-9, abs=1e-10)


def test_a_singular_matrix_is_shifted():
    form = np.ones((150, 150))
    factor = inverse_factor(form)
    assert np.array_equal(factor, np.triu(factor))
    identity = factor.T @ factor @ (form + 1e-4 * np.eye(150))
    assert identity == pytest.approx(np.eye(150), abs=1e-6)


def test_eigenvalues_are_clipped_where_no_shift_helps():
    values = np.array([-1e4, 1e4, 3.0])  # the mean is 1, shifts go up to 100
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    form = (Q * values) @ Q.T
    step = 1e-4 * np.diag(form).mean()
    factor = inverse_factor(form)
    assert np.allclose(factor, np.triu(factor))
    expected = (Q / np.maximum(values, step)) @ Q.T
    assert factor.T @ factor == pytest.approx(expected, rel=1e-6, abs=1e-6)
