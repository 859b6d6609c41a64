"""``sparse-onnx bench``: what is timed against what, and how it is told. The times themselves are not judged."""

import re

import numpy as np
import onnx
import pytest

from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv

SHAPE = ("--input-shape", "X:1,16,64")
QUICK = ("--rounds", "5", "--threads", "1", *SHAPE)


def models(document):
    return [(row["model"], row["library"]) for row in document["models"]]


def test_one_model(run_cli, dense):
    ran = run_cli("bench", dense, *QUICK)
    assert ran.code == 0
    header, _, row = ran.out.splitlines()
    assert header.split() == ["model", "min", "median", "speedup", "(95", "%)"]
    assert row.startswith(str(dense))
    assert row.endswith("1.00x (1.00-1.00)")
    assert "5 rounds, 1 thread, X [1, 16, 64]" in ran.err


def test_models_side_by_side_as_json(run_cli, pruned, compiled):
    document = run_cli("bench", pruned, compiled, *QUICK, "--format", "json").json()
    assert models(document) == [(str(pruned), False), (str(compiled), True)]
    assert document["rounds"] == 5
    assert document["environment"]["threads"] == 1
    assert document["layers"] == {}
    first, second = document["models"]
    assert first["speedup"] == first["speedup_low"] == first["speedup_high"] == 1
    assert 0 < second["min_ms"] <= second["median_ms"]
    assert 0 < second["speedup_low"] <= second["speedup"] <= second["speedup_high"]
    assert first["whole"]
    assert second["whole"]
    assert second["weight_bytes"] < first["weight_bytes"]


def test_dense_baseline_is_the_same_file_without_the_library(run_cli, compiled):
    document = run_cli("bench", compiled, "--compare", "dense", *QUICK, "--format", "json").json()
    assert models(document) == [(f"{compiled} (dense)", False), (str(compiled), True)]


def test_dense_baseline_of_a_dense_model_is_itself(run_cli, dense):
    ran = run_cli("bench", dense, "--compare", "dense", "--rounds", "1", *SHAPE, "--format", "json")
    assert models(ran.json()) == [(str(dense), False)]
    assert "has no operator of the library: it is dense already" in ran.err


def test_layers(run_cli, compiled):
    document = run_cli("bench", compiled, "--layers", *QUICK, "--format", "json").json()
    first, second = document["layers"][str(compiled)]
    assert first["module"] == "layers.0"
    assert first["op_type"] == "SparseMatMulGelu"
    assert first["x_shape"] == [1, 16, 64]
    assert first["weight_shapes"] == [[64, 96]]
    assert second["op_type"] == "SparseMatMul"
    assert second["x_shape"] == [1, 16, 96]
    for row in (first, second):
        assert 0.85 < row["sparsity"] < 0.95
        assert row["rows"] == 16
        assert row["kernel"].startswith(document["environment"]["isa"])
        assert 0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["dense_ms"] > 0
        assert row["sparse_ms"] > 0


def test_layers_as_text(run_cli, compiled):
    ran = run_cli("bench", compiled, "--layers", *QUICK)
    lines = ran.out.splitlines()
    header = next(line for line in lines if line.startswith("layer "))
    columns = [
        "layer",
        "equal",
        "rows x K x N",
        "zeros",
        "kernel",
        "dense",
        "sparse",
        "speedup (95 %)",
    ]
    assert re.split(r"  +", header) == columns
    assert any(line.startswith("layers.0") and "16 x 64 x 96" in line for line in lines)
    assert lines[-1].startswith("all ")


def test_layers_of_a_convolution(run_cli, tmp_path):
    conv = "Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>"
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 8, 10, 7] X) => (float[n, 16, 5, 4] Y)'
        f"{{ h = {conv}(X, W) Y = Relu(h) }}"
    )
    weight = np.random.default_rng(0).standard_normal((16, 8, 3, 3)).astype(np.float32)
    weight[np.abs(weight) < 1.5] = 0
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    onnx.save(proto, tmp_path / "conv.onnx")
    model = model_io.load_model(tmp_path / "conv.onnx")
    LowerSparseConv(min_sparsity=0.5)(model)
    model_io.save_model(model, tmp_path / "compiled")
    flags = ("--layers", "--rounds", "5", "--quiet", "--input-shape", "X:2,8,10,7", "--format", "json")
    document = run_cli("bench", tmp_path / "compiled", *flags).json()
    (row,) = document["layers"][str(tmp_path / "compiled")]
    assert row["op_type"] == "SparseConvRelu"
    assert row["x_shape"] == [2, 8, 10, 7]
    assert row["rows"] == 2 * 5 * 4
    assert row["weight_shapes"] == [[72, 16]]
    assert row["kernel"].startswith(document["environment"]["isa"])
    assert row["dense_ms"] > 0
    assert row["sparse_ms"] > 0


