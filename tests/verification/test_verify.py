"""``verify``: what is run, on which inputs, and what counts as different."""

import json

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import sparse_onnx
from sparse_onnx.errors import UsageError, VerificationError
from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.running import runtime
from sparse_onnx.verification import verify as module
from sparse_onnx.verification.verify import Thresholds, verify


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
    assert sparse_onnx.VerifyResult is module.VerifyResult


def test_equal_models(tmp_path):
    path = write(tmp_path, "Y = MatMul(X, W)", W=W)
    lines = []
    result = verify(path, path, progress=lines.append)
    assert result.passed
    assert result.batches == 2
    assert result.skipped == ()
    assert result.inputs == ("generated: X float32[1, 128, 8]", "generated: X float32[2, 17, 8]")
    assert result.against_original["without_library"].relative_error == 0
    assert result.thresholds == Thresholds(max_relative_error=1e-4)
    assert result.against_pruned_dense == {}, "the model holds no operator of ours"
    assert result.trace is None
    assert any("running the original" in line for line in lines)


def test_known_difference(tmp_path):
    first = write(tmp_path, "Y = MatMul(X, W)", name="a", W=W)
    second = write(tmp_path, "Y = MatMul(X, W)", name="b", W=W * np.float32(1.25))
    result = verify(first, second)
    assert not result.passed
    assert result.against_original["without_library"].relative_error == pytest.approx(0.25, rel=1e-5)
    assert result.against_original["without_library"].cosine == pytest.approx(1, rel=1e-6)
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
    assert document["against_original"]["without_library"]["relative_error"] is None
    assert document["misses"][0]["found"] is None


def test_nan_in_both_passes(tmp_path):
    path = write(tmp_path, "z = Sub(X, X) Y = Div(z, z)")
    assert verify(path, path).passed


