"""The compiled library: where it is, what it offers, and its kernels without ONNX Runtime.

Sessions need only :func:`register` (or ``SessionOptions.register_custom_ops_library(str(library_path()))``).
The environment variable ``SPARSE_ONNX_FORCE_ISA`` (``avx512``, ``avx2``, ``neon`` or ``generic``) forces an
instruction set, with single features of the processor if wanted (``avx512+avx512vnni``); what is unknown or not
supported by the processor is an error, here and when a session is created.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_onnx.errors import HostError
from sparse_onnx.sparse_ops.formats.base import FormatError, Packed, StoredFormat
from sparse_onnx.sparse_ops.ops.sparse_matmul import OP_TYPES
from sparse_onnx.sparse_ops.ort_path import native_path

__all__ = [
    "LibraryInfo",
    "check",
    "info",
    "library_path",
    "load_peak",
    "native_path",
    "peak",
    "register",
    "run",
    "select",
    "select_for",
    "time_kernel",
]

_FILE_NAME = "libsparse_ops.so"
_MESSAGE_SIZE = 512


class _Array(ctypes.Structure):
    """``SparseOnnxArray`` of c_api.h."""

    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_size_t))


class _Weight(ctypes.Structure):
    """``SparseOnnxWeight`` of c_api.h."""

    _fields_ = (
        ("format", ctypes.c_char_p),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("size_count", ctypes.c_size_t),
        ("parts", ctypes.POINTER(_Array)),
        ("part_count", ctypes.c_size_t),
        ("bias", _Array),
        ("linears", ctypes.POINTER(ctypes.c_int64)),
        ("linear_count", ctypes.c_size_t),
    )


@dataclasses.dataclass(frozen=True)
class LibraryInfo:
    """What the library is and would use here.

    ``kernels`` are the names of the kernels that this processor can run, best first; ``isa`` is the
    instruction set in use, and ``features`` are those of the processor that kernels may use.
    """

    path: Path
    version: str
    isa: str
    features: tuple[str, ...]
    kernels: tuple[str, ...]


def library_path() -> Path:
    """The library's file. Raises HostError where the package was installed without it."""
    folder = resources.files("sparse_onnx.sparse_ops")
    path = Path(str(folder.joinpath(_FILE_NAME)))
    if not path.is_file():
        raise HostError(
            f"the kernel library {_FILE_NAME} is not installed beside sparse_onnx.sparse_ops (looked at {path}); "
            "install the package with a C++ compiler at hand: pip install ."
        )
    return path


def register(session_options: Any) -> None:
    """Make ``onnxruntime.SessionOptions`` know the operators. Doing it twice is harmless.

    Raises HostError if the library is missing, damaged, of another version, or refused by ONNX Runtime, or if
    ``SPARSE_ONNX_FORCE_ISA`` is wrong, which a session would say of every node.
    """
    info()
    try:
        with native_path(library_path()) as path:
            session_options.register_custom_ops_library(path)
    except Exception as error:  # ORT's exceptions have no common base but Exception
        raise HostError(
            f"ONNX Runtime refuses the kernel library {library_path()}: {error}; "
            "it needs ONNX Runtime 1.17 or newer on the same architecture"
        ) from error


def _library() -> ctypes.CDLL:
    return _load(library_path())


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise HostError(f"the kernel library cannot be loaded: {error}; reinstall the package") from error
    text, size, message = ctypes.c_char_p, ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t)
    weight, floats = ctypes.POINTER(_Weight), ctypes.c_void_p
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "sparse_onnx_version": (text, ()),
        "sparse_onnx_isa": (text, message),
        "sparse_onnx_feature_name": (text, (size,)),
        "sparse_onnx_kernel_name": (text, (size,)),
        "sparse_onnx_kernel_supported": (ctypes.c_int, (text,)),
        "sparse_onnx_check": (ctypes.c_int, (weight, *message)),
        "sparse_onnx_run": (ctypes.c_int, (weight, ctypes.c_int, text, floats, size, floats, *message)),
        "sparse_onnx_select": (text, (text, ctypes.POINTER(ctypes.c_int64), size, size)),
        "sparse_onnx_peak": (ctypes.c_double, (text, ctypes.c_double)),
        "sparse_onnx_load_peak": (ctypes.c_double, (text, ctypes.c_double)),
        "sparse_onnx_time": (ctypes.c_double, (weight, text, size, ctypes.c_double, *message)),
    }
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise HostError(f"{path} is no kernel library of this package: {error}; reinstall it") from error
    version, package = library.sparse_onnx_version().decode(), metadata.version("sparse-onnx")
    if version != package:
        raise HostError(f"{path} has version {version}, the package {package}; reinstall the package")
    return library


def info() -> LibraryInfo:
    """Raises HostError if the library is missing or ``SPARSE_ONNX_FORCE_ISA`` is wrong."""
    library = _library()
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    isa = library.sparse_onnx_isa(message, _MESSAGE_SIZE)
    if isa is None:
        raise HostError(message.value.decode())
    kernels = tuple(
        name
        for name in _names(library.sparse_onnx_kernel_name)
        if library.sparse_onnx_kernel_supported(name.encode())
    )
    features = _names(library.sparse_onnx_feature_name)
    return LibraryInfo(
        library_path(), library.sparse_onnx_version().decode(), isa.decode(), features, kernels
    )


def _names(name_of: Callable[[int], bytes | None]) -> tuple[str, ...]:
    """What a function of the library gives for 0, 1, ... up to the first None."""
    names: list[str] = []
    while name := name_of(len(names)):
        names.append(name.decode())
    return tuple(names)


