"""Run models on ONNX Runtime: sessions, whole or segment by segment, and timing that holds on a noisy machine.

A model whose weights exceed a memory budget is run as a chain of *segments*, consecutive nodes with a bounded
amount of weights, one session at a time; the values between them pass through numpy.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx_ir as ir

from sparse_onnx import sparse_ops
from sparse_onnx.data.inputs import Feeds
from sparse_onnx.document import Level
from sparse_onnx.errors import RunError, UsageError, VerificationError
from sparse_onnx.model import model_io
from sparse_onnx.model.graph import read_values, subgraphs
from sparse_onnx.progress import Progress
from sparse_onnx.running.heap import give_back_memory, large_blocks_apart
from sparse_onnx.running.host import cpu_features, has_integer_dot_products
from sparse_onnx.running.outputs import tensor_outputs
from sparse_onnx.running.session import import_onnxruntime
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.sparse_ops.domain import DOMAIN

if TYPE_CHECKING:
    import onnxruntime


__all__ = [
    "LEVELS",
    "Runner",
    "at_best_level",
    "of_our_making",
    "open_runner",
    "open_session",
    "run_session",
    "session_budget",
    "session_options",
]

LEVELS: tuple[Level, ...] = ("all", "basic", "disabled")
"""ONNX Runtime's graph optimizations, its default first: each leaves out some of those before it."""

_LEVEL_NAMES = {"basic": "basic ones", "disabled": "none"}
_FOLDED_BYTES = 1 << 20
_WORTH_COLLECTING = 64 << 20
"""Bytes of weights from which a model is worth a search for those that nobody knows any more."""

_T = TypeVar("_T")


