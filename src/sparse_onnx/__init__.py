"""sparse-onnx: compile pruned ONNX models into smaller, faster ones that run on stock ONNX Runtime.

The public API; everything is imported on first use, so that ``import sparse_onnx`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_onnx.analysis.analyze import Analysis, analyze
    from sparse_onnx.api import optimize
    from sparse_onnx.compilation.compile import OptimizeResult
    from sparse_onnx.errors import SparseOnnxError
    from sparse_onnx.running.session import InferenceSession
    from sparse_onnx.sparse_ops import library_path
    from sparse_onnx.verification.verify import VerifyResult, verify

__all__ = [
    "Analysis",
    "InferenceSession",
    "OptimizeResult",
    "SparseOnnxError",
    "VerifyResult",
    "__version__",
    "analyze",
    "library_path",
    "optimize",
    "verify",
]

_HOMES = {
    "Analysis": "sparse_onnx.analysis.analyze",
    "InferenceSession": "sparse_onnx.running.session",
    "OptimizeResult": "sparse_onnx.compilation.compile",
    "SparseOnnxError": "sparse_onnx.errors",
    "VerifyResult": "sparse_onnx.verification.verify",
    "analyze": "sparse_onnx.analysis.analyze",
    "library_path": "sparse_onnx.sparse_ops",
    "optimize": "sparse_onnx.api",
    "verify": "sparse_onnx.verification.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # slow to import, and seldom asked for

        return metadata.version("sparse-onnx")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparse_onnx' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
