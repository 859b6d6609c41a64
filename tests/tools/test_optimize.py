"""``sparse-onnx optimize``: what it prints and writes, and for every kind of bad input one message, the documented
exit code, and nothing written."""

import json
import os

import numpy as np
import onnx
import onnx.parser
import pytest

from sparse_onnx.compilation.groups import Target
from sparse_onnx.compilation.recipe_reader import load_recipe
from sparse_onnx.compilation.worth_pruning import NO_USE
from sparse_onnx.tools.cli import main
from sparse_onnx.tools.optimize import summary_table


def write_model(folder, *, width=256, sparsity=0.0, external=False, opset=20, ir_version=9):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((width, width)).astype(np.float32)
    weight[rng.random(weight.shape) < sparsity] = 0
    proto = onnx.parser.parse_model(
        f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
        g (float[batch, {width}] X) => (float[batch, {width}] Y) {{ h = MatMul(X, W) Y = Relu(h) }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=external, location="data.bin", size_threshold=0)
    return path


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of one call."""
    with pytest.raises(SystemExit) as caught:
        main(["optimize", *map(str, arguments)])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def refused(capsys, tmp_path, code, message, *arguments):
    """The call fails with ``code`` and one message, and leaves no file that was not there."""
    before = sorted(tmp_path.rglob("*"))
    got, out, err = call(capsys, *arguments)
    assert got == code, err
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in err, err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


SHAPE = ("--input-shape", "X:64,256", "--threads", "1")


def test_table_and_files(tmp_path, capsys):
    model = write_model(tmp_path / "in", sparsity=0.97)
    code, out, err = call(capsys, model, "-o", tmp_path / "out", *SHAPE)
    assert code in (0, 5), err
    assert len(out.splitlines()) <= 15
    assert "smaller" in out
    assert (tmp_path / "out/report.html").is_file()


def test_json_is_one_document_on_stdout(tmp_path, capsys):
    model = write_model(tmp_path / "in", sparsity=0.97)
    code, out, _ = call(capsys, model, "-o", tmp_path / "out", "--format", "json", *SHAPE)
    report = json.loads(out)
    assert report["exit_code"] == code
    assert report["layers"][0]["name"] == "W"
    assert json.loads((tmp_path / "out/report.json").read_text())["summary"] == report["summary"]


def test_json_errors_are_json_too(tmp_path, capsys):
    code, out, _ = call(capsys, tmp_path / "none.onnx", "-o", tmp_path / "out", "--format", "json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2


def test_underscores_are_accepted(tmp_path, capsys):
    model = write_model(tmp_path / "in")
    code, _, err = call(capsys, model, "--dry_run", "--mask_structure", "2:4")
    assert code == 0, err
    assert "50" in err  # N:M prints the resulting percentage


def test_dense_model_is_exit_5(tmp_path, capsys):
    code, _, err = call(capsys, write_model(tmp_path / "in"), "-o", tmp_path / "out", *SHAPE)
    assert code == 5
    assert "dense model was written" in err
    assert (tmp_path / "out/model.onnx").is_file()


def test_missed_goal_is_exit_4(tmp_path, capsys):
    options = ("--method", "magnitude", "--sparsity", "0.97", "--max-drop", "0", "--min-speedup", "0.01")
    code, _, err = call(capsys, write_model(tmp_path / "in"), "-o", tmp_path / "out", *options, *SHAPE)
    assert code in (4, 5)
    if code == 4:
        assert "Goal not met" in err
    assert (tmp_path / "out/model.onnx").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sparsity", "1.0"), "sparsity"),
        (("--sparsity", "-0.5"), "sparsity"),
        (("--sparsity", "nan"), "sparsity"),
        (("--mask-structure", "3:2"), "3:2"),
        (("--mask-structure", "banana"), "banana"),
        (("--method", "magnitud", "--sparsity", "0.5"), "magnitude"),
        (("--method", "magnitude", "--sparsity", "0.5", "--targets", "nosuch"), "nosuch"),
        (("--input-shape", "X:0,256"), "X:0,256"),
        (("--input-shape", "nosuch:1,2"), "nosuch"),
        (("--input-shape", "X:1,256", "--input-shape", "X:2,128"), "X:2,128"),
        (("--input-shape", "X:1,256", "--shape-weights", "1,2"), "as many as shapes has targets (1)"),
        (("--shape-weights", "1;2"), "'1;2': write numbers with commas"),
        (("--timing-cache", "times", "--no-timing-cache"), "not both"),
        (("--calibration-data", "nosuch.npz"), "nosuch.npz"),
        (("--recipe", "nosuch.yaml"), "nosuch.yaml"),
        (("--threads", "0"), "threads"),
        (("--set", "prune.magnitude.sparsity"), "write NAME.OPTION=VALUE"),
        (("--set", "prune.magnitude.sparsity=0.5"), "prune.magnitude is not in the recipe"),
        (("--method", "random", "--sparsity", "0.5", "--set", "prune.random.sed=1"), "the nearest is 'seed'"),
        (
            ("--method", "random", "--set", "prune.random.sparsity=80%"),
            "sparsity must be a finite number, not '80%'",
        ),
        (
            ("--dump-after", "prune.magnitud"),
            "unknown pass 'prune.magnitud'; the nearest is 'prune.magnitude'",
        ),
        (("--nosuch-option",), "nosuch-option"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    model = write_model(tmp_path / "in")
    refused(capsys, tmp_path, 2, message, model, "-o", tmp_path / "out", "--quiet", *options)


def test_settings_reach_modifiers_of_a_recipe_and_of_flags(tmp_path, capsys):
    model, recipe = write_model(tmp_path / "in"), tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\nstages: [{name: p, modifiers: ["
        "{prune.threshold: {theta: 0.1}}, {prune.magnitude: {sparsity: 0.5}}, {quant.weight: {}}]}]\n"
    )
    settings = ("--set", "prune.magnitude.sparsity=0.75", "--set", "quant.weight.bits=4")
    code, out, err = call(capsys, model, "--dry-run", "--recipe", recipe, *settings, "--format", "json")
    assert code == 0, err
    report = json.loads(out)
    (stage,) = report["recipe"]["stages"]
    options = {name: given for modifier in stage["modifiers"] for name, given in modifier.items()}
    assert options["prune.magnitude"]["sparsity"] == 0.75
    assert options["quant.weight"]["bits"] == 4
    assert report["layers"][0]["sparsity"] >= 0.75
    flags = ("--method", "magnitude", "--set", "prune.magnitude.mask_structure=2:4")
    code, out, err = call(capsys, model, "--dry-run", *flags, "--format", "json")
    assert code == 0, err
    assert json.loads(out)["layers"][0]["sparsity"] == 0.5


def test_the_model_after_a_pass(tmp_path, capsys):
    model = write_model(tmp_path / "in", sparsity=0.97)
    dumped = ("--dump-after", "clean.unused", "--dump-after", "lower.sparse-matmul", "--no-benchmark")
    code, _, err = call(capsys, model, "-o", tmp_path / "out", *dumped, *SHAPE)
    assert code in (0, 5), err
    ops = {
        path.stem: {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        for path in (tmp_path / "out").glob("after-*.onnx")
    }
    assert ops == {
        "after-clean.unused": {"MatMul", "Relu"},
        "after-lower.sparse-matmul": {"SparseMatMulRelu"},
    }


def test_several_shapes_and_a_cache_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparse_onnx.running.machine_load.OtherLoad.spared", lambda self, threads: True)
    model = write_model(tmp_path / "in", sparsity=0.97)
    shapes = ("--input-shape", "X:64,256", "--input-shape", "X:2,256", "--shape-weights", "1,0.5")
    options = (*shapes, "--threads", "1", "--min-speedup", "0.001", "--timing-cache", tmp_path / "times")
    code, out, err = call(capsys, model, "-o", tmp_path / "out", *options, "--format", "json")
    assert code in (0, 5), err
    report = json.loads(out)
    assert [(target["input_shapes"], target["weight"]) for target in report["targets"]] == [
        ({"X": [64, 256]}, 1.0),
        ({"X": [2, 256]}, 0.5),
    ]
    assert all(target["dense_ms"] > 0 for target in report["targets"])
    recipe = load_recipe(tmp_path / "out/recipe.yaml")
    assert recipe.target == Target(({"X": (64, 256)}, {"X": (2, 256)}), 1, (1.0, 0.5))
    assert (tmp_path / "times").is_file()


def test_no_timing_cache_leaves_the_default_place_empty(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sparse_onnx.running.machine_load.OtherLoad.spared", lambda self, threads: True)
    model = write_model(tmp_path / "in", sparsity=0.97)
    call(capsys, model, "-o", tmp_path / "a", *SHAPE, "--no-timing-cache")
    assert not (tmp_path / "cache").exists()
    call(capsys, model, "-o", tmp_path / "b", *SHAPE)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["timings.jsonl"]


def test_unknown_recipe_key_names_the_nearest(tmp_path, capsys):
    model = write_model(tmp_path / "in")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nstages: [{name: p, modifiers: [{prune.magnitude: {sparsty: 0.5}}]}]\n")
    refused(capsys, tmp_path, 2, "sparsity", model, "-o", tmp_path / "out", "--recipe", recipe)


def test_output_is_required(tmp_path, capsys):
    refused(capsys, tmp_path, 2, "-o DIR", write_model(tmp_path / "in"))


def test_output_exists(tmp_path, capsys):
    model = write_model(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    refused(capsys, tmp_path, 2, "--overwrite", model, "-o", tmp_path / "out")


def test_missing_file(tmp_path, capsys):
    refused(capsys, tmp_path, 2, "none.onnx", tmp_path / "none.onnx", "-o", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09" * 50, b"PK\x03\x04zip"])
def test_not_a_model(tmp_path, capsys, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    refused(capsys, tmp_path, 2, "bad.onnx", path, "-o", tmp_path / "out")


def test_truncated_model(tmp_path, capsys):
    model = write_model(tmp_path / "in")
    model.write_bytes(model.read_bytes()[:1000])
    refused(capsys, tmp_path, 2, "model.onnx", model, "-o", tmp_path / "out")


@pytest.mark.parametrize("damage", ["missing", "truncated", "symlink"])
def test_bad_external_data(tmp_path, capsys, damage):
    model = write_model(tmp_path / "in", external=True)
    data = tmp_path / "in/data.bin"
    content = data.read_bytes()
    data.unlink()
    if damage == "truncated":
        data.write_bytes(content[:1000])
    elif damage == "symlink":
        (tmp_path / "elsewhere").write_bytes(content)
        data.symlink_to(tmp_path / "elsewhere")
    refused(capsys, tmp_path, 2, "data.bin", model, "-o", tmp_path / "out")


@pytest.mark.parametrize("location", ["../elsewhere", "/etc/hostname", "a/../../elsewhere"])
def test_external_data_outside_the_folder(tmp_path, capsys, location):
    model = write_model(tmp_path / "in", external=True)
    (tmp_path / "elsewhere").write_bytes(bytes(256 * 256 * 4))
    proto = onnx.load(model, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    model.write_bytes(proto.SerializeToString())
    refused(capsys, tmp_path, 2, "W", model, "-o", tmp_path / "out")


@pytest.mark.parametrize(("opset", "ir_version", "message"), [(27, 9, "opset"), (20, 99, "IR")])
def test_too_new(tmp_path, capsys, opset, ir_version, message):
    model = write_model(tmp_path / "in")
    proto = onnx.load(model)
    proto.opset_import[0].version = opset
    proto.ir_version = ir_version
    model.write_bytes(proto.SerializeToString())
    refused(capsys, tmp_path, 2, message, model, "-o", tmp_path / "out")


def test_no_write_permission_is_exit_6(tmp_path, capsys, monkeypatch):
    model = write_model(tmp_path / "in")
    real = os.mkdir

    def denied(path, *arguments, **options):
        if "out" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", denied)
    refused(capsys, tmp_path, 6, "no permission to write", model, "-o", tmp_path / "out", *SHAPE)


def test_full_disk_is_exit_6(tmp_path, capsys, monkeypatch):
    import errno

    from sparse_onnx.model import model_io

    model = write_model(tmp_path / "in", sparsity=0.97)

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device", "model.onnx.data")

    monkeypatch.setattr(model_io, "save_model", full)
    refused(capsys, tmp_path, 6, "No space left", model, "-o", tmp_path / "out", *SHAPE)


def test_nm_that_does_not_divide_is_declined_by_name(tmp_path, capsys):
    model = write_model(tmp_path / "in", width=254)
    code, out, err = call(capsys, model, "--dry-run", "--mask-structure", "2:4", "--format", "json")
    assert code == 0, err
    declined = [place for place in json.loads(out)["declined"] if place["place"] == "W"]
    assert len(declined) == 1
    assert "254" in declined[0]["reason"]


def test_internal_errors_are_exit_1_without_a_traceback(tmp_path, capsys, monkeypatch):
    from sparse_onnx.model import model_io

    def broken(_path):
        raise ZeroDivisionError("planted")

    model = write_model(tmp_path / "in")
    monkeypatch.setattr(model_io, "load_model", broken)
    refused(capsys, tmp_path, 1, "planted", model, "-o", tmp_path / "out")


def test_a_layer_without_use_for_zeros_is_not_told_to_be_dense():
    reason = f"not pruned: with 60.0% zeros its fastest form would be int8-token, {NO_USE}"
    slow = "its sparse form would be 0.91x dense (0.90 to 0.92), below min_speedup 1.02"
    rows = [{"decision": "int8-token", "reason": ""}] * 2 + [{"decision": "dense", "reason": slow}]
    summary = {
        "speedup": None, "bytes_before": 8, "bytes_after": 2, "sparsity": 0.0, "sparse_flops_fraction": 0.0,
    }  # fmt: skip
    text = summary_table(
        {
            "summary": summary,
            "layers": [{**row, "non_finite": 0} for row in rows],
            "verification": {},
            "declined": [{"place": "a", "reason": reason}, {"place": "b", "reason": reason}],
        }
    )
    assert "not pruned: 2 x faster in a form that makes no use of zeros" in text
    assert "kept dense: 1 x not faster" in text
    assert text.count("kept dense") == 1


def test_a_decoder_is_told_in_tokens():
    from sparse_onnx.tools.optimize import token_rows

    timed = {
        "speedup": 1.5,
        "speedup_low": 1.4,
        "speedup_high": 1.6,
        "dense_ms": 300.0,
        "optimized_ms": 200.0,
    }
    rates = {"dense_tokens_per_second": 20.0, "optimized_tokens_per_second": 30.0}
    prefill = {**timed, **rates, "phase": "prefill", "tokens": 128}
    decode = {**timed, **rates, "phase": "decode", "tokens": 1}
    assert token_rows([prefill, decode]) == [
        ["first token, 128 of prompt", "300.0 ms", "200.0 ms", "1.50x (1.40-1.60)"],
        ["tokens a second, decode", "20.0", "30.0", "1.50x (1.40-1.60)"],
    ]
    assert token_rows([timed, prefill | {"speedup": None}]) == []
