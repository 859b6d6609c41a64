"""``sparse-onnx verify``: exit codes, messages and documents."""

import re

import numpy as np
import onnx
import onnx.parser
import pytest


def test_compiled_model_agrees_with_the_pruned_one(run_cli, pruned, compiled):
    ran = run_cli("verify", pruned, compiled)
    assert ran.code == 0
    rows = [line.split("  ") for line in ran.out.splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell][:2] for row in rows] == [
        [reference, way]
        for reference in ("pruned dense", "original")
        for way in ("with library", "without library")
    ]
    assert "dimension batch is taken as 1" in ran.err
    assert "X float32[1, 128, 64]" in ran.err
    assert "X float32[2, 17, 64]" in ran.err


def test_file_inside_the_folder_is_the_same_as_the_folder(run_cli, pruned, compiled):
    ran = run_cli("verify", pruned, compiled / "model.onnx", "--quiet")
    assert ran.code == 0
    assert "running" not in ran.err


def test_json_is_one_document(run_cli, pruned, compiled):
    ran = run_cli("verify", pruned, compiled, "--format", "json", "--input-shape", "X:1,5,64")
    assert ran.code == 0
    document = ran.json()
    assert document["passed"] is True
    assert document["batches"] == 2
    assert document["inputs"][0] == "generated: X float32[1, 5, 64]"
    for reference in ("against_pruned_dense", "against_original"):
        for way in ("with_library", "without_library"):
            assert 0 <= document[reference][way]["relative_error"] <= 1e-5
            assert document[reference][way]["worst_output"] == "Y"


def test_loss_from_pruning_is_exit_3_and_explained(run_cli, dense, compiled):
    ran = run_cli("verify", dense, compiled)
    assert ran.code == 3
    assert re.search("at output .Y., run with(out)? library, against the original; allowed 0.0001 ", ran.err)
    assert re.search(r"The compiler is exact \(\d\.\de-0\d against the pruned dense model\)", ran.err)
    assert "this is the compression loss" in ran.err
    assert "To accept it, say how much: --max-relative-error" in ran.err
    assert re.search(r"The largest error of one layer is that of layers\.\d \[SparseMatMul", ran.err)
    assert "layer, against the original" in ran.out
    assert "with library" in ran.out


def test_loss_from_pruning_as_json(run_cli, dense, compiled):
    ran = run_cli("verify", dense, compiled, "--format=json")
    assert ran.code == 3
    document = ran.json()
    assert document["passed"] is False
    assert document["against_original"]["with_library"]["relative_error"] > 1e-4
    assert document["against_pruned_dense"]["with_library"]["relative_error"] < 1e-5
    assert [miss["threshold"] for miss in document["misses"]] == ["max_relative_error"]
    assert [row["op_type"] for row in document["trace"]["layers"]] == ["SparseMatMulGelu", "SparseMatMul"]


def test_loss_can_be_allowed(run_cli, dense, compiled):
    assert run_cli("verify", dense, compiled, "--max-relative-error", "10").code == 0


def test_model_without_our_operators_is_run_once(run_cli, dense, pruned):
    document = run_cli("verify", dense, pruned, "--format", "json").json()
    assert document["against_pruned_dense"] == {}
    assert document["against_original"].keys() == {"without_library"}
    assert document["against_original"]["without_library"]["relative_error"] > 1e-4


def test_real_inputs(run_cli, pruned, compiled, tmp_path):
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "real.npz", X=rng.standard_normal((11, 4, 64)).astype(np.float32))
    document = run_cli("verify", pruned, compiled, "--data", tmp_path / "real.npz", "--format", "json").json()
    assert document["batches"] == 2
    assert document["inputs"] == [f"{tmp_path / 'real.npz'}: 2 batches"]


def test_real_inputs_that_do_not_fit(run_cli, pruned, compiled, tmp_path):
    np.savez(tmp_path / "real.npz", Z=np.zeros((2, 4, 64), np.float32))
    ran = run_cli("verify", pruned, compiled, "--data", tmp_path / "real.npz")
    assert ran.code == 2
    assert "has no X; it has Z" in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input-shape", "X"], "NAME:DIM,DIM"),
        (["--input-shape", "Z:1,2,64"], "names 'Z'"),
        (["--input-shape", "X:1,2,65"], "does not fit"),
        (["--max-relative-error", "-1"], "must be 0 or more"),
        (["--min-cosine", "2"], "min_cosine must be in [-1, 1]"),
        (["--max-kl", "0.1"], "no output of the original is known to hold logits"),
        (["--metric", "nosuch"], "unknown metric 'nosuch'"),
        (["--metric", "cosine"], "metric cosine needs data"),
        (["--labels", "y"], "labels and tokenizer belong to real inputs"),
        (["--data", "nosuch.npz"], "no such file"),
        (["--threads", "0"], "--threads"),
        (["--nosuch"], "--nosuch"),
    ],
)
def test_wrong_options_are_exit_2(run_cli, pruned, compiled, options, said):
    ran = run_cli("verify", pruned, compiled, *options)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_missing_model_is_exit_2(run_cli, pruned, tmp_path):
    ran = run_cli("verify", pruned, tmp_path / "nosuch.onnx", "--format", "json")
    assert ran.code == 2
    assert ran.json()["exit_code"] == 2
    assert "nosuch.onnx" in ran.json()["error"]


