"""The benchmark tables: every section runs through on small models, and engines that fail are told, not fatal."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result

from sparse_onnx.model.model_io import save_model
from sparse_onnx.passes.lower.sparse_recurrent import LowerSparseRecurrent
from sparse_onnx.running.runtime import open_session
from sparse_onnx.sparse_ops import info
from sparse_onnx.tools.benchmarks import recurrent_layers, single_layers, tables, whole_models
from sparse_onnx.tools.benchmarks.engines import Engine, EngineError, EngineSpec, compare
from sparse_onnx.tools.benchmarks.section import Table

IMAGES = """<ir_version: 8, opset_import: ["" : 14]>
images (float[batch, 8, 6, 6] X) => (float[batch, 16, 6, 6] Y)
{ h = Conv<kernel_shape = [1, 1]>(X, W) Y = Relu(h) }"""

TIMES = ["dense ms", "sparse ms", "ratio", "interval"]
ENGINES = ["zeros", "threads", "engine", "min ms", "median ms", "times ours", "interval"]
ENGINES += ["load s", "resident MB", "file MB"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(tables.command, [str(argument) for argument in arguments])


def sections(path: Path) -> dict:
    document = json.loads(path.read_text())
    assert document["quick"]
    assert document["environment"]["isa"] == info().isa
    return document["sections"]


@pytest.fixture
def interpreter(tmp_path: Path) -> Callable[[str], Path]:
    """``interpreter(script)``: a program to be started as the Python of an engine, which runs a shell script."""

    def write(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def models(tmp_path: Path, save_chain: Callable[..., Path]) -> Path:
    """A folder with a small model in each place where a section looks."""
    folder = tmp_path / "models"

    def place(name: str, proto: onnx.ModelProto) -> None:
        (folder / name).mkdir(parents=True)
        onnx.save(proto, folder / name / "model.onnx")

    for name, sparsity in (("dense", 0.0), ("s90", 0.9)):
        chain = onnx.load(save_chain(name, sparsity=sparsity))
        images = onnx.parser.parse_model(IMAGES)
        weight = np.random.default_rng(0).standard_normal((16, 8, 1, 1)).astype(np.float32)
        weight[np.abs(weight) < (1.6 if sparsity else 0)] = 0
        images.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
        for suffix in ("", "_legacy"):
            place(f"bert{suffix}/{name}", chain)
            place(f"resnet-50{suffix}/{name}", images)
            place(f"mobilenet-v2{suffix}/{name}", images)
    return folder


def test_bert(models, tmp_path, interpreter):
    broken = interpreter("echo 'no such engine' >&2; exit 3")
    ran = run("--quick", "--section", "bert", "--models", models, "--json", tmp_path / "out.json",
              "--deepsparse", broken, "--quiet")  # fmt: skip
    assert ran.exit_code == 0, ran.output
    engines, scaling = sections(tmp_path / "out.json")["bert"]
    assert engines["title"] == "BERT-base, 128 tokens, batch 1"
    rows = {(row["engine"], row["threads"]): row for row in engines["rows"]}
    names = ["sparse-onnx", "ONNX Runtime, dense", "ONNX Runtime, int8 dynamic", "DeepSparse"]
    assert list(rows) == [(name, threads) for threads in (1, 2) for name in names]
    for (name, _), row in rows.items():
        assert list(row) == ENGINES
        if name == "DeepSparse":
            assert row["times ours"] is None
            assert row["interval"] == "failed"
        else:
            assert row["times ours"] > 0
            assert row["resident MB"] > 1
            assert row["load s"] > 0
    assert rows["sparse-onnx", 1]["times ours"] == 1
    assert engines["notes"].count("DeepSparse failed: exit code 3: no such engine") == 2
    assert any(note.endswith("layers are sparse") for note in engines["notes"])
    assert [row["threads"] for row in scaling["rows"]] == ["1 to 2"]
    assert all(column in ran.output for column in ENGINES)


def test_convs(models, tmp_path):
    ran = run("--quick", "--section", "convs", "--models", models, "--threads", "1",
              "--json", tmp_path / "out.json", "--quiet")  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found = sections(tmp_path / "out.json")["convs"]
    assert [table["title"] for table in found] == ["resnet-50, batch 1", "mobilenet-v2, batch 1"]
    for table in found:
        assert [row["engine"] for row in table["rows"]] == ["sparse-onnx", "ONNX Runtime, dense"]
        assert all(row["times ours"] > 0 for row in table["rows"])


def test_shapes(tmp_path):
    ran = run("--quick", "--section", "shapes", "--threads", "1,2", "--json", tmp_path / "out.json")
    assert ran.exit_code == 0, ran.output
    found = sections(tmp_path / "out.json")["shapes"]
    assert [table["title"] for table in found] == [
        f"{series}, {threads}"
        for series in ("batch x tokens", "odd sizes", "hidden size")
        for threads in ("1 thread", "2 threads")
    ]
    for table in found:
        for row in table["rows"]:
            assert list(row) == ["batch x tokens", "K x N", "zeros", *TIMES, "trend", "flag"]
            assert row["ratio"] > 0
            assert (row["flag"] != "") == (row["trend"] is not None and row["trend"] > 1.15)


def test_few_rows(tmp_path):
    ran = run("--quick", "--section", "few-rows", "--threads", "1", "--json", tmp_path / "out.json")
    assert ran.exit_code == 0, ran.output
    (table,) = sections(tmp_path / "out.json")["few-rows"]
    columns = ["K x N", "zeros", "threads", "rows", *TIMES, "weight GB/s", "memory GB/s", "share"]
    assert [row["rows"] for row in table["rows"]] == [1, 2]
    for row in table["rows"]:
        assert list(row) == columns
        assert row["share"] == f"{100 * row['weight GB/s'] / row['memory GB/s']:.0f} %"


def test_recurrent(tmp_path):
    ran = run("--quick", "--section", "recurrent", "--threads", "1", "--json", tmp_path / "out.json")
    assert ran.exit_code == 0, ran.output
    (table,) = sections(tmp_path / "out.json")["recurrent"]
    assert list(table["rows"][0]) == ["layer", "hidden", "batch", "zeros", *TIMES]
    assert [(row["layer"], row["batch"]) for row in table["rows"]] == [
        ("LSTM", 1),
        ("LSTM", 2),
        ("GRU", 1),
        ("GRU", 2),
    ]
    assert all(row["dense ms"] > 0 and row["sparse ms"] > 0 for row in table["rows"])


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_sparse_recurrent_layer_computes_the_dense_one(cell, tmp_path):
    dense = recurrent_layers.layer(cell, 64, 0.8)
    sparse = dense.clone()
    LowerSparseRecurrent()(sparse)
    feeds = {"X": np.random.default_rng(1).standard_normal((4, 3, 64), np.float32)}
    paths = [save_model(model, tmp_path, name=name) for model, name in ((dense, "a"), (sparse, "b"))]
    want, got = (
        open_session(path, threads=1, library=library).run(None, feeds)[0]
        for path, library in zip(paths, (False, True), strict=True)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_kernels(tmp_path):
    ran = run("--quick", "--section", "kernels", "--json", tmp_path / "out.json")
    assert ran.exit_code == 0, ran.output
    (table,) = sections(tmp_path / "out.json")["kernels"]
    columns = ["K x N", "structure", "zeros", "kernel", "us", "GFLOP/s", "dense GFLOP/s"]
    assert [row["structure"] for row in table["rows"]] == ["unstructured", "block:4x1", "2:4"]
    assert [row["zeros"] for row in table["rows"]] == ["90 %", "90 %", "50 %"]
    for row in table["rows"]:
        assert list(row) == [*columns, "of peak", "of load peak"]
        assert row["kernel"].startswith(info().isa)
        assert row["GFLOP/s"] < row["dense GFLOP/s"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--section", "berts"], "'berts' is not one of"),
        (["--threads", "1,0"], "positive numbers"),
        (["--threads", ""], "positive numbers"),
        (["--deepsparse", "/nonexistent/python"], "does not exist"),
    ],
)
def test_wrong_options_are_exit_2(arguments, said):
    ran = run("--quick", *arguments)
    assert ran.exit_code == 2
    assert said in ran.output


def test_every_section_is_described():
    assert tables.__doc__ is not None
    assert all(f"``{name}``" in tables.__doc__ for name in tables.SECTIONS)


READY = """echo '{"load_s": 0.5, "rss_bytes": 1000}'"""


def spec(python: Path, model: Path = Path("none.onnx"), kind: str = "onnxruntime") -> EngineSpec:
    return EngineSpec("engine", kind, python, model, threads=1)


def test_engine_runs_a_model(dense):
    with Engine(spec(Path(sys.executable), dense), batch=2, length=5) as engine:
        assert engine.load_s > 0
        assert engine.rss_bytes > 1 << 20
        assert engine.run() > 0
        assert engine.run() > 0


def test_engine_that_dies_leaves_the_others_running(interpreter):
    dying = spec(
        interpreter(f"{READY}; read line; echo '{{\"ms\": 5}}'; read line; echo 'too hot' >&2; exit 7")
    )
    steady_path = dying.python.with_name("steady")
    steady_path.write_text(f"#!/bin/sh\n{READY}; while read line; do echo '{{\"ms\": 3}}'; done\n")
    steady_path.chmod(0o755)
    first, second = compare([dying, spec(steady_path)], batch=1, length=1, rounds=4)
    assert (first.ms, first.problem) == ([], "exit code 7: too hot")
    assert (second.ms, second.problem) == ([3.0] * 4, "")
    assert (second.load_s, second.rss_bytes) == (0.5, 1000)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 2", "exit code 2: nothing said"),
        ("echo hello; cat", "answered 'hello', which is no JSON"),
    ],
)
def test_engine_that_does_not_start(script, said, interpreter):
    with pytest.raises(EngineError, match=said):
        Engine(spec(interpreter(script)), batch=1, length=1)


def test_engine_without_an_interpreter(tmp_path):
    with pytest.raises(EngineError, match="nothing/python cannot be started: No such file"):
        Engine(spec(tmp_path / "nothing" / "python"), batch=1, length=1)


def test_engine_says_why_a_model_does_not_load(tmp_path):
    with pytest.raises(EngineError, match=r"exit code 1: .*none\.onnx"):
        Engine(spec(Path(sys.executable), tmp_path / "none.onnx"), batch=1, length=1)


def made(folder: Path, save: Callable[[object, Path], None]) -> whole_models._Files:
    return whole_models._Files(
        folder, lambda: "module", lambda module, sparsity: (module, sparsity), save, save, lambda _line: None
    )


def test_missing_models_are_made_once(tmp_path):
    saved = []

    def save(module: object, path: Path) -> None:
        saved.append(module)
        path.write_text(str(module))

    files = made(tmp_path / "bert", save)
    assert files.model(0.95) == files.model(0.95) == tmp_path / "bert" / "s95" / "model.onnx"
    assert files.model(0) == tmp_path / "bert" / "dense" / "model.onnx"
    assert files.model(0, legacy=True) == tmp_path / "bert_legacy" / "dense" / "model.onnx"
    assert saved == [("module", 0.95), ("module", 0), ("module", 0)]


def test_model_that_cannot_be_made_leaves_nothing(tmp_path):
    def save(module: object, path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        made(tmp_path / "bert", save).model(0)
    assert list((tmp_path / "bert").iterdir()) == []


def test_power_law_is_its_own_trend():
    work = [1, 2, 8, 8, 20]
    trend = single_layers.above_trend(work, [3 * amount**0.7 for amount in work])
    assert trend[0] is None
    assert trend[-1] is None
    np.testing.assert_allclose(np.array(trend[1:-1], float), 1)


def test_point_above_its_neighbours():
    trend = single_layers.above_trend([1, 2, 4, 8], [1, 2.6, 4, 8])
    assert trend[1] == pytest.approx(1.3)
    assert trend[2] == pytest.approx(1 / math.sqrt(1.3))


@pytest.mark.parametrize("bias", [False, True])
def test_repeated_layers_have_weights_of_their_own(bias, tmp_path):
    weight = single_layers.random_weight(64, 96, 0.8)
    x = np.random.default_rng(1).standard_normal((1, 3, 64)).astype(np.float32)
    dense = single_layers.linear(weight, bias=bias)
    for index, model in enumerate((dense, single_layers.lowered(dense))):
        three = single_layers.repeated(model, 3)
        assert len({id(v.const_value) for v in three.graph.initializers.values()}) == 3 * len(
            model.graph.initializers
        )
        path = save_model(three, tmp_path, name=f"model{index}")
        assert path.with_name(f"model{index}.onnx.data").stat().st_size > 2 * sum(
            v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
        )
        outputs = open_session(path, threads=1, library=bool(index)).run(None, {"X": x})
        assert len(outputs) == 3
        for output in outputs:
            np.testing.assert_allclose(output, x @ weight + float(bias), rtol=1e-5, atol=1e-4)


def test_cells_of_a_table():
    table = Table(
        "title", ("a", "b"), (("x", 1), ("y", None), ("z", 123.4), ("w", 12.34), ("v", 0.01234)), ("note",)
    )
    assert [line.split() for line in table.text().splitlines()] == [
        ["title"], ["a", "b"], ["-", "------"], ["x", "1"], ["y", "-"], ["z", "123"], ["w", "12.3"],
        ["v", "0.0123"], ["note"],
    ]  # fmt: skip
    assert table.document()["rows"][1] == {"a": "y", "b": None}
