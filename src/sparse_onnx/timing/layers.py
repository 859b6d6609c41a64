"""Time single layers of a model: each alone, sparse against dense, at the shape that it has in the model.

The dense side of a sparse operator is its own function body: without the library, ONNX Runtime unpacks the
stored weight when the session is created and runs the same MatMul as for a dense model.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds, InputSpec, generate
from sparse_onnx.model import model_io
from sparse_onnx.model.bit_packing import UNPACK_DOMAIN
from sparse_onnx.model.graph import name_of
from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.model.stored_weights import rows_at_once, rows_of, sparse_nodes, sparsity_of, stored_weights
from sparse_onnx.passes.patterns.rounded import rounded_dtype
from sparse_onnx.running.machine_load import OtherLoad
from sparse_onnx.running.runtime import of_our_making, open_runner, open_session
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.library import select_for
from sparse_onnx.timing.rounds import Ratio, evict_caches, interleave, ratio

if TYPE_CHECKING:
    import onnxruntime

from sparse_onnx.model.probe import shapes_in, with_shape_outputs

__all__ = ["LayerTiming", "cut_layer", "kernel_of", "time_pair", "time_sparse_layers", "time_together"]


@dataclasses.dataclass(frozen=True)
class LayerTiming:
    """One sparse operator. ``x_shape`` is the shape of its activations, ``weight_shapes`` has [K, N] of each of its
    weights, ``rows`` is how many vectors of activations they multiply, ``sparsity`` the share of weights that are not
    stored, ``kernel`` what full tiles are computed with (of an LSTM or GRU those of the input and of the recurrence),
    ``times`` dense against sparse."""

    name: str
    module: str
    op_type: str
    x_shape: tuple[int, ...]
    weight_shapes: tuple[tuple[int, int], ...]
    rows: int
    sparsity: float
    kernel: str
    times: Ratio


def time_pair(
    models: Sequence[ir.Model],
    libraries: Sequence[bool],
    feeds: Feeds,
    *,
    threads: int,
    work: Path,
    rounds: int = 15,
    seconds: float = 1.0,
) -> Ratio:
    """Two models in turn on the same ``feeds``: the first against the second; see :func:`time_together`."""
    load = OtherLoad()
    first, second = time_together(
        models, libraries, feeds, threads=threads, work=work, rounds=rounds, seconds=seconds
    )
    return ratio(first, second, quiet=load.spared(threads))


@of_our_making()
def time_together(
    models: Sequence[ir.Model],
    libraries: Sequence[bool],
    feeds: Feeds,
    *,
    threads: int,
    work: Path,
    rounds: int = 15,
    seconds: float = 1.0,
) -> list[list[float]]:
    """Milliseconds of every model, round by round, in turn on the same ``feeds``, each in a session with or without
    the kernel library.

    Before every run a buffer larger than the private caches is walked over, since inside a whole model the other
    layers' weights pass through them. Scratch files go to ``work``. The models are parts of one that has run, or are
    made of them: VerificationError if ONNX Runtime refuses one.
    """
    scratch = Path(tempfile.mkdtemp(prefix="layer-", dir=work))
    try:
        runs: list[Callable[[], float]] = []
        for index, (model, library) in enumerate(zip(models, libraries, strict=True)):
            path = model_io.save_model(model, scratch, name=f"model{index}")
            session = open_session(path, threads=threads, library=library, timed=True)

            def run(session: onnxruntime.InferenceSession = session) -> float:
                evict_caches()
                start = time.perf_counter()
                session.run(None, feeds)
                return (time.perf_counter() - start) * 1e3

            runs.append(run)
        return interleave(runs, rounds=rounds, seconds=seconds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _activations(node: ir.Node) -> list[ir.Value]:
    """The inputs of a sparse operator that are not constant: X, and a residual or a state if it has one."""
    return [value for value in node.inputs if value is not None and value.const_value is None]


def time_sparse_layers(
    model: ir.Model,
    feeds: Feeds,
    bench: Workbench,
) -> list[LayerTiming]:
    """Every sparse operator of ``model`` against its dense form, at the shapes that ``feeds`` lead to.

    Operators of equal shapes, sparsity and attributes are timed once.
    """
    nodes = sparse_nodes(model)
    names = {value.name or "" for node in nodes for value in _activations(node)}
    probe = with_shape_outputs(model, names)
    with open_runner(probe, bench.quietly(), library=True) as runner:
        _, shapes = shapes_in(runner.run(feeds))
    measured: dict[tuple[object, ...], Ratio] = {}
    timings = []
    for index, node in enumerate(nodes):
        inputs = [shapes[value.name or ""] for value in _activations(node)]
        weights = stored_weights(node)
        name = name_of(node)
        attributes = sorted((key, str(attribute.value)) for key, attribute in node.attributes.items())
        key = (node.op_type, *attributes, *inputs, *(round(weight.sparsity, 2) for weight in weights))
        if key not in measured:
            bench.progress(f"timing layer {index + 1}/{len(nodes)} {name}")
            measured[key] = _time_node(model, node, inputs, bench)
        module = node.metadata_props.get(MODULE_KEY, "")
        timings.append(
            LayerTiming(
                name=name,
                module=module,
                op_type=node.op_type,
                x_shape=inputs[0],
                weight_shapes=tuple(weight.shape for weight in weights),
                rows=rows_of(node, inputs[0]),
                sparsity=sparsity_of(node),
                kernel=kernel_of(node, inputs[0]),
                times=measured[key],
            )
        )
    return timings


def kernel_of(node: ir.Node, x_shape: tuple[int, ...]) -> str:
    """The name of the kernel that full tiles of a sparse operator are computed with, here, for X of that shape: one for
    all weights of the node, but for an LSTM or GRU those of the input and of the recurrence."""
    weights, rows = stored_weights(node), rows_at_once(node, x_shape)
    sizes, stored = [weight.sizes for weight in weights], weights[0].stored
    if len(rows) == 1:
        return select_for(stored, stored.joint_sizes(sizes), rows[0])
    return ", ".join(select_for(stored, one, count) for one, count in zip(sizes, rows, strict=True))


def cut_layer(
    model: ir.Model,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    shapes: Sequence[tuple[int, ...]],
) -> tuple[ir.Model, Feeds]:
    """The part of ``model`` from ``inputs`` to ``outputs``, all float32 or of 8 bits, as a model of its own, and random
    inputs.

    ``shapes`` are those of the inputs, which may contain a value twice. One of int32 has the lengths of sequences,
    whose steps are the first axis of the first input: they are all of full length.
    """
    distinct = dict(zip(inputs, shapes, strict=True))
    part = ir.Model(
        ir.convenience.extract(model.graph, list(distinct), list(outputs)),
        ir_version=model.ir_version,
        functions=[f.clone() for f in model.functions.values() if f.domain in (DOMAIN, UNPACK_DOMAIN)],
    )
    part.graph.opset_imports.update(model.opset_imports)
    for node in part.graph:
        for value in node.outputs:
            value.shape = None  # with the symbols of the whole model, which are numbers here
    specs = []
    for whole, source in zip(distinct, part.graph.inputs, strict=True):
        shape = distinct[whole]
        source.shape = ir.Shape(shape)
        dtype = ir.DataType.INT32 if source.dtype == ir.DataType.INT32 else rounded_dtype(whole)
        source.type = ir.TensorType(dtype)
        specs.append(InputSpec(source.name or "", dtype.numpy(), shape, None))
    for output in part.graph.outputs:
        output.type = ir.TensorType(rounded_dtype(output))
    sizes = {spec.name: shape for spec, shape in zip(specs, distinct.values(), strict=True)}
    feeds = generate(specs, sizes)
    lengths = [spec.name for spec in specs if spec.dtype == np.int32]
    return part, feeds | {name: np.full(sizes[name], shapes[0][0], np.int32) for name in lengths}


def _time_node(model: ir.Model, node: ir.Node, shapes: Sequence[tuple[int, ...]], bench: Workbench) -> Ratio:
    part, feeds = cut_layer(model, _activations(node), node.outputs, shapes)
    return time_pair([part, part], [False, True], feeds, threads=bench.threads, work=bench.work)
