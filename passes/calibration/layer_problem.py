"""What a layer is solved for, from the statistics of its input, and the bias that takes up what is left of the mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_tensor
from sparse_onnx.model.graph import add_initializer, drop_if_unused, new_name
from sparse_onnx.passes.calibration.layer_output import LayerOutput
from sparse_onnx.passes.calibration.two_streams import Aim
from sparse_onnx.passes.solvers.correction import aimed_target, centred_gram, centred_pull
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["LayerProblem", "bias_of", "corrected_bias", "layer_problem", "write_bias"]

_PULL, _NOISE = 0.05, 2
"""How strongly weights that aim at the dense model's output are drawn to the dense weights, of the mean diagonal of the
Gram: the first, or less where there are many tokens, the second times inputs / tokens, since what is fitted to noise
falls with these. Measured: with 63 tokens an input a sentence encoder is best at .05 (.01 fits the calibration data too
closely, .2 gives up a tenth of the gain); with 93 to 256 a language model loses 15 % more at .05."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProblem:
    """min over V of tr((T - V)' G (T - V)): G is that of ``statistics``, T is ``target``, W itself where it is None.
    ``damping`` is what G still needs."""

    statistics: InputStatistics
    target: np.ndarray | None
    damping: float


def layer_problem(
    W: np.ndarray,
    statistics: InputStatistics,
    damping: float,
    aim: Aim | None = None,
    outputs: slice = slice(None),
    *,
    biased: bool,
) -> LayerProblem:
    """What W [K, N] is solved for: its own output, or what ``aim``, at its ``outputs``, says. Where it is ``biased``, a
    bias takes up the shift of the mean, and only what varies is to be fitted."""
    if not isinstance(statistics.gram, np.ndarray) or statistics.gram.ndim != 2:
        return LayerProblem(statistics, None, damping)
    gram, count, mean = np.asarray(statistics.gram, np.float64), statistics.count, statistics.mean
    pull = None if aim is None else aim.pull[:, outputs]
    target = None
    if biased and mean is not None:
        centred = centred_gram(gram, mean, count)
        # Where nothing varies, the data does not tell what the weights are for: the bias would do all.
        if centred.any():
            if aim is not None and pull is not None:
                pull = centred_pull(pull, mean, aim.mean[outputs], centred, count)
            gram = centred
    if pull is not None:
        gram, target = aimed_target(W, gram, pull, min(_PULL, _NOISE * len(W) / count))
        damping = 0.0
    return LayerProblem(InputStatistics(gram, mean, count), target, damping)


def corrected_bias(
    bias: np.ndarray,
    W: np.ndarray,
    after: np.ndarray,
    mean: np.ndarray,
    aim: Aim | None = None,
    outputs: slice = slice(None),
) -> np.ndarray:
    """The bias [N] that gives the output of ``after`` the mean that that of W [K, N] has with ``bias``, or that ``aim``
    says; ``mean`` [K] is that of the input."""
    wanted = mean @ W + bias if aim is None else aim.mean[outputs]
    return np.asarray(wanted - mean @ after)


def bias_of(target: LayerOutput) -> np.ndarray:
    """The bias of a layer that has one, [N] float64."""
    array = constant_array(target.bias)
    assert array is not None
    return array.reshape(-1).astype(np.float64)


def write_bias(
    model: ir.Model,
    target: LayerOutput,
    bias: np.ndarray,
    store: Callable[[np.ndarray, str], ir.TensorProtocol],
) -> tuple[str, ir.TensorProtocol]:
    """Put ``bias`` in place of a layer's. Returns the name of the initializer that holds it now, and the tensor that it
    was before."""
    old, node = target.bias, target.bias_node
    assert old is not None
    assert node is not None
    before = constant_tensor(old)
    assert before is not None
    array = bias.astype(np.float32).reshape(before.shape.numpy())
    if len(old.uses()) == 1 and not old.is_graph_output() and old.is_initializer():
        old.const_value = store(array, old.name or "bias")
        return old.name or "bias", before
    name = new_name(model, f"{old.name}.corrected")
    node.replace_input_with(target.bias_index, add_initializer(model.graph, name, store(array, name)))
    drop_if_unused(old)
    return name, before
