"""Sections ``shapes`` and ``few-rows``: single linear layers through ONNX Runtime, sparse against dense."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.running.runtime import open_session
from sparse_onnx.timing.layers import time_pair
from sparse_onnx.timing.rounds import Ratio, interleave, ratio
from sparse_onnx.tools.benchmarks.section import Settings, Table, band, count, percent

__all__ = ["above_trend", "few_rows", "random_weight", "shapes"]

_TIMES = ("dense ms", "sparse ms", "ratio", "interval")
_SHAPES_COLUMNS = ("batch x tokens", "K x N", "zeros", *_TIMES, "trend", "flag")
_FEW_ROWS_COLUMNS = ("K x N", "zeros", "threads", "rows", *_TIMES, "weight GB/s", "memory GB/s", "share")
_LIMIT = 1.15  # a point further above its neighbours' trend is flagged


@dataclass(frozen=True)
class _Point:
    """X [batch, tokens, K] times W [K, N]."""

    batch: int
    tokens: int
    K: int
    N: int

    @property
    def work(self) -> int:
        """Multiply-adds of the dense layer."""
        return self.batch * self.tokens * self.K * self.N


def _series(quick: bool) -> dict[str, list[_Point]]:
    """Points in the order of their size; inside a series only one thing grows."""
    if quick:
        return {
            "batch x tokens": [_Point(batch, tokens, 64, 96) for batch, tokens in ((1, 1), (1, 8), (2, 8))],
            "odd sizes": [_Point(1, 8, 37, 101)],
            "hidden size": [_Point(1, 8, size, size) for size in (32, 64, 128)],
        }
    batches = [(1, 1), (1, 8), (1, 16), (1, 32), (1, 128), (1, 384), (1, 512), (4, 128), (8, 128), (32, 128)]
    return {
        "batch x tokens, 768 x 768": [_Point(*sizes, 768, 768) for sizes in batches],
        "batch x tokens, 768 x 3072": [_Point(*sizes, 768, 3072) for sizes in batches],
        "rows one by one": [_Point(1, rows, 768, 768) for rows in range(1, 18)],
        "odd sizes": [_Point(1, 128, 383, 1001), _Point(1, 128, 1000, 1000)],
        "hidden size": [_Point(1, 128, size, size) for size in (256, 512, 1024, 2048, 4096, 8192)],
    }


def shapes(settings: Settings) -> Iterator[Table]:
    """One layer at many shapes; does any point stand out?"""
    for name, points in _series(settings.quick).items():
        found: dict[tuple[int, float], list[Ratio]] = {}
        levels = (0.9,) if settings.quick else (0.5, 0.8, 0.9)
        for level in levels:
            for point in points:
                settings.say(f"shapes: {name}, {point}, {percent(level)}")
                dense = linear(random_weight(point.K, point.N, level), bias=True)
                sparse = lowered(dense)
                for threads in settings.threads:
                    timed = _time(dense, sparse, point, threads, settings.quick)
                    found.setdefault((threads, level), []).append(timed)
        work = [point.work for point in points]
        for threads in settings.threads:
            rows = []
            for level in levels:
                timings = found[threads, level]
                trends = above_trend(work, [timing.second_ms for timing in timings])
                for point, timing, trend in zip(points, timings, trends, strict=True):
                    flag = f"> {_LIMIT} x trend" if trend is not None and trend > _LIMIT else ""
                    rows.append(
                        (
                            f"{point.batch} x {point.tokens}",
                            f"{point.K} x {point.N}",
                            percent(level),
                            timing.first_ms,
                            timing.second_ms,
                            timing.median,
                            band(timing),
                            trend,
                            flag,
                        )
                    )
            note = "trend: time a row / that interpolated between the neighbours, logarithmic in both"
            yield Table(f"{name}, {count(threads)}", _SHAPES_COLUMNS, tuple(rows), (note,))


def above_trend(work: Sequence[float], ms: Sequence[float]) -> list[float | None]:
    """``ms / work`` of each point by what its neighbours lead one to expect; None where one is missing.

    The neighbours are the nearest points with less and with more work; between them log(ms / work) is taken as linear
    in log(work). ``work`` must not fall.
    """
    speed = [math.log(time_ / amount) for time_, amount in zip(ms, work, strict=True)]
    result: list[float | None] = []
    for amount, own in zip(work, speed, strict=True):
        less = [i for i, other in enumerate(work) if other < amount]
        more = [i for i, other in enumerate(work) if other > amount]
        if not less or not more:
            result.append(None)
            continue
        low, high = less[-1], more[0]
        share = math.log(amount / work[low]) / math.log(work[high] / work[low])
        result.append(math.exp(own - (1 - share) * speed[low] - share * speed[high]))
    return result


def _time(dense: ir.Model, sparse: ir.Model, point: _Point, threads: int, quick: bool) -> Ratio:
    shape = (point.batch, point.tokens, point.K)
    feeds = {"X": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    rounds, seconds = (5, 0.1) if quick else (101, 1.5)
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as work:
        return time_pair(
            [dense, sparse],
            [False, True],
            feeds,
            threads=threads,
            work=Path(work),
            rounds=rounds,
            seconds=seconds,
        )


def few_rows(settings: Settings) -> Iterator[Table]:
    """One to eight rows, weights from memory: what counts is how few bytes are read, and how fast."""
    sizes = ((64, 96),) if settings.quick else ((4096, 4096), (4096, 11008))
    levels = (0.9,) if settings.quick else (0.5, 0.7, 0.8, 0.9)
    rows_of_x = (1, 2) if settings.quick else (1, 2, 4, 8)
    cold = 1 << 20 if settings.quick else _cold_bytes()
    buffer = np.ones(cold // 8)
    rows: list[tuple[str | float | None, ...]] = []
    for K, N in sizes:
        for level in levels:
            settings.say(f"few-rows: {K} x {N}, {percent(level)}")
            dense = linear(random_weight(K, N, level), bias=False)
            models = [dense, lowered(dense)]
            copies = [math.ceil(cold / model_io.weight_bytes(model)) for model in models]
            stored = model_io.weight_bytes(models[1])
            with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as work:
                paths = [
                    model_io.save_model(repeated(model, number), Path(work), name=f"model{index}")
                    for index, (model, number) in enumerate(zip(models, copies, strict=True))
                ]
                for threads in settings.threads:
                    bandwidth = read_bandwidth(buffer, threads)
                    sessions = [
                        open_session(path, threads=threads, library=library, timed=True)
                        for path, library in zip(paths, (False, True), strict=True)
                    ]
                    for tokens in rows_of_x:
                        timed = _time_repeated(sessions, copies, tokens, K, settings.quick)
                        speed = stored / timed.second_ms / 1e6
                        times = (timed.first_ms, timed.second_ms, timed.median, band(timed))
                        share = percent(speed / bandwidth)
                        head = (f"{K} x {N}", percent(level), threads, tokens)
                        rows.append((*head, *times, speed, bandwidth, share))
    notes = (
        f"weights from memory: as many layers with weights of their own as make {cold / 1e6:.0f} MB; ms a layer",
        "memory: numpy sums of a buffer of that size, as many at once as there are threads, best of five",
    )
    yield Table("Few rows, weights from memory", _FEW_ROWS_COLUMNS, tuple(rows), notes)


def _cold_bytes() -> int:
    """What no cache holds: at least 256 MiB, and twice the largest cache where Linux tells its size."""
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max([256 << 20, *(2048 * int(size[:-1]) for size in sizes if size.endswith("K"))])


def read_bandwidth(buffer: np.ndarray, threads: int) -> float:
    """GB/s at which ``threads`` threads read ``buffer`` together."""
    parts = np.array_split(buffer, threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best / 1e9


def _time_repeated(sessions: Sequence[Any], copies: Sequence[int], tokens: int, K: int, quick: bool) -> Ratio:
    """Dense against sparse, milliseconds of one layer."""
    feeds = {"X": np.random.default_rng(0).standard_normal((1, tokens, K)).astype(np.float32)}

    def run(index: int) -> float:
        start = time.perf_counter()
        sessions[index].run(None, feeds)
        return (time.perf_counter() - start) * 1e3 / copies[index]

    first, second = interleave(
        [lambda: run(0), lambda: run(1)], rounds=5 if quick else 15, seconds=0.1 if quick else 5
    )
    return ratio(first, second)


def random_weight(K: int, N: int, sparsity: float) -> np.ndarray:
    """Standard normal values with a share of zeros at random places: float32 [K, N], seed 0."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((K, N), np.float32)
    weight[rng.random((K, N), np.float32) < sparsity] = 0
    return weight


