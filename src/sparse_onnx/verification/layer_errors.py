"""How far each pruned layer's output lies from what its dense weight would give, on data that was not pruned with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.samples import Samples
from sparse_onnx.model.metadata_keys import RESCALED_KEY
from sparse_onnx.model.weights import Weight, find_weights
from sparse_onnx.passes.calibration import Calibrator, Options
from sparse_onnx.passes.solvers import relative_error
from sparse_onnx.progress import Progress, is_lasting

__all__ = ["layer_errors"]


def layer_errors(
    dense: ir.Model,
    pruned: ir.Model,
    samples: Samples,
    options: Options | None = None,
    *,
    work: Path,
    behind_pruned: bool = False,
    progress: Callable[[str], None] = lambda _message: None,
) -> dict[str, float]:
    """‖X(W − W′)‖ / ‖XW‖ by the name of the weight, for every weight whose tensor is another one in ``pruned``.

    X are the inputs that the layer has on ``samples`` in the dense model; with ``behind_pruned`` those in the pruned
    one. For a convolution with groups it is the mean over groups, as in ``LayerChange.error``. Left out: weights that
    have another shape or scale now or cannot be calibrated, and those whose X'X does not fit into memory as a whole.

    One pass over the samples, in memory that ``options`` bounds; scratch files go to ``work``.
    """
    before = {weight.name: weight for weight in find_weights(dense, encoded=True)[0]}
    after = {weight.name: weight for weight in find_weights(pruned, encoded=True)[0]}
    changed = [
        name
        for name in before
        if name in after
        and before[name].tensor is not after[name].tensor
        and before[name].shape == after[name].shape
        and RESCALED_KEY not in after[name].value.metadata_props
    ]
    if not changed:
        return {}
    model, known = (pruned, after) if behind_pruned else (dense, before)

    def say(line: str) -> None:
        if not is_lasting(line):  # few tokens are no fault here
            progress(f"errors on held-out data: {line}")

    calibrator = Calibrator(
        model, [known[name] for name in changed], samples, options, work=work, progress=say
    )
    statistics = calibrator.oneshot()
    errors = {}
    solved = Progress(progress, "errors on held-out data: layer", len(statistics))
    for name in statistics:
        grams = [group.gram for group in statistics[name]]
        error = _error(before[name], after[name], grams)
        if error is not None:
            errors[name] = error
        solved.step()
    return errors


def _error(before: Weight, after: Weight, grams: list[np.ndarray | tuple[np.ndarray, ...]]) -> float | None:
    W, pruned = (np.asarray(weight.matrix(), np.float32) for weight in (before, after))
    width = W.shape[1] // len(grams)
    errors = []
    for index, gram in enumerate(grams):
        if isinstance(gram, tuple) or gram.ndim != 2:
            return None
        part = slice(index * width, (index + 1) * width)
        errors.append(relative_error(W[:, part], pruned[:, part], gram))
    del W, pruned
    before.release()
    after.release()
    return float(np.mean(errors))
