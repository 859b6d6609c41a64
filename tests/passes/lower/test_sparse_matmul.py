"""Lowering to SparseMatMul: right nodes, right answers on plain ONNX Runtime, and what must not fire."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul


def sparse(shape, sparsity, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < sparsity, 0, rng.standard_normal(shape)).astype(np.float32)


def build(text, **weights):
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def run(model, **feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def op_types(model):
    return [node.op_type for node in model.graph]


MLP = """<ir_version: 9, opset_import: ["" : 20]>
    mlp (float[B, S, 40] X) => (float[B, S, 30] Y)
    { r = MatMul(X, W3) h = MatMul(X, W1) i = Add(h, b1) j = Gelu(i) k = MatMul(j, W2) l = Add(b2, k)
      m = Add(l, r) Y = Relu(m) }"""


def mlp(sparsity=0.9):
    rng = np.random.default_rng(1)
    return build(
        MLP,
        W1=sparse((40, 70), sparsity),
        b1=rng.standard_normal(70).astype(np.float32),
        W2=sparse((70, 30), sparsity, 2),
        b2=rng.standard_normal(30).astype(np.float32),
        W3=sparse((40, 30), 0.1, 3),
    )


X = np.random.default_rng(5).standard_normal((2, 3, 40)).astype(np.float32)


def test_replaces_pattern_and_keeps_answers():
    before, model = run(mlp(), X=X), mlp()
    result = LowerSparseMatMul(min_sparsity=0.5)(model)
    assert result.modified
    assert result.statistics == {"weights": 2, "linears": 2}
    assert sorted(op_types(model)) == ["Add", "MatMul", "Relu", "SparseMatMul", "SparseMatMulGelu"]
    assert [(d.place, d.reason) for d in result.declined] == [("W3", "10.2% zeros, fewer than 50.0%")]
    assert set(model.graph.initializers) >= {
        "W1.values",
        "W1.offsets",
        "W1.counts",
        "W1.rows",
        "b1",
        "b2",
        "W3",
    }
    assert not {"W1", "W2"} & set(model.graph.initializers)
    np.testing.assert_allclose(run(model, X=X)[0], before[0], rtol=1e-5, atol=1e-5)


def test_second_run_changes_nothing():
    model = mlp()
    LowerSparseMatMul(min_sparsity=0.5)(model)
    assert not LowerSparseMatMul(min_sparsity=0.5)(model).modified


def test_chain_of_lowered_layers_reads_the_new_values():
    model = build(
        """<ir_version: 9, opset_import: ["" : 17]>
        chain (float[B, 32] X) => (float[B, 32] Y) { h = MatMul(X, A) i = Relu(h) Y = Gemm<transB = 1>(i, T, c) }""",
        A=sparse((32, 48), 0.8),
        T=sparse((32, 48), 0.8, 1),
        c=np.arange(32, dtype=np.float32).reshape(1, 32),
    )
    x = X.reshape(-1, 40)[:, :32]
    before = run(model, X=x)
    LowerSparseMatMul()(model)
    assert op_types(model) == ["SparseMatMulRelu", "SparseMatMul"]
    np.testing.assert_allclose(run(model, X=x)[0], before[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [13, 15, 17, 20, 21, 24])
def test_every_opset(opset):
    text = f"""<ir_version: {9 if opset < 21 else 10}, opset_import: ["" : {opset}]>
        one (float[B, 40] X) => (float[B, 30] Y) {{ h = MatMul(X, W) Y = Relu(h) }}"""
    model = build(text, W=sparse((40, 30), 0.8))
    x = X.reshape(-1, 40)
    before = run(model, X=x)
    LowerSparseMatMul()(model)
    np.testing.assert_allclose(run(model, X=x)[0], before[0], rtol=1e-5, atol=1e-6)


def test_shared_weight_is_stored_once():
    text = """<ir_version: 9, opset_import: ["" : 20]>
        shared (float[B, 32] X) => (float[B, 32] Y) { h = MatMul(X, W) i = Relu(h) Y = MatMul(i, W) }"""
    model = build(text, W=sparse((32, 32), 0.9))
    x = X.reshape(-1, 40)[:, :32]
    before = run(model, X=x)
    assert LowerSparseMatMul()(model).statistics == {"weights": 1, "linears": 2}
    assert len(model.graph.initializers) == 5  # four stored tensors, one bias of zeros
    np.testing.assert_allclose(run(model, X=x)[0], before[0], rtol=1e-5, atol=1e-6)


def test_bias_and_output_names_survive():
    text = """<ir_version: 9, opset_import: ["" : 20]>
        outs (float[B, 40] X) => (float[B, 30] Y, float[B, 30] h) { h = MatMul(X, W) Y = Add(h, b) }"""
    model = build(text, W=sparse((40, 30), 0.9), b=np.ones(30, np.float32))
    x = X.reshape(-1, 40)
    before = run(model, X=x)
    LowerSparseMatMul()(model)
    assert [value.name for value in model.graph.outputs] == ["Y", "h"]
    assert op_types(model) == ["SparseMatMul", "Add"]
    for got, expected in zip(run(model, X=x), before, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_weight_in_a_subgraph_is_declined_by_name():
    text = """<ir_version: 9, opset_import: ["" : 20]>
        sub (float[B, 40] X, bool c) => (float[B, 30] Y) {
            Y = If (c) <then_branch = t () => (float[B, 30] y1) { y1 = MatMul(X, W) },
                        else_branch = e () => (float[B, 30] y2) { y2 = MatMul(X, W) }> }"""
    model = build(text, W=sparse((40, 30), 0.9))
    result = LowerSparseMatMul()(model)
    assert not result.modified
    assert [(d.place, "If" in d.reason) for d in result.declined] == [("W", True)]


def test_double_weight_is_declined():
    text = """<ir_version: 9, opset_import: ["" : 20]>
        d (double[B, 40] X) => (double[B, 30] Y) { Y = MatMul(X, W) }"""
    model = build(text, W=sparse((40, 30), 0.9).astype(np.float64))
    result = LowerSparseMatMul()(model)
    assert not result.modified
    assert "DOUBLE" in result.declined[0].reason


def test_unknown_layer_is_an_error():
    with pytest.raises(UsageError, match="nosuch"):
        LowerSparseMatMul(layers=("nosuch",))(mlp())


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_options_are_validated(value):
    with pytest.raises(UsageError, match="min_sparsity"):
        LowerSparseMatMul(min_sparsity=value)


def test_candidates_carry_their_sparsity():
    candidates, declined = LowerSparseMatMul.find_candidates(mlp(0.75))
    assert declined == []
    for candidate in candidates:
        matrix = candidate.weight.matrix()
        assert candidate.sparsity == (matrix == 0).mean()
