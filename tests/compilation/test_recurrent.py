"""An LSTM and a GRU on the whole road: pruned, timed, compiled, verified, inspected and timed as what they are."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

import sparse_onnx
from sparse_onnx.analysis.inspection import inspect_model
from sparse_onnx.compilation.worth_pruning import below_break_even, without_kernel
from sparse_onnx.model import model_io
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing.choose import Bench, decide
from sparse_onnx.timing.layers import time_sparse_layers

S, B, K, H = 6, 2, 40, 64
SHAPES = {"X": (S, B, K), "lens": (B,), "h0": (2, B, H), "c0": (2, B, H)}


def weight(*shape, seed, sparsity=0.9):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * shape[-1] ** -0.5
    return np.where(rng.random(shape) < sparsity, 0, values).astype(np.float32)


def feeds(steps=S, lengths=(S, 3)):
    return {
        "X": weight(steps, B, K, seed=9, sparsity=0),
        "lens": np.array(lengths, np.int32),
        "h0": weight(2, B, H, seed=10, sparsity=0),
        "c0": weight(2, B, H, seed=11, sparsity=0),
    }


@pytest.fixture(params=[0.9, 0.0], ids=["sparse", "dense"])
def source(request, tmp_path):
    """Both directions of an LSTM, then a GRU, with 90 % zeros or none."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        g (float[S, B, {K}] X, int32[B] lens, float[2, B, {H}] h0, float[2, B, {H}] c0) => (float[1, B, {H}] Y)
        {{
            A, unused, C = LSTM<hidden_size = {H}, direction = "bidirectional">(X, W, R, Bias, lens, h0, c0)
            t = Transpose<perm = [0, 2, 1, 3]>(A) P = Reshape(t, flat)
            , Y = GRU<hidden_size = {H}, linear_before_reset = 1>(P, V, T)
        }}"""
    )
    proto.graph.node[0].name, proto.graph.node[-1].name = "encoder", "decoder"
    arrays = {
        "W": weight(2, 4 * H, K, seed=1, sparsity=request.param),
        "R": weight(2, 4 * H, H, seed=2, sparsity=request.param),
        "Bias": weight(2, 8 * H, seed=3, sparsity=0),
        "V": weight(1, 3 * H, 2 * H, seed=4, sparsity=request.param),
        "T": weight(1, 3 * H, H, seed=5, sparsity=request.param),
        "flat": np.array([0, 0, -1]),
    }
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    onnx.checker.check_model(proto)
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def compiled(source, tmp_path):
    zeros = {"method": "magnitude", "sparsity": 0.9}
    options = {"input_shapes": SHAPES, "benchmark": False}
    result = sparse_onnx.optimize(source, tmp_path / "out", **options, **zeros)
    assert result.exit_code == 0
    return result


def test_compiled_verified_and_portable(source, tmp_path):
    result = compiled(source, tmp_path)
    path = result.folder / "model.onnx"
    op_types = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert op_types == ["SparseLSTMLengthsState", "Transpose", "Reshape", "SparseGRU"]
    verification = sparse_onnx.verify(source, path, input_shapes=SHAPES, layers=True, max_relative_error=10)
    assert verification.passed
    assert verification.against_pruned_dense["with_library"].relative_error < 1e-5
    assert {layer.op_type for layer in verification.trace.layers} >= {"SparseLSTMLengthsState", "SparseGRU"}
    for given in (feeds(), feeds(9, (1, 0)), feeds(1, (1, 1))):
        (fast,) = sparse_onnx.InferenceSession(path).run(None, given)
        (portable,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, given)
        np.testing.assert_allclose(fast, portable, rtol=1e-5, atol=1e-6)


def test_report_and_inspection_have_every_weight(source, tmp_path):
    result = compiled(source, tmp_path)
    rows = {row["name"]: row for row in result.report["layers"]}
    assert {name: row["shape"] for name, row in rows.items()} == {
        "W": [K, 8 * H],
        "R": [H, 8 * H],
        "V": [2 * H, 3 * H],
        "T": [H, 3 * H],
    }
    assert all(row["decision"] == "sparse" and row["rows"] == S * B for row in rows.values())
    assert all(row["sparsity"] == pytest.approx(0.9, abs=0.02) for row in rows.values())
    assert rows["W"]["reason"] == rows["R"]["reason"]
    assert rows["W"]["kernel"] == rows["R"]["kernel"] != "sparse"
    assert all(row["pruning"] in ("pruned", "never") for row in rows.values())
    assert result.report["summary"]["sparse_flops_fraction"] == 1.0
    found = {row["name"]: row for row in inspect_model(result.folder / "model.onnx", metrics=True)["weights"]}
    assert {name: row["shape"] for name, row in found.items()} == {n: row["shape"] for n, row in rows.items()}
    assert all(row["state"] == "sparse" and row["metrics"] for row in found.values())
    before = {row["name"]: row["state"] for row in inspect_model(source)["weights"]}
    assert {before[name] for name in "WRVT"} == {"can be sparse"}


def test_layers_are_timed(source, tmp_path):
    result = compiled(source, tmp_path)
    model = model_io.load_model(result.folder / "model.onnx")
    lstm, gru = time_sparse_layers(model, feeds(), Workbench(1, tmp_path, 1 << 30))
    assert (lstm.name, gru.name) == ("encoder", "decoder")
    assert lstm.weight_shapes == ((K, 8 * H), (H, 8 * H))
    assert lstm.rows == S * B
    assert lstm.kernel.count(",") == 1
    assert lstm.times.first_ms > 0
    assert gru.times.second_ms > 0


def test_the_guard_times_the_whole_node(source, tmp_path):
    """At full length, with the states that it reads; dense weights are not worth it."""
    model = model_io.load_model(source)
    candidates, declined = find_candidates(model)
    assert not declined
    shapes = SHAPES | {"P": (S, B, 2 * H)}
    bench = Bench(Workbench(1, tmp_path))
    decisions = decide(model, candidates, [shapes], Packer(PassContext()), bench)
    assert [decision.candidate.weight.name for decision in decisions] == ["W", "V"]
    for decision in decisions:
        if decision.candidate.sparsity == 0:
            assert decision.reason == "0.0% zeros: too few for any sparse kernel"
        else:
            assert decision.times.keys() == {"dense", "sparse"}
            assert all(time > 0 for time in decision.times.values())
            assert "x dense" in decision.reason


def test_both_weights_or_none_are_worth_pruning(source):
    model = model_io.load_model(source)
    assert without_kernel(model) == {}
    shapes = SHAPES | {"P": (S, B, 2 * H)}
    against = below_break_even(
        model, [Magnitude(sparsity=0.2)], [shapes], lambda *_: None, weights=None, min_speedup=1.02
    )
    zeros = find_candidates(model)[0][0].sparsity
    assert set(against) == (set() if zeros else {"W", "R", "V", "T"})