def session_budget(nbytes: int) -> int:
    """Bytes of weights that one session may hold for a model of ``nbytes``: 1.5 GiB for all models up to that; of
    a larger one a 16th, so that weights, ORT's packed copies and activations together stay under half of it."""
    return 3 << 29 if nbytes <= 3 << 29 else max(nbytes // 16, 128 << 20)


def session_options(
    *, threads: int, library: bool, level: Level = LEVELS[0], timed: bool = False
) -> onnxruntime.SessionOptions:
    """Options of a quiet CPU session. ``library`` registers the sparse kernels, else standard operators run; ``level``
    is one of :data:`LEVELS`.

    ORT's products of unsigned by signed bytes saturate on processors with AVX2 and no VNNI, unless it is told to be
    precise, which costs time. There, sessions are, but for ``timed`` ones, which do what ORT does by itself.

    Raises HostError if ONNX Runtime or the library is missing.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }[level]
    # Threads that spin after a run would take the cores from the other session of an interleaved timing.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not timed and not has_integer_dot_products(cpu_features()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    if library:
        sparse_ops.register(options)
    return options


def open_session(
    path: Path,
    *,
    threads: int,
    library: bool,
    level: Level = LEVELS[0],
    lean: bool = False,
    timed: bool = False,
) -> onnxruntime.InferenceSession:
    """A CPU session on a model file. ``library`` registers the sparse kernels, else standard operators run.

    ``level`` is one of :data:`LEVELS`; ``timed`` is as for :func:`session_options`. A ``lean`` session computes large
    constants anew in every run rather than keep them, as far as ORT lets itself be told: the weights of sparse
    operators without the library among them.

    Raises HostError if ONNX Runtime or the library is missing, RunError if ORT refuses the model.
    """
    options = session_options(threads=threads, library=library, level=level, timed=timed)
    ort = import_onnxruntime()
    if lean:
        options.add_session_config_entry(
            "optimization.constant_folding_max_output_size_in_bytes", str(_FOLDED_BYTES)
        )
    try:
        with sparse_ops.native_path(path) as native, large_blocks_apart():
            return ort.InferenceSession(native, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT's exceptions have no common base but Exception
        raise RunError(f"ONNX Runtime {ort.__version__} refuses {path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Segment:
    """``model`` is None if the file at ``path`` exists already; else it is written on first use."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    model: ir.Model | None = None

    def write(self, values: Feeds) -> None:
        """Write the file if it is not there. ORT wants typed inputs, and a model need not say the types of the
        values inside it: they are those of ``values``."""
        if self.model is None or self.path.exists():
            return
        for value in self.model.graph.inputs:
            if value.type is None:
                value.type = _type_of(values[value.name or ""])
        self.path.parent.mkdir()
        model_io.save_model(self.model, self.path.parent)


def _type_of(value: np.ndarray | list[np.ndarray]) -> ir.TypeProtocol:
    """Of what a session has returned. A sequence without an element to tell from is taken as one of floats."""
    if isinstance(value, list):
        return ir.SequenceType(_type_of(value[0]) if value else ir.TensorType(ir.DataType.FLOAT))
    return ir.TensorType(ir.DataType.from_numpy(value.dtype))


class Runner:
    """Runs one model: ``run(feeds)`` gives all tensor outputs by name; ``milliseconds(feeds)`` times one run.

    Where ORT cannot open or run a session with its default optimizations, the highest of :data:`LEVELS` that works is
    used, and ``bench.progress`` told so; ``level`` is the lowest one in use.
    """

    def __init__(
        self,
        segments: Sequence[_Segment],
        outputs: Sequence[str],
        bench: Workbench,
        library: bool,
        constants: Feeds | None = None,
        lean: bool = False,
        level: Level = LEVELS[0],
        timed: bool = False,
    ) -> None:
        self._segments = segments
        self.outputs = tuple(outputs)
        self.level = level
        self._threads, self._say = bench.threads, bench.progress
        self._library, self._lean, self._timed = library, lean, timed
        self._constants = constants or {}
        self._session: onnxruntime.InferenceSession | None = None
        if self.whole:
            segments[0].write({})
            self._session = self._at_best_level(segments[0], lambda _session, _feeds: None, {})[0]
            give_back_memory()

    def _open(self, segment: _Segment, level: Level) -> onnxruntime.InferenceSession:
        return open_session(
            segment.path,
            threads=self._threads,
            library=self._library,
            level=level,
            lean=self._lean,
            timed=self._timed,
        )

    def _at_best_level(
        self,
        segment: _Segment,
        step: Callable[[onnxruntime.InferenceSession, Feeds], _T],
        feeds: Feeds,
        session: onnxruntime.InferenceSession | None = None,
    ) -> tuple[onnxruntime.InferenceSession, _T]:
        """``step`` on the first session of ``segment`` that can do it, which is returned as well; ``session`` is the
        one of the present level, if there is one."""
        usable = [session]

        def attempt(level: Level) -> tuple[onnxruntime.InferenceSession, _T]:
            found = usable.pop() if usable else None
            found = found or self._open(segment, level)
            return found, step(found, feeds)

        self.level, result = at_best_level(attempt, self._say, self.level)
        return result

    @property
    def whole(self) -> bool:
        """True if one session holds the whole model, so that its time is that of a deployed model."""
        return len(self._segments) == 1 and not self._constants

    def close(self) -> None:
        """Give back the session's memory; the runner is of no more use."""
        self._session = None
        give_back_memory()

    def run(self, feeds: Feeds) -> Feeds:
        results = {k: v for k, v in self._walk(feeds, run_session).items() if k in self.outputs}
        for name, value in results.items():
            if not isinstance(value, np.ndarray):
                raise UsageError(
                    f"output {name!r} is no tensor, though the model does not say so; declare its type"
                )
        return results

    def milliseconds(self, feeds: Feeds, repeat: int = 3) -> float:
        """Wall-clock time of one run. In segments: the sum of each segment's best of ``repeat``, after a warm-up."""
        if self._session is not None:
            return self._step(feeds, _timed)
        spent = 0.0

        def timed(session: onnxruntime.InferenceSession, feeds: Feeds) -> Feeds:
            nonlocal spent
            result = run_session(session, feeds)
            spent += min(_timed(session, feeds) for _ in range(repeat))
            return result

        self._walk(feeds, timed)
        return spent

    def _step(self, feeds: Feeds, step: Callable[[onnxruntime.InferenceSession, Feeds], _T]) -> _T:
        """One step of a model that one session holds."""
        self._session, result = self._at_best_level(self._segments[0], step, feeds, self._session)
        return result

    def _walk(self, feeds: Feeds, step: Callable[[onnxruntime.InferenceSession, Feeds], Feeds]) -> Feeds:
        if self._session is not None:
            return self._step(feeds, step)
        values = {**self._constants, **feeds}
        parts = Progress(self._say, "too large for one session: part", len(self._segments))
        for index, segment in enumerate(self._segments):
            segment.write(values)
            given = {name: values[name] for name in segment.inputs if name in values}
            values |= self._at_best_level(segment, step, given)[1]
            give_back_memory()
            later = {name for s in self._segments[index + 1 :] for name in s.inputs} | set(self.outputs)
            values = {name: value for name, value in values.items() if name in later}
            parts.step()
        return {name: values[name] for name in self.outputs}


def at_best_level(
    attempt: Callable[[Level], _T], progress: Callable[[str], None], level: Level = LEVELS[0]
) -> tuple[Level, _T]:
    """The first of :data:`LEVELS`, from ``level`` on, with which ``attempt`` raises no RunError, and what it returns.

    ``progress`` is told if it is not the first. Raises RunError, the first one, if there is none.
    """
    first: RunError | None = None
    for lower in LEVELS[LEVELS.index(level) :]:
        try:
            result = attempt(lower)
        except RunError as error:
            first = first or error
            continue
        if first is not None:
            progress(
                "warning: ONNX Runtime cannot run this model with its default optimizations; here it runs with "
                f"{_LEVEL_NAMES[lower]}: {_one_line(first)}"
            )
        return lower, result
    assert first is not None
    raise RunError(f"{_one_line(first)}. With fewer or no graph optimizations it is the same") from first


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _timed(session: onnxruntime.InferenceSession, feeds: Feeds) -> float:
    start = time.perf_counter()
    run_session(session, feeds)
    return (time.perf_counter() - start) * 1e3


def run_session(session: onnxruntime.InferenceSession, feeds: Feeds) -> Feeds:
    """All outputs by name; of ``feeds`` what the session takes. RunError if ORT cannot run it."""
    names = [output.name for output in session.get_outputs()]
    wanted = {entry.name for entry in session.get_inputs()}
    try:
        values = session.run(names, {name: value for name, value in feeds.items() if name in wanted})
    except Exception as error:  # ORT's exceptions have no common base but Exception
        raise RunError(f"the model cannot be run with inputs {_describe(feeds)}: {error}") from error
    return dict(zip(names, values, strict=True))


def _describe(feeds: Feeds) -> str:
    return ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())


