"""Inputs that steer the graph, everywhere where shapes are taken: values given, values fixed, data with both."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.analysis.analyze import analyze
from sparse_onnx.compilation.recipe import dump_recipe
from sparse_onnx.compilation.recipe_reader import load_recipe, parse_recipe
from sparse_onnx.errors import UsageError
from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.fix_inputs import fixed_values
from sparse_onnx.running.runtime import open_session, run_session
from sparse_onnx.tools import cli

SIZES = {16000: 256, 8000: 128}


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """Voice activity as silero-vad has it: a rate chooses the branch, a state has its batch in the second axis."""
    rng = np.random.default_rng(0)

    def weight(*shape):
        W = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        W[rng.random(shape) < 0.85] = 0
        return W

    def branch(name, weight):
        nodes = [helper.make_node("MatMul", ["x", weight], ["t"]), helper.make_node("Relu", ["t"], ["r"])]
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
        )

    nodes = [
        helper.make_node("Equal", ["sr", "rate"], ["c"]),
        helper.make_node(
            "If", ["c"], ["i"], then_branch=branch("then", "w"), else_branch=branch("else", "v")
        ),
        helper.make_node("MatMul", ["i", "u"], ["z"]),
        helper.make_node("ReduceMean", ["state"], ["m"], axes=[0], keepdims=0),
        helper.make_node("Add", ["z", "m"], ["y"]),
        helper.make_node("Neg", ["state"], ["state_out"]),
    ]
    arrays = {"w": weight(256, 128), "v": weight(128, 128), "u": weight(128, 128), "rate": np.array(16000)}
    graph = helper.make_graph(
        nodes,
        "voice",
        [
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "batch", 128]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "samples"]),
            helper.make_tensor_value_info("sr", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 128]),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, [2, "batch", 128]),
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    path = tmp_path_factory.mktemp("voice") / "voice.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def feeds(batch, rate, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "state": rng.standard_normal((2, batch, 128)).astype(np.float32),
        "x": rng.standard_normal((batch, SIZES[rate])).astype(np.float32),
        "sr": np.array(rate),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **feeds(20, 16000))
    return path


def outputs(path, given, library=False):
    return run_session(open_session(path, threads=1, library=library), given)


def optimize(*arguments, **options):
    said = []
    result = sparse_onnx.optimize(*arguments, benchmark=False, threads=1, progress=said.append, **options)
    return result, [line.split("note: ")[1] for line in said if "note: " in line]


@pytest.mark.parametrize("rate", [16000, 8000])
def test_a_fixed_input_is_gone_with_the_branch_that_it_does_not_take(voice, tmp_path, rate):
    result, notes = optimize(voice, tmp_path / "out", fixed_inputs={"sr": rate})
    written = tmp_path / "out" / "model.onnx"
    model = load_model(written)
    assert [value.name for value in model.graph.inputs] == ["state", "x"]
    assert not [node for node in model.graph if node.op_type == "If"]
    assert fixed_values(model) == {"sr": rate}
    assert [row["shape"] for row in result.report["layers"]] == [[SIZES[rate], 128], [128, 128]]
    assert all(row["decision"] == "sparse" for row in result.report["layers"])
    assert not any("sr" in note for note in notes)
    given = feeds(3, rate)
    expected = outputs(voice, given)
    for library in (True, False):
        got = outputs(written, given, library)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=1e-5)
    assert load_recipe(tmp_path / "out" / "recipe.yaml").target.fixed_inputs == {"sr": rate}
    assert sparse_onnx.verify(voice, written, threads=1).passed


def test_the_original_is_compared_with_at_the_fixed_value(voice, tmp_path):
    result, _ = optimize(
        voice, tmp_path / "out", fixed_inputs={"sr": 8000}, method="magnitude", sparsity=0.95
    )
    checks = result.report["verification"]
    assert checks["against_pruned_dense"]["relative_error"] < 1e-5
    assert 0.01 < checks["against_original"]["relative_error"] < 1


def test_layers_are_traced_through_what_is_fixed(voice, tmp_path):
    optimize(voice, tmp_path / "out", fixed_inputs={"sr": 8000}, method="magnitude", sparsity=0.95)
    found = sparse_onnx.verify(voice, tmp_path / "out" / "model.onnx", threads=1)
    assert [miss.threshold for miss in found.misses] == ["max_relative_error"]
    assert found.trace is not None


def test_a_search_with_a_fixed_input(voice, data, tmp_path):
    said = []
    result = sparse_onnx.optimize(
        voice,
        tmp_path / "out",
        method="magnitude",
        max_drop=0.9,
        fixed_inputs={"sr": 16000},
        calibration_data=data,
        search_trials=1,
        threads=1,
        progress=said.append,
    )
    assert [row["shape"] for row in result.report["layers"]] == [[256, 128], [128, 128]]
    assert [v.name for v in load_model(tmp_path / "out" / "model.onnx").graph.inputs] == ["state", "x"]
    assert load_recipe(tmp_path / "out" / "recipe.yaml").target.fixed_inputs == {"sr": 16000}
    assert any("note: dimension batch is taken as 1" in line for line in said)


def test_nothing_sparse_is_still_fixed(voice, tmp_path):
    result = sparse_onnx.optimize(
        voice, tmp_path / "out", fixed_inputs={"sr": 8000}, min_speedup=1e6, threads=1
    )
    assert result.exit_code == 5
    assert [v.name for v in load_model(tmp_path / "out" / "model.onnx").graph.inputs] == ["state", "x"]
    given = feeds(3, 8000)
    np.testing.assert_allclose(
        outputs(tmp_path / "out" / "model.onnx", given)["y"], outputs(voice, given)["y"], atol=1e-5
    )


def test_a_value_given_decides_the_branch_that_is_run(voice, tmp_path):
    result, notes = optimize(voice, tmp_path / "out", input_values={"sr": 8000})
    assert result.report["input_shapes"]["x"] == [1, 128]  # what the branch that is taken wants
    assert [value.name for value in load_model(tmp_path / "out" / "model.onnx").graph.inputs] == [
        "state",
        "x",
        "sr",
    ]
    assert load_recipe(tmp_path / "out" / "recipe.yaml").target.input_values == {"sr": 8000}
    result, notes = optimize(voice, tmp_path / "plain")
    assert result.report["input_shapes"]["x"] == [1, 256]
    assert (
        "input sr is taken as 16000, which the graph compares it with; say --input sr=VALUE to decide for another"
        in notes
    )


def test_data_with_a_state_and_a_rate(voice, data, tmp_path):
    result, _ = optimize(
        voice,
        tmp_path / "out",
        calibration_data=data,
        method="wanda",
        sparsity=0.9,
        fixed_inputs={"sr": 16000},
    )
    assert result.report["verification"]["batches"] >= 1
    assert result.report["verification"]["against_pruned_dense"]["relative_error"] < 1e-5
    assert result.report["input_shapes"]["x"] == [1, 256]
    verified = sparse_onnx.verify(
        voice, tmp_path / "out" / "model.onnx", data=data, threads=1, max_relative_error=1, metric="cosine"
    )
    assert verified.metric is not None
    assert verified.metric.samples == 20
    assert 0.5 < verified.metric.after < 1


def test_the_data_decides_what_would_be_guessed(voice, tmp_path):
    np.savez(tmp_path / "data.npz", **feeds(6, 8000))
    result, notes = optimize(voice, tmp_path / "out", calibration_data=tmp_path / "data.npz")
    assert result.report["input_shapes"] == {"state": [2, 1, 128], "x": [1, 128], "sr": []}
    assert "sr is taken as 8000, as in the data; say --input-shape or --input to decide for another" in notes


def test_data_without_the_rate(voice, tmp_path):
    given = feeds(6, 8000)
    del given["sr"]
    np.savez(tmp_path / "data.npz", **given)
    with pytest.raises(UsageError, match=r"has no sr; .*--input NAME=VALUE"):
        optimize(voice, tmp_path / "out", calibration_data=tmp_path / "data.npz")
    for option in ("input_values", "fixed_inputs"):
        result, _ = optimize(
            voice,
            tmp_path / option,
            calibration_data=tmp_path / "data.npz",
            **{option: {"sr": np.int64(8000)}},
        )
        assert result.report["verification"]["inputs"] != "generated"


def test_data_that_contradicts_what_is_fixed(voice, data, tmp_path):
    with pytest.raises(UsageError, match="sr holds other values than --fix-input sr=8000"):
        optimize(voice, tmp_path / "out", calibration_data=data, fixed_inputs={"sr": 8000})


def test_analyze_looks_into_the_branch_that_is_taken(voice):
    found = analyze(
        voice, fixed_inputs={"sr": 8000}, sparsities=[0.8], mask_structures=[], anchors=False, threads=1
    )
    assert sorted(layer.shape for layer in found.forecast.layers) == [(128, 128), (128, 128)]
    found = analyze(
        voice, input_values={"sr": 8000}, sparsities=[0.8], mask_structures=[], anchors=False, threads=1
    )
    assert found.input_shapes["x"] == (1, 128)
    assert [layer.shape for layer in found.forecast.layers] == [(128, 128)]


@pytest.fixture
def run(capsys):
    """Runs one command line; its exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_commands(run, voice, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    flags = ("--threads", 1, "--no-benchmark", "--quiet")
    assert run("optimize", voice, "-o", out, "--fix-input", "sr=8000", *flags)[0] == 0
    assert run("optimize", voice, "-o", other, "--fix-input", "sr=16000", *flags)[0] == 0
    assert run("verify", voice, out, "--threads", 1, "--quiet")[0] == 0
    code, _, said = run("verify", voice, out, "--input", "sr=16000", "--threads", 1)
    assert code == 2
    assert "the optimized model has it fixed to 8000" in said
    code, document, _ = run("bench", voice, out, "--rounds", 5, "--threads", 1, "--format", "json", "--quiet")
    assert code == 0
    assert len(json.loads(document)["models"]) == 2
    code, _, said = run("bench", voice, out, other, "--rounds", 5)
    assert code == 2
    assert "sr fixed to 16000, another model to 8000" in said
    code, _, said = run("bench", voice, "--input", "sr=8000", "--rounds", 5, "--threads", 1)
    assert code == 0
    assert "x [1, 128]" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--input", "rate=1"], "--input names 'rate'; the inputs are state: float32[2, batch, 128]; x"),
        (["--fix-input", "rate=1"], "--fix-input names 'rate'"),
        (["--input", "sr=fast"], "--input 'sr=fast': write NAME=VALUE"),
        (["--fix-input", "sr"], "--fix-input 'sr': write NAME=VALUE"),
        (["--input", "sr=1.5"], "sr: int64[] takes an integer"),
        (["--input", "sr=1,2"], "is of shape [2], which does not fit sr: int64[]"),
        (["--input", "sr=1", "--input", "sr=2"], "--input gives 'sr' twice"),
        (["--input", "sr=1", "--fix-input", "sr=2"], "both give 'sr'"),
        (["--fix-input", "x=0"], "leaves its size open"),
    ],
)
def test_flags_that_are_wrong(run, voice, tmp_path, flags, said):
    code, _, error = run("optimize", voice, "-o", tmp_path / "out", "--threads", 1, "--no-benchmark", *flags)
    assert code == 2
    assert said in error
    assert not (tmp_path / "out").exists()


def test_recipes_hold_both():
    text = "version: 1\ntarget: {input_values: {sr: 16000, flags: [1, 0]}, fixed_inputs: {on: true, t: [[1.5]]}}\n"
    recipe = parse_recipe(text)
    assert recipe.target.input_values == {"sr": 16000, "flags": (1, 0)}
    assert recipe.target.fixed_inputs == {"on": True, "t": ((1.5,),)}
    assert parse_recipe(dump_recipe(recipe)) == recipe
    for bad in ("{sr: fast}", "{sr: []}", "{sr: {a: 1}}", "[1]"):
        with pytest.raises(UsageError, match="input_values"):
            parse_recipe(f"version: 1\ntarget: {{input_values: {bad}}}\n")
