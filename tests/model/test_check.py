"""Hostile and damaged model files: one clear error each, and sound ones pass."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.helper import (
    make_attribute,
    make_node,
    make_opsetid,
    make_sequence_type_proto,
    make_tensor_type_proto,
    make_tensor_value_info,
)

from sparse_onnx.errors import HostError, ModelFileError, SparseOnnxError
from sparse_onnx.model.model_io import load_model, save_model

WEIGHT = np.arange(64, dtype=np.float32)

# Every kind of place for a tensor: graph, subgraph, Constant, function; inside the file and outside.
TEXT = """
<ir_version: 9, opset_import: ["" : 20, "local" : 1]>
main (float[64] x, bool c) => (float[64] y)
<float[64] w = {zeros}, float[2] small = {{1.5, -2.0}}>
{{
    k = Constant <value = float[64] {zeros}> ()
    a = Add (x, w)
    b = Add (a, k)
    d = If (c) <
        then_branch = then () => (float[64] t) <float[64] u = {zeros}> {{ t = Add (b, u) }},
        else_branch = otherwise () => (float[64] e) {{ e = Identity (b) }}
    >
    y = local.Twice (d)
}}
<domain: "local", opset_import: ["" : 20]>
Twice (p) => (q)
{{
    one = Constant <value = float[64] {zeros}> ()
    r = Add (p, one)
    q = Add (r, p)
}}
"""

Edit = Callable[[onnx.ModelProto], object]


def sound_model() -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT.format(zeros="{" + ", ".join(["0.0"] * 64) + "}"))


def make_external(tensor: TensorProto, location: str = "w.data", **entries: object) -> TensorProto:
    """Turn ``tensor`` into one that reads ``location``; an entry of None leaves its key out."""
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": location, "offset": 0, "length": 256, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def places(model: onnx.ModelProto) -> dict[str, TensorProto]:
    nodes = {node.op_type: node for node in model.graph.node}
    return {
        "initializer": model.graph.initializer[0],
        "subgraph": nodes["If"].attribute[0].g.initializer[0],
        "attribute": nodes["Constant"].attribute[0].t,
        "function": model.functions[0].node[0].attribute[0].t,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "w.data").write_bytes(WEIGHT.tobytes())
    return tmp_path


def write(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(str(path)), "the message names the file"
    assert len(message.splitlines()) == 1
    return message


def test_sound_model_passes(folder: Path) -> None:
    model = sound_model()
    for tensor in places(model).values():
        make_external(tensor)
    loaded = load_model(write(folder, model))
    np.testing.assert_array_equal(loaded.graph.initializers["w"].const_value.numpy(), WEIGHT)
    function = loaded.functions["local", "Twice", ""]
    np.testing.assert_array_equal(function[0].attributes["value"].as_tensor().numpy(), WEIGHT)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)


# Files


def test_missing(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "model.onnx")
    (tmp_path / "file").touch()
    assert "does not exist" in refused(tmp_path / "file" / "model.onnx")


def test_folder(tmp_path: Path) -> None:
    assert "it holds no .onnx file" in refused(tmp_path)
    (tmp_path / "decoder.onnx").touch()
    assert "decoder.onnx" in refused(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    assert "is empty" in refused(tmp_path / "model.onnx")


def test_too_large_file(tmp_path: Path) -> None:
    with open(tmp_path / "model.onnx", "wb") as file:
        file.truncate(2**31)
    assert "2 GiB" in refused(tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [b"\0", b"{}", b"PK\3\4" + bytes(64), b"hello world", bytes(range(64))])
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    refused(tmp_path / "model.onnx")


def test_no_graph(tmp_path: Path) -> None:
    assert "no graph" in refused(write(tmp_path, onnx.ModelProto(ir_version=8)))


def test_truncated_protobuf(folder: Path) -> None:
    path = write(folder, sound_model())
    path.write_bytes(path.read_bytes()[:-7])
    assert "cut off" in refused(path)


def test_ort_format(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x18\0\0\0ORTM" + bytes(64))
    assert "ORT format" in refused(tmp_path / "model.onnx")


def test_fifo_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "model.onnx")
    os.mkfifo(folder / "pipe")
    model = sound_model()
    make_external(model.graph.initializer[0], "pipe")
    messages: list[str] = []

    def check() -> None:
        messages.append(refused(folder / "model.onnx"))
        (folder / "model.onnx").unlink()
        messages.append(refused(write(folder, model)))

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(20)
    assert len(messages) == 2, "reading a pipe blocked"
    assert all("not a regular file" in message for message in messages)


def test_path_with_null_character() -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_model("model\0.onnx")


def test_no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sound_model()
    make_external(model.graph.initializer[0])
    path = write(folder, model)
    allowed = open

    for name in ("w.data", "model.onnx"):

        def deny(file: object, *args: object, denied: str = name, **kwargs: object) -> object:
            if str(file).endswith(denied):
                raise PermissionError(13, "Permission denied")
            return allowed(file, *args, **kwargs)  # type: ignore[call-overload]

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", deny)
            with pytest.raises(HostError, match=rf"{name}: no permission to read"):
                load_model(path)


@pytest.mark.parametrize("name", ["model.onnx", "w.data"])
def test_real_permission(folder: Path, name: str) -> None:
    model = sound_model()
    make_external(model.graph.initializer[0])
    path = write(folder, model)
    (folder / name).chmod(0)
    if os.access(folder / name, os.R_OK):
        pytest.skip("this user may read everything; simulated above")
    with pytest.raises(HostError, match="no permission to read"):
        load_model(path)


# Versions


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: setattr(m, "ir_version", 14), "IR version 14"),
        (lambda m: m.ClearField("ir_version"), "no IR version"),
        (lambda m: setattr(m.opset_import[0], "version", 27), "opset <= 26"),
        (lambda m: setattr(m.opset_import[0], "version", 6), "version_converter"),
        (lambda m: setattr(m.opset_import[0], "version", 12), "it has functions"),
        (lambda m: m.opset_import.pop(0), "imports no version"),
        (lambda m: m.opset_import.append(make_opsetid("ai.onnx", 19)), "two versions"),
        (lambda m: setattr(m.functions[0].opset_import[0], "version", 27), "opset <= 26"),
    ],
)
def test_versions(folder: Path, edit: Edit, words: str) -> None:
    model = sound_model()
    edit(model)
    assert words in refused(write(folder, model))


@pytest.mark.parametrize(("opset", "ir_version"), [(13, 8), (26, 13)])
def test_versions_at_the_edge(folder: Path, opset: int, ir_version: int) -> None:
    model = sound_model()
    model.ir_version = ir_version
    model.opset_import[0].version = opset
    assert load_model(write(folder, model)).opset_imports[""] == opset


def test_long_name_of_the_default_domain(folder: Path) -> None:
    model = sound_model()
    model.opset_import[0].domain = "ai.onnx"
    model.graph.node[0].domain = "ai.onnx"
    assert load_model(write(folder, model)).opset_imports == {"": 20, "local": 1}


# Graphs


def _map_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.map_type.key_type = TensorProto.INT64


def _nested_map(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.sequence_type.elem_type.map_type.key_type = TensorProto.INT64


def _graph_reference(model: onnx.ModelProto) -> None:
    model.functions[0].node[1].attribute.add(name="a", ref_attr_name="b", type=onnx.AttributeProto.GRAPH)


def _subgraph(model: onnx.ModelProto) -> onnx.GraphProto:
    return model.graph.node[3].attribute[0].g


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.graph.node[1].input.append("gone"), "reads 'gone'"),
        (lambda m: _subgraph(m).node[0].input.append("gone"), "reads 'gone'"),
        (lambda m: m.functions[0].node[1].input.append("x"), "reads 'x'"),
        (lambda m: m.graph.node[1].output.append("k"), "already defined"),
        (lambda m: m.graph.node[1].output.append("w"), "already defined"),
        (lambda m: m.graph.input.add(name="x"), "two inputs"),
        (lambda m: setattr(m.graph.output[0], "name", "gone"), "output 'gone'"),
        (lambda m: setattr(_subgraph(m).output[0], "name", "b"), "output 'b'"),
        (lambda m: m.functions[0].output.append("gone"), "output 'gone'"),
        (_map_output, "zipmap=False"),
        (_nested_map, "zipmap=False"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 999), "element type 999"),
        (lambda m: m.graph.node[1].attribute.add(name="odd"), "'odd'"),
        (lambda m: m.graph.node[1].device_configurations.add(), "device configuration"),
        (_graph_reference, "inline the function"),
    ],
)
def test_graph(folder: Path, edit: Edit, words: str) -> None:
    model = sound_model()
    edit(model)
    assert words in refused(write(folder, model))


@pytest.mark.parametrize("old", [b"then", b"Twice", b"local"])
def test_text_that_is_not_utf8(folder: Path, old: bytes) -> None:
    path = write(folder, sound_model())
    path.write_bytes(path.read_bytes().replace(old, b"\xff" * len(old)))
    assert "UTF-8" in refused(path)


def test_names_are_escaped_and_shortened(folder: Path) -> None:
    model = sound_model()
    model.graph.node[1].input.append("\x1b[31m\n" + "n" * 5000)
    message = refused(write(folder, model))
    assert "\x1b" not in message
    assert len(message) < 400 + len(str(folder))


def test_deep_nesting(folder: Path) -> None:
    # Field 7 (graph) > 1 (node) > 5 (attribute) > 6 (subgraph) > 1 ..., by hand: the library refuses too.
    content = b""
    for _ in range(3000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            length, size = b"", len(content)
            while size >= 128:
                length, size = length + bytes([size % 128 + 128]), size // 128
            content = tag + length + bytes([size]) + content
    (folder / "model.onnx").write_bytes(b"\x08\x08" + b"\x3a\x03\x0a\x01\x00" + content)
    refused(folder / "model.onnx")


# Tensors


def _sizes(**fields: object) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("float_data")
        for field, value in fields.items():
            if isinstance(value, list):
                tensor.ClearField(field)
                getattr(tensor, field).extend(value)
            else:
                setattr(tensor, field, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_sizes(raw_data=bytes(255)), "255 bytes"),
        (_sizes(raw_data=b""), "0 bytes"),
        (_sizes(raw_data=bytes(256), float_data=[1.0]), "twice"),
        (_sizes(), "0 entries of float_data"),
        (_sizes(float_data=[0.0] * 63), "63 entries"),
        (_sizes(int32_data=[0] * 64), "float_data"),
        (_sizes(dims=[-64], raw_data=bytes(256)), "negative"),
        (_sizes(dims=[2**32, 2**32], raw_data=bytes(256)), "too large"),
        (_sizes(dims=[2**40, 2**40, 2**40, 0], raw_data=b""), "too large"),
        (_sizes(dims=[2**62], raw_data=bytes(256)), "too large"),
        (_sizes(dims=[2**40], raw_data=bytes(256)), "256 bytes"),
        (_sizes(dims=[1] * 200, raw_data=bytes(4)), "dimensions"),
        (_sizes(data_type=0, raw_data=bytes(256)), "element type 0"),
        (_sizes(data_type=27, raw_data=bytes(48)), "element type 27"),
        (_sizes(data_type=-1, raw_data=bytes(256)), "element type -1"),
        (_sizes(data_type=TensorProto.STRING, raw_data=bytes(64)), "string_data"),
        (_sizes(data_type=TensorProto.STRING), "0 entries of string_data"),
        (_sizes(data_type=TensorProto.INT4, int32_data=[0] * 64), "32 of int32_data"),
        (_sizes(data_type=TensorProto.COMPLEX64, float_data=[0.0] * 64), "128 of float_data"),
    ],
)
def test_tensor_sizes(folder: Path, edit: Edit, words: str) -> None:
    model = sound_model()
    edit(model)
    assert words in refused(write(folder, model))


@pytest.mark.parametrize(
    ("edit", "size"),
    [
        (_sizes(dims=[], float_data=[2.0]), 4),
        (_sizes(dims=[5, 0]), 0),
        (_sizes(dims=[0], raw_data=b""), 0),
        (_sizes(data_type=TensorProto.INT4, dims=[5], int32_data=[0x21, 0x43, 0x05]), 3),
        (_sizes(data_type=TensorProto.COMPLEX128, dims=[2], double_data=[1.0] * 4), 32),
        (_sizes(data_type=TensorProto.UINT32, dims=[2], uint64_data=[1, 2]), 8),
        (_sizes(data_type=TensorProto.BFLOAT16, dims=[2], int32_data=[1, 2]), 4),
        (_sizes(data_type=TensorProto.BOOL, dims=[2], int32_data=[1, 0]), 2),
    ],
)
def test_unusual_but_sound_tensors(folder: Path, edit: Edit, size: int) -> None:
    model = sound_model()
    edit(model)
    loaded = load_model(write(folder, model))
    assert len(loaded.graph.initializers["w"].const_value.tobytes()) == size


def test_segment(folder: Path) -> None:
    model = sound_model()
    model.graph.initializer[0].segment.begin = 0
    assert "segments" in refused(write(folder, model))


# External data


@pytest.mark.parametrize("place", ["initializer", "subgraph", "attribute", "function"])
@pytest.mark.parametrize(
    ("location", "entries", "words"),
    [
        ("gone.data", {}, "does not exist"),
        ("w.data/x", {}, "does not exist"),
        ("", {}, "is no file name"),
        (".", {}, "is no file name"),
        ("w\0.data", {}, "is no file name"),
        ("n" * 5000, {}, "cannot be read"),
        ("/etc/passwd", {}, "outside the model's folder"),
        ("../w.data", {}, "outside the model's folder"),
        ("sub/../../w.data", {}, "outside the model's folder"),
        ("..\\w.data", {}, "outside the model's folder"),
        ("C:\\w.data", {}, "outside the model's folder"),
        ("\\\\host\\w.data", {}, "outside the model's folder"),
        ("sub", {}, "not a regular file"),
        ("hard.data", {}, "hard links"),
        ("out.data", {}, "leads out of the model's folder"),
        ("out/w.data", {}, "leads out of the model's folder"),
        ("passwd", {}, "leads out of the model's folder"),
        ("loop", {}, "cannot be read"),
        ("nowhere", {}, "does not exist"),
        ("linked", {}, "not a regular file"),
        ("first.link", {}, "hard links"),
        ("w.data", {"offset": 1}, "which has only 256"),
        ("w.data", {"offset": 10**17}, "which has only 256"),
        ("w.data", {"offset": -4}, "is no byte count"),
        ("w.data", {"offset": "0x10"}, "is no byte count"),
        ("w.data", {"offset": "1_0"}, "is no byte count"),
        ("w.data", {"offset": "\u0661"}, "is no byte count"),
        ("w.data", {"offset": "9" * 5000}, "is no byte count"),
        ("w.data", {"length": "many"}, "is no byte count"),
        ("w.data", {"length": -1}, "is no byte count"),
        ("w.data", {"length": 252}, "does not match"),
        ("w.data", {"length": 0}, "does not match"),
    ],
)
def test_external_data(
    folder: Path, place: str, location: str, entries: dict[str, object], words: str
) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "w.data").write_bytes(WEIGHT.tobytes())
    (folder / "first.data").write_bytes(WEIGHT.tobytes())
    (folder / "hard.data").hardlink_to(folder / "first.data")
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir()
    (outside / "w.data").write_bytes(WEIGHT.tobytes())
    links = {"out.data": outside / "w.data", "out": outside, "passwd": "/etc/passwd", "loop": "loop"}
    for name, target in {**links, "nowhere": "gone", "linked": "sub", "first.link": "first.data"}.items():
        (folder / name).symlink_to(target)
    model = sound_model()
    make_external(places(model)[place], location, **entries)
    message = refused(write(folder, model))
    assert words in message
    assert place in message or {"subgraph": "'u'", "function": "attribute 'value'"}[place] in message


def in_cache(folder: Path, name: str = "model.onnx", up: str = "../..") -> Path:
    """The sound model with external data as the Hugging Face cache keeps it; the path that a user gives."""
    model = sound_model()
    make_external(model.graph.initializer[0])
    made = write(folder, model)
    blobs, path = folder / "blobs", folder / "snapshots" / "0a1b" / name
    blobs.mkdir()
    path.parent.mkdir(parents=True)
    made.rename(blobs / "first")
    (folder / "w.data").rename(blobs / "second")
    path.symlink_to(f"{up}/blobs/first")
    (path.parent / "w.data").symlink_to(f"{up}/blobs/second")
    return path


@pytest.mark.parametrize(("name", "up"), [("model.onnx", "../.."), ("onnx/model.onnx", "../../..")])
def test_data_where_the_link_of_the_model_leads(folder: Path, name: str, up: str) -> None:
    loaded = load_model(in_cache(folder, name, up)).graph.initializers["w"].const_value
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy(), WEIGHT)
    saved = save_model(load_model(folder / "snapshots" / "0a1b" / name), folder / "out")
    again = load_model(saved).graph.initializers["w"].const_value
    assert again is not None
    np.testing.assert_array_equal(again.numpy(), WEIGHT)


def test_a_folder_may_be_a_link_itself(folder: Path) -> None:
    path = in_cache(folder)
    (folder / "current").symlink_to(path.parent, target_is_directory=True)
    loaded = load_model(folder / "current" / path.name).graph.initializers["w"].const_value
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy(), WEIGHT)


@pytest.mark.parametrize(
    "edit",
    [
        lambda snapshot, blobs: blobs.parent,  # beside the blobs
        lambda snapshot, blobs: snapshot.parent,
        lambda snapshot, blobs: blobs.parent / "blobs-of-another",  # a name that begins like theirs
    ],
)
def test_data_elsewhere_stays_refused(folder: Path, edit: Callable[[Path, Path], Path]) -> None:
    path = in_cache(folder)
    elsewhere = edit(path.parent, folder / "blobs")
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "secret").write_bytes(WEIGHT.tobytes())
    (path.parent / "w.data").unlink()
    (path.parent / "w.data").symlink_to(elsewhere / "secret")
    assert "leads out of the model's folder" in refused(path)


def test_a_model_that_is_no_link_opens_no_other_folder(folder: Path) -> None:
    path = in_cache(folder)
    path.unlink()
    (folder / "blobs" / "first").rename(path)
    assert "leads out of the model's folder" in refused(path)


def test_a_link_that_changes_after_the_check_is_not_followed(folder: Path) -> None:
    path = in_cache(folder)
    loaded = load_model(path).graph.initializers["w"].const_value
    (folder / "secret").write_bytes(bytes(256))
    (path.parent / "w.data").unlink()
    (path.parent / "w.data").symlink_to("../../secret")
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy(), WEIGHT)


def test_truncated_data_file(folder: Path) -> None:
    model = sound_model()
    make_external(model.graph.initializer[0])
    path = write(folder, model)
    os.truncate(folder / "w.data", 255)
    assert "cut off" in refused(path)


def test_key_given_twice(folder: Path) -> None:
    model = sound_model()
    make_external(model.graph.initializer[0]).external_data.add(key="offset", value="4")
    assert "twice" in refused(write(folder, model))


def test_external_strings(folder: Path) -> None:
    model = sound_model()
    make_external(model.graph.initializer[0]).data_type = TensorProto.STRING
    assert "string_data" in refused(write(folder, model))


@pytest.mark.parametrize("entries", [{"offset": None}, {"length": None}, {"prepacked_0": "1|2"}])
@pytest.mark.parametrize("location", ["w.data", "./w.data", "sub/w.data", "link.data", "linked/w.data"])
def test_sound_external_data(folder: Path, location: str, entries: dict[str, object]) -> None:
    (folder / "sub").mkdir()
    (folder / "link.data").symlink_to("w.data")
    (folder / "linked").symlink_to("sub")
    (folder / "sub" / "w.data").write_bytes(WEIGHT.tobytes())
    model = sound_model()
    make_external(model.graph.initializer[0], location, **entries)
    loaded = load_model(write(folder, model))
    np.testing.assert_array_equal(loaded.graph.initializers["w"].const_value.numpy(), WEIGHT)


def test_external_tensor_without_elements_needs_no_file(folder: Path) -> None:
    model = sound_model()
    tensor = make_external(model.graph.initializer[0], "gone.data", length=0)
    tensor.dims[:] = [0, 4]
    assert load_model(write(folder, model)).graph.initializers["w"].const_value.tobytes() == b""


def test_relative_path_survives_a_change_of_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sound_model()
    make_external(model.graph.initializer[0])
    write(folder, model)
    monkeypatch.chdir(folder)
    loaded = load_model("model.onnx")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(loaded.graph.initializers["w"].const_value.numpy(), WEIGHT)


# Sparse tensors


def sparse(
    values: np.ndarray, indices: np.ndarray, dims: list[int], name: str = "s"
) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(
        values=onnx.numpy_helper.from_array(values, name),
        indices=onnx.numpy_helper.from_array(indices, ""),
        dims=dims,
    )


VALUES = np.array([1.5, -2.0, 3.0], np.float32)
DENSE = np.zeros((4, 5), np.float32)
DENSE[[0, 1, 3], [2, 4, 0]] = VALUES
LINEAR = np.array([2, 9, 15])
PAIRS = np.array([[0, 2], [1, 4], [3, 0]])


@pytest.mark.parametrize("indices", [LINEAR, PAIRS, LINEAR.astype(np.int32), PAIRS.astype(np.int8)])
@pytest.mark.parametrize("place", ["graph", "subgraph", "constant"])
@pytest.mark.parametrize("external", [False, True])
def test_sparse_becomes_dense(folder: Path, indices: np.ndarray, place: str, external: bool) -> None:
    model = sound_model()
    tensor = sparse(VALUES, indices, [4, 5])
    if external:
        (folder / "s.data").write_bytes(VALUES.tobytes() + indices.tobytes())
        make_external(tensor.values, "s.data", length=12)
        make_external(tensor.indices, "s.data", offset=12, length=indices.nbytes)
    if place == "graph":
        model.graph.sparse_initializer.append(tensor)
    elif place == "subgraph":
        _subgraph(model).sparse_initializer.append(tensor)
    else:
        attribute = model.graph.node.add(op_type="Constant", output=["s"]).attribute.add(name="sparse_value")
        attribute.type = onnx.AttributeProto.SPARSE_TENSOR
        attribute.sparse_tensor.CopyFrom(tensor)
    loaded = load_model(write(folder, model))
    if place == "constant":
        node = next(node for node in loaded.graph if node.outputs[0].name == "s")
        assert list(node.attributes) == ["value"]
        dense = node.attributes["value"].as_tensor()
    else:
        graph = loaded.graph if place == "graph" else next(iter(loaded.graph.subgraphs()))
        dense = graph.initializers["s"].const_value
    np.testing.assert_array_equal(dense.numpy(), DENSE)

    saved = load_model(save_model(loaded, folder / "saved"))
    assert sum(DENSE.tobytes() == raw for raw in _all_bytes(saved)) == 1


def _all_bytes(model: ir.Model) -> list[bytes]:
    values = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "Constant"]
    return [t.numpy().tobytes() for t in [*values, *(node.attributes["value"].as_tensor() for node in nodes)]]


def test_sparse_of_other_types(folder: Path) -> None:
    model = sound_model()
    model.graph.sparse_initializer.append(sparse(VALUES.astype(np.float16), LINEAR, [4, 5], "half"))
    model.graph.sparse_initializer.append(sparse(np.array([True]), np.array([3]), [4], "bool"))
    model.graph.sparse_initializer.append(sparse(VALUES[:0], LINEAR[:0], [3], "none"))
    nibbles = sparse(VALUES, LINEAR, [4, 5], "int4")
    nibbles.values.CopyFrom(
        TensorProto(name="int4", data_type=TensorProto.INT4, dims=[3], raw_data=b"\x21\x0d")
    )
    model.graph.sparse_initializer.append(nibbles)
    loaded = load_model(write(folder, model)).graph.initializers
    np.testing.assert_array_equal(loaded["half"].const_value.numpy(), DENSE.astype(np.float16))
    np.testing.assert_array_equal(loaded["bool"].const_value.numpy(), [False, False, False, True])
    np.testing.assert_array_equal(loaded["none"].const_value.numpy(), np.zeros(3, np.float32))
    unpacked = loaded["int4"].const_value.numpy().astype(int).reshape(-1)
    np.testing.assert_array_equal(unpacked[LINEAR], [1, 2, -3])
    assert np.count_nonzero(unpacked) == 3


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (sparse(VALUES, np.array([2, 9, 20]), [4, 5]), "outside shape"),
        (sparse(VALUES, np.array([-1, 9, 15]), [4, 5]), "outside shape"),
        (sparse(VALUES, np.array([[0, 2], [1, 5], [3, 0]]), [4, 5]), "outside shape"),
        (sparse(VALUES, np.array([2, 9, 2]), [4, 5]), "given twice"),
        (sparse(VALUES, np.array([2, 9]), [4, 5]), "do not fit"),
        (sparse(VALUES, np.zeros((3, 3), np.int64), [4, 5]), "do not fit"),
        (sparse(VALUES[:, None], LINEAR, [4, 5]), "do not fit"),
        (sparse(VALUES, np.zeros((3, 0), np.int64), []), "do not fit"),
        (sparse(VALUES, LINEAR.astype(np.float32), [4, 5]), "must be int64"),
        (sparse(VALUES, LINEAR, [2**20, 2**20]), "2 GiB"),
        (sparse(VALUES, LINEAR, [2**40, 2**40]), "too large"),
        (sparse(VALUES, LINEAR, [-4, -5]), "negative"),
        (sparse(VALUES, LINEAR, [0, 5]), "outside shape"),
        (sparse(VALUES, LINEAR, [4, 5], "w"), "taken"),
        (sparse(VALUES, LINEAR, [4, 5], ""), "no name"),
        (sparse(np.array(["a", "b", "c"], object), LINEAR, [4, 5]), "sparse strings"),
    ],
)
def test_bad_sparse(folder: Path, tensor: onnx.SparseTensorProto, words: str) -> None:
    model = sound_model()
    model.graph.sparse_initializer.append(tensor)
    assert words in refused(write(folder, model))


def test_sparse_attribute_of_another_operator(folder: Path) -> None:
    model = sound_model()
    attribute = model.graph.node[1].attribute.add(name="sparse_value")
    attribute.type = onnx.AttributeProto.SPARSE_TENSOR
    attribute.sparse_tensor.CopyFrom(sparse(VALUES, LINEAR, [4, 5]))
    assert "Constant nodes only" in refused(write(folder, model))


def test_old_initializers_are_constants(folder: Path) -> None:
    model = sound_model()
    model.graph.input.add(name="w").type.tensor_type.elem_type = TensorProto.FLOAT
    assert [value.name for value in load_model(write(folder, model)).graph.inputs] == ["x", "c", "w"]
    model.ir_version = 3
    assert [value.name for value in load_model(write(folder, model)).graph.inputs] == ["x", "c"]


# Fuzzing


def rich_model() -> onnx.ModelProto:
    """A sound model with something in nearly every field of the format."""
    model = sound_model()
    model.ir_version = 11
    make_external(model.graph.initializer[0])
    make_external(places(model)["subgraph"])
    graph = model.graph
    graph.sparse_initializer.append(sparse(VALUES, PAIRS, [4, 5]))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(["a", "b"], object), "text"))
    graph.initializer[0].metadata_props.add(key="k", value="v")
    graph.value_info.append(make_tensor_value_info("a", TensorProto.FLOAT, ["n", 4]))
    graph.quantization_annotation.add(tensor_name="w").quant_parameter_tensor_names.add(
        key="k", value="small"
    )
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.int8), "inner")
    sequence = make_sequence_type_proto(make_tensor_type_proto(TensorProto.FLOAT, [2]))
    graph.node.append(
        make_node("Any", ["x", ""], ["any", ""], "any", domain="local", overload="o", i=1, f=0.5)
    )
    attributes = {"s": "s", "t": tensor, "g": _subgraph(model), "is": [1], "fs": [0.5], "ss": ["s"]}
    attributes |= {"ts": [tensor], "gs": [_subgraph(model)], "tp": sequence, "tps": [sequence]}
    graph.node[-1].attribute.extend(make_attribute(key, value) for key, value in attributes.items())
    graph.node[-1].device_configurations.add(configuration_id="two").sharding_spec.add(tensor_name="x")
    model.configuration.add(name="two", num_devices=2)
    function = model.functions[0]
    function.value_info.append(make_tensor_value_info("r", TensorProto.FLOAT, [64]))
    function.attribute.append("free")
    function.attribute_proto.append(make_attribute("default", tensor))
    function.node[1].attribute.add(name="alpha", ref_attr_name="free", type=onnx.AttributeProto.FLOAT)
    model.metadata_props.add(key="k", value="v")
    return model


def works_or_says_why(content: bytes, folder: Path) -> None:
    """Loading and saving may fail with an error of this package only."""
    (folder / "model.onnx").write_bytes(content)
    with contextlib.suppress(SparseOnnxError):
        save_model(load_model(folder / "model.onnx"), folder / "saved")


def test_rich_model_is_sound(folder: Path) -> None:
    first = save_model(load_model(write(folder, rich_model())), folder / "first")
    second = save_model(load_model(first), folder / "second")
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "w.data").write_bytes(WEIGHT.tobytes())
    return folder


RICH = rich_model().SerializeToString()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, len(RICH) - 1), st.integers(1, 255)), max_size=4),
    st.integers(0, 20).map(lambda cut: len(RICH) if cut else cut) | st.integers(0, len(RICH)),
)
def test_fuzzed_bytes(fuzz_folder: Path, flips: list[tuple[int, int]], end: int) -> None:
    content = bytearray(RICH)
    for place, mask in flips:
        content[place] ^= mask
    works_or_says_why(bytes(content[:end]), fuzz_folder)


def _messages(message: Any) -> list[Any]:
    found = [message]
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in value if not hasattr(value, "ListFields") else [value]:
                found += _messages(child)
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_fuzzed_fields(fuzz_folder: Path, data: st.DataObject) -> None:
    """Well-formed messages with wild values: what random bytes rarely reach."""
    model = onnx.ModelProto.FromString(RICH)
    for _ in range(data.draw(st.integers(1, 3))):
        message = data.draw(st.sampled_from(_messages(model)))
        field = data.draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
        if field.type == field.TYPE_MESSAGE or data.draw(st.booleans()):
            message.ClearField(field.name)
            continue
        if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            text = data.draw(st.sampled_from(["", "x", "w", "y", "../x", "\0", "If", "Constant", "local"]))
            value: object = text if field.type == field.TYPE_STRING else text.encode()
        elif field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
            value = 0.5
        elif field.type == field.TYPE_ENUM:
            value = data.draw(st.sampled_from([v.number for v in field.enum_type.values]))
        else:
            value = data.draw(st.sampled_from([0, 1, 2, 8, 21, 22, 26, 64, 2**31 - 1]))
        if isinstance(getattr(message, field.name), str | bytes | int | float):
            setattr(message, field.name, value)
        else:
            getattr(message, field.name).append(value)
    works_or_says_why(model.SerializeToString(), fuzz_folder)
