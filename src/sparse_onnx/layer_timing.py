"""Time single layers of a model: each alone, sparse against dense, at the shape that it has in the model.

The dense side of a sparse operator is its own function body: without the library, ONNX Runtime unpacks the
stored weight when the session is created and runs the same MatMul as for a dense model.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sparse_onnx import model_io
from sparse_onnx.graph import name_of, value_names
from sparse_onnx.inputs import Feeds, InputSpec, generate
from sparse_onnx.machine_load import OtherLoad
from sparse_onnx.metadata_keys import MODULE_KEY
from sparse_onnx.runtime import Ratio, evict_caches, interleave, open_runner, open_session, ratio
from sparse_onnx.sparse_ops import sparse_conv, sparse_conv_depthwise
from sparse_onnx.sparse_ops.library import select_for
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN
from sparse_onnx.stored_weights import sparse_nodes, sparsity_of, stored_weights

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "LayerTiming",
    "cut_layer",
    "shapes_in",
    "time_pair",
    "time_sparse_layers",
    "time_together",
    "uses_library",
    "with_shape_outputs",
]

# In front of a colon and the name of a value: its shape, or an output of the model that begins like one of these.
_SHAPE_OUTPUT = "sparse_onnx.shape"
_OWN_OUTPUT = "sparse_onnx.shape.own"


@dataclasses.dataclass(frozen=True)
class LayerTiming:
    """One sparse operator. ``x_shape`` is the shape of its activations, ``weight_shapes`` has [K, N] of each of its
    weights, ``rows`` is how many vectors of activations they multiply, ``sparsity`` the share of weights that are not
    stored, ``kernel`` what full tiles are computed with, ``times`` dense against sparse."""

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
    layers' weights pass through them. Scratch files go to ``work``.
    """
    scratch = Path(tempfile.mkdtemp(prefix="layer-", dir=work))
    try:
        runs: list[Callable[[], float]] = []
        for index, (model, library) in enumerate(zip(models, libraries, strict=True)):
            path = model_io.save_model(model, scratch, name=f"model{index}")
            session = open_session(path, threads=threads, library=library)

            def run(session: onnxruntime.InferenceSession = session) -> float:
                evict_caches()
                start = time.perf_counter()
                session.run(None, feeds)
                return (time.perf_counter() - start) * 1e3

            runs.append(run)
        return interleave(runs, rounds=rounds, seconds=seconds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def uses_library(model: ir.Model) -> bool:
    """True if an operator of the kernel library occurs anywhere in the graph or its subgraphs."""
    return any(node.domain == DOMAIN for node in model.graph.all_nodes())


def _activations(node: ir.Node) -> list[ir.Value]:
    """The inputs of a sparse operator that are not constant: X, and a residual if it has one."""
    return [value for value in node.inputs if value is not None and value.const_value is None]


def with_shape_outputs(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A copy of ``model`` that also tells the shapes of these values of its main graph; see :func:`shapes_in`."""
    probe = model.clone()
    made = [value for node in probe.graph for value in node.outputs]
    values = {value.name: value for value in (*probe.graph.inputs, *made)}
    for value in made:
        if value.is_graph_output() and (value.name or "").startswith(_SHAPE_OUTPUT):
            value.name = f"{_OWN_OUTPUT}:{value.name}"
    kind, taken = _SHAPE_OUTPUT, value_names(probe)
    while any(f"{kind}:{name}" in taken for name in names):
        kind += "_"
    for name in sorted(names):
        node = ir.node("Shape", [values[name]])
        node.outputs[0].name = f"{kind}:{name}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([None])
        probe.graph.append(node)
        probe.graph.outputs.append(node.outputs[0])
    return probe


def shapes_in(outputs: Feeds) -> tuple[Feeds, dict[str, tuple[int, ...]]]:
    """Outputs of a model made by :func:`with_shape_outputs`: those of the model itself, and the shapes by name."""
    own, shapes = dict[str, np.ndarray](), dict[str, tuple[int, ...]]()
    for output, value in outputs.items():
        kind, _, name = output.partition(":")
        if kind.rstrip("_") == _SHAPE_OUTPUT:
            shapes[name] = tuple(int(size) for size in value)
        else:
            own[name if kind == _OWN_OUTPUT else output] = value
    return own, shapes


def time_sparse_layers(
    model: ir.Model,
    feeds: Feeds,
    *,
    threads: int,
    budget: int,
    work: Path,
    progress: Callable[[str], None],
) -> list[LayerTiming]:
    """Every sparse operator of ``model`` against its dense form, at the shapes that ``feeds`` lead to.

    Operators of equal shapes, sparsity and attributes are timed once.
    """
    nodes = sparse_nodes(model)
    names = {value.name or "" for node in nodes for value in _activations(node)}
    probe = with_shape_outputs(model, names)
    with open_runner(probe, threads=threads, library=True, budget=budget, work=work) as runner:
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
            progress(f"timing layer {index + 1}/{len(nodes)} {name}")
            measured[key] = _time_node(model, node, inputs, threads=threads, work=work)
        module = node.metadata_props.get(MODULE_KEY, "")
        rows = _rows_of(node, inputs[0])
        # One kernel computes all weights of a node.
        chunk, block, width = (max(w.sizes[size] for w in weights) for size in ("chunk", "block", "width"))
        timings.append(
            LayerTiming(
                name=name,
                module=module,
                op_type=node.op_type,
                x_shape=inputs[0],
                weight_shapes=tuple(weight.shape for weight in weights),
                rows=rows,
                sparsity=sparsity_of(node),
                kernel=select_for(chunk, block, width, rows),
                times=measured[key],
            )
        )
    return timings


def _rows_of(node: ir.Node, x_shape: tuple[int, ...]) -> int:
    """The vectors of activations that every weight multiplies: tokens, or the positions of a convolution's output."""
    if node.op_type not in (*sparse_conv.OP_TYPES, *sparse_conv_depthwise.OP_TYPES):
        return math.prod(x_shape[:-1])
    names = ("kernel_shape", "strides", "pads", "dilations")
    window = sparse_conv.Window(*(tuple(node.attributes[name].as_ints()) for name in names))  # type: ignore[arg-type]
    return x_shape[0] * math.prod(window.output_size(*x_shape[2:]))


def cut_layer(
    model: ir.Model,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    shapes: Sequence[tuple[int, ...]],
) -> tuple[ir.Model, Feeds]:
    """The part of ``model`` from ``inputs`` to ``outputs``, all float32, as a model of its own, and random inputs.

    ``shapes`` are those of the inputs, which may contain a value twice.
    """
    distinct = dict(zip(inputs, shapes, strict=True))
    part = ir.Model(
        ir.convenience.extract(model.graph, list(distinct), list(outputs)),
        ir_version=model.ir_version,
        functions=[function.clone() for function in model.functions.values() if function.domain == DOMAIN],
    )
    part.graph.opset_imports.update(model.opset_imports)
    for node in part.graph:
        for value in node.outputs:
            value.shape = None  # with the symbols of the whole model, which are numbers here
    specs = []
    for source, shape in zip(part.graph.inputs, distinct.values(), strict=True):
        source.shape = ir.Shape(shape)
        source.type = ir.TensorType(ir.DataType.FLOAT)
        specs.append(InputSpec(source.name or "", ir.DataType.FLOAT.numpy(), shape, None))
    for output in part.graph.outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    return part, generate(
        specs, {spec.name: shape for spec, shape in zip(specs, distinct.values(), strict=True)}
    )


def _time_node(
    model: ir.Model, node: ir.Node, shapes: Sequence[tuple[int, ...]], *, threads: int, work: Path
) -> Ratio:
    part, feeds = cut_layer(model, _activations(node), node.outputs, shapes)
    return time_pair([part, part], [False, True], feeds, threads=threads, work=work)
