"""The benchmark of an encoder in few bits: what its arguments mean, and that peers quantize what they are given."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

pytest.importorskip("torch")

from sparse_onnx.passes.prune.oneshot_methods import Auto
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.tools.benchmarks.quantized_encoder import PEERS
from sparse_onnx.tools.benchmarks.rows import passes_from

IGNORE = ("re:.*pooler.*",)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("0.5/", (Auto(sparsity=0.5, ignore=IGNORE),)),
        ("/rtn,bits=8,group_size=0", (QuantizeWeights(method="rtn", bits=8, group_size=0, ignore=IGNORE),)),
        (
            "8:16/auto,symmetric=false",
            (
                Auto(mask_structure="8:16", ignore=IGNORE),
                QuantizeWeights(method="auto", symmetric=False, ignore=IGNORE),
            ),
        ),
    ],
)
def test_zeros_and_weights(text, passes):
    assert passes_from(text, IGNORE) == passes


@pytest.mark.parametrize("text", ["", "/", "0.5", "auto,bits=4"])
def test_what_is_no_pair(text):
    with pytest.raises(SystemExit, match="is not ZEROS/WEIGHTS"):
        passes_from(text)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # ONNX Runtime's own
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_rounds_the_weights(tmp_path, name):
    rng = np.random.default_rng(4)
    W = rng.standard_normal((256, 64)).astype(np.float32)
    x = rng.standard_normal((32, 256)).astype(np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[B, 256] X) => (float[B, 64] Y) { Y = MatMul(X, W) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "W"))
    onnx.save(proto, tmp_path / "dense.onnx")
    PEERS[name](tmp_path / "dense.onnx", tmp_path / "peer.onnx", [{"X": x}])
    session = onnxruntime.InferenceSession(tmp_path / "peer.onnx", providers=["CPUExecutionProvider"])
    exact = x.astype(np.float64) @ W
    (found,) = session.run(None, {"X": x})
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.2
