"""Sparse weights and one-layer models."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.chunked_csc import PackedWeight
from sparse_onnx.sparse_ops.formats.nbits import Layout, PackedLevels, pack
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

NODE = "encoder/layer.3/query"


def _sparse(K: int, N: int, density: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((K, N)).astype(np.float32)
    return np.where(rng.random((K, N)) < density, weight, np.float32(0))


def _model(
    packed: PackedWeight,
    bias: np.ndarray,
    op_type: str = "SparseMatMul",
    *,
    x_shape: Sequence[int | str] | None = ("tokens", None),
    x_type: int = onnx.TensorProto.FLOAT,
    arrays: Mapping[str, np.ndarray] | None = None,
    attributes: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = ("Y",),
    opset: int = 17,
    with_body: bool = True,
) -> onnx.ModelProto:
    """One layer, node name NODE. ``arrays`` and ``attributes`` replace packed ones (None: left out) or come behind
    them, ``inputs`` names arrays that become inputs of the graph instead of initializers."""
    stored = {**packed.arrays(), "bias": bias, **(arrays or {})}
    wanted = {**packed.attributes(), "mask_structure": "unstructured", **(attributes or {})}
    node = onnx.helper.make_node(op_type, ["X", *stored], outputs, name=NODE, domain=DOMAIN)
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in wanted.items() if v is not None)
    if x_shape is not None:
        x_shape = [*x_shape[:-1], packed.K if x_shape[-1] is None else x_shape[-1]]
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [
            onnx.helper.make_tensor_value_info("X", x_type, x_shape),
            *(
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(stored[name].dtype), stored[name].shape
                )
                for name in inputs
            ),
        ],
        [onnx.helper.make_tensor_value_info(name, float32, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items() if name not in inputs],
    )
    return onnx.helper.make_model(
        graph,
        ir_version=9,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[OP_TYPES[op_type].function_body(opset)] if with_body else [],
    )


def _open_session(
    model: onnx.ModelProto, *, library: bool = True, threads: int = 1, options: Any = None
) -> onnxruntime.InferenceSession:
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library:
        sparse_ops.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


LOGGED = """
import sys, onnxruntime
from sparse_onnx import sparse_ops
options = onnxruntime.SessionOptions()
options.log_severity_level = 1
options.register_custom_ops_library(str(sparse_ops.library_path()))  # as any host does
onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
"""


def _create_session(path: Path, isa: str) -> subprocess.CompletedProcess[str]:
    """A session for the model at ``path`` in a process of its own, with a forced instruction set and all its logs."""
    return subprocess.run(
        [sys.executable, "-c", LOGGED, str(path)],
        env={**os.environ, "SPARSE_ONNX_FORCE_ISA": isa, "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


FORCED = """
import sys, numpy as np, onnxruntime
from sparse_onnx import sparse_ops
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(str(sparse_ops.library_path()))
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
np.savez(sys.argv[3], *session.run(None, dict(np.load(sys.argv[2]))))
"""


@pytest.fixture
def run_forced(tmp_path) -> Callable[..., list[np.ndarray]]:
    """``run_forced(model, feeds, isa)``: all outputs, in a process of its own with that instruction set; skips where
    the processor has not got it."""

    def run_forced(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], isa: str) -> list[np.ndarray]:
        paths = [str(tmp_path / name) for name in ("forced.onnx", "feeds.npz", "got.npz")]
        onnx.save(model, paths[0])
        np.savez(paths[1], **feeds)
        result = subprocess.run(
            [sys.executable, "-c", FORCED, *paths],
            env={**os.environ, "SPARSE_ONNX_FORCE_ISA": isa, "ORT_DISABLE_TELEMETRY": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if "SPARSE_ONNX_FORCE_ISA" in result.stderr:
            pytest.skip(f"this processor has no {isa}")
        assert result.returncode == 0, result.stderr
        with np.load(paths[2]) as got:
            return [got[name] for name in got.files]

    return run_forced


@pytest.fixture
def sparse() -> Callable[..., np.ndarray]:
    """``sparse(K, N, density, seed=0)``"""
    return _sparse


@pytest.fixture
def layer_model() -> Callable[..., onnx.ModelProto]:
    return _model


@pytest.fixture
def open_session() -> Callable[..., onnxruntime.InferenceSession]:
    return _open_session


def _packed_levels(
    K: int,
    N: int,
    layout: Layout,
    *,
    group: int = 64,
    kept: int = 5,
    density: float = 0.5,
    seed: int = 0,
) -> tuple[PackedLevels, np.ndarray]:
    """A random weight, and its levels, of which that share, or ``kept`` of 16, are not 0."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-layout.middle, layout.middle - 1, (K, N))
    levels += levels >= 0  # none is 0
    zero_point = None
    if layout.zeros:
        zero_point = rng.integers(0, 16, (-(-K // group), N)).astype(np.uint8)
        zero = zero_point.astype(np.int64)[np.arange(K) // group]
        stored = rng.integers(0, 15, (K, N))
        levels = stored + (stored >= zero) - zero
    if layout.masks:
        keep = rng.random((K, N)) < density
    else:
        keep = rng.random((-(-K // 16), 16, N)).argsort(axis=1).reshape(-1, N)[:K] < kept
    scale = rng.uniform(1e-6, 2, (-(-K // group), N)).astype(np.float16).astype(np.float32)
    packed = pack(levels * keep, scale, group, layout, zero_point)
    return packed, levels * keep


@pytest.fixture(scope="session")
def packed_levels() -> Callable[..., tuple[PackedLevels, np.ndarray]]:
    return _packed_levels


@pytest.fixture
def create_session() -> Callable[[Path, str], subprocess.CompletedProcess[str]]:
    return _create_session


@pytest.fixture
def node_name() -> str:
    return NODE
