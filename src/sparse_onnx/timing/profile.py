"""Where a model's time goes: ONNX Runtime's own profile, added up over the layers that we know and the rest.

The runtime fuses nodes and renames them. So a copy of the model is run in which every node and every value has a mark
in its name, and the kernels are looked up in the graph as the runtime has rewritten it: a kernel belongs to the layer
that makes its output, or else whose mark is left in its name. What fits no layer is listed by its operator.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.document import Level, OperatorTime, TimeShares
from sparse_onnx.errors import RunError
from sparse_onnx.model import model_io
from sparse_onnx.model.graph import value_names
from sparse_onnx.model.stored_weights import stored_weights
from sparse_onnx.running.runtime import at_best_level, run_session, session_options
from sparse_onnx.running.session import import_onnxruntime
from sparse_onnx.sparse_ops import native_path

__all__ = ["NodeProfile", "profile_model", "time_shares"]

_WARM_UP, _RUNS, _KEPT = 2, 9, 3
_MARK = "sparse_onnx."
_SUFFIX = "_kernel_time"


@dataclasses.dataclass(frozen=True)
class NodeProfile:
    """Milliseconds of one run, means over the fastest of several: of every layer by name, and of all other kernels by
    operator.

    ``wall_ms`` is the time of a whole run as the runtime tells it, while it was profiled.
    """

    wall_ms: float
    layers: Mapping[str, float]
    others: Mapping[str, float]

    @property
    def covered(self) -> float:
        """The share of the whole that the kernels add up to; the rest is between them."""
        return (sum(self.layers.values()) + sum(self.others.values())) / self.wall_ms

    def share(self, layer: str) -> float:
        """The part of the whole time that ``layer`` takes, in [0, 1]."""
        return self.layers.get(layer, 0.0) / self.wall_ms


def time_shares(
    model: ir.Model, weights: Collection[str], feeds: Feeds, *, threads: int, library: bool, work: Path
) -> TimeShares:
    """Where a run of ``model`` spends its time, as a report has it: in the layers of the ``weights``, sparse or dense,
    and in all other operators. The arguments are as for :func:`profile_model`."""
    nodes = [
        node
        for node in model.graph
        if stored_weights(node) or any(value is not None and value.name in weights for value in node.inputs)
    ]
    found = profile_model(model, {"layers": nodes}, feeds, threads=threads, library=library, work=work)
    others: list[OperatorTime] = [{"op_type": name, "ms": ms} for name, ms in found.others.items()]
    return {"wall_ms": found.wall_ms, "layers_ms": sum(found.layers.values()), "others": others}


def profile_model(
    model: ir.Model,
    layers: Mapping[str, Sequence[ir.Node]],
    feeds: Feeds,
    *,
    threads: int,
    work: Path,
    library: bool = False,
) -> NodeProfile:
    """Run ``model`` in one session and tell the time of its ``layers``, nodes of its main graph by a name of the layer.

    ``library`` registers the sparse kernels. Scratch files go to ``work``. Raises RunError if ORT refuses the model.
    """
    scratch = Path(tempfile.mkdtemp(prefix="profile-", dir=work))
    try:
        marked, mark = _marked(model)
        model_io.save_model(marked, scratch)
        run = functools.partial(_run_profiled, scratch, feeds, threads=threads, library=library)
        events, optimized = at_best_level(lambda level: run(level=level), lambda _line: None)[1]
        return _add_up(events, _owners(optimized, model, layers, mark))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_profiled(
    scratch: Path, feeds: Feeds, *, threads: int, library: bool, level: Level
) -> tuple[list[dict[str, Any]], onnx.ModelProto]:
    """What ORT's profiler writes of runs of ``scratch/model.onnx``, and the graph as ORT has rewritten it."""
    options = session_options(threads=threads, library=library, level=level, timed=True)
    with native_path(scratch) as folder:
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/{level}"
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        # Or the file would hold all weights, and protobuf ends at 2 GB.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        ort = import_onnxruntime()
        try:
            session = ort.InferenceSession(
                f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ORT's exceptions have no common base but Exception
            raise RunError(f"ONNX Runtime {ort.__version__} refuses the model: {error}") from error
        for _ in range(_WARM_UP + _RUNS):
            run_session(session, feeds)
        session.end_profiling()
    (profile,) = scratch.glob(f"{level}*.json")
    events: list[dict[str, Any]] = json.loads(profile.read_text(encoding="utf-8"))
    return events, onnx.load(scratch / "optimized.onnx", load_external_data=False)


def _marked(model: ir.Model) -> tuple[ir.Model, str]:
    """A copy in which every node of the main graph and what it makes are named by the node's position, and what is in
    front of the position: it is in no name that the model has."""
    copy = model.clone()
    outputs = {value.name for value in copy.graph.outputs}
    taken, mark = value_names(copy), _MARK
    while any(mark in name for name in taken):
        mark = f"{_MARK}{mark}"
    for index, node in enumerate(copy.graph):
        node.name = f"{mark}{index}."
        for position, value in enumerate(node.outputs):
            if value.name not in outputs:
                value.name = f"{mark}{index}.{position}"
    return copy, mark


def _owners(
    optimized: onnx.ModelProto, model: ir.Model, layers: Mapping[str, Sequence[ir.Node]], mark: str
) -> dict[str, str]:
    """The layer of every node of the ``optimized`` copy that computes one, by the node's name. ``mark`` stands in front
    of the position of a node of ``model``."""
    layer_of = {id(node): name for name, nodes in layers.items() for node in nodes}
    outputs = {value.name: index for index, node in enumerate(model.graph) for value in node.outputs}
    by_position = [layer_of.get(id(node)) for node in model.graph]
    owners = {}
    for node in optimized.graph.node:
        # What it makes says more than its name, which may be that of the first node in it. But a kernel with a layout
        # of its own makes a value of its own.
        for text in (*node.output[:1], node.name):
            found = re.search(rf"{re.escape(mark)}(\d+)\.", text)
            position = int(found[1]) if found else outputs.get(text)
            if position is not None and (layer := by_position[position]) is not None:
                owners[node.name] = layer
                break
    return owners


def _add_up(events: Sequence[Mapping[str, Any]], owner: Mapping[str, str]) -> NodeProfile:
    """``owner`` has the layer of a kernel by the name of its node."""
    walls: list[float] = []
    runs: list[dict[str, tuple[str, float]]] = []
    kernels: dict[str, tuple[str, float]] = {}
    # An event is written when it ends, so the kernels of a run stand before the run.
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            node = name.removesuffix(_SUFFIX)
            before = kernels.get(node, ("", 0.0))[1]  # a body of Loop runs several times
            kernels[node] = (event["args"]["op_name"], before + event["dur"] / 1e3)
        elif name == "model_run":
            walls.append(event["dur"] / 1e3)
            runs.append(kernels)
            kernels = {}
    # Another process in the way hits some kernel in every run: so whole runs are taken, the fastest ones.
    fastest = sorted(range(_WARM_UP, len(runs)), key=walls.__getitem__)[:_KEPT]
    layers: dict[str, float] = collections.defaultdict(float)
    others: dict[str, float] = collections.defaultdict(float)
    for index in fastest:
        for node, (operator, spent) in runs[index].items():
            if node in owner:
                layers[owner[node]] += spent / len(fastest)
            else:
                others[operator] += spent / len(fastest)
    order = sorted(others.items(), key=lambda item: -item[1])
    return NodeProfile(statistics.fmean(walls[index] for index in fastest), dict(layers), dict(order))
