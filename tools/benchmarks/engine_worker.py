"""One engine in a process of its own: load a model, then time one run at every request.

Started by :mod:`sparse_onnx.tools.benchmarks.engines` with the interpreter that has the engine, so this file needs
nothing but that engine and NumPy. Protocol: lines of JSON on stdout, ``{"load_s": .., "rss_bytes": ..}`` once the
model is loaded and has run twice, then ``{"ms": ..}`` for every line that is read from stdin. It ends with stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["main"]

_DTYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
_DTYPE_OF_CODE = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 11: np.float64}
_TOKENS = 1000  # indices stay below this, as every vocabulary is larger


def _values(name: str, dims: Sequence[Any], dtype: Any, options: argparse.Namespace) -> np.ndarray:
    """Random values of seed 0: a first dimension without a number is the batch, any other the length."""
    shape = [
        dim if isinstance(dim, int) and dim > 0 else options.batch if axis == 0 else options.length
        for axis, dim in enumerate(dims)
    ]
    rng = np.random.default_rng(0)
    if "mask" in name or dtype == np.bool_:
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 1 if "type" in name else _TOKENS, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _load_onnxruntime(options: argparse.Namespace) -> Callable[[], Any]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    # Threads that spin after a run would take a core from the engine whose turn is next.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.library:
        settings.register_custom_ops_library(options.library)
    session = onnxruntime.InferenceSession(options.model, settings, providers=["CPUExecutionProvider"])
    feeds = {i.name: _values(i.name, i.shape, _DTYPES[i.type], options) for i in session.get_inputs()}
    return lambda: session.run(None, feeds)


def _load_openvino(options: argparse.Namespace) -> Callable[[], Any]:
    import openvino  # type: ignore[import-not-found]

    core = openvino.Core()
    config = {
        "INFERENCE_NUM_THREADS": options.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(options.model), "CPU", config)
    feeds = {}
    for port in compiled.inputs:
        dims = [dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()]
        name = port.get_any_name()
        feeds[name] = _values(name, dims, np.dtype(port.get_element_type().to_dtype()), options)
    request = compiled.create_infer_request()
    return lambda: [np.array(value) for value in request.infer(feeds).values()]


def _load_deepsparse(options: argparse.Namespace) -> Callable[[], Any]:
    os.environ["NM_DISABLE_ANALYTICS"] = "True"
    import onnx
    from deepsparse import compile_model  # type: ignore[import-not-found]

    graph = onnx.load(options.model, load_external_data=False).graph
    constants = {value.name for value in graph.initializer}
    feeds = []
    for value in graph.input:
        if value.name not in constants:
            kind = value.type.tensor_type
            dims = [dim.dim_value for dim in kind.shape.dim]
            feeds.append(_values(value.name, dims, _DTYPE_OF_CODE[kind.elem_type], options))
    engine = compile_model(
        options.model,
        batch_size=feeds[0].shape[0],
        num_cores=options.threads,
        input_shapes=[list(value.shape) for value in feeds],
    )
    return lambda: engine.run(feeds)


_LOADERS = {"onnxruntime": _load_onnxruntime, "openvino": _load_openvino, "deepsparse": _load_deepsparse}


def _resident_bytes() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Serve until stdin ends; see the docstring of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=sorted(_LOADERS))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--library", default="")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an engine prints must not mix with the protocol
    start = time.perf_counter()
    run = _LOADERS[options.engine](options)
    loaded = time.perf_counter() - start
    for _ in range(2):
        run()
    answers.write(json.dumps({"load_s": loaded, "rss_bytes": _resident_bytes()}) + "\n")
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        answers.write(json.dumps({"ms": (time.perf_counter() - start) * 1e3}) + "\n")


if __name__ == "__main__":
    main()
