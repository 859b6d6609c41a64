"""Small outputs: what rounding explains is no fault of the compiler, and what is wrong is found all the same."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import sparse_onnx
from sparse_onnx.errors import UsageError, VerificationError
from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.running.recording import record
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.verification.comparison import compare
from sparse_onnx.verification.compiler_error import judge
from sparse_onnx.verification.tolerance import MAX_COMPILER_ERROR
from sparse_onnx.verification.verify import verify
from sparse_onnx.verification.yardstick import MARGIN, Rounding, exceeding, measure_rounding, perturbed

WIDTH, ROWS = 192, 8
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)


def sparse(scale=1.0):
    weight = RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) * np.float32(scale)
    weight[RNG.random(weight.shape) < 0.85] = 0
    return weight


FIRST, LAST = sparse(), sparse(1 / 30)
FAR = "h = MatMul(X, W) hb = Add(h, b) t = Tanh(hb) g = MatMul(t, V) gb = Add(g, c)"
BIASES = {"b": np.full(WIDTH, 0.1, np.float32), "c": np.full(WIDTH, -15, np.float32)}
SMALL = {
    # name: nodes, weights, those that become sparse
    "sigmoid far in its tail": (
        f"{FAR} Y = Sigmoid(gb)",
        {"W": FIRST, "V": LAST, **BIASES},
        ("W", "V"),
    ),
    "silu far in its tail": (
        f"{FAR} s = Sigmoid(gb) Y = Mul(gb, s)",
        {"W": FIRST, "V": LAST, **BIASES},
        ("W", "V"),
    ),
    "logits after cancellation": (
        "a = MatMul(X, W) r = Relu(a) p = MatMul(r, V) q = MatMul(r, U) Y = Sub(p, q)",
        {
            "W": FIRST,
            "V": LAST,
            "U": LAST * (1 + np.float32(1e-6) * RNG.standard_normal(LAST.shape).astype(np.float32)),
        },
        ("W", "V"),
    ),
    "nothing but rounding": (
        "a = MatMul(X, W) r = Relu(a) p = MatMul(r, V) q = MatMul(r, U) Y = Sub(p, q)",
        {"W": FIRST, "V": LAST, "U": LAST.copy()},
        ("W", "V"),
    ),
}


def write(folder, body, arrays):
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {WIDTH}] X) => (float[batch, {WIDTH}] Y) {{ {body} }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    folder.mkdir(exist_ok=True, parents=True)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def judged(folder, kind, spoil=lambda _arrays: None, *, threshold=MAX_COMPILER_ERROR, x=X):
    """A model of ``SMALL`` against what is compiled of it after ``spoil`` changed its arrays."""
    body, arrays, layers = SMALL[kind]
    dense = model_io.load_model(write(folder / "dense", body, arrays))
    changed = {name: array.copy() for name, array in arrays.items()}
    spoil(changed)
    compiled = model_io.load_model(write(folder / "spoiled", body, changed))
    LowerSparseMatMul(layers=layers)(compiled)
    feeds = [{"X": x}]
    bench = Workbench(1, folder)
    reference, _ = record(dense, None, feeds, folder / "reference", bench, library=False)
    outputs, _ = record(compiled, None, feeds, folder / "outputs", bench, library=True)
    found = compare(reference, outputs)
    return judge(dense, compiled, feeds, found, bench, threshold=threshold, library=True)


@pytest.mark.parametrize("kind", SMALL)
def test_rounding_is_no_fault(tmp_path, kind):
    error = judged(tmp_path, kind)
    assert error.found.relative_error > MAX_COMPILER_ERROR, "else this tests nothing"
    assert not error.at_fault, error.describe()
    assert error.rounding["Y"].absolute > 0
    assert error.trace is not None
    assert error.trace.jump is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "outputs", "reference", "spoiled"]


def scaled(arrays):
    arrays["W"] *= np.float32(1.001)


def one_column_scaled(arrays):
    arrays["W"][:, 7] *= np.float32(1.05)


def swapped(arrays):
    arrays["V"][:, [3, 100]] = arrays["V"][:, [100, 3]]


def swapped_first(arrays):
    arrays["W"][:, [3, 100]] = arrays["W"][:, [100, 3]]


def without_bias(arrays):
    arrays["b"][:] = 0


def without_last_bias(arrays):
    arrays["c"][:] = 0


SIGMOID, SILU = "sigmoid far in its tail", "silu far in its tail"


@pytest.mark.parametrize(
    ("kind", "spoil", "layer"),
    [
        (SIGMOID, scaled, "hb"),
        (SIGMOID, one_column_scaled, "hb"),
        (SIGMOID, swapped, "gb"),
        (SIGMOID, swapped_first, "hb"),
        (SIGMOID, without_bias, "hb"),
        (SIGMOID, without_last_bias, "gb"),
        # Its last activation is part of the layer, and ORT's own is off by a tenth there: two channels of 192 for one
        # another are no more.
        (SILU, scaled, "hb"),
        (SILU, one_column_scaled, "hb"),
        (SILU, swapped_first, "hb"),
        (SILU, without_bias, "hb"),
        (SILU, without_last_bias, "Y"),
    ],
)
def test_a_wrong_layer_in_front_of_a_small_output_is_found(tmp_path, kind, spoil, layer):
    error = judged(tmp_path, kind, spoil)
    assert error.at_fault
    assert error.trace.jump.name == layer
    assert f"It begins at {error.trace.jump.describe()}" in error.describe()
    assert error.trace.jump.own_error > MAX_COMPILER_ERROR


@pytest.mark.parametrize("kind", ["logits after cancellation", "nothing but rounding"])
@pytest.mark.parametrize(
    ("spoil", "layer"), [(scaled, "r"), (one_column_scaled, "r"), (swapped, "p"), (swapped_first, "r")]
)
def test_a_wrong_layer_in_front_of_a_cancellation_is_found(tmp_path, kind, spoil, layer):
    error = judged(tmp_path, kind, spoil)
    assert error.at_fault
    assert error.trace.jump.name == layer


def test_exact_models_are_not_run_against_themselves(tmp_path, monkeypatch):
    import sparse_onnx.verification.compiler_error as module

    monkeypatch.setattr(module, "measure_rounding", None)
    assert not judged(tmp_path, SIGMOID, threshold=1.0).at_fault


# What is allowed


def difference(relative, absolute=1.0):
    scale = absolute / relative if relative else 1.0
    reference = np.full((4, 4), scale, np.float32) if np.isfinite(relative) else np.zeros((4, 4), np.float32)
    return compare([{"Y": reference.astype(np.float64)}], [{"Y": reference.astype(np.float64) + absolute}])


@pytest.mark.parametrize(
    ("found", "rounding", "allowed"),
    [
        (difference(0.5e-4), {}, True),
        (difference(2e-4), {}, False),
        (difference(2e-4), {"Y": Rounding(1e-4, 1.0)}, True),
        (difference(2e-4), {"Y": Rounding(1e-6, 1.0)}, False),
        (difference(2e-4), {"Z": Rounding(1.0, 1.0)}, False),
        (difference(float("inf"), 1e-6), {"Y": Rounding(float("inf"), 1e-6)}, True),
        (difference(float("inf"), 1e-2), {"Y": Rounding(float("inf"), 1e-6)}, False),
        (difference(float("inf"), 1e-2), {}, False),
    ],
)
def test_allowed(found, rounding, allowed):
    assert (exceeding(found, 1e-4, rounding) == []) is allowed


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_nan_is_never_rounding(broken):
    reference = np.ones((2, 2), np.float32)
    found = compare([{"Y": reference}], [{"Y": np.array([[1, broken], [1, 1]], np.float32)}])
    for own in (Rounding(1.0, 1.0), Rounding(float("inf"), 1.0), Rounding(float("inf"), float("inf"))):
        assert exceeding(found, 1e-4, {"Y": own})


# The yardstick


def rounding_of(folder, body, arrays, x=X):
    dense = model_io.load_model(write(folder / "model", body, arrays))
    return measure_rounding(dense, [{"X": x}], Workbench(1, folder))["Y"]


def test_of_a_layer_it_is_a_few_units_in_the_last_place(tmp_path):
    own = rounding_of(tmp_path, "Y = MatMul(X, W)", {"W": FIRST})
    assert 5e-8 < own.relative < 5e-7


def test_it_is_what_float32_and_float64_differ_by(tmp_path):
    """After cancellation: of the same size as the true rounding error."""
    body, arrays, _ = SMALL["logits after cancellation"]
    own = rounding_of(tmp_path, body, arrays)
    r = np.maximum(X.astype(np.float64) @ arrays["W"], 0)
    true = r @ arrays["V"].astype(np.float64) - r @ arrays["U"].astype(np.float64)
    r32 = np.maximum(X @ arrays["W"], 0)
    error = np.linalg.norm((r32 @ arrays["V"] - r32 @ arrays["U"]) - true) / np.linalg.norm(true)
    assert error / MARGIN < own.relative < error * MARGIN


def test_no_layer_no_rounding(tmp_path):
    assert rounding_of(tmp_path, "Y = Relu(X)", {}) == Rounding(0.0, 0.0)


def test_a_model_that_cannot_be_run_otherwise_has_no_yardstick(tmp_path, monkeypatch):
    import sparse_onnx.verification.yardstick as yardstick

    real = yardstick.record

    def refuse(model, path, batches, folder, bench, **options):
        if folder.name != "reference":
            raise UsageError("refused")
        return real(model, path, batches, folder, bench, **options)

    monkeypatch.setattr(yardstick, "record", refuse)
    dense = model_io.load_model(write(tmp_path / "model", "Y = MatMul(X, W)", {"W": FIRST}))
    assert measure_rounding(dense, [{"X": X}], Workbench(1, tmp_path)) == {}


def test_values_keep_their_names_and_the_model_is_left_as_it_was(tmp_path):
    body, arrays, _ = SMALL["sigmoid far in its tail"]
    dense = model_io.load_model(write(tmp_path / "model", body, arrays))
    before = ir.to_proto(dense).SerializeToString(deterministic=True)
    moved = perturbed(dense, lambda array, name: ir.tensor(array, name=name))
    assert ir.to_proto(dense).SerializeToString(deterministic=True) == before
    names = {value.name for node in moved.graph for value in node.outputs}
    assert {value.name for node in dense.graph for value in node.outputs} <= names
    assert [value.name for value in moved.graph.outputs] == ["Y"]
    change = moved.graph.initializers["W"].const_value.numpy() / np.where(FIRST, FIRST, 1)
    assert set(np.unique(np.abs(change[FIRST != 0] - 1) > 0)) == {True}
    assert np.abs(change[FIRST != 0] - 1).max() < 3e-7
    assert (moved.graph.initializers["W"].const_value.numpy()[FIRST == 0] == 0).all()


# In the commands


@pytest.mark.parametrize("kind", SMALL)
def test_optimize_and_verify_pass(tmp_path, kind):
    body, arrays, _ = SMALL[kind]
    source = write(tmp_path / "in", body, arrays)
    said = []
    options = {"threads": 1, "benchmark": False, "input_shapes": {"X": (ROWS, WIDTH)}}
    result = sparse_onnx.optimize(source, tmp_path / "out", progress=said.append, **options)
    assert result.exit_code == 0
    checks = result.report["verification"]
    error = checks["against_pruned_dense"]["relative_error"]
    if error is None or error > MAX_COMPILER_ERROR:
        assert "Y" in checks["rounding"]
        assert any("what rounding explains" in line for line in said)
    found = verify(source, result.folder / "model.onnx", input_shapes={"X": (ROWS, WIDTH)}, threads=1)
    assert found.passed, found.misses


def test_optimize_names_the_layer_where_a_fault_begins(tmp_path, monkeypatch):
    from sparse_onnx.sparse_ops.formats.chunked_csc import ChunkedCsc

    real = ChunkedCsc.pack

    def damaged(*arguments, **options):
        packed = real(*arguments, **options)
        packed.values[:] *= np.float32(1.01)
        return packed

    monkeypatch.setattr(ChunkedCsc, "pack", damaged)
    body, arrays, _ = SMALL["sigmoid far in its tail"]
    source = write(tmp_path / "in", body, arrays)
    options = {"threads": 1, "benchmark": False, "input_shapes": {"X": (ROWS, WIDTH)}}
    with pytest.raises(VerificationError, match=r"It begins at .*MatMul.*on its own"):
        sparse_onnx.optimize(source, tmp_path / "out", **options)
    allowed = sparse_onnx.optimize(source, tmp_path / "out", max_compiler_error=1.0, **options)
    assert allowed.report["recipe"]["goal"]["max_compiler_error"] == 1.0


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_max_compiler_error_out_of_range(tmp_path, value):
    with pytest.raises(UsageError, match=r"max_compiler_error must be (0 or more|a finite number)"):
        sparse_onnx.optimize(tmp_path / "no.onnx", tmp_path / "out", max_compiler_error=value)
