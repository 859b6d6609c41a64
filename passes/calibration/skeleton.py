"""Sessions on parts of a model whose weights come in from outside: nothing but the graph is ever serialised.

ONNX Runtime gets a model whose large initializers point to a data file that does not exist, and the arrays
themselves beside it. Weights that lie in a file stay mapped there, and a weight that a pass has replaced is seen by the
next session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.errors import RunError
from sparse_onnx.model import model_io
from sparse_onnx.model.graph import read_values
from sparse_onnx.running.runtime import run_session, session_options
from sparse_onnx.running.session import import_onnxruntime

__all__ = ["PartSession", "extract"]


def extract(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The nodes of the main graph that compute ``outputs`` from ``inputs``, initializers perhaps among them, as a model
    that shares the tensors."""
    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    values |= {value.name: value for node in graph for value in node.outputs}
    nodes: set[int] = set()
    initializers: dict[int, ir.Value] = {}
    seen = {id(values[name]) for name in inputs}
    waiting = [values[name] for name in outputs]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        producer = value.producer()
        if producer is not None and producer.graph is graph and id(producer) not in nodes:
            nodes.add(id(producer))
            waiting += read_values(producer)
        elif value.is_initializer() and value.graph is graph:
            initializers[id(value)] = value
    view = ir.GraphView(
        [values[name] for name in inputs],
        [values[name] for name in outputs],
        nodes=[node for node in graph if id(node) in nodes],
        initializers=tuple(initializers.values()),
        opset_imports=graph.opset_imports,
        name=graph.name,
    )
    part = ir.Model(
        view.clone(),
        ir_version=model.ir_version,
        functions=[function.clone() for function in model.functions.values()],
    )
    part.graph.opset_imports.update(model.opset_imports)
    return part


class PartSession:
    """A session that computes ``outputs`` of ``model`` from ``inputs`` (values of its main graph, by name;
    initializers among them come from outside, then).

    ``example`` holds the inputs of one batch, from which values without a type get theirs. ``library`` registers the
    sparse kernels. Graph optimizations of ORT are limited to the basic ones: others fuse values away.

    Without outputs there is nothing to run. Use it in a ``with`` block.

    Raises RunError if ORT refuses the part.
    """

    def __init__(
        self,
        model: ir.Model,
        inputs: Sequence[str],
        outputs: Sequence[str],
        example: Feeds,
        *,
        threads: int,
        library: bool = False,
    ) -> None:
        self.outputs = tuple(outputs)
        self._session: Any = None
        self._weights: list[Any] = []
        self._tensors: dict[str, ir.TensorProtocol] = {}
        if not outputs:
            return
        part = extract(model, inputs, outputs)
        for value in part.graph.inputs:
            array = example[value.name or ""]
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            if value.shape is None:
                value.shape = ir.Shape([None] * array.ndim)
        options = session_options(threads=threads, library=library, level="basic")
        ort = import_onnxruntime()
        content, self._tensors = model_io.skeleton(part)
        # The session reads these arrays in place, so they must live as long as it does.
        self._weights = [_value_of(tensor, ort) for tensor in self._tensors.values()]
        if self._weights:
            options.add_external_initializers(list(self._tensors), self._weights)
        try:
            self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT's exceptions have no common base but Exception
            raise RunError(f"ONNX Runtime {ort.__version__} refuses a part of the model: {error}") from error

    def close(self) -> None:
        """Give back the session's memory, and the mapped pages of weights that lie in files."""
        self._session = None
        self._weights = []
        for tensor in self._tensors.values():
            model_io.release_mapping(tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, feeds: Feeds) -> Feeds:
        """The outputs by name."""
        if not self.outputs:
            return {}
        values = run_session(self._session, feeds)
        missing = [name for name in self.outputs if name not in values]
        if missing:
            raise AssertionError(f"ONNX Runtime returned no {', '.join(missing)}")
        return values


def _value_of(tensor: ir.TensorProtocol, ort: Any) -> Any:
    """The array of ``tensor`` as ORT takes it, without a copy."""
    array = np.ascontiguousarray(tensor.numpy())
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    # bfloat16 and the like: NumPy has no such type of its own
    raw = array.view(f"u{array.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, int(tensor.dtype))
