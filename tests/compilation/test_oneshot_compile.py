"""The whole road with calibration data: pruned for it, measured on what was held out."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import sparse_onnx
from sparse_onnx.compilation.recipe_reader import load_recipe, parse_recipe
from sparse_onnx.errors import UsageError

D = 64


@pytest.fixture
def model(tmp_path):
    """Two linears with a nonlinearity and a residual."""
    rng = np.random.default_rng(0)
    tensors = {
        "W1": rng.standard_normal((D, 2 * D)) / np.sqrt(D),
        "b1": rng.standard_normal(2 * D),
        "W2": rng.standard_normal((2 * D, D)) / np.sqrt(2 * D),
        "b2": rng.standard_normal(D),
    }
    nodes = [
        helper.make_node("MatMul", ["X", "W1"], ["h"]),
        helper.make_node("Add", ["h", "b1"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["a"]),
        helper.make_node("MatMul", ["a", "W2"], ["o"]),
        helper.make_node("Add", ["o", "b2"], ["ob"]),
        helper.make_node("Add", ["ob", "X"], ["Y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "block",
        [info("X", onnx.TensorProto.FLOAT, ["batch", "tokens", D])],
        [info("Y", onnx.TensorProto.FLOAT, ["batch", "tokens", D])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((D, D)) * np.logspace(0, -1.5, D)
    path = tmp_path / "data.npz"
    np.savez(path, X=(rng.standard_normal((64, 16, D)) @ mix).astype(np.float32))
    return path


def optimize(model, output, **options):
    shapes = {"X": (1, 16, D)}
    return sparse_onnx.optimize(model, output, input_shapes=shapes, threads=1, benchmark=False, **options)


def test_auto_loses_less_than_magnitude_on_held_out_data(model, data, tmp_path):
    said = []
    loss = {}
    for method in ("magnitude", "auto"):
        result = optimize(
            model, tmp_path / method, method=method, sparsity=0.7, calibration_data=data, progress=said.append
        )
        assert result.exit_code == 0
        loss[method] = result.report["summary"]["relative_error"]
        assert result.report["summary"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert loss["auto"] < 0.6 * loss["magnitude"]
    report = json.loads((tmp_path / "auto" / "report.json").read_text())
    assert report["verification"]["against_pruned_dense"]["relative_error"] < 1e-5
    assert report["verification"]["batches"] == 2  # an eighth of 16
    errors = {row["name"]: row["output_error"] for row in report["layers"]}
    assert set(errors) == {"W1", "W2"}
    assert all(0 < error < 1 for error in errors.values())
    assert any("left" in line and "zeros, error" in line for line in said)


def test_the_resolved_recipe_gives_the_same_model(model, data, tmp_path):
    optimize(model, tmp_path / "a", method="auto", sparsity=0.5, calibration_data=data, batch_size=8)
    recipe = load_recipe(tmp_path / "a" / "recipe.yaml")
    assert [step.name for step in recipe.modifiers()] == ["prune.auto"]
    assert (recipe.calibration.data, recipe.calibration.batch_size) == (str(data), 8)
    optimize(model, tmp_path / "b", recipe=recipe)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_method_in_place_of_another_brings_its_own_defaults(model, data, tmp_path):
    optimize(model, tmp_path / "a", method="wanda", sparsity=0.75, calibration_data=data)
    recipe = load_recipe(tmp_path / "a" / "recipe.yaml")
    result = optimize(model, tmp_path / "b", recipe=recipe, method="auto")
    (step,) = load_recipe(tmp_path / "b" / "recipe.yaml").modifiers()
    assert (step.name, step.sparsity, step.scope, step.calibration) == (
        "prune.auto",
        0.75,
        "layer",
        "asymmetric",
    )
    assert result.exit_code == 0


def test_several_sources_are_mixed_and_the_recipe_names_them(model, data, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, X=np.random.default_rng(2).standard_normal((32, 16, D)).astype(np.float32))
    sources = [data, f"{other}:0.5"]
    options = {"method": "auto", "sparsity": 0.5, "batch_size": 8, "keep_pruned": True}
    found = optimize(model, tmp_path / "a", calibration_data=sources, **options)
    recipe = load_recipe(tmp_path / "a" / "recipe.yaml")
    assert recipe.calibration.data == (str(data), f"{other}:0.5")
    assert found.report["verification"]["inputs"] == f"{data}, {other}:0.5"
    assert found.report["verification"]["batches"] == 1  # an eighth of 8 + 4
    optimize(model, tmp_path / "b", recipe=recipe)
    optimize(model, tmp_path / "c", calibration_data=[data, other], **options)
    files = [(tmp_path / name / "model.onnx.data").read_bytes() for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_weighted_data_is_not_kept_in_a_statistics_file(model, data, tmp_path):
    with pytest.raises(UsageError, match="statistics of weighted data are not kept in a file"):
        optimize(
            model,
            tmp_path / "a",
            method="wanda",
            sparsity=0.5,
            calibration_data=f"{data}:0.5",
            statistics=tmp_path / "file",
        )


def test_one_batch_is_used_for_both_and_that_is_said(model, data, tmp_path):
    said = []
    options = {"method": "alps", "sparsity": 0.5, "calibration_data": data, "num_calibration_samples": 4}
    optimize(model, tmp_path / "out", progress=said.append, **options)
    assert any("measured on the data that it was made with" in line for line in said)


def test_a_plan_needs_no_calibration(model, tmp_path):
    result = optimize(model, tmp_path, method="auto", sparsity=0.7, dry_run=True)
    assert result.report["summary"]["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_structured_and_one_shot_pruning_in_one_recipe(model, data, tmp_path):
    recipe = parse_recipe(
        """
