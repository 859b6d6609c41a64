"""Operators of the domain ``sparse_onnx``: their contracts in Python, and the library with their kernels.

Everything is imported on first use, so that importing this package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_onnx.sparse_ops.library import (
        LibraryInfo,
        check,
        info,
        library_path,
        native_path,
        register,
        run,
    )

__all__ = ["LibraryInfo", "check", "info", "library_path", "native_path", "register", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("sparse_onnx.sparse_ops.library"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
