"""Section ``kernels``: the kernels alone, in one thread and without ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparse_onnx.passes.solvers.masks import MaskStructure, keep_mask, resolve_sparsity
from sparse_onnx.sparse_ops import library
from sparse_onnx.sparse_ops.formats.registry import SPARSE_FORMAT
from sparse_onnx.tools.benchmarks.section import Settings, Table, percent

__all__ = ["kernels"]

_ROWS = 128
_COLUMNS = (
    "K x N",
    "structure",
    "zeros",
    "kernel",
    "us",
    "GFLOP/s",
    "dense GFLOP/s",
    "of peak",
    "of load peak",
)
_NOTES = (
    f"{_ROWS} rows, one thread, processor time, transposition and store included; a weight that fits is in the caches",
    "GFLOP/s: on non-zeros; dense: on all weights of the dense layer",
    "of peak, of load peak: share of what multiply-adds reach in registers, and with one operand each from the "
    "first-level cache, measured beside every point; wide entries use one load several times and may pass the second",
)


def _masks(quick: bool) -> list[tuple[str, float | None]]:
    """(mask structure, sparsity), the latter None where the former implies it."""
    if quick:
        return [("unstructured", 0.9), ("block:4x1", 0.9), ("2:4", None)]
    levels = (0.5, 0.7, 0.8, 0.9, 0.95)
    unstructured = [("unstructured", level) for level in levels]
    blocks = [(block, level) for block in ("block:4x1", "block:8x1") for level in levels[:-1]]
    return [*unstructured, *blocks, *((pattern, None) for pattern in ("2:4", "1:4", "4:8", "1:8"))]


def kernels(settings: Settings) -> Iterator[Table]:
    """The kernel that a session would choose, for each mask structure."""
    sizes = ((64, 96),) if settings.quick else ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
    seconds = 0.01 if settings.quick else 0.3
    rows = []
    for K, N in sizes:
        weight = np.random.default_rng(0).standard_normal((K, N), np.float32)
        for name, level in _masks(settings.quick):
            settings.say(f"kernels: {K} x {N}, {name}")
            structure = MaskStructure.parse(name)
            keep = keep_mask(weight, level, structure)
            packed = SPARSE_FORMAT.pack(np.where(keep, weight, np.float32(0)))
            kernel = library.select(packed, _ROWS)
            time = library.time_kernel(packed, _ROWS, seconds=seconds)
            peak, load_peak = (limit(kernel, seconds / 3) for limit in (library.peak, library.load_peak))
            speed, dense = (2 * _ROWS * count / time for count in (int(np.count_nonzero(keep)), K * N))
            zeros = percent(resolve_sparsity(level, structure))
            shares = (percent(speed / peak), percent(speed / load_peak))
            rows.append((f"{K} x {N}", name, zeros, kernel, 1e6 * time, speed / 1e9, dense / 1e9, *shares))
    yield Table("Kernels alone", _COLUMNS, tuple(rows), _NOTES)