def select(packed: Packed, tokens: int) -> str:
    """Name of the kernel that a session here uses for ``tokens`` tokens."""
    attributes = packed.attributes()
    stored = packed.stored_format
    return select_for(stored, {name: int(attributes[name]) for name in stored.sizes}, tokens)


def select_for(stored: StoredFormat, sizes: Mapping[str, int], tokens: int) -> str:
    """As :func:`select`, for a weight in the format ``stored`` with these ``sizes``."""
    order = (ctypes.c_int64 * len(stored.sizes))(*(sizes[name] for name in stored.sizes))
    name = _library().sparse_onnx_select(stored.name.encode(), order, len(order), tokens)
    if name is None:
        info()  # raises if the forced instruction set is what is wrong
        text = ", ".join(f"{name} {sizes[name]}" for name in stored.sizes)
        raise FormatError(f"no kernel takes a weight in the format {stored.name} with {text}")
    return str(name.decode())


def _array(name: str, array: np.ndarray, dtype: type[np.generic]) -> _Array:
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        raise FormatError(f"{name} must be a contiguous vector of {np.dtype(dtype).name}")
    return _Array(array.ctypes.data, array.size)


def _weight(packed: Packed, bias: npt.NDArray[np.float32], linears: Sequence[int] = ()) -> _Weight:
    """What the library is told of a weight; valid as long as ``packed`` and ``bias`` are."""
    stored, attributes, arrays = packed.stored_format, packed.attributes(), packed.arrays()
    sizes = [int(attributes[name]) for name in stored.sizes]
    parts = [_array(part.name, arrays[part.name], part.dtype) for part in stored.parts]
    return _Weight(
        str(attributes["format"]).encode(),
        (ctypes.c_int64 * len(sizes))(*sizes),
        len(sizes),
        (_Array * len(parts))(*parts),
        len(parts),
        _array("bias", bias, np.float32),
        (ctypes.c_int64 * len(linears))(*linears),
        len(linears),
    )


def check(packed: Packed) -> None:
    """Raise FormatError unless the library accepts the stored arrays. The same code checks every session."""
    bias = np.zeros(max(packed.shape[1], 0), np.float32)
    linears = packed.linears if len(packed.linears) > 1 else ()
    weight = _weight(packed, bias, linears)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    if _library().sparse_onnx_check(ctypes.byref(weight), message, _MESSAGE_SIZE):
        raise FormatError(message.value.decode())


def run(
    x: npt.NDArray[np.float32],
    packed: Packed,
    bias: npt.NDArray[np.float32],
    activation: str = "none",
    kernel: str | None = None,
) -> npt.NDArray[np.float32]:
    """``act(x · W + bias)`` [..., N] float32 for ``x`` [..., K], in the calling thread.

    ``kernel`` names one of :attr:`LibraryInfo.kernels`; without it the library chooses as in a session. Raises
    FormatError for wrong arrays, ValueError for an unknown activation or a kernel that cannot run here.
    """
    if activation not in OP_TYPES:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(OP_TYPES)}")
    if x.dtype != np.float32 or x.ndim < 1 or x.shape[-1] != packed.shape[0]:
        raise ValueError(f"x must be float32 [..., {packed.shape[0]}], not {x.dtype}{list(x.shape)}")
    library = _library()
    weight = _weight(packed, bias)
    check(packed)
    if bias.size != packed.shape[1]:
        raise FormatError(f"bias must have {packed.shape[1]} elements, not {bias.size}")
    _require_kernel(kernel)
    x = np.ascontiguousarray(x)
    y = np.empty((*x.shape[:-1], packed.shape[1]), np.float32)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    failed = library.sparse_onnx_run(
        ctypes.byref(weight),
        list(OP_TYPES).index(activation),
        kernel.encode() if kernel is not None else None,
        x.ctypes.data,
        x.size // packed.shape[0],
        y.ctypes.data,
        message,
        _MESSAGE_SIZE,
    )
    if failed:
        raise ValueError(message.value.decode())
    return y


def time_kernel(packed: Packed, tokens: int, kernel: str | None = None, seconds: float = 0.2) -> float:
    """Seconds of processor time that ``x · W`` takes for ``x`` [``tokens``, K] in one thread, without ONNX Runtime.

    The lower quartile of calls during about ``seconds``, at least seven; x, y and a weight that fits are warm in the
    caches. ``kernel`` and the errors are those of :func:`run`, and ``tokens`` must be at least 1, else ValueError.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    check(packed)
    _require_kernel(kernel)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    bias = np.zeros(packed.shape[1], np.float32)
    name = kernel.encode() if kernel is not None else None
    weight = ctypes.byref(_weight(packed, bias))
    result = float(_library().sparse_onnx_time(weight, name, tokens, seconds, message, _MESSAGE_SIZE))
    if result == 0:
        raise ValueError(message.value.decode())
    return result


def peak(kernel: str, seconds: float = 0.1) -> float:
    """Floating-point operations per second of multiply-adds in registers, in vectors of the kernel's instruction set.

    One thread, the best of short runs during about ``seconds``. The kernel must be one of
    :attr:`LibraryInfo.kernels`, else ValueError.
    """
    _require_kernel(kernel)
    return float(_library().sparse_onnx_peak(kernel.encode(), seconds))


def load_peak(kernel: str, seconds: float = 0.1) -> float:
    """As :func:`peak`, with one factor of every multiply-add loaded from the first-level cache."""
    _require_kernel(kernel)
    return float(_library().sparse_onnx_load_peak(kernel.encode(), seconds))


def _require_kernel(kernel: str | None) -> None:
    """ValueError unless ``kernel`` is None or can run here."""
    if kernel is not None and not _library().sparse_onnx_kernel_supported(kernel.encode()):
        raise ValueError(f"no kernel {kernel!r} can run here; there are {', '.join(info().kernels)}")