version: 1
stages:
- name: remove
  modifiers: [prune.ffn: {sparsity: 0.25}]
- name: prune
  modifiers: [prune.auto: {sparsity: 0.7}]
"""
    )
    result = optimize(model, tmp_path / "out", recipe=recipe, calibration_data=data)
    shapes = {row["name"]: row["shape"] for row in result.report["layers"]}
    assert shapes == {"W1": [D, 96], "W2": [96, D]}
    assert result.report["verification"]["against_pruned_dense"]["relative_error"] < 1e-5
    plan = optimize(model, tmp_path, recipe=recipe, dry_run=True)
    assert plan.report["summary"]["sparsity"] == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "prune.auto needs calibration data: give --calibration-data"),
        ({"Z": np.ones((8, 16, D), np.float32)}, "has no X; it has Z; expected X"),
        ({"X": np.ones((8, 16, D + 1), np.float32)}, r"X is float32\[8, 16, 65\]; expected X"),
        ({"X": np.full((8, 16, D), np.nan, np.float32)}, "X holds NaN"),
        ({"X": np.ones((0, 16, D), np.float32)}, r"X is float32\[0, 16, 64\]; expected X"),
        ({"X": np.array(["a"])}, "expected X"),
    ],
)
def test_data_that_does_not_fit_is_refused_and_nothing_written(arrays, message, model, tmp_path):
    path = tmp_path / "bad.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UsageError, match=message):
        optimize(
            model, tmp_path / "out", method="auto", sparsity=0.5, calibration_data=path if arrays else None
        )
    assert not (tmp_path / "out").exists()


DEGENERATE = {
    "one sample": lambda x: x[:1, :1],
    "equal samples": lambda x: np.repeat(x[:1, :1], 64, 0),
    "mean 10, deviation 1e-3": lambda x: 10 + 1e-3 * x,
    "mean 1, deviation 1e-6": lambda x: 1 + 1e-6 * np.abs(x),
    "some inputs constant": lambda x: np.where(np.arange(D) % 2, x, 2.5),
    "all zero": lambda x: np.zeros_like(x),
}


@pytest.mark.parametrize(
    ("method", "calibration"), [("auto", "oneshot"), ("auto", "asymmetric"), ("sparsegpt", "sequential")]
)
@pytest.mark.parametrize("case", DEGENERATE)
def test_activations_that_hardly_vary(model, data, tmp_path, case, method, calibration):
    with np.load(data) as arrays:
        x = DEGENERATE[case](arrays["X"]).astype(np.float32)
    np.savez(tmp_path / "degenerate.npz", X=x)
    result = optimize(
        model,
        tmp_path / "out",
        method=method,
        calibration=calibration,
        sparsity=0.6,
        keep_pruned=True,
        calibration_data=tmp_path / "degenerate.npz",
    )
    for row in result.report["layers"]:
        assert row["sparsity"] >= 0.59
    session = sparse_onnx.InferenceSession(tmp_path / "out" / "model.onnx")
    before = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    got, want = (s.run(None, {"X": x[:8]})[0].astype(np.float64) for s in (session, before))
    # What the data says is kept: the outputs on it.
    assert np.linalg.norm(got - want) <= 0.3 * np.linalg.norm(want)


def test_a_single_sample_does_not_make_the_model_constant(model, data, tmp_path):
    """The bias alone could give its output."""
    with np.load(data) as arrays:
        np.savez(tmp_path / "one.npz", X=arrays["X"][:1, :1])
    optimize(
        model,
        tmp_path / "out",
        method="auto",
        sparsity=0.6,
        keep_pruned=True,
        calibration_data=tmp_path / "one.npz",
    )
    initializers = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    weights = [numpy_helper.to_array(tensor) for tensor in initializers if tensor.name in ("W1", "W2")]
    assert [np.count_nonzero(array) / array.size for array in weights] == [pytest.approx(0.4, abs=0.01)] * 2
