"""The whole road on a model that has the names which compiling and measuring make up."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

import sparse_onnx

N = 256
TAKEN = [
    "W.values",
    "W.rows",
    "W+V.values",
    "bias.256",
    "sparse_onnx.zeros.256",
    "sparse_onnx.shape:X",
    "sparse_onnx.0.0",
]


def test_a_model_with_names_of_our_making(tmp_path):
    rng = np.random.default_rng(0)
    sums = " ".join(f"s{i + 1} = Add(s{i}, taken{i})" for i in range(len(TAKEN)))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (float[B, {N}] X) => (float[B, {N}] Y) {{
            a = MatMul(X, W) b = Add(a, bias) c = Relu(b) s0 = MatMul(c, V) {sums} Y = Relu(s{len(TAKEN)}) }}"""
    )
    arrays = {name: rng.standard_normal((N, N)).astype(np.float32) / np.sqrt(N) for name in "WV"}
    arrays = {
        name: np.where(rng.random((N, N)) < 0.95, 0, w).astype(np.float32) for name, w in arrays.items()
    }
    arrays["bias"] = rng.standard_normal((1, N)).astype(np.float32)
    arrays |= {f"taken{i}": np.full((), i, np.float32) for i in range(len(TAKEN))}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    names = dict(zip([f"taken{i}" for i in range(len(TAKEN))], TAKEN, strict=True))
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(proto, tmp_path / "model.onnx")
    result = sparse_onnx.optimize(tmp_path / "model.onnx", tmp_path / "out", benchmark=False, threads=1)
    assert [row["decision"] for row in result.report["layers"]] == ["sparse", "sparse"]
    x = {"X": rng.standard_normal((4, N)).astype(np.float32)}
    path = result.folder / "model.onnx"
    want = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"]).run(None, x)[0]
    plain = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, x)[0]
    np.testing.assert_allclose(plain, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sparse_onnx.InferenceSession(path).run(None, x)[0], want, rtol=1e-4, atol=1e-4)
