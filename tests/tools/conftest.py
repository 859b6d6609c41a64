"""Small models on disk, and the command line run in this process."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from sparse_onnx.model import model_io
from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.tools import cli

_CHAIN = """<ir_version: 9, opset_import: ["" : 20]>
chain (float[batch, sequence, 64] X) => (float[batch, sequence, 48] Y)
{ m0 = MatMul(X, W0) a0 = Add(m0, b0) g0 = Gelu(a0) m1 = MatMul(g0, W1) Y = Add(m1, b1) }"""


@dataclasses.dataclass(frozen=True)
class Ran:
    """How one command line ended."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        text = capsys.readouterr()
        return Ran(int(ended.value.code or 0), text.out, text.err)

    return run


def chain(*, sparsity: float = 0.0, nan: bool = False) -> onnx.ModelProto:
    """Two linear layers; the same random weights whatever ``sparsity``, but for the zeros."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(_CHAIN)
    for name, shape in (("W0", (64, 96)), ("b0", (96,)), ("W1", (96, 48)), ("b1", (48,))):
        array = rng.standard_normal(shape).astype(np.float32) / np.float32(8)
        if len(shape) == 2:
            threshold = np.quantile(np.abs(array), sparsity) if sparsity else 0
            array[np.abs(array) < threshold] = 0
        if nan and name == "W1":
            array[0, 0], array[1, 1] = np.nan, np.inf
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"node{index}"
        node.metadata_props.add(key=MODULE_KEY, value=f"layers.{0 if index < 3 else 1}")
    return proto


@pytest.fixture
def save_chain(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str, **options: float) -> Path:
        path = tmp_path / f"{name}.onnx"
        onnx.save(chain(**options), path)
        return path

    return save


@pytest.fixture
def dense(save_chain: Callable[..., Path]) -> Path:
    """The model before pruning."""
    return save_chain("dense")


@pytest.fixture
def pruned(save_chain: Callable[..., Path]) -> Path:
    """The pruned model in dense form."""
    return save_chain("pruned", sparsity=0.9)


@pytest.fixture
def compiled(pruned: Path, tmp_path: Path) -> Path:
    """The folder of the pruned model with both layers as sparse operators."""
    model = model_io.load_model(pruned)
    LowerSparseMatMul(min_sparsity=0.5)(model)
    model_io.save_model(model, tmp_path / "compiled")
    return tmp_path / "compiled"
