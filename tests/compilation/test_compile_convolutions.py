"""The whole road for a small convolutional network: folded, pruned, lowered, verified."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

import sparse_onnx
from sparse_onnx.analysis.inspection import inspect_model
from sparse_onnx.sparse_ops.domain import DOMAIN

C = 64


@pytest.fixture
def network(tmp_path):
    """A residual block with batch normalization, around a depthwise convolution, and a classifier."""
    rng = np.random.default_rng(0)

    def filters(*shape):
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    tensors = {
        "W1": filters(C, C, 3, 3),
        "gamma": rng.uniform(0.5, 1.5, C).astype(np.float32),
        "beta": rng.standard_normal(C).astype(np.float32),
        "mean": rng.standard_normal(C).astype(np.float32),
        "var": rng.uniform(0.5, 1.5, C).astype(np.float32),
        "D": filters(C, 1, 3, 3),
        "W2": filters(C, C, 1, 1),
        "F": filters(C, 10),
    }
    text = f"""<ir_version: 9, opset_import: ["" : 17]>
        net (float[batch, {C}, 28, 28] X) => (float[batch, 10] Y) {{
            a = Conv<pads = [1, 1, 1, 1]>(X, W1)
            b = BatchNormalization(a, gamma, beta, mean, var)
            c = Relu(b)
            d = Conv<pads = [1, 1, 1, 1], group = {C}>(c, D)
            e = Relu(d)
            f = Conv(e, W2)
            g = Add(f, X)
            h = Relu(g)
            p = GlobalAveragePool(h)
            q = Flatten(p)
            Y = MatMul(q, F) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in tensors.items())
    path = tmp_path / "in.onnx"
    onnx.save(proto, path)
    return path


X = np.random.default_rng(1).standard_normal((2, C, 28, 28)).astype(np.float32)


def outputs(path, *, library):
    if library:
        return sparse_onnx.InferenceSession(path).run(None, {"X": X})[0]
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"X": X})[0]


@pytest.mark.parametrize("benchmark", [True, False])
def test_network_is_compiled_and_both_ways_agree(network, tmp_path, benchmark):
    result = sparse_onnx.optimize(
        network,
        tmp_path / "out",
        sparsity=0.95,
        input_shapes={"X": X.shape},
        threads=1,
        benchmark=benchmark,
    )
    assert result.exit_code in (0, 5)  # 5: on a busy machine nothing may be faster
    assert result.report["verification"]["without_library"]["relative_error"] < 1e-6
    rows = {row["name"]: row for row in result.report["layers"]}
    assert rows["W1"]["rows"] == rows["W2"]["rows"] == rows["D"]["rows"] == 2 * 28 * 28
    assert rows["F"]["rows"] == 2
    assert rows["W1"]["shape"] == [9 * C, C]
    assert rows["D"]["sparsity"] == 0
    assert rows["W2"]["sparsity"] == pytest.approx(0.95, abs=1e-3)
    written = tmp_path / "out" / "model.onnx"
    with_library, without = (outputs(written, library=library) for library in (True, False))
    np.testing.assert_allclose(with_library, without, rtol=1e-4, atol=1e-4)
    if not benchmark:
        nodes = onnx.load(written, load_external_data=False).graph.node
        assert [node.op_type for node in nodes if node.domain == DOMAIN] == [
            "SparseConvRelu",
            "SparseConvRelu",
            "SparseConvAddRelu",
            "SparseMatMul",
        ]


def test_depthwise_convolutions_alone_stay_dense(network, tmp_path):
    result = sparse_onnx.optimize(network, tmp_path / "out", input_shapes={"X": X.shape}, threads=1)
    assert result.exit_code == 5
    (row,) = [row for row in result.report["layers"] if row["name"] == "D"]
    assert (row["decision"], row["reason"]) == ("dense", "no convolution around it is sparse")


@pytest.fixture
def voice(tmp_path):
    """What a network on sound has: convolutions of one axis with batch normalization, strides and a residual."""
    rng = np.random.default_rng(0)

    def filters(*shape):
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    tensors = {
        "W1": filters(C, 40, 5),
        "D": filters(C, 1, 3),
        "W2": filters(C, C, 1),
        "W3": filters(C, C, 3),
        "F": filters(C, 10),
        **{name: rng.uniform(0.5, 1.5, C).astype(np.float32) for name in ("gamma", "beta", "mean", "var")},
    }
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        net (float[batch, 40, 100] X) => (float[batch, 10] Y) {{
            a = Conv<pads = [2, 2], strides = [2]>(X, W1)
            b = BatchNormalization(a, gamma, beta, mean, var)
            c = Relu(b)
            d = Conv<pads = [1, 1], group = {C}>(c, D)
            e = Relu(d)
            f = Conv(e, W2)
            g = Add(f, c)
            h = Relu(g)
            i = Conv<dilations = [2], pads = [4, 0]>(h, W3)
            p = ReduceMean<axes = [2], keepdims = 0>(i)
            Y = MatMul(p, F) }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in tensors.items())
    onnx.save(proto, tmp_path / "voice.onnx")
    return tmp_path / "voice.onnx"


@pytest.mark.parametrize("method", ["magnitude", "auto", "sparsegpt", "wanda"])
def test_convolutions_of_one_axis(voice, tmp_path, method):
    x = np.random.default_rng(1).standard_normal((24, 40, 100)).astype(np.float32)
    np.savez(tmp_path / "data.npz", X=x)
    result = sparse_onnx.optimize(
        voice,
        tmp_path / "out",
        sparsity=0.9,
        method=method,
        calibration_data=tmp_path / "data.npz",
        input_shapes={"X": (2, 40, 100)},
        threads=1,
        benchmark=False,
    )
    assert result.report["verification"]["without_library"]["relative_error"] < 1e-6
    rows = {row["name"]: row for row in result.report["layers"]}
    assert rows["W1"]["rows"] == rows["W2"]["rows"] == rows["W3"]["rows"] == 2 * 50
    assert rows["W1"]["shape"] == [5 * 40, C]
    for name in ("W1", "W2", "W3"):
        assert rows[name]["sparsity"] == pytest.approx(0.9, abs=0.01)
    written = tmp_path / "out" / "model.onnx"
    nodes = onnx.load(written, load_external_data=False).graph.node
    assert [node.op_type for node in nodes if node.domain == DOMAIN] == [
        "SparseConvRelu",
        "SparseConvRelu",
        "SparseConvAddRelu",
        "SparseConv",
        "SparseMatMul",
    ]
    plain = ort.InferenceSession(str(written), providers=["CPUExecutionProvider"]).run(None, {"X": x})[0]
    fast = sparse_onnx.InferenceSession(written).run(None, {"X": x})[0]
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-4)
    document = inspect_model(written)
    stored = {row["name"]: row["shape"] for row in document["weights"] if row["state"] == "sparse"}
    assert stored["W3"] == [3 * C, C]


def test_three_axes_are_declined_with_the_reason(tmp_path):
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]>
        net (float[batch, 4, 6, 6, 6] X) => (float[batch, C, U, V, W_] Y) { Y = Conv(X, W) }"""
    )
    array = np.random.default_rng(0).standard_normal((8, 4, 3, 3, 3)).astype(np.float32)
    array[:, :, 1:] = 0
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "W"))
    onnx.save(proto, tmp_path / "in.onnx")
    result = sparse_onnx.optimize(tmp_path / "in.onnx", tmp_path / "out", benchmark=False)
    reasons = [place["reason"] for place in result.report["declined"] if place["place"] == "W"]
    assert any("rank 5" in reason for reason in reasons)