def test_layers_of_a_dense_model(run_cli, dense):
    ran = run_cli("bench", dense, "--layers", *QUICK)
    assert ran.code == 0
    assert "layers.0" not in ran.out


def test_models_with_different_inputs_get_the_shapes_that_they_know(run_cli, dense, tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 4] Z) => (float[n, 4] Y) { Y = Relu(Z) }'
    )
    onnx.save(proto, tmp_path / "relu.onnx")
    flags = ("--input-shape", "Z:3,4", "--format", "json")
    document = run_cli("bench", dense, tmp_path / "relu.onnx", *QUICK, *flags).json()
    assert len(document["models"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input-shape", "Q:1,2"], "names 'Q'; the inputs are X: float32[batch, sequence, 64]"),
        (["--input-shape", "X:1,2"], "does not fit"),
        (["--compare", "sparse"], "--compare"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_options_are_exit_2(run_cli, dense, options, said):
    ran = run_cli("bench", dense, *options)
    assert ran.code == 2
    assert said in ran.err


def test_no_model_is_exit_2(run_cli):
    ran = run_cli("bench")
    assert ran.code == 2
    assert "MODELS" in ran.err


def test_missing_model_is_exit_2(run_cli, dense, tmp_path):
    ran = run_cli("bench", dense, tmp_path / "nosuch.onnx")
    assert ran.code == 2
    assert "nosuch.onnx" in ran.err


def test_input_that_the_model_refuses_is_exit_2(run_cli, tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 4] Z) => (float[2, 2] Y)'
        "<int64[2] s = {2, 2}> { Y = Reshape(Z, s) }"
    )
    onnx.save(proto, tmp_path / "fixed.onnx")
    ran = run_cli("bench", tmp_path / "fixed.onnx", "--input-shape", "Z:7,4")
    assert ran.code == 2
    assert "cannot be run with inputs Z float32[7, 4]" in ran.err


def decoders(tmp_path):
    from sparse_onnx.tools.benchmarks.make_decoder import SHAPES, write_decoder

    return [write_decoder(tmp_path / f"{bits}", SHAPES["tiny"], bits=bits).parent for bits in (32, 4)]


FEW = ("--rounds", "5", "--threads", "1")


def test_decoders_take_in_a_prompt_and_step(run_cli, tmp_path):
    first, second = decoders(tmp_path)
    rows = run_cli("bench", first, second, *FEW, "--format", "json").json()["models"]
    assert [(row["model"], row["phase"], row["tokens"]) for row in rows] == [
        (str(first), "prefill", 128),
        (str(second), "prefill", 128),
        (str(first), "decode", 1),
        (str(second), "decode", 1),
    ]
    for row in rows:
        assert row["tokens_per_second"] == 1000 * row["tokens"] / row["median_ms"]
    assert rows[0]["speedup"] == rows[2]["speedup"] == 1  # each against the first in the same phase
    ran = run_cli("bench", first, *FEW)
    header, _, prefill, decode = ran.out.splitlines()
    assert header.split()[:5] == ["model", "run", "min", "median", "tokens/s"]
    assert "prefill, 128" in prefill
    assert "decode" in decode
    assert "input_ids [1, 128]" in ran.err
    assert "; then input_ids [1, 1], attention_mask [1, 129]" in ran.err


def test_shapes_that_are_given_are_the_only_ones(run_cli, tmp_path):
    first, second = decoders(tmp_path)
    given = ("--input-shape", "input_ids:2,16")
    rows = run_cli("bench", first, second, *FEW, *given, "--format", "json").json()["models"]
    assert [(row["phase"], row["tokens"]) for row in rows] == [("prefill", 32)] * 2
