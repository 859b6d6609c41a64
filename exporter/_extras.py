"""Imports of the packages that only exporting needs."""

from __future__ import annotations

import importlib
from typing import Any

from sparse_onnx.errors import HostError

__all__ = ["require"]


def require(name: str) -> Any:
    """Import the module ``name``. Raises HostError, which says what to install, if its package is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise HostError(
            f"{package} is needed here and cannot be imported ({error}): pip install 'sparse-onnx[export]'"
        ) from error
