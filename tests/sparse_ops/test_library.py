"""The library through its C interface: every kernel, every instruction set, every mistake."""

import ctypes
import ctypes.util
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import sparse_onnx
from sparse_onnx import sparse_ops
from sparse_onnx.errors import HostError
from sparse_onnx.sparse_ops import library
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, PackedWeight
from sparse_onnx.sparse_ops.ops import sparse_matmul as sm

CSRC = Path(__file__).resolve().parents[2] / "sparse_ops" / "csrc"
ISAS = ("avx512", "avx2", "neon", "generic")
KERNELS = sparse_ops.info().kernels


def tolerance(x: np.ndarray, packed: PackedWeight, bias: np.ndarray) -> np.ndarray:
    """What rounding in float32 may amount to; no activation is steeper than 1.13."""
    magnitude = np.abs(x).astype(np.float64) @ np.abs(packed.unpack()) + np.abs(bias)
    return 1.13 * np.finfo(np.float32).eps * (packed.K + 8) * magnitude


def test_info():
    info = sparse_ops.info()
    assert info.path == sparse_ops.library_path()
    assert info.version == sparse_onnx.__version__
    assert info.isa in ISAS
    assert {"generic_t4", "reference"} <= set(info.kernels)
    assert any(name.startswith(info.isa) for name in info.kernels)
    assert len(info.features) == len(set(info.features))
    if info.isa != "generic":
        assert {"avx512": {"avx2", "avx512f"}, "avx2": {"avx2", "fma"}, "neon": {"neon"}}[info.isa] <= set(
            info.features
        )


@pytest.mark.parametrize("activation", sm.OP_TYPES)
@pytest.mark.parametrize("kernel", [*KERNELS, None])
def test_every_kernel_computes_the_reference(kernel, activation, sparse):
    packed = CHUNKED_CSC.pack(sparse(131, 67, 0.3))
    rng = np.random.default_rng(1)
    bias = rng.standard_normal(67).astype(np.float32)
    for tokens in (1, 2, 7, 33, 130):
        x = rng.standard_normal((tokens, 131)).astype(np.float32)
        got = sparse_ops.run(x, packed, bias, activation, kernel)
        error = np.abs(got - sm.reference(x, packed, bias, activation))
        assert (error <= tolerance(x, packed, bias)).all()


@pytest.mark.parametrize("shape", [(131,), (0, 131), (2, 3, 131), (2, 0, 3, 131)])
def test_leading_dimensions_are_kept(shape, sparse):
    packed = CHUNKED_CSC.pack(sparse(131, 20, 0.3))
    x = np.ones(shape, np.float32)
    got = sparse_ops.run(x, packed, np.zeros(20, np.float32))
    assert got.shape == (*shape[:-1], 20)
    np.testing.assert_allclose(got, x @ packed.unpack(), rtol=1e-5, atol=1e-5)


def test_strided_input_is_copied(sparse):
    packed = CHUNKED_CSC.pack(sparse(16, 8, 0.5))
    x = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32).T
    got = sparse_ops.run(x, packed, np.zeros(8, np.float32))
    np.testing.assert_allclose(got, x @ packed.unpack(), rtol=1e-5, atol=1e-5)


def test_run_refuses(sparse):
    packed, bias = CHUNKED_CSC.pack(sparse(16, 8, 0.5)), np.zeros(8, np.float32)
    x = np.zeros((3, 16), np.float32)
    with pytest.raises(ValueError, match=r"x must be float32 \[..., 16\]"):
        sparse_ops.run(np.zeros((3, 15), np.float32), packed, bias)
    with pytest.raises(ValueError, match="x must be float32"):
        sparse_ops.run(x.astype(np.float64), packed, bias)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        sparse_ops.run(x, packed, bias, "tanh")
    with pytest.raises(ValueError, match="no kernel 'avx9000'"):
        sparse_ops.run(x, packed, bias, kernel="avx9000")
    with pytest.raises(FormatError, match="bias"):
        sparse_ops.run(x, packed, bias[:-1])
    with pytest.raises(FormatError, match="bias must be a contiguous vector of float32"):
        sparse_ops.run(x, packed, bias.astype(np.float64))


