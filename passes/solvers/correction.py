"""What follows from the means and the second moments of the pruned model's own inputs."""

from __future__ import annotations

import numpy as np

from sparse_onnx.errors import UsageError

__all__ = ["aimed_target", "centred_gram", "centred_power", "centred_pull"]

# Share of an input's power that varies, up to which it counts as constant: a deviation of 3e-7 of its size is the
# rounding of float32 activations. The sums themselves are exact to about 1e-15.
_CONSTANT = 1e-13


def centred_gram(gram: np.ndarray, mean: np.ndarray, count: float) -> np.ndarray:
    """G - count · mean mean': the form to solve on where the bias takes up the mean shift; float64 [K, K].

    Rows and columns of inputs that do not vary are 0.
    """
    mean = mean.astype(np.float64)
    still = centred_power(gram.diagonal(), mean, count) == 0
    form = np.asarray(gram - count * np.outer(mean, mean))
    form[still] = 0
    form[:, still] = 0
    return form


def centred_power(power: np.ndarray, mean: np.ndarray, count: float) -> np.ndarray:
    """What varies of the ``power`` [K], the diagonal of G, float64; 0 for inputs that are constant but for rounding."""
    power = power.astype(np.float64)
    centred = power - count * mean.astype(np.float64) ** 2
    return np.where(centred > _CONSTANT * power, centred, 0.0)


def centred_pull(
    pull: np.ndarray, mean: np.ndarray, aim: np.ndarray, form: np.ndarray, count: float
) -> np.ndarray:
    """X'Y [K, N] of X and Y less their means, ``aim`` [N] being that of Y; ``form`` is X'X less its mean."""
    centred = pull - count * np.outer(mean, aim)
    centred[form.diagonal() == 0] = 0
    return np.asarray(centred)


def aimed_target(
    W: np.ndarray, gram: np.ndarray, pull: np.ndarray, weight: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """The problem min over V of ‖X V − Y‖² + μ‖V − W‖² in the form tr((T − V)′ H (T − V)): H [K, K] and T [K, N].

    Y [tokens, N] is what the layer's output should be on the inputs X that it sees; ``gram`` X'X [K, K] and ``pull``
    X'Y [K, N] are float64; μ = ``weight`` · mean(diag X'X). H = X'X + μI and T = H⁻¹(X'Y + μW). For Y = X_d W of a
    dense model's input X_d this is the asymmetric calibration of GPTAQ (Li et al. 2025); Y = X W gives T = W.
    """
    K = len(W)
    if gram.shape != (K, K) or pull.shape != W.shape:
        raise UsageError(f"for a weight {list(W.shape)} the Gram is {gram.shape} and the pull {pull.shape}")
    if not weight > 0:
        raise UsageError(f"the weight of the target must be above 0, not {weight}")
    mu = weight * float(np.mean(gram.diagonal(), dtype=np.float64))
    if mu == 0:
        return gram, np.asarray(W, np.float32)
    form = gram + mu * np.eye(K)
    dense = W.astype(np.float64)
    return form, np.asarray(dense + np.linalg.solve(form, pull - gram @ dense), np.float32)
