"""``sparse-onnx analyze``: its table and document, the table of timings that it saves, and bad input."""

import numpy as np
import pytest

FORMS = (
    *("int8-dynamic", "int8-nbits", "int8-token", "int8-quads", "int8-bitmap"),
    *("int4-nbits", "int4-bitmap"),
)
SHAPE = ("--input-shape", "X:1,16,64", "--threads", "1", "--quiet")


@pytest.mark.parametrize("quiet", [True, False])
def test_the_answer_comes_first_and_fits_a_screen(quiet, run_cli, dense, monkeypatch):
    monkeypatch.setattr("sparse_onnx.running.machine_load.OtherLoad.spared", lambda _self, _threads: quiet)
    ran = run_cli("analyze", dense, *SHAPE)
    assert ran.code == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0].startswith("At 70 % unstructured ")
    assert lines[0].endswith("for the error to expect, give --calibration-data.")
    assert len(lines) <= 26
    assert max(len(line) for line in lines[1:]) <= 120
    assert lines[-1].startswith("Other programs took processors") is not quiet
    for pattern in ("unstructured", "2:4", "1:8", "block:8x1", "layers.0", "layers.1"):
        assert any(line.startswith(pattern) for line in lines), pattern


def test_few_bits_are_told_right_behind_and_in_the_table(run_cli, dense):
    ran = run_cli("analyze", dense, *SHAPE)
    lines = ran.out.splitlines()
    for line, bits in zip(lines[1:3], (8, 4), strict=True):
        assert line.startswith(f"int{bits}: ")
        assert "x smaller; with 50 % zeros " in line
        assert len(line) <= 100
    assert not lines[3]
    assert [line.split()[:2] for line in lines if line.startswith("int") and ":" not in line] == [
        ["int8", "0.0%"],
        ["int4", "0.0%"],
    ]


@pytest.mark.parametrize(("precision", "bits"), [("float32", []), ("int8", [8]), ("int4", [4])])
def test_the_precision_narrows_what_is_looked_at(run_cli, dense, precision, bits):
    ran = run_cli("analyze", dense, "--precision", precision, "--no-anchors", "--format", "json", *SHAPE)
    document = ran.json()
    assert ran.code == 0
    assert [answer.split(":")[0] for answer in document["bits_answers"]] == [f"int{count}" for count in bits]
    assert {row["bits"] for row in document["precisions"]} == set(bits)
    forms = {row["form"] for row in document["curves"]}
    assert forms == {"sparse"} | {name for name in FORMS if int(name[3]) in bits}


def test_the_group_size_is_asked_for(run_cli, dense):
    sizes = []
    for group_size in ("16", "64"):
        options = ("--precision", "int4", "--group-size", group_size, "--no-anchors", "--format", "json")
        ran = run_cli("analyze", dense, *options, *SHAPE)
        sizes.append(ran.json()["layers"][0]["encoded_bytes"]["4"])
    assert sizes[0] > sizes[1]


def test_json_has_everything(run_cli, dense):
    ran = run_cli("analyze", dense, "--sparsity", "0.9", "--no-anchors", "--format", "json", *SHAPE)
    document = ran.json()
    assert ran.code == 0
    assert document["answer"].startswith("at 90 % unstructured")
    assert [row["name"] for row in document["layers"]] == ["W0", "W1"]
    assert [row["module"] for row in document["layers"]] == ["layers.0", "layers.1"]
    assert document["input_shapes"] == {"X": [1, 16, 64]}
    assert all(row["relative_error"] is None for row in document["predictions"])


def test_a_pattern_of_ones_own_and_real_inputs(run_cli, dense, tmp_path):
    inputs = np.random.default_rng(0).standard_normal((8, 16, 64)).astype(np.float32)
    np.savez(tmp_path / "data.npz", X=inputs)
    ran = run_cli(
        "analyze", dense, "--mask-structure", "3:4", "--calibration-data", tmp_path / "data.npz", *SHAPE
    )
    assert ran.code == 0, ran.err
    assert ran.out.startswith("At 25 % 3:4 ")
    assert "expected relative error 0" in ran.out.splitlines()[0]  # 0 where no layer would be sparse
    assert "error" in ran.out.splitlines()[2]


def test_a_saved_table_is_what_optimize_decides_by(run_cli, dense, pruned, tmp_path):
    path = tmp_path / "timings.json"
    assert run_cli("analyze", dense, "--no-anchors", "--save-table", path, *SHAPE).code == 0
    ran = run_cli(
        "optimize", pruned, "-o", tmp_path / "out", "--no-benchmark", "--timing-table", path,
        "--format", "json", *SHAPE,
    )  # fmt: skip
    assert ran.code in (0, 5), ran.err
    reasons = [row["reason"] for row in ran.json()["layers"]]
    assert len(reasons) == 2
    assert all("by the timing table" in reason for reason in reasons)
    other = run_cli(
        "optimize", pruned, "-o", tmp_path / "other", "--no-benchmark", "--timing-table", path,
        "--format", "json", "--input-shape", "X:1,17,64", "--threads", "1", "--quiet",
    )  # fmt: skip
    assert all("not in the timing table" in row["reason"] for row in other.json()["layers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", "1.5"), "sparsity must be at least 0 and below 1, not 1.5"),
        (("--mask-structure", "2:4", "--sparsity", "0.7"), "implies sparsity 0.5"),
        (("--mask-structure", "4:2"), "mask_structure '4:2' is not known"),
        (("--calibration-data", "none.npz"), "none.npz: no such file"),
        (("--targets", "W7"), "'W7' matches no weight"),
        (("--min-speedup", "0"), "min_speedup must be above 0"),
        (("--precision", "int3"), "precision must be float32, int8, int4, not 'int3'"),
        (("--group-size", "8"), "group_size must be 16 to 256"),
        (("--threads", "0"), "'--threads'"),
    ],
)
def test_bad_options_are_one_message(run_cli, dense, arguments, message):
    ran = run_cli("analyze", dense, *arguments, "--quiet")
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
    assert ran.err.count("Error: ") == 1
    assert "Traceback" not in ran.err


def test_a_timing_table_is_for_another_machine(run_cli, pruned, tmp_path):
    ran = run_cli("optimize", pruned, "-o", tmp_path / "out", "--timing-table", "t.json", "--quiet")
    assert ran.code == 2
    assert "give it with --no-benchmark" in ran.err
    ran = run_cli(
        "optimize", pruned, "-o", tmp_path / "out", "--no-benchmark", "--timing-table", "t.json", "--quiet"
    )
    assert ran.code == 2
    assert "t.json: no such file" in ran.err
    assert not (tmp_path / "out").exists()
