"""``verify``: what is run, on which inputs, and what counts as different."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx import verification
from sparse_onnx.errors import UsageError, VerificationError
from sparse_onnx.verification import verify


def write(
    folder,
    body,
    *,
    name="a",
    inputs="float[batch, sequence, 8] X",
    outputs="float[batch, sequence, 8] Y",
    **arrays,
):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(proto, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


def test_verify_is_public():
    assert sparse_onnx.verify is verify
    assert sparse_onnx.VerifyResult is verification.VerifyResult


def test_equal_models(tmp_path):
    path = write(tmp_path, "Y = MatMul(X, W)", W=W)
    lines = []
    result = verify(path, path, progress=lines.append)
    assert result.passed
    assert result.batches == 2
    assert result.skipped == ()
    assert result.inputs == ("generated: X float32[1, 128, 8]", "generated: X float32[2, 17, 8]")
    assert result.differences["without_library"].relative_error == 0
    assert result.max_relative_error == 1e-4
    assert any("running the original" in line for line in lines)


def test_known_difference(tmp_path):
    first = write(tmp_path, "Y = MatMul(X, W)", name="a", W=W)
    second = write(tmp_path, "Y = MatMul(X, W)", name="b", W=W * np.float32(1.25))
    result = verify(first, second)
    assert not result.passed
    assert result.differences["without_library"].relative_error == pytest.approx(0.25, rel=1e-5)
    assert result.differences["without_library"].cosine == pytest.approx(1, rel=1e-6)
    assert verify(first, second, max_relative_error=0.26).passed


def test_fixed_shapes_are_run_once(tmp_path):
    shape = "float[2, 3, 8]"
    path = write(tmp_path, "Y = MatMul(X, W)", inputs=f"{shape} X", outputs=f"{shape} Y", W=W)
    assert verify(path, path).inputs == ("generated: X float32[2, 3, 8]",)


def test_image_sizes_are_kept_in_the_second_run(tmp_path):
    shape = "float[batch, 3, height, width]"
    path = write(tmp_path, "Y = Relu(X)", inputs=f"{shape} X", outputs=f"{shape} Y")
    shapes = {"X": (1, 3, 32, 40)}
    result = verify(path, path, input_shapes=shapes)
    assert result.inputs == ("generated: X float32[1, 3, 32, 40]", "generated: X float32[2, 3, 32, 40]")


def test_shape_that_only_the_second_run_has_may_be_refused(tmp_path):
    """A model with a batch of one baked in: named as not run, and no failure."""
    shape = np.array([1, 128, 8], np.int64)
    path = write(tmp_path, "r = Reshape(X, shape) Y = MatMul(r, W)", W=W, shape=shape)
    result = verify(path, path)
    assert result.passed
    assert result.batches == 1
    assert result.inputs == ("generated: X float32[1, 128, 8]",)
    assert len(result.skipped) == 1
    assert result.skipped[0].startswith("generated: X float32[2, 17, 8]: ")


def test_shape_that_was_asked_for_may_not_be_refused(tmp_path):
    shape = np.array([1, 128, 8], np.int64)
    path = write(tmp_path, "r = Reshape(X, shape) Y = MatMul(r, W)", W=W, shape=shape)
    with pytest.raises(UsageError, match="cannot be run with inputs X float32"):
        verify(path, path, input_shapes={"X": (1, 5, 8)})


def test_optimized_model_must_run_wherever_the_original_does(tmp_path):
    shape = np.array([1, 128, 8], np.int64)
    first = write(tmp_path, "Y = MatMul(X, W)", name="a", W=W)
    second = write(tmp_path, "r = Reshape(X, shape) Y = MatMul(r, W)", name="b", W=W, shape=shape)
    with pytest.raises(UsageError, match="cannot be run with inputs X float32"):
        verify(first, second)


def test_nan_where_the_original_has_none_fails_and_is_valid_json(tmp_path):
    first = write(tmp_path, "Y = Relu(X)", name="a")
    second = write(tmp_path, "z = Sub(X, X) Y = Div(z, z)", name="b")
    result = verify(first, second)
    assert not result.passed
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["passed"] is False
    assert document["without_library"]["relative_error"] is None


def test_nan_in_both_passes(tmp_path):
    path = write(tmp_path, "z = Sub(X, X) Y = Div(z, z)")
    assert verify(path, path).passed


def test_every_output_counts(tmp_path):
    outputs = "float[batch, sequence, 8] Y, float[batch, sequence, 8] Z"
    first = write(tmp_path, "Y = Relu(X) Z = Neg(X)", name="a", outputs=outputs)
    second = write(tmp_path, "Y = Relu(X) Z = Abs(X)", name="b", outputs=outputs)
    result = verify(first, second)
    assert not result.passed
    assert result.differences["without_library"].worst_output == "Z"


def test_integer_outputs_are_compared(tmp_path):
    outputs = "int64[batch, sequence] Y"
    first = write(tmp_path, "Y = ArgMax<axis = 2, keepdims = 0>(X)", name="a", outputs=outputs)
    second = write(tmp_path, "Y = ArgMin<axis = 2, keepdims = 0>(X)", name="b", outputs=outputs)
    assert verify(first, first).passed
    assert not verify(first, second).passed


def test_order_of_inputs_and_outputs_does_not_matter(tmp_path):
    pair = ("float[batch, 8] P", "float[batch, 8] Q")
    results = ("float[batch, 8] Y", "float[batch, 8] Z")
    body = "Y = Sub(P, Q) Z = Mul(P, Q)"
    first = write(tmp_path, body, name="a", inputs=", ".join(pair), outputs=", ".join(results))
    second = write(tmp_path, body, name="b", inputs=", ".join(pair[::-1]), outputs=", ".join(results[::-1]))
    assert verify(first, second).passed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"inputs": "float[batch, sequence, 8] Z", "body": "Y = Relu(Z)"},
            "inputs: X only in the original; Z only",
        ),
        (
            {"inputs": "float[batch, 8] X", "outputs": "float[batch, 8] Y"},
            "float32.batch, 8. in the optimized",
        ),
        ({"inputs": "double[batch, sequence, 8] X", "outputs": "double[batch, sequence, 8] Y"}, "float64"),
        (
            {"outputs": "float[batch, sequence, 8] Z", "body": "Z = Relu(X)"},
            "outputs: Y only in the original",
        ),
        (
            {
                "outputs": "float[batch, sequence, 8] Y, float[batch, sequence, 8] Z",
                "body": "Y = Relu(X) Z = Neg(X)",
            },
            "outputs: Z only in the optimized",
        ),
    ],
)
def test_models_of_different_interface(tmp_path, changes, said):
    first = write(tmp_path, "Y = Relu(X)", name="a")
    second = write(tmp_path, **{"body": "Y = Relu(X)", "name": "b", **changes})
    with pytest.raises(VerificationError, match=said):
        verify(first, second)


def test_outputs_of_different_shape(tmp_path):
    outputs = "float[a, b, c] Y"
    first = write(tmp_path, "Y = Identity(X)", name="a", outputs=outputs)
    second = write(tmp_path, "Y = Transpose<perm = [0, 2, 1]>(X)", name="b", outputs=outputs)
    with pytest.raises(
        VerificationError, match=r"output 'Y' has shape \[1, 8, 128\] instead of \[1, 128, 8\]"
    ):
        verify(first, second)


def test_output_that_is_no_tensor(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n] X) => (seq(float[n]) Y) { Y = SequenceConstruct(X, X) }'
    )
    onnx.save(proto, tmp_path / "sequence.onnx")
    with pytest.raises(UsageError, match="output 'Y' is no tensor of numbers"):
        verify(tmp_path / "sequence.onnx", tmp_path / "sequence.onnx")


@pytest.mark.parametrize("value", [-1e-9, float("nan")])
def test_threshold_out_of_range(tmp_path, value):
    with pytest.raises(UsageError, match="max_relative_error must be 0 or more"):
        verify(tmp_path / "a.onnx", tmp_path / "b.onnx", max_relative_error=value)


def test_data_and_shapes_exclude_each_other(tmp_path):
    path = write(tmp_path, "Y = Relu(X)")
    with pytest.raises(UsageError, match="not both"):
        verify(path, path, data=tmp_path / "x.npz", input_shapes={"X": (1, 2, 8)})


def test_real_inputs_of_which_one_batch_fails_are_an_error(tmp_path):
    shape = np.array([8, 3, 8], np.int64)
    path = write(tmp_path, "r = Reshape(X, shape) Y = MatMul(r, W)", W=W, shape=shape)
    np.savez(tmp_path / "x.npz", X=np.ones((9, 3, 8), np.float32))
    with pytest.raises(UsageError, match="cannot be run with inputs"):
        verify(path, path, data=tmp_path / "x.npz")


def test_models_above_the_memory_budget_give_the_same_result(tmp_path, monkeypatch):
    body = "a = MatMul(X, W) b = Relu(a) Y = MatMul(b, V)"
    first = write(tmp_path, body, name="a", W=W, V=W.T.copy())
    second = write(tmp_path, body, name="b", W=W, V=W.T * np.float32(1.5))
    whole = verify(first, second)
    monkeypatch.setattr(verification, "session_budget", lambda nbytes: nbytes // 2)
    assert verify(first, second).to_dict() == whole.to_dict()


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = write(tmp_path, "Y = Relu(X)")
    before = sorted(tmp_path.iterdir())
    verify(path, path)
    assert list(scratch.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == before
