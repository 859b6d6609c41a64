"""The weights of a model in the order in which they are to be solved, each with the statistics of its turn.

What a layer is solved for:

- ``oneshot``: its output on the inputs that it has in the dense model; one pass over the data.
- ``sequential``: its output on the inputs that it has behind the layers solved so far; two passes.
- ``asymmetric``: the *dense* model's output, from the inputs that it has behind the layers solved so far. Where a
  residual is added to the output, the sum is what is aimed at, so that the layer makes up for what the residual
  carries of earlier errors. Two passes. LSTM and GRU are solved as by ``oneshot``, before all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from sparse_onnx.model.weights import RECURRENT, Weight
from sparse_onnx.passes.calibration.calibrator import Calibrator
from sparse_onnx.passes.calibration.layer_output import LayerOutput, find_output
from sparse_onnx.passes.calibration.layer_problem import bias_of, corrected_bias
from sparse_onnx.passes.calibration.two_streams import Aim
from sparse_onnx.passes.solvers.gram import relative_error
from sparse_onnx.passes.solvers.statistics import InputStatistics

__all__ = ["Layer", "Order", "layers_in_turn"]

Order: TypeAlias = Literal["oneshot", "sequential", "asymmetric"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight at its turn: statistics of its input for every group, none where it cannot be calibrated, and what its
    output is aimed at, if anything."""

    weight: Weight
    inputs: tuple[InputStatistics, ...]
    target: LayerOutput | None = None
    aim: Aim | None = None

    def parts(self, outputs: int) -> list[tuple[slice, InputStatistics]]:
        """Which of the ``outputs`` each group of a convolution makes, with the statistics of what it reads; of another
        layer all."""
        width = outputs // max(len(self.inputs), 1)
        return [
            (slice(index * width, (index + 1) * width), statistics)
            for index, statistics in enumerate(self.inputs)
        ]

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias that can take up the shift of a mean, which is known."""
        known = all(statistics.mean is not None for statistics in self.inputs)
        return known and self.target is not None and self.target.bias is not None

    def error(self, wanted: np.ndarray, found: np.ndarray) -> float | None:
        """‖X(W − W′)‖ / ‖XW‖ of W ``wanted`` and W′ ``found``, [K, N], in the mean over groups; None where no Gram is
        known as a whole."""
        errors = [
            relative_error(wanted[:, part], found[:, part], statistics.gram)
            for part, statistics in self.parts(wanted.shape[1])
            if isinstance(statistics.gram, np.ndarray) and statistics.gram.ndim == 2
        ]
        return float(np.mean(errors)) if errors else None

    def shifted_bias(self, W: np.ndarray, found: np.ndarray) -> np.ndarray:
        """The bias [N] that takes up what is left of the mean where ``found`` takes the place of W, [K, N]; of a layer
        that :attr:`has_bias`."""
        assert self.target is not None
        old, shifted = bias_of(self.target), []
        for part, statistics in self.parts(W.shape[1]):
            assert statistics.mean is not None
            shifted.append(
                corrected_bias(old[part], W[:, part], found[:, part], statistics.mean, self.aim, part)
            )
        return np.concatenate(shifted)


def layers_in_turn(
    calibrator: Calibrator,
    weights: Sequence[Weight],
    order: Order,
    *,
    biased: bool,
    statistics: Path | None = None,
    known: Mapping[str, Sequence[InputStatistics]] | None = None,
) -> Iterator[Layer]:
    """``weights``, which ``calibrator`` was made with, each when its statistics are there: first those that cannot be
    calibrated.

    The dense model is that of the calibrator, or the model as it is when the first is asked for; the caller puts the
    new tensor of each into ``weight.value.const_value`` before it asks for the next. With ``biased`` layers have a
    target that tells their bias also where nothing is aimed at. ``oneshot`` takes ``known`` statistics, or reads and
    writes the file ``statistics``.
    """

    def plain(weight: Weight, inputs: Sequence[InputStatistics]) -> Layer:
        return Layer(weight, tuple(inputs), find_output(weight, lambda _residual: False) if biased else None)

    # Without one of its own, the calibrator takes the model as it is now for the dense one.
    steps = calibrator.steps() if order == "asymmetric" else None
    uncalibrated = dict(calibrator.declined)
    for weight in weights:
        if weight.name in uncalibrated:
            yield Layer(weight, ())
    if steps is not None:
        recurrent = [weight for weight in weights if weight.nodes[0].op_type in RECURRENT]
        if recurrent:
            apart = calibrator.oneshot(weights=recurrent)
            yield from (plain(weight, apart[weight.name]) for weight in recurrent if weight.name in apart)
            del apart
        for step in steps:
            for weight in step.weights:
                aim = step.aims.get(weight.name)
                yield Layer(weight, step.inputs, aim.target if aim is not None else None, aim)
            del step, aim
    elif order == "sequential":
        for block in calibrator.blocks():
            yield from (plain(weight, block.statistics[weight.name]) for weight in block.weights)
    else:
        found = calibrator.oneshot(statistics) if known is None else known
        yield from (plain(weight, found[weight.name]) for weight in weights if weight.name in found)
