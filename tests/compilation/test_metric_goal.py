"""A metric as the goal of a compilation: measured before and after, on what was not pruned with, and as a gate."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

import sparse_onnx
from sparse_onnx.compilation.groups import Calibration, Goal
from sparse_onnx.compilation.recipe import Recipe
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.errors import UsageError

WIDTH, CLASSES, SAMPLES = 256, 8, 64
RNG = np.random.default_rng(0)
WEIGHTS = {
    "W0": RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 16,
    "W1": RNG.standard_normal((WIDTH, CLASSES)).astype(np.float32),
}
X = RNG.standard_normal((SAMPLES, WIDTH)).astype(np.float32)
RIGHT = (np.maximum(X @ WEIGHTS["W0"], 0) @ WEIGHTS["W1"]).argmax(1)


OWN = """
import numpy as np
def size(run, data):
    return np.abs(run({"X": np.ones((1, 256), np.float32)})["logits"]).sum()
size.lower_is_better = True
"""


@pytest.fixture
def model(tmp_path):
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {WIDTH}] X) => (float[batch, {CLASSES}] logits)
        {{ m = MatMul(X, W0) r = Relu(m) logits = MatMul(r, W1) }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in WEIGHTS.items())
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", X=X, label=RIGHT)
    return tmp_path / "data.npz"


def optimize(model, **options):
    defaults = {"method": "magnitude", "sparsity": 0.9, "threads": 1, "benchmark": False}
    return sparse_onnx.optimize(model, model.parent / "out", **{**defaults, **options})


def right(path, x=X, labels=RIGHT):
    """The share of samples that the model gets right on stock ONNX Runtime."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.mean(session.run(None, {"X": x})[0].argmax(1) == labels)


def test_before_and_after_are_in_the_report(model, data):
    result = optimize(model, calibration_data=data, metric="accuracy", labels="label")
    found = result.report["summary"]["metric"]
    assert (found["name"], found["before"], found["samples"]) == ("accuracy", 1, SAMPLES)
    assert found["after"] == right(result.folder / "model.onnx") < 1
    assert found["drop"] == 1 - found["after"]
    assert result.exit_code == 0, "nothing was asked of it"
    assert result.report["goal"] == {"met": True, "gates": []}


def test_without_a_metric_the_drop_is_that_of_the_cosine(model, data):
    report = optimize(model, calibration_data=data, max_drop=1e-6).report
    assert report["summary"]["metric"] is None
    (gate,) = report["goal"]["gates"]
    assert gate["reached"] == 1 - report["summary"]["cosine"]
    assert gate["text"].startswith("1 - cosine is")


@pytest.mark.parametrize(("allowed", "code"), [(1.0, 0), (1e-6, 4)])
def test_the_metric_is_the_gate(model, data, allowed, code):
    result = optimize(model, calibration_data=data, metric="accuracy", labels="label", max_drop=allowed)
    assert result.exit_code == code
    assert (result.folder / "model.onnx").is_file(), "written all the same"
    (gate,) = result.report["goal"]["gates"]
    found = result.report["summary"]["metric"]
    assert (gate["name"], gate["reached"], gate["met"]) == ("max_drop", found["drop"], code == 0)
    assert gate["text"].startswith(
        f"accuracy went from 1 to {found['after']:.5g}, a drop of {found['drop']:.4f}"
    )


def test_measured_on_the_part_that_nothing_was_pruned_with(model, data):
    result = optimize(
        model, calibration_data=data, method="wanda", metric="accuracy", labels="label", batch_size=4
    )
    held = SAMPLES // 8
    found = result.report["summary"]["metric"]
    assert found["samples"] == held
    assert found["after"] == right(result.folder / "model.onnx", X[-held:], RIGHT[-held:])


def test_labels_do_not_change_what_is_pruned(model, data, tmp_path):
    """Statistics of calibration are known again, with labels or without."""
    options = {"calibration_data": data, "method": "wanda", "statistics": tmp_path / "statistics"}
    first = optimize(model, **options)
    before = (tmp_path / "statistics").read_bytes(), (first.folder / "model.onnx.data").read_bytes()
    second = optimize(model, **options, metric="accuracy", labels="label", overwrite=True)
    assert (tmp_path / "statistics").read_bytes() == before[0], "with the digest of the data in it"
    assert (second.folder / "model.onnx.data").read_bytes() == before[1]


def test_data_of_its_own(model, data, tmp_path):
    np.savez(tmp_path / "other.npz", X=X[:10], y=RIGHT[:10] * 0)
    result = optimize(
        model,
        calibration_data=data,
        metric="accuracy",
        metric_data=tmp_path / "other.npz",
        labels="y",
    )
    found = result.report["summary"]["metric"]
    assert found["samples"] == 10
    assert found["before"] == np.mean(RIGHT[:10] == 0)


def test_own_function(model, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    result = optimize(model, metric=f"{tmp_path / 'mine.py'}:size")
    found = result.report["summary"]["metric"]
    assert found["before"] == pytest.approx(
        np.abs(np.maximum(WEIGHTS["W0"].sum(0), 0) @ WEIGHTS["W1"]).sum(), rel=1e-5
    )
    assert found["drop"] == pytest.approx(found["after"] / found["before"] - 1)
    assert found["samples"] == 0


def test_plan_measures_nothing(model, data):
    report = optimize(
        model, calibration_data=data, metric="accuracy", labels="label", max_drop=0.1, dry_run=True
    ).report
    assert report["summary"]["metric"] is None
    (gate,) = report["goal"]["gates"]
    assert (gate["met"], gate["text"]) == (None, "the drop of accuracy is not measured, allowed are 0.1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "accuracy"}, "metric accuracy needs data"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'"),
        ({"metric": "nosuch:f"}, "nosuch:f cannot be imported"),
        ({"labels": "y"}, "labels must be left out, or given with a metric"),
        ({"metric_output": "y"}, "metric_output must be left out, or given with a metric"),
        ({"metric": "accuracy", "calibration_data": "data.npz"}, "needs labels"),
        ({"metric": "accuracy", "calibration_data": "data.npz", "labels": "y"}, "has no labels 'y'; it has X, label"),
        (
            {"metric": "accuracy", "calibration_data": "data.npz", "labels": "label", "metric_data": "short.npz"},
            "differ in their number of samples: {'X': 3, 'label': 2}",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_pruned(model, data, tmp_path, options, said):
    np.savez(tmp_path / "short.npz", X=X[:3], label=RIGHT[:2])
    options = {k: tmp_path / v if str(v).endswith(".npz") else v for k, v in options.items()}
    lines = []
    with pytest.raises(UsageError, match=said):
        optimize(model, **options, progress=lines.append)
    assert not any(line.startswith("prune") for line in lines)
    assert not (tmp_path / "out").exists()


def test_recipe_names_a_metric():
    text = "version: 1\ngoal: {metric: accuracy, labels: y, metric_data: held.npz, max_drop: 0.01}\n"
    expected = Goal(max_drop=0.01, metric="accuracy", labels="y", metric_data="held.npz")
    assert parse_recipe(text) == Recipe(goal=expected, calibration=Calibration())