@contextmanager
def open_runner(
    model: ir.Model,
    bench: Workbench,
    path: Path | None = None,
    *,
    library: bool,
    lean: bool = False,
    level: Level = LEVELS[0],
    timed: bool = False,
) -> Iterator[Runner]:
    """A runner for ``model``. ``path`` is its file if it is on disk already.

    ``bench.progress`` is told how far a run is that takes several sessions, and where ORT's optimizations fail.
    ``library`` registers the sparse kernels; ``lean``, ``level`` and ``timed`` are as for :func:`open_session`.
    """
    held = max(model_io.weight_bytes(model), sum(_session_sizes(model.graph, library).values()))
    budget = session_budget(held) if bench.budget is None else bench.budget
    if held > _WORTH_COLLECTING:
        give_back_memory(cycles=True)
    scratch = Path(tempfile.mkdtemp(prefix="run-", dir=bench.work))
    runner = None
    try:
        outputs = [value.name or "" for value in model.graph.outputs]
        tensors = tensor_outputs(model)
        if held <= budget:
            if path is None:
                model_io.save_model(model, scratch)
                path = scratch / "model.onnx"
            inputs = tuple(value.name or "" for value in model.graph.inputs)
            whole = _Segment(path, inputs, tuple(outputs))
            runner = Runner([whole], tensors, bench, library, None, lean, level, timed)
        else:
            constants = {
                value.name or "": value.const_value.numpy()
                for value in model.graph.outputs
                if value.const_value is not None and value.is_initializer()
            }
            segments = _split(model, scratch, budget, library)
            runner = Runner(segments, tensors, bench, library, constants, lean, level, timed)
        yield runner
    finally:
        if runner is not None:
            runner.close()
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def of_our_making() -> Iterator[None]:
    """Around what is done with a model that this package made of one that has run on the same inputs: what ONNX Runtime
    refuses there is no mistake of the user's but of the compiler or a kernel, and raised as VerificationError. Other
    errors, as of data that are read meanwhile, stay what they are."""
    try:
        yield
    except RunError as error:
        raise VerificationError(
            f"the compiled model does not run, though the original does: {error}. This is a defect of sparse-onnx: "
            "please report it, with the recipe"
        ) from error


