"""Outputs that are no tensors are computed and left out of comparisons, and that is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.errors import UsageError
from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.outputs import check_outputs, left_out, tensor_outputs
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench

BODIES = {
    "a sequence": ("seq(float[n, 64]) q", "q = SplitToSequence <axis = 0> (y)"),
    "optional": ("optional(float[n, 64]) q", "q = Optional (y)"),
}


def write(folder: Path, text: str) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> g {text}')
    rng = np.random.default_rng(0)
    for name in ("w", "v"):
        if any(name in node.input for node in model.graph.node):
            weight = rng.standard_normal((64, 64)).astype(np.float32)
            weight[rng.random((64, 64)) < 0.9] = 0
            model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize("kind", BODIES)
def test_other_outputs_are_left_out_and_told(tmp_path: Path, kind: str) -> None:
    declared, body = BODIES[kind]
    path = write(tmp_path, f"(float[n, 64] x) => (float[n, 64] y, {declared}) {{ y = MatMul (x, w) {body} }}")
    said: list[str] = []
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1, progress=said.append)
    assert result.exit_code == 0
    assert any(f"output q is {kind}" in line for line in said)
    verification = result.report["verification"]
    assert verification["left_out"] == {"q": kind}
    assert [row["output"] for row in verification["against_original"]["outputs"]] == ["y"]
    checked = sparse_onnx.verify(path, result.folder / "model.onnx", threads=1)
    assert checked.passed
    assert checked.left_out == {"q": kind}
    # It is there as before.
    x = {"x": np.ones((3, 64), np.float32)}
    for library in (False, True):
        options = ort.SessionOptions()
        if library:
            options.register_custom_ops_library(str(sparse_onnx.library_path()))
        found = ort.InferenceSession(
            result.folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        wanted = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["q"], x)[0]
        np.testing.assert_allclose(
            np.asarray(found.run(["q"], x)[0]), np.asarray(wanted), rtol=1e-4, atol=1e-5
        )


def test_nothing_to_compare_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path, "(float[n, 64] x) => (seq(float) q) { y = MatMul (x, w) q = SequenceConstruct (y) }"
    )
    monkeypatch.setattr("sparse_onnx.compilation.compile.prepare", lambda *_: pytest.fail("pruned"))
    for call in (
        lambda: sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1),
        lambda: sparse_onnx.verify(path, path, threads=1),
    ):
        with pytest.raises(UsageError, match=r"no output of the model is a tensor \(q is a sequence\)"):
            call()


def test_tensors_are_not_touched(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, "(float[n, 64] x) => (float[n, 64] y) { y = Relu (x) }"))
    said: list[str] = []
    check_outputs(model, said.append)
    assert not said
    assert not left_out(model)
    assert tensor_outputs(model) == ("y",)


BETWEEN = """(float[n, 64] x) => (float[n, 64] y) { h = MatMul (x, w) q = SplitToSequence <axis = 1> (h)
    c = ConcatFromSequence <axis = 1> (q) y = MatMul (c, v) }"""


def test_sequences_inside(tmp_path: Path) -> None:
    path = write(tmp_path, BETWEEN)
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1)
    assert [row["decision"] for row in result.report["layers"]] == ["sparse", "sparse"]
    assert result.report["summary"]["relative_error"] < 1e-5


def test_sequences_between_the_parts_of_a_large_model(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, BETWEEN))
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)}
    found = []
    for budget in (1 << 30, 17_000):
        with open_runner(model, Workbench(1, tmp_path, budget), library=False) as runner:
            found.append(runner.run(feeds)["y"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_sequences_inside_while_calibrating(tmp_path: Path) -> None:
    path = write(tmp_path, BETWEEN)
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32))
    result = sparse_onnx.optimize(
        path,
        tmp_path / "out",
        benchmark=False,
        threads=1,
        method="sparsegpt",
        sparsity=0.95,
        calibration_data=data,
    )
    assert result.report["summary"]["sparsity"] == pytest.approx(0.95, abs=0.01)


def test_optional_inputs_need_nothing(tmp_path: Path) -> None:
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 64]))
    path = write(tmp_path, "(float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    model = onnx.load(path)
    model.graph.input.append(helper.make_value_info("extra", optional))
    model.graph.node.append(helper.make_node("OptionalHasElement", ["extra"], ["given"]))
    model.graph.output.append(helper.make_tensor_value_info("given", TensorProto.BOOL, []))
    onnx.save(model, path)
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1)
    assert result.exit_code == 0
    assert sparse_onnx.verify(path, result.folder / "model.onnx", threads=1).passed
