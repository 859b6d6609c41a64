"""Calibration data for the passes that need it, and a way to apply one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.passes.base import CalibrationData, Pass, PassContext, PassResult


@pytest.fixture
def remove(tmp_path: Path) -> Callable[..., PassResult]:
    """Apply a pass with these batches of inputs; what it says goes to ``said``."""

    def remove(
        step: Pass,
        model: ir.Model,
        batches: Sequence[Mapping[str, np.ndarray]],
        said: list[str] | None = None,
    ) -> PassResult:
        data = CalibrationData(Samples.of([dict(feeds) for feeds in batches], "test"), tmp_path)
        return step(model, PassContext(calibration=data, progress=(said if said is not None else []).append))

    return remove