def _session_sizes(graph: ir.Graph, library: bool) -> dict[ir.Node, int]:
    """Bytes of weights that a session holds for every node: those that are stored, and what they are unfolded to.
    Without the library that is a compressed weight; in any case what ORT computes of constants alone, as floats of
    integers."""
    constant = _constant_nodes(graph)
    sizes = {}
    for node in graph:
        constants = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
        size = sum(tensor.nbytes for tensor in constants)
        if node.domain == DOMAIN and not library:
            size += 4 * node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
        if node in constant:
            size += sum(_nbytes(value) for value in node.outputs)
        sizes[node] = size
    return sizes


def _constant_nodes(graph: ir.Graph) -> set[ir.Node]:
    """What ORT computes when it opens a session: nodes that read constants alone. ``graph`` is sorted."""
    found: set[ir.Node] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if given and all(value.const_value is not None or value.producer() in found for value in given):
            found.add(node)
    return found


def _in_turn(graph: ir.Graph) -> list[list[ir.Node]]:
    """The nodes in an order they can run in, each behind the constant ones that it is the first to read. ``graph`` is
    sorted."""
    constant, place = _constant_nodes(graph), {node: index for index, node in enumerate(graph)}
    found: list[list[ir.Node]] = []
    left = dict.fromkeys(graph)
    for node in graph:
        if node in constant:
            continue
        needed = [node]
        for reader in needed:  # which grows meanwhile
            for value in read_values(reader):
                maker = value.producer()
                if maker is not None and maker in constant and maker in left:
                    del left[maker]
                    needed.append(maker)
        del left[node]
        found.append(sorted(needed, key=place.__getitem__))
    return [*found, *([node] for node in left)]


def _nbytes(value: ir.Value) -> int:
    """0 where the type or the shape is not known."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return 0
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


def _split(model: ir.Model, scratch: Path, budget: int, library: bool) -> list[_Segment]:
    """Cut the nodes, in an order they can run in, into runs that hold at most ``budget`` bytes of weights each."""
    model = model.clone()
    model.graph.sort()
    groups: list[list[ir.Node]] = [[]]
    held = 0
    sizes = _session_sizes(model.graph, library)
    for nodes in _in_turn(model.graph):
        size = sum(sizes[node] for node in nodes)
        if groups[-1] and held + size > budget:
            groups.append([])
            held = 0
        groups[-1] += nodes
        held += size
    position: dict[int, int] = {}
    for index, group in enumerate(groups):
        for node in group:
            position[id(node)] = index
            position.update({id(inner): index for graph in subgraphs(node) for inner in graph.all_nodes()})
    outputs = {id(value) for value in model.graph.outputs}
    segments = []
    for index, group in enumerate(groups):
        needed: dict[str, ir.Value] = {}
        made: dict[str, ir.Value] = {}
        for node in group:
            for value in read_values(node):
                producer = value.producer()
                from_before = producer is not None and position.get(id(producer), index) < index
                from_outside = value.is_graph_input() and not value.is_initializer()
                if from_before or (from_outside and value.graph is model.graph):
                    needed[value.name or ""] = value
            for value in node.outputs:
                later = any(position[id(user)] > index for user in value.consumers())
                if id(value) in outputs or later:
                    made[value.name or ""] = value
        if not made:
            continue
        part = ir.Model(
            ir.convenience.extract(model.graph, list(needed.values()), list(made.values())),
            ir_version=model.ir_version,
            functions=[function.clone() for function in model.functions.values()],
        )
        part.graph.opset_imports.update(model.opset_imports)
        path = scratch / f"segment{index}" / "model.onnx"
        segments.append(_Segment(path, tuple(needed), tuple(made), part))
    return segments
