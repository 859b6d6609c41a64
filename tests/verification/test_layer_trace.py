"""Where models come apart: one spoiled layer among good ones is found, and nothing is found among equal ones."""

import json

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.verification import layer_trace
from sparse_onnx.verification.layer_trace import trace_layers

LAYERS = 4
FEEDS = [
    {"X": np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)}
    for seed, rows in ((0, 3), (1, 7))
]


def model_of(body, header="(float[b, 16] X) => (float[b, 16] Y)", **arrays):
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> g {header} {{ {body} }}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def chain(spoiled=None, factor=1.5):
    """Residual blocks h + relu(h W); ``spoiled`` is the one with another weight."""
    rng = np.random.default_rng(5)
    steps, arrays, last = [], {}, "X"
    for i in range(LAYERS):
        arrays[f"W{i}"] = rng.standard_normal((16, 16)).astype(np.float32) / 4
        if i == spoiled:
            arrays[f"W{i}"] *= np.float32(factor)
        out = "Y" if i == LAYERS - 1 else f"h{i}"
        steps.append(f"m{i} = MatMul({last}, W{i}) r{i} = Relu(m{i}) {out} = Add({last}, r{i})")
        last = out
    return model_of(" ".join(steps), **arrays)


def trace(reference, candidate, tmp_path, feeds=FEEDS, **options):
    options = {"threshold": 1e-4, "library": False, **options}
    return trace_layers(reference, candidate, feeds, Workbench(1, tmp_path), **options)


@pytest.mark.parametrize("spoiled", range(LAYERS))
def test_spoiled_layer_is_found_whatever_follows(tmp_path, spoiled):
    found = trace(chain(), chain(spoiled), tmp_path)
    assert found.jump.name == found.largest.name == f"m{spoiled}"
    assert found.jump.own_error == pytest.approx(0.5, rel=1e-5)
    wrong = [layer.name for layer in found.layers if layer.own_error > 1e-4]
    assert wrong == [f"m{spoiled}"], "no other layer makes an error of its own"
    flowing = [layer.relative_error > 1e-4 for layer in found.layers]
    assert flowing == [False] * (3 * spoiled) + [True] * (3 * (LAYERS - spoiled))


def test_equal_models_have_no_jump(tmp_path):
    found = trace(chain(), chain(), tmp_path)
    assert found.jump is None
    assert found.largest is None
    assert [layer.name for layer in found.layers] == [
        name for i in range(LAYERS) for name in (f"m{i}", f"r{i}", "Y" if i == LAYERS - 1 else f"h{i}")
    ]
    assert found.batches == 2


def test_errors_are_over_all_batches(tmp_path):
    found = {layer.name: layer for layer in trace(chain(), chain(1), tmp_path).layers}
    weights = chain().graph.initializers
    before, after = 0.0, 0.0
    for feeds in FEEDS:
        h = feeds["X"] + np.maximum(feeds["X"] @ weights["W0"].const_value.numpy(), 0)
        r = np.maximum(h @ weights["W1"].const_value.numpy(), 0)
        before, after = before + np.square(h + r).sum(), after + np.square(0.5 * r).sum()
    assert found["h1"].relative_error == pytest.approx(np.sqrt(after / before), rel=1e-5)
    assert found["h1"].own_error < 1e-6


def test_values_in_chunks_give_the_same(tmp_path, monkeypatch):
    whole = trace(chain(), chain(2), tmp_path)
    monkeypatch.setattr(layer_trace, "_CHUNK_BYTES", 1)
    assert trace(chain(), chain(2), tmp_path) == whole
    assert list(tmp_path.iterdir()) == []


def test_nan_is_the_largest_error(tmp_path):
    candidate = chain(2, factor=np.nan)
    found = trace(chain(), candidate, tmp_path)
    assert found.jump.name == "m2"
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["jump"] == "m2"
    assert document["layers"][6]["own_error"] is None


def test_layers_without_a_counterpart_belong_to_the_next(tmp_path):
    """Names that only one model has, and shapes that differ, are passed over."""
    header = "(float[b, 16] X) => (float[b, 16] Y)"
    reference = model_of("a = Relu(X) t = Transpose(X) c = Neg(a) Y = Add(c, X)", header)
    candidate = model_of(
        "other = Relu(X) n = Transpose(X) t = Transpose(n) c = Abs(other) Y = Add(c, X)", header
    )
    found = trace(reference, candidate, tmp_path)
    assert [layer.name for layer in found.layers] == ["c", "Y"]
    assert (found.jump.name, found.jump.op_type) == ("c", "Abs")
    assert found.jump.own_error == pytest.approx(2)


def test_integers_and_booleans_are_no_layers(tmp_path):
    body = "i = Shape(X) z = Less(X, X) w = Where(z, X, X) Y = Relu(w)"
    found = trace(model_of(body), model_of(body), tmp_path)
    assert [layer.name for layer in found.layers] == ["w", "Y"]


def test_values_of_subgraphs_stay_inside(tmp_path):
    body = """c = ReduceMax<keepdims = 0>(X) s = Relu(X) zero = Constant<value = float {0.0}>() p = Greater(c, zero)
        y = If(p) <then_branch = t () => (float[b, 16] u) { u = Neg(s) },
                   else_branch = e () => (float[b, 16] v) { v = Abs(s) }>
        Y = Add(y, s)"""
    found = trace(model_of(body), model_of(body.replace("Neg", "Abs")), tmp_path)
    assert found.jump.name == "Y", "y may be no tensor, as its type is not told"
    assert [layer.name for layer in found.layers] == ["c", "s", "Y"]


def test_lowered_model_against_the_pruned_one(tmp_path):
    pruned = chain()
    Magnitude(sparsity=0.8)(pruned)
    lowered = pruned.clone()
    LowerSparseMatMul(min_sparsity=0.5)(lowered)
    found = trace(pruned, lowered, tmp_path, library=True)
    assert found.jump is None
    assert {layer.op_type for layer in found.layers} == {"SparseMatMulRelu", "Add"}
    assert 0 < found.largest.own_error < 1e-6
    loss = trace(chain(), lowered, tmp_path, library=True, title="original")
    assert loss.reference == "original"
    assert loss.jump.name == "r0"
    assert all((layer.own_error > 0.1) == (layer.op_type != "Add") for layer in loss.layers)
