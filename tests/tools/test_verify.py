"""``sparse-onnx verify``: exit codes, messages and documents."""

import re

import numpy as np
import onnx
import onnx.parser
import pytest


def test_compiled_model_agrees_with_the_pruned_one(run_cli, pruned, compiled):
    ran = run_cli("verify", pruned, compiled)
    assert ran.code == 0
    rows = ran.out.splitlines()
    assert [row.split("  ")[0] for row in rows[2:]] == ["with library", "without library"]
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
    for way in ("with_library", "without_library"):
        assert 0 <= document[way]["relative_error"] <= 1e-5
        assert document[way]["worst_output"] == "Y"


def test_loss_from_pruning_is_exit_3_and_explained(run_cli, dense, compiled):
    ran = run_cli("verify", dense, compiled)
    assert ran.code == 3
    assert re.search("at output .Y., run with(out)? library; allowed 0.0001", ran.err)
    assert "For a pruned model this is the compression loss" in ran.err
    assert "compare against the pruned dense model" in ran.err
    assert "with library" in ran.out


def test_loss_from_pruning_as_json(run_cli, dense, compiled):
    ran = run_cli("verify", dense, compiled, "--format=json")
    assert ran.code == 3
    document = ran.json()
    assert document["passed"] is False
    assert document["with_library"]["relative_error"] > 1e-4


def test_loss_can_be_allowed(run_cli, dense, compiled):
    assert run_cli("verify", dense, compiled, "--max-relative-error", "10").code == 0


def test_model_without_our_operators_is_run_once(run_cli, dense, pruned):
    document = run_cli("verify", dense, pruned, "--format", "json").json()
    assert "with_library" not in document
    assert document["without_library"]["relative_error"] > 1e-4


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
    (found,) = document["without_library"]["predictions"]
    assert found["output"] == "logits"
    assert found["kl_divergence"] > 0
    assert found["candidate_perplexity"] is None


def test_outputs_without_logits_have_no_such_table(run_cli, dense, pruned):
    assert "KL divergence" not in run_cli("verify", dense, pruned).out