def linear(weight: np.ndarray, *, bias: bool) -> ir.Model:
    """Y = X · W [+ bias] as standard operators, X [batch, tokens, K]."""
    K, N = weight.shape
    x = ir.Value(name="X", shape=ir.Shape(("batch", "tokens", K)), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="W", const_value=ir.tensor(weight, name="W"))
    nodes, initializers = [ir.node("MatMul", [x, w])], [w]
    if bias:
        b = ir.Value(name="b", const_value=ir.tensor(np.ones(N, np.float32), name="b"))
        initializers.append(b)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], b]))
    y = nodes[-1].outputs[0]
    y.name, y.type = "Y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes, initializers=initializers, opset_imports={"": 17}, name="linear")
    return ir.Model(graph, ir_version=9)


def lowered(dense: ir.Model) -> ir.Model:
    """The same layer with its weight compressed."""
    sparse = dense.clone()
    LowerSparseMatMul(min_sparsity=0)(sparse)
    return sparse


def repeated(model: ir.Model, copies: int) -> ir.Model:
    """A model of one layer, ``copies`` times side by side on the same input, each with weights of its own."""
    x = model.graph.inputs[0]
    source = ir.Value(name="X", shape=x.shape, type=x.type)
    nodes, outputs, initializers = [], [], []
    for index in range(copies):
        values: dict[ir.Value | None, ir.Value | None] = {x: source, None: None}
        for node in model.graph:
            for value in node.inputs:
                if value not in values and value is not None and value.const_value is not None:
                    name = f"{value.name}.{index}"
                    own = ir.tensor(value.const_value.numpy().copy(), name=name)
                    values[value] = ir.Value(name=name, const_value=own)
                    initializers.append(values[value])
            copy = ir.node(
                node.op_type,
                [values[value] for value in node.inputs],
                domain=node.domain,
                attributes=dict(node.attributes),
            )
            nodes.append(copy)
            values.update(zip(node.outputs, copy.outputs, strict=True))
        y = values[model.graph.outputs[0]]
        assert y is not None
        y.name, y.type = f"Y.{index}", ir.TensorType(ir.DataType.FLOAT)
        outputs.append(y)
    graph = ir.Graph(
        [source],
        outputs,
        nodes=nodes,
        initializers=[value for value in initializers if value is not None],
        opset_imports=dict(model.graph.opset_imports),
        name="layers",
    )
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)
