"""The numbers of a report that come from real data: errors of layers on both parts of it, and predictions."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.compilation import prepare
from sparse_onnx.errors import UsageError

D, VOCABULARY, LENGTH = 32, 48, 12
RNG = np.random.default_rng(0)
SHAPES = {"E": (VOCABULARY, D), "W1": (D, 2 * D), "W2": (2 * D, D), "U": (D, VOCABULARY)}
ARRAYS = {name: (RNG.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for name, s in SHAPES.items()}
BODY = """e = Gather(E, input_ids) axis = Constant<value = int64 {1}>() c = CumSum(e, axis)
    h = MatMul(c, W1) a = Relu(h) o = MatMul(a, W2) r = Add(o, c) logits = MatMul(r, U)"""


@pytest.fixture
def model(tmp_path):
    """A causal language model: what is predicted depends on the sum of all tokens so far."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        g (int64[batch, tokens] input_ids) => (float[batch, tokens, {VOCABULARY}] logits) {{ {BODY} }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in ARRAYS.items())
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


IDS = RNG.integers(0, VOCABULARY, (64, LENGTH))


def write(folder, ids=IDS):
    np.savez(folder / "text.npz", input_ids=ids)
    return folder / "text.npz"


def optimize(model, output, **options):
    shapes = {"input_ids": (1, LENGTH)}
    result = sparse_onnx.optimize(model, output, input_shapes=shapes, threads=1, benchmark=False, **options)
    assert json.loads((output / "report.json").read_text()) == result.report
    assert "None" not in (output / "report.html").read_text()
    return result.report


def column(report, key):
    return {row["name"]: row[key] for row in report["layers"]}


def hidden(ids, arrays):
    sums = np.cumsum(ARRAYS["E"][ids].astype(np.float64), axis=1)
    return sums, np.maximum(sums @ arrays["W1"], 0)


def distance(x, weight, other):
    return np.linalg.norm(x @ (weight - other.astype(np.float64))) / np.linalg.norm(x @ weight)


@pytest.mark.parametrize("calibration", ["oneshot", "sequential"])
def test_errors_on_held_out_data_are_those_of_the_pruned_weights(model, tmp_path, calibration):
    options = {"method": "sparsegpt", "sparsity": 0.5, "ignore": ["U"], "calibration": calibration}
    options["keep_pruned"] = True
    report = optimize(model, tmp_path / "out", calibration_data=write(tmp_path), **options)
    pruned = {}
    for tensor in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer:
        pruned[tensor.name] = onnx.numpy_helper.to_array(tensor)
    held_out = IDS[56:]
    sums, middle = hidden(held_out, pruned if calibration == "sequential" else ARRAYS)
    found = column(report, "output_error_held_out")
    assert found["W1"] == pytest.approx(distance(sums, ARRAYS["W1"], pruned["W1"]), rel=1e-4)
    assert found["W2"] == pytest.approx(distance(middle, ARRAYS["W2"], pruned["W2"]), rel=1e-4)
    assert found["U"] is None
    known = column(report, "output_error")
    assert all(known[name] != found[name] and known[name] > 0 for name in ("W1", "W2"))


@pytest.mark.parametrize(("method", "ids"), [("magnitude", IDS), ("wanda", IDS[:1])])
def test_nothing_is_said_without_a_method_or_data_for_it(model, tmp_path, method, ids):
    """Magnitude uses no data; of a single sample nothing is held out."""
    report = optimize(
        model, tmp_path / "out", method=method, sparsity=0.5, calibration_data=write(tmp_path, ids)
    )
    assert set(column(report, "output_error_held_out").values()) == {None}


def test_failure_on_held_out_data_does_not_lose_the_result(model, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise UsageError("no token reached W1")

    monkeypatch.setattr(prepare, "layer_errors", fail)
    said = []
    report = optimize(
        model,
        tmp_path / "out",
        method="wanda",
        sparsity=0.5,
        calibration_data=write(tmp_path),
        progress=said.append,
    )
    assert set(column(report, "output_error_held_out").values()) == {None}
    assert "warning: no errors on held-out data: no token reached W1" in said


def test_perplexity_of_a_language_model(model, tmp_path):
    report = optimize(
        model,
        tmp_path / "out",
        method="wanda",
        sparsity=0.5,
        keep_pruned=True,
        calibration_data=write(tmp_path),
        ignore=["U"],
    )
    (found,) = report["verification"]["against_original"]["predictions"]
    assert found["output"] == "logits"
    assert found["rows"] == 8 * LENGTH
    assert found["tokens"] == 8 * (LENGTH - 1)
    assert found["kl_divergence"] > 0
    assert 0 < found["top1_agreement"] <= 1
    sums, middle = hidden(IDS[56:], ARRAYS)
    logits = (middle @ ARRAYS["W2"] + sums) @ ARRAYS["U"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p[:, :-1], IDS[56:, 1:, None], -1)
    assert found["reference_perplexity"] == pytest.approx(np.exp(-np.log(chosen).mean()), rel=1e-4)
    assert found["candidate_perplexity"] != found["reference_perplexity"]
    assert report["verification"]["against_pruned_dense"]["predictions"] == [], "the compiler alone"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Perplexity" in page
    assert "Held out" in page


def test_generated_tokens_have_no_perplexity(model, tmp_path):
    report = optimize(model, tmp_path / "out", method="magnitude", sparsity=0.5, keep_pruned=True)
    (found,) = report["verification"]["against_original"]["predictions"]
    assert found["kl_divergence"] > 0
    assert found["reference_perplexity"] is None


def test_unpruned_model_predicts_as_before(model, tmp_path):
    report = optimize(model, tmp_path / "out", calibration_data=write(tmp_path))
    (found,) = report["verification"]["against_original"]["predictions"]
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert found["top1_agreement"] == 1
    assert found["candidate_perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-6)
