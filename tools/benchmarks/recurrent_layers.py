"""Section ``recurrent``: single LSTM and GRU layers through ONNX Runtime, its own against sparse ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.passes.lower.sparse_recurrent import LowerSparseRecurrent
from sparse_onnx.sparse_ops.ops.sparse_recurrent import CELLS
from sparse_onnx.timing.layers import time_pair
from sparse_onnx.tools.benchmarks.section import Settings, Table, band, count, percent

__all__ = ["layer", "recurrent"]

_COLUMNS = ("layer", "hidden", "batch", "zeros", "dense ms", "sparse ms", "ratio", "interval")


def recurrent(settings: Settings) -> Iterator[Table]:
    """One layer in one direction, with as many inputs as hidden elements."""
    steps = 5 if settings.quick else 50
    sizes, batches = ((32,), (1, 2)) if settings.quick else ((256, 512, 1024), (1, 8))
    levels = (0.9,) if settings.quick else (0.8, 0.9)
    rounds, seconds = (5, 0.1) if settings.quick else (101, 4.0)
    for threads in settings.threads:
        rows = []
        for cell in CELLS:
            for hidden in sizes:
                for level in levels:
                    settings.say(f"recurrent: {cell}, {hidden}, {percent(level)}, {count(threads)}")
                    dense = layer(cell, hidden, level)
                    sparse = dense.clone()
                    LowerSparseRecurrent(min_sparsity=0)(sparse)
                    for batch in batches:
                        x = np.random.default_rng(0).standard_normal((steps, batch, hidden), np.float32)
                        with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as work:
                            timed = time_pair(
                                [dense, sparse],
                                [False, True],
                                {"X": x},
                                threads=threads,
                                work=Path(work),
                                rounds=rounds,
                                seconds=seconds,
                            )
                        times = (timed.first_ms, timed.second_ms, timed.median, band(timed))
                        rows.append((cell, hidden, batch, percent(level), *times))
        note = "dense: the LSTM or GRU of ONNX Runtime with the same zeros"
        yield Table(f"Recurrent layers, {steps} steps, {count(threads)}", _COLUMNS, tuple(rows), (note,))


def layer(cell: str, hidden: int, sparsity: float) -> ir.Model:
    """Y = ``cell``(X, W, R, B), a key of CELLS, X [steps, batch, hidden], with a share of zeros at random places."""
    rng, outputs = np.random.default_rng(0), CELLS[cell] * hidden
    weights = rng.standard_normal((2, 1, outputs, hidden), np.float32) / np.float32(np.sqrt(hidden))
    weights[rng.random(weights.shape, np.float32) < sparsity] = 0
    arrays = {"W": weights[0], "R": weights[1], "B": np.zeros((1, 2 * outputs), np.float32)}
    stored = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="X", shape=ir.Shape(("steps", "batch", hidden)), type=float32)
    reset = {"linear_before_reset": 1} if cell == "GRU" else {}
    node = ir.node(cell, [x, *stored], {"hidden_size": hidden, **reset})
    (y,) = node.outputs
    y.name, y.type = "Y", float32
    graph = ir.Graph([x], [y], nodes=[node], initializers=stored, opset_imports={"": 17}, name=cell)
    return ir.Model(graph, ir_version=9)