def test_every_output_counts(tmp_path):
    outputs = "float[batch, sequence, 8] Y, float[batch, sequence, 8] Z"
    first = write(tmp_path, "Y = Relu(X) Z = Neg(X)", name="a", outputs=outputs)
    second = write(tmp_path, "Y = Relu(X) Z = Abs(X)", name="b", outputs=outputs)
    result = verify(first, second)
    assert not result.passed
    assert result.against_original["without_library"].worst_output == "Z"


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
    with pytest.raises(UsageError, match=r"no output of the model is a tensor \(Y is a sequence\)"):
        verify(tmp_path / "sequence.onnx", tmp_path / "sequence.onnx")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_relative_error", -1e-9, "0 or more"),
        ("max_compiler_error", float("nan"), "0 or more"),
        ("max_abs_error", float("inf"), "0 or more"),
        ("min_cosine", 1.1, r"in \[-1, 1\]"),
        ("min_top1_agreement", -0.1, r"in \[0, 1\]"),
    ],
)
def test_threshold_out_of_range(tmp_path, name, value, allowed):
    with pytest.raises(UsageError, match=f"{name} must be {allowed}"):
        verify(tmp_path / "a.onnx", tmp_path / "b.onnx", **{name: value})


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
    monkeypatch.setattr(runtime, "session_budget", lambda nbytes: nbytes // 2)
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


# -- two differences, never mixed up ---------------------------------------------------------------


LARGE = np.random.default_rng(1).standard_normal((8, 64, 64)).astype(np.float32) / 8
PRUNED = np.where(np.abs(LARGE) > 0.15, LARGE, 0)
ROAD = "a = MatMul(X, W0) b = Relu(a) c = MatMul(b, W1) d = Add(c, X) Y = MatMul(d, W2)"
WIDE = {"inputs": "float[batch, 64] X", "outputs": "float[batch, 64] Y"}


def road(folder, name, weights):
    return write(folder, ROAD, name=name, **WIDE, W0=weights[0], W1=weights[1], W2=weights[2])


@pytest.fixture
def dense(tmp_path):
    return road(tmp_path, "dense", LARGE)


@pytest.fixture
def pruned(tmp_path):
    return road(tmp_path, "pruned", PRUNED)


def compile_to(folder, path):
    model = model_io.load_model(path)
    LowerSparseMatMul(min_sparsity=0.5)(model)
    return model_io.save_model(model, folder / "compiled")


def test_compiler_and_loss_are_two_numbers(tmp_path, dense, pruned):
    result = verify(dense, compile_to(tmp_path, pruned))
    for way in ("with_library", "without_library"):
        assert result.against_pruned_dense[way].relative_error < 1e-6
        assert result.against_original[way].relative_error > 0.1
    (miss,) = result.misses
    assert (miss.threshold, miss.reference, miss.output) == ("max_relative_error", "original", "Y")
    assert miss.found == max(found.relative_error for found in result.against_original.values())
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["against_pruned_dense"]["with_library"]["relative_error"] < 1e-6
    assert document["misses"][0]["allowed"] == 1e-4
    assert document["against_original"]["with_library"]["outputs"][0]["output"] == "Y"


def test_the_loss_is_that_of_the_pruned_model_itself(tmp_path, dense, pruned):
    loss = verify(dense, pruned).against_original["without_library"].relative_error
    found = verify(dense, compile_to(tmp_path, pruned)).against_original["without_library"].relative_error
    assert found == pytest.approx(loss, rel=1e-5)


def test_compiled_model_against_the_pruned_one_it_was_made_from(tmp_path, pruned):
    result = verify(pruned, compile_to(tmp_path, pruned))
    assert result.passed
    assert result.against_original["with_library"].relative_error < 1e-6


def test_a_decoder_that_unpacks_wrongly_is_the_compilers_fault(tmp_path, dense, pruned):
    """The body that runs without the library is broken: only that way, and only the first number, shows it."""
    path = compile_to(tmp_path, pruned)
    proto = onnx.load(path)
    body = next(body for body in proto.functions if body.name == "SparseMatMul")
    step = next(node for node in body.node if list(node.output) == ["Y"])
    step.op_type = "Neg"
    onnx.save(proto, path)
    result = verify(dense, path, max_relative_error=10)
    (miss,) = result.misses
    assert (miss.threshold, miss.reference, miss.way) == (
        "max_compiler_error",
        "pruned dense model",
        "without_library",
    )
    assert result.trace.reference == "pruned dense model"
    assert result.trace.jump.name == "c", "the first linear without an activation"
    assert result.against_pruned_dense["with_library"].relative_error < 1e-6


def test_stored_weight_that_is_damaged(tmp_path, dense, pruned):
    path = compile_to(tmp_path, pruned)
    model = model_io.load_model(path)
    counts = model.graph.initializers["W0.counts"]
    counts.const_value = ir.tensor(counts.const_value.numpy() * 0, name="W0.counts")
    model_io.save_model(model, tmp_path / "damaged")
    with pytest.raises(UsageError, match="its stored weight is damaged: every count must lie in"):
        verify(dense, tmp_path / "damaged/model.onnx")


# -- thresholds ------------------------------------------------------------------------------------


def scaled(folder, factor):
    body = "Y = MatMul(X, W)"
    return write(folder, body, name="a", W=W), write(folder, body, name="b", W=W * np.float32(factor))


def flipped(folder):
    body = "Y = MatMul(X, W)"
    return write(folder, body, name="a", W=W), write(folder, body, name="b", W=-W)


@pytest.mark.parametrize(
    ("models", "options", "found"),
    [
        (lambda f: scaled(f, 1.25), {"max_relative_error": 0.2}, 0.25),
        (flipped, {"min_cosine": 0.9}, -1),
        (flipped, {"min_top1_agreement": 0.5}, 0),
        (flipped, {"max_drop": 1.5}, 2),
    ],
)
def test_threshold_that_is_missed(tmp_path, models, options, found):
    (miss,) = verify(*models(tmp_path), **options).misses
    assert {miss.threshold: miss.allowed} == options
    assert miss.found == pytest.approx(found, rel=1e-5)
    assert miss.output == "Y"
    assert f"allowed {miss.allowed:g} (--{miss.threshold.replace('_', '-')})" in str(miss)


@pytest.mark.parametrize(
    "options",
    [
        {"max_relative_error": 0.26},
        {"min_cosine": 0.999},
        {"min_top1_agreement": 1.0},
        {"max_abs_error": 100.0},
        {"max_drop": 0.01},
    ],
)
def test_threshold_that_is_met(tmp_path, options):
    """Naming one loss is enough: the default of the relative error is then not judged."""
    result = verify(*scaled(tmp_path, 1.25), **options)
    assert result.passed
    assert result.trace is None


def test_every_threshold_that_is_missed_is_named(tmp_path):
    result = verify(*flipped(tmp_path), min_cosine=0.9, max_abs_error=1e-3, max_relative_error=5)
    assert [miss.threshold for miss in result.misses] == ["max_abs_error", "min_cosine"]
    largest = result.against_original["without_library"].max_abs
    assert result.misses[0].found == largest


def test_the_output_that_misses_most_is_named(tmp_path):
    outputs = "float[batch, sequence, 8] Y, float[batch, sequence, 8] Z"
    body = "Y = Mul(X, P) Z = Mul(X, Q)"
    p, q = (np.full(1, value, np.float32) for value in (1.1, 3.0))
    one = np.ones(1, np.float32)
    first = write(tmp_path, body, name="a", outputs=outputs, P=one, Q=one)
    second = write(tmp_path, body, name="b", outputs=outputs, P=p, Q=q)
    (miss,) = verify(first, second).misses
    assert (miss.output, miss.found) == ("Z", pytest.approx(2))
    found = {x.worst_output: x for x in verify(first, second).against_original["without_library"].outputs}
    assert found["Y"].relative_error == pytest.approx(0.1, rel=1e-5)
    assert found["Y"].max_relative == pytest.approx(0.1, rel=1e-5)


def logits(folder, name, weight):
    shapes = {"inputs": "float[batch, 8] X", "outputs": "float[batch, 8] logits"}
    return write(folder, "logits = MatMul(X, W)", name=name, **shapes, W=weight)


def test_divergence_of_predictions(tmp_path):
    first, second = logits(tmp_path, "a", W), logits(tmp_path, "b", W / 2)
    (miss,) = verify(first, second, max_kl=1e-3).misses
    assert (
        miss.found == verify(first, second).against_original["without_library"].predictions[0].kl_divergence
    )
    assert verify(first, second, max_kl=miss.found).passed


def test_divergence_without_predictions(tmp_path):
    path = write(tmp_path, "Y = Relu(X)")
    with pytest.raises(UsageError, match="no output of the original is known to hold logits"):
        verify(path, path, max_kl=0.1)


def test_nan_misses_every_threshold(tmp_path):
    first = write(tmp_path, "Y = Relu(X)", name="a")
    second = write(tmp_path, "z = Sub(X, X) Y = Div(z, z)", name="b")
    options = {"max_relative_error": 1e6, "max_abs_error": 1e6, "min_cosine": 0.1, "min_top1_agreement": 0.1}
    assert [miss.threshold for miss in verify(first, second, **options).misses] == list(options)


# -- inputs ----------------------------------------------------------------------------------------


def test_several_targets(tmp_path):
    path = write(tmp_path, "Y = MatMul(X, W)", W=W)
    result = verify(path, path, input_shapes=[{"X": (1, 4, 8)}, {"X": (3, 40, 8)}, {"X": (1, 4, 8)}])
    assert result.inputs == (
        "generated: X float32[1, 4, 8]",
        "generated: X float32[3, 40, 8]",
        "generated: X float32[2, 4, 8]",
    )


def test_target_that_is_not_the_first_may_not_be_refused_either(tmp_path):
    shape = np.array([1, 128, 8], np.int64)
    path = write(tmp_path, "r = Reshape(X, shape) Y = MatMul(r, W)", W=W, shape=shape)
    with pytest.raises(UsageError, match="cannot be run with inputs X float32"):
        verify(path, path, input_shapes=[{"X": (1, 128, 8)}, {"X": (1, 5, 8)}])


def test_inputs_from_a_folder_and_from_a_function(tmp_path):
    path = write(tmp_path, "Y = MatMul(X, W)", W=W)
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(3):
        np.savez(folder / f"{i}.npz", X=np.ones((2, 4 + i, 8), np.float32))
    assert verify(path, path, data=folder).batches == 3
    assert verify(path, path, data=folder, num_samples=3).batches == 2
    code = "import numpy as np\ndef batches():\n    yield {'X': np.ones((1, 2, 8), np.float32)}\n"
    (tmp_path / "mine.py").write_text(code)
    assert verify(path, path, data=f"{tmp_path / 'mine.py'}:batches").batches == 1


# -- metric ----------------------------------------------------------------------------------------


def test_metric_before_and_after(tmp_path):
    first, second = logits(tmp_path, "a", W), logits(tmp_path, "b", -W)
    x = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", X=x, label=(x @ W).argmax(1))
    options = {"data": tmp_path / "x.npz", "metric": "accuracy", "labels": "label"}
    result = verify(first, second, max_drop=0.5, **options)
    assert (result.metric.before, result.metric.after, result.metric.samples) == (1, 0, 20)
    (miss,) = result.misses
    assert (miss.threshold, miss.found, miss.output) == ("max_drop", 1, "")
    assert verify(first, first, max_drop=0.0, **options).passed


def test_metric_needs_data(tmp_path):
    path = write(tmp_path, "Y = Relu(X)")
    with pytest.raises(UsageError, match="metric cosine needs data"):
        verify(path, path, metric="cosine")
    with pytest.raises(UsageError, match="labels and tokenizer belong to real inputs"):
        verify(path, path, labels="y")
