"""Functions of the model in our own domain: they keep their bodies, and operators of ours stay what they are."""

import numpy as np
import pytest

from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.clean.foreign_functions import ForeignFunctions
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.presets import CLEAN_PASSES

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
W = np.where(np.random.default_rng(1).random((8, 8)) < 0.8, 0, 1).astype(np.float32)


def model_with(from_text, function, call, version=1, more="", **tensors):
    return from_text(
        f"""<ir_version: 9, opset_import: ["" : 17, "sparse_onnx" : {version}{more}]>
            g (float[B, 8] X) => (float[B, 8] Y) {{ {call} }}
            <domain: "sparse_onnx", opset_import: ["" : 17, "sparse_onnx" : {version}]> {function}""",
        **tensors,
    )


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize(
    "function",
    [
        "SparseMatMul (a) => (b) { b = Neg(a) }",
        "Attention (a) => (b) { c = Neg(a) b = Relu(c) }",
        "Swish (a) => (b) { s = Sigmoid(a) b = Mul(a, s) }",
    ],
)
def test_a_function_of_the_model_keeps_its_body(from_text, run, function, version):
    name = function.split()[0]
    call = f"t = MatMul(X, W) Y = sparse_onnx.{name}(t)"
    model = model_with(from_text, function, call, version, W=W)
    before = run(model, {"X": X})["Y"]
    Pipeline((*CLEAN_PASSES, LowerSparseMatMul()))(model)
    assert [(node.domain, node.op_type) for node in model.graph] == [
        ("sparse_onnx", "SparseMatMul"),
        ("sparse_onnx.model", name),
    ]
    assert model.opset_imports["sparse_onnx.model"] == version
    assert model.opset_imports["sparse_onnx"] == 1
    np.testing.assert_allclose(run(model, {"X": X})["Y"], before, rtol=1e-6, atol=1e-6)


def test_calls_from_functions_and_subgraphs_follow(from_text, run):
    functions = """Outer (a) => (b) { c = sparse_onnx.Inner(a) b = Relu(c) }
        <domain: "sparse_onnx", opset_import: ["" : 17]> Inner (a) => (b) { b = Neg(a) }"""
    call = """s = ReduceSum<keepdims = 0>(X) z = Constant<value = float {0.0}>() c = Greater(s, z)
        t = sparse_onnx.Outer(X)
        Y = If(c) <then_branch = u () => (float[B, 8] p) { p = sparse_onnx.Inner(t) },
                   else_branch = e () => (float[B, 8] q) { q = sparse_onnx.Outer(t) }>"""
    model = model_with(from_text, functions, call)
    before = run(model, {"X": X})["Y"]
    result = ForeignFunctions()(model)
    assert result.statistics == {"functions": 2}
    assert {domain for domain, _, _ in model.functions} == {"sparse_onnx.model"}
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)


def test_the_new_domain_is_one_that_nothing_uses(from_text, run):
    function = """F (a) => (b) { b = Neg(a) }
        <domain: "sparse_onnx.model", opset_import: ["" : 17]> F (a) => (b) { b = Relu(a) }"""
    model = model_with(
        from_text,
        function,
        "t = sparse_onnx.F(X) Y = sparse_onnx.model.F(t)",
        more=', "sparse_onnx.model" : 1',
    )
    before = run(model, {"X": X})["Y"]
    ForeignFunctions()(model)
    assert [node.domain for node in model.graph] == ["sparse_onnx.model1", "sparse_onnx.model"]
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)


def test_operators_of_ours_stay(from_text):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 8] X) => (float[B, 8] Y) { Y = MatMul(X, W) }""",
        W=W,
    )
    LowerSparseMatMul()(model)
    assert not ForeignFunctions()(model).modified
    assert [(node.domain, node.op_type) for node in model.graph] == [("sparse_onnx", "SparseMatMul")]
