"""A session for optimized models: ONNX Runtime's own, with the kernel library registered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparse_onnx.errors import HostError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["InferenceSession", "import_onnxruntime"]


def import_onnxruntime() -> Any:
    """The module ``onnxruntime``, imported on first use; HostError says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise HostError(
            f"onnxruntime cannot be imported ({error}): pip install 'sparse-onnx[cpu]'"
        ) from error
    return onnxruntime


def InferenceSession(
    path: str | os.PathLike[str],
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
    **options: Any,
) -> onnxruntime.InferenceSession:
    """``onnxruntime.InferenceSession`` for ``path`` with the sparse kernels registered.

    The arguments are those of ORT; ``providers`` defaults to the CPU. Registering twice is harmless.
    Raises HostError if onnxruntime or the library is missing.
    """
    ort = import_onnxruntime()
    from sparse_onnx.sparse_ops import native_path, register

    sess_options = sess_options or ort.SessionOptions()
    register(sess_options)
    with native_path(path) as native:
        return ort.InferenceSession(
            native, sess_options, providers=providers or ["CPUExecutionProvider"], **options
        )
