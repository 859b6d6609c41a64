"""Products of integers by ONNX Runtime's dynamic int8: its operators are found and fused, and what it stores."""

import collections

import numpy as np
import onnx
import onnxruntime

from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.dynamic_int8 import LowerDynamicInt8

RNG = np.random.default_rng(4)
K, N = 32, 4

TENSORS = {
    "q": RNG.integers(-127, 128, (K, N)).astype(np.int8),
    "s": RNG.uniform(0.001, 0.01, N).astype(np.float32),
    "b": RNG.standard_normal(N).astype(np.float32),
}


def test_onnx_runtime_makes_one_operator_of_it(from_text, tmp_path):
    body = "D = DequantizeLinear<axis = 1>(q, s) Y = Gemm(X, D, b)"
    model = from_text(
        f'<ir_version: 9, opset_import: ["" : 17]> g (float[S, {K}] X) => (float[S, {N}] Y) {{ {body} }}',
        **TENSORS,
    )
    LowerDynamicInt8()(model)
    path = model_io.save_model(model, tmp_path, name="model")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    types = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert types["DynamicQuantizeMatMul"] + types["MatMulIntegerToFloat"] == 1
    assert types["MatMul"] + types["Gemm"] == 0
    X = RNG.standard_normal((3, K)).astype(np.float32)
    q, s, b = TENSORS.values()
    expected = X.astype(np.float64) @ (q * s.astype(np.float64)) + b
    found = session.run(None, {"X": X})[0]
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
