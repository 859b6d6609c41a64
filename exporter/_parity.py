"""Does an exported model compute what the torch module computes?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError, VerificationError
from sparse_onnx.exporter._extras import require
from sparse_onnx.model.model_io import save_model
from sparse_onnx.running.runtime import open_session

__all__ = ["check_parity", "difference", "leaves"]

RELATIVE_TOLERANCE = 1e-4


def difference(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference, and the largest finite magnitude in ``expected`` (1.0 if that is zero).

    NaN and infinities must stand in the same places; otherwise, or with another shape, the difference is
    infinite. Sound for every real dtype, bool included.
    """
    if expected.shape != actual.shape:
        return float("inf"), 1.0
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return float("inf"), 1.0
    scale = float(np.abs(one[finite]).max(initial=0.0))
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0)), scale or 1.0


def leaves(case: Mapping[str, Any]) -> list[Any]:
    """The tensors of a case in order; an input may be a list of them."""
    return [leaf for value in case.values() for leaf in (value if isinstance(value, list) else [value])]


def check_parity(model: ir.Model, module: Any, cases: Sequence[Mapping[str, Any]]) -> float:
    """Run ``model`` in ONNX Runtime and ``module`` in torch on each case: its inputs in order, by keyword.

    Returns the largest absolute difference. Raises VerificationError when an output is further from torch
    than 1e-4 of its largest value (16 units in the last place for narrower types than float32), or when the
    model does not run at all.
    """
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder:
        try:
            session = open_session(save_model(model, folder), threads=0, library=False)
        except UsageError as error:
            raise VerificationError(f"the exported model cannot be used: {error}") from error
        for case in cases:
            largest = max(largest, _check_case(session, module, case))
        del session  # it maps the file that the folder holds
    return largest


def _check_case(session: Any, module: Any, case: Mapping[str, Any]) -> float:
    torch = require("torch")
    inputs = session.get_inputs()
    tensors = dict(zip([value.name for value in inputs], leaves(case), strict=True))
    where = ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in tensors.items())
    with torch.no_grad():
        result = module(**case)
    expected = [
        leaf for leaf in require("torch.utils._pytree").tree_leaves(result) if isinstance(leaf, torch.Tensor)
    ]
    try:
        actual = session.run(None, {name: tensor.detach().numpy() for name, tensor in tensors.items()})
    except Exception as error:  # ORT's exceptions have no common base but Exception
        raise VerificationError(f"the exported model does not run on {where}: {error}") from error
    names = [value.name for value in session.get_outputs()]
    if len(names) != len(expected):
        raise VerificationError(f"the exported model has {len(names)} outputs, torch returns {len(expected)}")
    largest = 0.0
    for name, want, got in zip(names, expected, actual, strict=True):
        tolerance = RELATIVE_TOLERANCE
        if want.dtype.is_floating_point:
            tolerance = max(tolerance, 16 * torch.finfo(want.dtype).eps)
        distance, scale = difference(want.numpy(), got)
        if not distance <= tolerance * scale:
            raise VerificationError(
                f"output {name} of the exported model differs from torch by {distance:.3g} on {where}; "
                f"{tolerance * scale:.3g} is allowed"
            )
        largest = max(largest, distance)
    return largest
