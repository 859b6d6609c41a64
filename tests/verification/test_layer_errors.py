"""Errors of layers on held-out data: against what the layers really compute, and what is left out."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.passes.calibration import Layout, Options
from sparse_onnx.verification.layer_errors import layer_errors

RNG = np.random.default_rng(0)
W, V = (RNG.standard_normal(shape).astype(np.float32) for shape in ((6, 10), (10, 4)))
X = RNG.standard_normal((3, 5, 6)).astype(np.float32)


def build(inputs, outputs, body, **arrays):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return ir.from_proto(proto)


def mlp(**arrays):
    body = "a = MatMul(X, W) h = Relu(a) Y = MatMul(h, V)"
    return build("float[b, s, 6] X", "float[b, s, 4] Y", body, **{"W": W, "V": V, **arrays})


def pruned_copy(model, **arrays):
    copy = model.clone()
    for name, array in arrays.items():
        copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return copy


def without_half(weight):
    return np.where(np.abs(weight) >= np.median(np.abs(weight)), weight, np.float32(0))


def samples(**inputs):
    return Samples.of([{name: array[i : i + 1] for name, array in inputs.items()} for i in range(3)], "test")


def distance(x, weight, other):
    x, weight, other = (np.asarray(array, np.float64) for array in (x, weight, other))
    return np.linalg.norm(x @ (weight - other)) / np.linalg.norm(x @ weight)


@pytest.mark.parametrize("behind_pruned", [False, True])
def test_errors_are_those_of_the_outputs(tmp_path, behind_pruned):
    dense = mlp()
    w, v = without_half(W), without_half(V)
    pruned = pruned_copy(dense, W=w, V=v)
    found = layer_errors(dense, pruned, samples(X=X), work=tmp_path, behind_pruned=behind_pruned)
    assert found.keys() == {"W", "V"}
    assert found["W"] == pytest.approx(distance(X, W, w), rel=1e-5)
    hidden = np.maximum(X @ (w if behind_pruned else W), 0)
    assert found["V"] == pytest.approx(distance(hidden, V, v), rel=1e-5)


def test_only_weights_that_changed(tmp_path):
    dense = mlp()
    found = layer_errors(dense, pruned_copy(dense, V=without_half(V)), samples(X=X), work=tmp_path)
    assert found.keys() == {"V"}


def test_nothing_changed_runs_nothing(tmp_path):
    dense = mlp()
    lines = []
    assert layer_errors(dense, dense.clone(), samples(X=X), work=tmp_path, progress=lines.append) == {}
    assert lines == []


def test_padding_is_left_out(tmp_path):
    inputs = "float[b, s, 6] X, int64[b, s] attention_mask"
    dense = build(inputs, "float[b, s, 10] Y", "m = Neg(attention_mask) Y = MatMul(X, W)", W=W)
    pruned = pruned_copy(dense, W=without_half(W))
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    found = layer_errors(dense, pruned, samples(X=X, attention_mask=mask), work=tmp_path)
    assert found["W"] == pytest.approx(distance(X[mask != 0], W, without_half(W)), rel=1e-5)


def test_transposed_weight(tmp_path):
    dense = build("float[b, 6] X", "float[b, 10] Y", "Y = Gemm<transB = 1>(X, W)", W=W.T.copy())
    pruned = pruned_copy(dense, W=without_half(W.T.copy()))
    x = X[:, 0]
    found = layer_errors(dense, pruned, samples(X=x), work=tmp_path)
    assert found["W"] == pytest.approx(distance(x, W, without_half(W)), rel=1e-5)


def test_convolution_with_groups_is_the_mean_of_its_groups(tmp_path):
    filters = RNG.standard_normal((6, 2, 1, 1)).astype(np.float32)
    dense = build("float[b, 4, 5, 5] X", "float[b, 6, 5, 5] Y", "Y = Conv<group = 2>(X, F)", F=filters)
    changed = without_half(filters)
    images = RNG.standard_normal((3, 4, 5, 5)).astype(np.float32)
    found = layer_errors(dense, pruned_copy(dense, F=changed), samples(X=images), work=tmp_path)
    rows = images.transpose(0, 2, 3, 1).reshape(-1, 2, 2)
    flat, other = (array.reshape(2, 3, 2).transpose(0, 2, 1) for array in (filters, changed))
    assert found["F"] == pytest.approx(
        np.mean([distance(rows[:, g], flat[g], other[g]) for g in range(2)]), rel=1e-5
    )


def test_weights_that_cannot_be_calibrated_are_left_out(tmp_path):
    body = """a = MatMul(X, W)
        Y = If (c) <then_branch = t () => (float[b, s, 4] A) { A = MatMul(a, V) },
                    else_branch = f () => (float[b, s, 4] B) { B = MatMul(a, V) }>"""
    dense = build("bool c, float[b, s, 6] X", "float[b, s, 4] Y", body, W=W, V=V)
    pruned = pruned_copy(dense, W=without_half(W), V=without_half(V))
    feeds = [{"c": np.array(True), "X": X}]
    assert layer_errors(dense, pruned, Samples.of(feeds, "test"), work=tmp_path).keys() == {"W"}


def test_parts_of_a_gram_say_nothing(tmp_path):
    dense = mlp()
    options = Options(layout=Layout.DIAGONAL)
    assert (
        layer_errors(dense, pruned_copy(dense, W=without_half(W)), samples(X=X), options, work=tmp_path) == {}
    )


def test_no_file_is_left_and_models_stay(tmp_path):
    dense = mlp()
    pruned = pruned_copy(dense, W=without_half(W))
    tensors = [m.graph.initializers["W"].const_value for m in (dense, pruned)]
    layer_errors(dense, pruned, samples(X=X), work=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all(
        m.graph.initializers["W"].const_value is t for m, t in zip((dense, pruned), tensors, strict=True)
    )