def test_some_kernels_refuse_large_chunks_and_blocks(sparse):
    packed = CHUNKED_CSC.pack(sparse(200, 300, 0.5), chunk=200, block=256)
    x, bias = np.ones((2, 200), np.float32), np.zeros(300, np.float32)
    for kernel in KERNELS:
        if kernel in ("avx512_t128", "avx512_t1"):
            with pytest.raises(ValueError, match="the chunk or the block is too large"):
                sparse_ops.run(x, packed, bias, kernel=kernel)
    np.testing.assert_allclose(sparse_ops.run(x, packed, bias), x @ packed.unpack(), rtol=1e-5, atol=1e-4)


def test_select_names_a_kernel_of_the_active_instruction_set(sparse):
    packed = CHUNKED_CSC.pack(sparse(768, 64, 0.1))
    isa = sparse_ops.info().isa
    chosen = [library.select(packed, tokens) for tokens in (1, 4, 5, 16, 64, 1000)]
    assert all(name.startswith(isa) for name in chosen)
    tiles = [int(name.rpartition("_t")[2]) for name in chosen]
    assert tiles == sorted(tiles)
    assert tiles[0] == (1 if isa == "avx512" else 4)


@pytest.mark.parametrize("width", [0, 16])
def test_select_refuses_a_width_that_no_kernel_has(width):
    sizes = {"K": 256, "N": 64, "chunk": 128, "block": 64, "width": width}
    with pytest.raises(FormatError, match=f"no kernel takes .* chunk 128, block 64, width {width}"):
        library.select_for(CHUNKED_CSC, sizes, 4)


@pytest.mark.parametrize("limit", [library.peak, library.load_peak])
def test_limits_of_the_processor(limit):
    for kernel in KERNELS:
        assert limit(kernel, 0.001) > 1e7
    with pytest.raises(ValueError, match="no kernel 'nothing'"):
        limit("nothing", 0.01)


@pytest.mark.parametrize("kernel", [*KERNELS, None])
def test_time_kernel(kernel, sparse):
    packed = CHUNKED_CSC.pack(sparse(131, 67, 0.3))
    assert 0 < library.time_kernel(packed, 7, kernel, seconds=0) < 1


def test_time_kernel_refuses(sparse):
    packed = CHUNKED_CSC.pack(sparse(16, 8, 0.5))
    with pytest.raises(ValueError, match="tokens must be at least 1, not 0"):
        library.time_kernel(packed, 0)
    with pytest.raises(ValueError, match="no kernel 'avx9000'"):
        library.time_kernel(packed, 4, "avx9000")
    with pytest.raises(FormatError, match="counts"):
        library.time_kernel(dataclasses.replace(packed, counts=np.zeros_like(packed.counts)), 4)


def test_time_kernel_says_why_a_kernel_does_not_fit(sparse):
    packed = CHUNKED_CSC.pack(sparse(200, 300, 0.5), chunk=200, block=256)
    for kernel in {"avx512_t128", "avx512_t1"} & set(KERNELS):
        with pytest.raises(ValueError, match="the chunk or the block is too large"):
            library.time_kernel(packed, 4, kernel)
    assert library.time_kernel(packed, 4, seconds=0) > 0


def test_missing_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(HostError, match=r"not installed.*pip install"):
        sparse_ops.library_path()


def test_damaged_library_is_explained(monkeypatch, tmp_path):
    (tmp_path / "libsparse_ops.so").write_bytes(b"no library at all")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(HostError, match=r"cannot be loaded.*reinstall"):
        sparse_ops.register(onnxruntime.SessionOptions())


