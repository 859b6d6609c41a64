"""What a newcomer gets wrong: every message says what is wrong, where, and what to do; never a traceback."""

import sys

import pytest

OUT = ("-o", "{out}")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("optimize",), 2, ["Missing argument 'MODEL'", "Try 'sparse-onnx optimize --help'."]),
        (("optimize", "{dense}"), 2, ["-o DIR"]),
        (("optimize", "{none}", *OUT), 2, ["none.onnx: does not exist; give the path of an .onnx file"]),
        (("optimize", "{text}", *OUT), 2, ["text.onnx: is not an ONNX model", "export or copy it again"]),
        (
            ("optimize", "{folder}", *OUT),
            2,
            ["is a folder, not an .onnx file; give a file in it:", "dense.onnx"],
        ),
        (("optimize", "{empty}", *OUT), 2, ["it has no config.json", "hf download"]),
        (("optimize", "{dense}", *OUT, "--sparsty", "0.5"), 2, ["'--sparsty'", "Did you mean '--sparsity'?"]),
        (("optimize", "{dense}", *OUT, "--sparsity", "80"), 2, ["below 1, not 80 (80 % are 0.8)"]),
        (
            ("optimize", "{dense}", *OUT, "--sparsity", "much"),
            2,
            ["'--sparsity'", "'much' is not a valid float"],
        ),
        (
            ("optimize", "{dense}", *OUT, "--method", "wand"),
            2,
            ["unknown method 'wand'; the nearest is 'wanda'"],
        ),
        (("optimize", "{dense}", "-o", "{none}/out"), 2, ["is no folder; create it first"]),
        (
            ("optimize", "{dense}", *OUT, "--input-shape", "X"),
            2,
            ["'X'", "NAME:DIM,DIM,..", "input_ids:1,128"],
        ),
        (
            ("optimize", "{dense}", *OUT, "--input-shape", "Z:1"),
            2,
            ["names 'Z'", "the inputs are X: float32"],
        ),
        (
            ("optimize", "{dense}", *OUT, "--target-size", "120"),
            2,
            ["a share (0.5 or 50%) or a size (120MB)"],
        ),
        (("optimize", "{dense}", *OUT, "--format", "yaml"), 2, ["'yaml' is not one of 'text', 'json'"]),
        (("verify", "{dense}"), 2, ["Missing argument 'OPTIMIZED'"]),
        (("verify", "{dense}", "{none}"), 2, ["none.onnx: does not exist"]),
        (("verify", "{dense}", "{dense}", "--data", "{text}"), 2, ["text.onnx: is no .npz"]),
        (("verify", "{dense}", "{dense}", "--threads", "0"), 2, ["'--threads'", "x>=1"]),
        (("bench",), 2, ["Missing argument 'MODELS...'"]),
        (("bench", "{folder}"), 2, ["is a folder", "dense.onnx"]),
        (("inspect", "{text}"), 2, ["is not an ONNX model"]),
        (("export", "{dense}", *OUT), 2, ["is no Hugging Face model folder: it is a file"]),
        (
            ("export", "nosuch_module:make", *OUT),
            2,
            ["cannot be imported", "No module named 'nosuch_module'"],
        ),
        (("doctor", "--fromat", "json"), 2, ["Did you mean '--format'?"]),
        (("demo", "-o", "{folder}"), 2, ["exists; choose another output folder, or give --overwrite"]),
        (("report", "{none}"), 2, ["there is no such file; give what `sparse-onnx optimize -o` wrote"]),
        (("analyze", "{none}"), 2, ["none.onnx: does not exist"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage(run_cli, tmp_path, dense, arguments, code, said):
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty").mkdir()
    names = {name: tmp_path / f"{name}.onnx" for name in ("none", "text")}
    names |= {"dense": dense, "folder": tmp_path, "empty": tmp_path / "empty", "out": tmp_path / "out"}
    before = sorted(tmp_path.rglob("*"))
    ran = run_cli(*(str(argument).format(**names) for argument in arguments))
    assert ran.code == code, ran.err
    errors = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    for part in said:
        assert part in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["optimize", "verify", "bench"])
def test_without_onnxruntime(run_cli, tmp_path, dense, monkeypatch, name):
    """Said at once, not after a model was pruned for minutes."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = {"optimize": (dense, "-o", tmp_path / "out"), "verify": (dense, dense), "bench": (dense,)}
    ran = run_cli(name, *arguments[name])
    assert ran.code == 6
    assert "pip install 'sparse-onnx[cpu]'" in ran.err
    assert "prune" not in ran.err


def test_an_output_folder_is_a_model(run_cli, tmp_path, compiled):
    """Of `optimize`, as of the other commands."""
    ran = run_cli("optimize", compiled, "--dry-run", "--format", "json")
    assert ran.code == 0
    assert ran.json()["source"] == compiled.name
