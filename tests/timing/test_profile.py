"""Time by layer from ORT's profile: which kernel belongs to which layer, however the runtime has fused it."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.errors import RunError
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.timing.profile import profile_model, time_shares

LINEARS = """<ir_version: 9, opset_import: ["" : 20]>
g (float[1, 32, 64] X) => (float[1, 32, 64] Y)
{ m0 = MatMul(X, A) a0 = Add(m0, a) g0 = Gelu(a0) s = Softmax(g0) m1 = MatMul(s, B) Y = Add(m1, b) }"""

IMAGES = """<ir_version: 9, opset_import: ["" : 17]>
g (float[1, 16, 12, 12] X) => (float[1, 16, 12, 12] Y)
{ c0 = Conv<pads = [1, 1, 1, 1]>(X, A, a) r0 = Relu(c0) c1 = Conv<pads = [1, 1, 1, 1]>(r0, B, b)
  s = Add(c1, r0) Y = Relu(s) }"""


def load(text, shape):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(text)
    for name in ("A", "B"):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    for name in ("a", "b"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape[0], np.float32), name))
    return ir.from_proto(proto)


def profiled(model, tmp_path, **feeds):
    layers = {
        candidate.weight.name: [node for layer in candidate.layers for node in layer.nodes]
        for candidate in find_candidates(model)[0]
    }
    names = [node.name for node in model.graph]
    found = profile_model(model, layers, feeds, threads=1, work=tmp_path)
    assert [node.name for node in model.graph] == names
    assert list(tmp_path.iterdir()) == []
    return found


def test_linears_with_their_bias_and_activation(tmp_path):
    x = np.ones((1, 32, 64), np.float32)
    found = profiled(load(LINEARS, (64, 64)), tmp_path, X=x)
    assert set(found.layers) == {"A", "B"}
    assert min(found.layers.values()) > 0
    assert {"Softmax"} <= set(found.others) <= {"Softmax", "Reshape"}  # some runtimes make a Gemm of it
    assert 0 < found.covered <= 1
    assert 0 < found.share("A") < 1
    assert found.share("none") == 0


def test_convolutions_in_the_runtimes_own_layout(tmp_path):
    x = np.ones((1, 16, 12, 12), np.float32)
    found = profiled(load(IMAGES, (16, 16, 3, 3)), tmp_path, X=x)
    assert set(found.layers) == {"A", "B"}
    assert not {"Conv", "Relu", "Add"} & set(found.others)
    assert sum(found.layers.values()) + sum(found.others.values()) <= found.wall_ms


def test_a_model_that_ort_refuses(tmp_path):
    model = load(LINEARS, (64, 64))
    next(iter(model.graph)).op_type = "NoSuchOperator"
    with pytest.raises(RunError, match="refuses the model"):
        profile_model(model, {}, {}, threads=1, work=tmp_path)


@pytest.mark.parametrize("library", [False, True])
def test_shares_of_sparse_and_dense_layers_and_of_the_rest(tmp_path, library):
    model = load(LINEARS, (64, 64))
    if library:
        Magnitude(sparsity=0.9, targets=("A",))(model)
        LowerSparseMatMul()(model)
    feeds = {"X": np.ones((1, 32, 64), np.float32)}
    found = time_shares(model, ["A", "B"], feeds, threads=1, library=library, work=tmp_path)
    operators = {other["op_type"] for other in found["others"]}
    assert "Softmax" in operators
    assert not any("MatMul" in name or "Gemm" in name for name in operators)
    assert 0 < found["layers_ms"] < found["wall_ms"]


def test_a_model_with_names_like_ours(tmp_path):
    x = np.ones((1, 32, 64), np.float32)
    model = load(LINEARS, (64, 64))
    model.graph.inputs[0].name, model.graph.initializers["a"].name = (
        "sparse_onnx.0.0",
        "sparse_onnx.sparse_onnx.4.0",
    )
    found = profiled(model, tmp_path, **{"sparse_onnx.0.0": x})
    assert set(found.layers) == {"A", "B"}
    assert "Softmax" in found.others