def test_renamed_output_is_exit_3(run_cli, pruned, tmp_path):
    proto = onnx.load(pruned)
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "Z"
    onnx.save(proto, tmp_path / "renamed.onnx")
    ran = run_cli("verify", pruned, tmp_path / "renamed.onnx")
    assert ran.code == 3
    assert "the models differ in their outputs: Y only in the original; Z only in the optimized" in ran.err


def classifier(folder, name, scale):
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]> g (float[b, 8] X) => (float[b, 4] logits)
        { logits = MatMul(X, W) }"""
    )
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight * np.float32(scale), "W"))
    onnx.save(proto, folder / name)
    return folder / name


def test_predictions_have_a_table_of_their_own(run_cli, tmp_path):
    first, second = classifier(tmp_path, "a.onnx", 1), classifier(tmp_path, "b.onnx", 0.5)
    text = run_cli("verify", first, second).out
    lines = text.split("\n\n")[1].splitlines()
    assert lines[0].split("  ")[0] == "optimized model"
    assert "KL divergence" in lines[0]
    assert "100.0%" in lines[2]
    document = run_cli("verify", first, second, "--format", "json").json()
    (found,) = document["against_original"]["without_library"]["predictions"]
    assert found["output"] == "logits"
    assert found["kl_divergence"] > 0
    assert found["candidate_perplexity"] is None


def test_outputs_without_logits_have_no_such_table(run_cli, dense, pruned):
    assert "KL divergence" not in run_cli("verify", dense, pruned).out


def test_layers_are_compared_if_asked_for(run_cli, pruned, compiled):
    ran = run_cli("verify", pruned, compiled, "--layers")
    assert ran.code == 0
    table = ran.out.split("\n\n")[1].splitlines()
    assert table[0].startswith("layer, against the original")
    assert len(table) == 4
    assert "the first above the threshold" not in ran.out
    assert "layer, against" not in run_cli("verify", pruned, compiled).out


def test_layers_are_not_compared_if_not_wanted(run_cli, dense, compiled):
    ran = run_cli("verify", dense, compiled, "--no-layers")
    assert ran.code == 3
    assert "layer, against" not in ran.out


def test_spoiled_operator_is_a_fault_of_the_compiler_and_is_found(run_cli, dense, compiled):
    proto = onnx.load(compiled / "model.onnx", load_external_data=False)
    body = next(function for function in proto.functions if function.name == "SparseMatMul")
    next(node for node in body.node if list(node.output) == ["Y"]).op_type = "Neg"
    onnx.save(proto, compiled / "model.onnx")
    ran = run_cli("verify", dense, compiled, "--max-relative-error", "100")
    assert ran.code == 3
    assert (
        "run without library, against the pruned dense model; allowed 0.0001 (--max-compiler-error)"
        in ran.err
    )
    assert "a fault of the compiler or the file. It begins at layers.1 [SparseMatMul]" in ran.err
    assert "<- the first above the threshold" in ran.out


def test_metric_as_a_gate(run_cli, tmp_path):
    first, second = classifier(tmp_path, "a.onnx", 1), classifier(tmp_path, "b.onnx", -1)
    x = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    weight = onnx.numpy_helper.to_array(onnx.load(first).graph.initializer[0])
    np.savez(tmp_path / "x.npz", X=x, y=(x @ weight).argmax(1))
    options = ("--data", tmp_path / "x.npz", "--metric", "accuracy", "--labels", "y", "--max-drop", "0.1")
    ran = run_cli("verify", first, second, *options)
    assert ran.code == 3
    assert "drop of the metric 1.0e+00, against the original; allowed 0.1 (--max-drop)" in ran.err
    assert re.search(r"accuracy +1 +0 +1 +12", ran.out)
    assert run_cli("verify", first, first, *options).code == 0
