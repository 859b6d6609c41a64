"""Models of opset 7 to 12 are converted on load; what cannot be converted is refused, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.analysis.inspection import inspect_model
from sparse_onnx.errors import ModelFileError
from sparse_onnx.model import opset_conversion
from sparse_onnx.model.model_io import load_model, save_model
from sparse_onnx.model.opset_conversion import CONVERTED_FROM

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)
ROWS = RNG.standard_normal((2, 3, 4)).astype(np.float32)


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    result: list[np.ndarray] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )
    return result


# (name, opset, signature and body, feeds)
CASES = [
    ("squeeze in a branch", 11, """(float[2,1,3] x, bool c) => (float y) { y = If(c) <
        then_branch = a () => (float[2,3] t) { t = Squeeze<axes=[1]>(x) },
        else_branch = b () => (float[2,3] e) { e = ReduceSum<axes=[1],keepdims=0>(x) }> }""",
        {"x": ROWS[:, :1, :3], "c": np.array(True)}),
    ("softmax of all behind the first axis", 11, "(float[N,3,4] x) => (float y) { y = Softmax(x) }", {"x": ROWS}),
    ("log softmax", 8, "(float[N,3,4] x) => (float y) { y = LogSoftmax<axis=1>(x) }", {"x": ROWS}),
    ("softmax of the last axis", 12, "(float[N,3,4] x) => (float y) { y = Softmax<axis=2>(x) }", {"x": ROWS}),
    ("linear upsample", 9, """(float[1,2,4,4] x) => (float y) <float[4] s={1.0,1.0,2.0,2.0}>
        { y = Upsample<mode="linear">(x,s) }""", {"x": IMAGE}),
    ("upsample by attributes", 7, """(float[1,2,4,4] x) => (float y)
        { y = Upsample<mode="linear",scales=[1.0,1.0,2.0,3.0]>(x) }""", {"x": IMAGE}),
    ("nearest upsample by a fraction", 9, """(float[1,2,4,4] x) => (float y) <float[4] s={1.0,1.0,2.75,1.3}>
        { y = Upsample<mode="nearest">(x,s) }""", {"x": IMAGE}),
    ("nearest resize to less", 10, """(float[1,2,4,4] x) => (float y) <float[4] s={1.0,1.0,0.6,0.8}>
        { y = Resize<mode="nearest">(x,s) }""", {"x": IMAGE}),
    ("linear resize of 11", 11, """(float[1,2,4,4] x) => (float y) <float[4] s={1.0,1.0,2.0,2.0}, float[0] r={}>
        { y = Resize<mode="linear",coordinate_transformation_mode="half_pixel">(x,r,s) }""", {"x": IMAGE}),
    ("pad and clip", 8, """(float[1,2,4,4] x) => (float y)
        { p = Pad<pads=[0,0,1,1,0,0,1,1],value=1.5>(x) q = Clip<min=-0.5>(p) y = Clip<max=0.5>(q) }""", {"x": IMAGE}),
    ("batch norm and dropout", 7, """(float[1,2,4,4] x) => (float y) <float[2] s={1.0,2.0}>
        { n = BatchNormalization(x,s,s,s,s) y = Dropout<ratio=0.5>(n) }""", {"x": IMAGE}),
    ("slice and topk", 9, """(float[1,2,4,4] x) => (float y, int64 i)
        { s = Slice<axes=[2,3],starts=[0,1],ends=[3,4]>(x) y,i = TopK<k=2,axis=3>(s) }""", {"x": IMAGE}),
    ("split", 9, "(float[1,2,4,4] x) => (float y, float z) { y,z = Split<axis=3,split=[1,3]>(x) }", {"x": IMAGE}),
    ("a foreign operator", 11, """(float[2,3,4] x) => (float y)
        { r = com.microsoft.Gelu(x) s = Unsqueeze<axes=[0]>(r) y = Squeeze<axes=[0]>(s) }""", {"x": ROWS}),
    ("a loop", 11, """(int64 n, float[2,3] x) => (float y) { c = Constant<value=bool {1}>() y = Loop(n,c,x) <body = b
        (int64 i, bool ci, float[2,3] v) => (bool co, float[2,3] w)
        { co = Identity(ci) u = Unsqueeze<axes=[0]>(v) s = Squeeze<axes=[0]>(u) w = Add(s,x) }> }""",
        {"n": np.array(3), "x": ROWS[:, :, 0]}),
    ("integers by their scale", 10, """(float[2,3] x) => (float y) <float s={0.1}, uint8 z={128}>
        { q = QuantizeLinear(x,s,z) y = DequantizeLinear(q,s,z) }""", {"x": ROWS[:, :, 0]}),
]  # fmt: skip


def write(folder: Path, opset: int, text: str, ir_version: int = 6) -> Path:
    imports = f'["" : {opset}, "com.microsoft" : 1]'
    model = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: {imports}> g {text}")
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize(
    ("opset", "text", "feeds"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_the_converted_model_computes_the_same(
    tmp_path: Path, opset: int, text: str, feeds: dict[str, np.ndarray]
) -> None:
    path = write(tmp_path, opset, text)
    model = load_model(path)
    assert model.meta[CONVERTED_FROM] == opset
    assert model.opset_imports[""] == 13
    saved = save_model(model, tmp_path / "out")
    assert onnx.load(saved).opset_import[0].version == 13
    for wanted, found in zip(run(path, feeds), run(saved, feeds), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_newer_models_are_left_alone(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, 13, "(float[2] x) => (float[2] y) { y = Relu(x) }"))
    assert CONVERTED_FROM not in model.meta


def test_weights_inputs_and_metadata_survive(tmp_path: Path) -> None:
    """IR version 3 lists weights as inputs; large ones lie inside, outside, in Constant nodes and in branches."""
    large = [RNG.standard_normal((40, 40)).astype(np.float32) for _ in range(4)]
    outside = numpy_helper.from_array(large[1], "outside")
    branch = helper.make_graph(
        [
            helper.make_node("Constant", [], ["inner"], value=numpy_helper.from_array(large[3])),
            helper.make_node("Add", ["h", "inner"], ["t"]),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["e"])], "else", [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(large[2])),
            helper.make_node("Sum", ["x", "w", "outside", "k"], ["u"], doc_string="kept"),
            helper.make_node("Unsqueeze", ["u"], ["v"], axes=[0]),
            helper.make_node("Squeeze", ["v"], ["h"], axes=[0]),
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 40]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [40, 40]),
            helper.make_tensor_value_info("outside", TensorProto.FLOAT, [40, 40]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 40])],
        [numpy_helper.from_array(large[0], "w"), outside],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3, producer_name="me"
    )
    proto.metadata_props.add(key="labels", value="a,b")
    proto.graph.node[1].metadata_props.add(key="where", value="here")
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    wanted = run(path, {"x": np.ones((40, 40), np.float32), "c": np.array(True)})[0]
    outside = next(t for t in proto.graph.initializer if t.name == "outside")
    onnx.external_data_helper.set_external_data(outside, "w.data")
    (tmp_path / "w.data").write_bytes(outside.raw_data)
    outside.ClearField("raw_data")
    path.write_bytes(proto.SerializeToString())

    model = load_model(path)
    assert [value.name for value in model.graph.inputs] == ["x", "c"]
    assert str(model.graph.inputs[0].shape) == "[rows,40]"
    assert model.producer_name == "me"
    assert model.metadata_props["labels"] == "a,b"
    assert next(node for node in model.graph if node.op_type == "Sum").metadata_props["where"] == "here"
    saved = save_model(model, tmp_path / "out")
    np.testing.assert_array_equal(
        run(saved, {"x": np.ones((40, 40), np.float32), "c": np.array(True)})[0], wanted
    )


def test_sequences_keep_their_type(tmp_path: Path) -> None:
    text = "(float[2,3,4] x) => (seq(float) q, float y) { q = SplitToSequence<axis=1>(x) y = Relu(x) }"
    saved = save_model(load_model(write(tmp_path, 11, text)), tmp_path / "out")
    assert onnx.load(saved).graph.output[0].type.HasField("sequence_type")


@pytest.mark.parametrize(
    ("opset", "text", "words"),
    [
        (6, "(float[2] x) => (float[2] y) { y = Relu(x) }", "opset 6 is too old"),
        (7, """(float[2,2,1,1] x) => (float y) <float[2,1,1] s={1.0,2.0}>
            { y = BatchNormalization<spatial=0>(x,s,s,s,s) }""", "spatial"),
        (7, "(float[1,2,4,4] x) => (float y, float m) { y,m = Dropout<ratio=0.5>(x) }", "[Tt]ype"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused(tmp_path: Path, opset: int, text: str, words: str) -> None:
    with pytest.raises(ModelFileError, match=rf"opset {opset} is too old.*onnx\.version_converter") as caught:
        sparse_onnx.optimize(write(tmp_path, opset, text), tmp_path / "out", benchmark=False, threads=1)
    assert caught.match(words)
    assert len(str(caught.value).splitlines()) == 1


LINEAR = "(float[n, 64] x) => (float[n, 64] y) { h = MatMul(x, w) y = Clip<min=0.0>(h) }"


def linear(folder: Path) -> Path:
    path = write(folder, 10, LINEAR.replace("{", "<float[1] unused = {0.0}> {", 1))
    model = onnx.load(path)
    weight = RNG.standard_normal((64, 64)).astype(np.float32)
    weight[RNG.random((64, 64)) < 0.9] = 0
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    return path


def test_every_command_takes_them_and_says_so(tmp_path: Path) -> None:
    path = linear(tmp_path)
    before, said = path.read_bytes(), []
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1, progress=said.append)
    assert result.exit_code == 0
    assert result.report["converted_from_opset"] == 10
    assert json.loads((result.folder / "report.json").read_text())["converted_from_opset"] == 10
    assert any("opset 10 was converted to 13" in line for line in said)
    assert sparse_onnx.verify(path, result.folder / "model.onnx", threads=1).passed
    shown = inspect_model(path)
    assert shown["opsets"]["ai.onnx"] == 10
    assert shown["read_as_opset"] == 13
    said.clear()
    sparse_onnx.analyze(path, threads=1, anchors=False, progress=said.append)
    assert any("opset 10 was converted to 13" in line for line in said)
    assert path.read_bytes() == before


def test_a_wrong_conversion_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 9, """(float[1,2,4,4] x) => (float y) <float[4] s={1.0,1.0,2.0,2.0}>
        { y = Upsample<mode="linear">(x,s) }""")  # fmt: skip
    monkeypatch.setattr(opset_conversion, "_place_pixels", lambda model: None)
    monkeypatch.setattr("sparse_onnx.compilation.compile.prepare", lambda *_: pytest.fail("pruned"))
    with pytest.raises(ModelFileError, match=r"opset 9 is too old.*computes another y: relative error"):
        sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1)
    assert not (tmp_path / "out").exists()