def test_library_of_something_else_is_explained(monkeypatch, tmp_path):
    name = ctypes.util.find_library("z") or ctypes.util.find_library("m")
    assert name is not None
    ctypes.CDLL(name)
    maps = Path("/proc/self/maps").read_text().split()
    found = next(path for path in maps if path.startswith("/") and name.split(".so")[0] in path)
    shutil.copy(found, tmp_path / "libsparse_ops.so")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(HostError, match=r"no kernel library of this package"):
        sparse_ops.register(onnxruntime.SessionOptions())


def test_library_of_another_version_is_explained(monkeypatch, tmp_path):
    shutil.copy(sparse_ops.library_path(), tmp_path / "libsparse_ops.so")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(metadata, "version", lambda package: "99.0")
    with pytest.raises(HostError, match=r"has version 0.*package 99\.0"):
        sparse_ops.register(onnxruntime.SessionOptions())


def test_refusal_by_the_runtime_is_explained():
    class Options:
        def register_custom_ops_library(self, _path):
            raise RuntimeError("too old")

    with pytest.raises(HostError, match=r"refuses.*too old.*1\.17"):
        sparse_ops.register(Options())


def in_subprocess(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPARSE_ONNX_FORCE_ISA": isa, "ORT_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


FORCED = """
import json, numpy as np
from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops import library
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC
from sparse_onnx.sparse_ops.ops import sparse_matmul as sm
rng = np.random.default_rng(0)
weight = rng.standard_normal((200, 90)).astype(np.float32) * (rng.random((200, 90)) < 0.2)
packed, bias = CHUNKED_CSC.pack(weight.astype(np.float32)), rng.standard_normal(90).astype(np.float32)
x = rng.standard_normal((77, 200)).astype(np.float32)
error = np.abs(sparse_ops.run(x, packed, bias, "gelu") - sm.reference(x, packed, bias, "gelu")).max()
print(json.dumps([sparse_ops.info().isa, library.select(packed, 77), float(error)]))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_forced_instruction_set_is_the_one_that_runs(isa):
    result = in_subprocess(FORCED, isa)
    if not any(name.startswith(isa) for name in KERNELS):
        assert "lacks" in result.stderr
        return
    active, kernel, error = json.loads(result.stdout)
    assert active == isa
    assert kernel.startswith(isa)
    assert error < 2e-5


FEATURES = """
import json
from sparse_onnx import sparse_ops
print(json.dumps([sparse_ops.info().isa, sparse_ops.info().features]))
"""


def test_a_feature_can_be_forced_beside_an_instruction_set():
    whole = sparse_ops.info()
    assert json.loads(in_subprocess(FEATURES, "generic").stdout) == ["generic", []]
    for feature in whole.features:
        isa, features = json.loads(in_subprocess(FEATURES, f"generic+{feature}").stdout)
        assert features == [feature]
        assert isa == ("neon" if feature == "neon" else "generic")
    everything = in_subprocess(FEATURES, "+".join(["generic", *whole.features]))
    assert json.loads(everything.stdout) == [whole.isa, list(whole.features)]


@pytest.mark.parametrize(
    ("forced", "word"), [("generic+fast", "an unknown feature"), ("generic+", "an unknown feature")]
)
def test_unknown_feature_is_refused(forced, word):
    result = in_subprocess("from sparse_onnx import sparse_ops; sparse_ops.info()", forced)
    assert result.returncode != 0
    assert f"HostError: SPARSE_ONNX_FORCE_ISA adds {word}" in result.stderr


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "sse", "reference"])
def test_unknown_instruction_set_is_refused(isa):
    result = in_subprocess("from sparse_onnx import sparse_ops; sparse_ops.info()", isa)
    assert result.returncode != 0
    assert "HostError: SPARSE_ONNX_FORCE_ISA is none of avx512, avx2, neon, generic" in result.stderr


def test_only_documented_symbols_are_exported():
    text = (CSRC / "c_api.h").read_text()
    documented = set(re.findall(r"\b(sparse_onnx_\w+)\(", text)) | {"RegisterCustomOps"}
    loaded = library._library()
    assert all(hasattr(loaded, name) for name in documented)
    assert "local: *;" in (CSRC / "exports.map").read_text()
