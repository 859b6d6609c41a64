"""Weights inside a model file are read where they lie, whatever the file looks like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.errors import ModelFileError, UsageError
from sparse_onnx.model.check import tensors
from sparse_onnx.model.embedded import EmbeddedTensor, cut_tensors
from sparse_onnx.model.model_io import load_model, release_mapping, save_model

ROWS = 64  # 64 x 64 floats are large enough to be cut


def weight(name: str, seed: int = 0, kind: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(
        np.random.default_rng(seed).standard_normal((ROWS, ROWS)).astype(kind), name
    )


def as_floats(tensor: TensorProto) -> TensorProto:
    """The same values in the packed field of their type."""
    values = numpy_helper.to_array(tensor)
    tensor.ClearField("raw_data")
    (tensor.double_data if values.dtype == np.float64 else tensor.float_data).extend(values.ravel().tolist())
    return tensor


def whole_model() -> onnx.ModelProto:
    """Large tensors at every place: initializers, Constant nodes, a subgraph, a function, a sparse one."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["b", "inner"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        [weight("inner", 3)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["b"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    values = numpy_helper.from_array(np.ones(1500, np.float32), "sparse")
    indices = numpy_helper.from_array(np.arange(1500, dtype=np.int64), "")
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value=weight("", 1)),
            helper.make_node("Cast", ["double"], ["d"], to=TensorProto.FLOAT),
            helper.make_node("Sum", ["x", "w", "k", "f", "d", "sparse"], ["a"]),
            helper.make_node("Twice", ["a"], ["b"], domain="local"),
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, ROWS]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight("w"), as_floats(weight("f", 2)), as_floats(weight("double", 4, np.float64))],
        sparse_initializer=[helper.make_sparse_tensor(values, indices, [ROWS, ROWS])],
    )
    function = helper.make_function(
        "local",
        "Twice",
        ["p"],
        ["q"],
        [
            helper.make_node("Constant", [], ["one"], value=weight("", 5)),
            helper.make_node("Add", ["p", "one"], ["q"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)


def test_every_large_tensor_is_cut_and_none_is_lost() -> None:
    model = whole_model()
    data = model.SerializeToString()
    small, regions = cut_tensors(data)
    assert len(regions) == 8
    assert len(small) < len(data) / 20
    found = {}
    for place, tensor in tensors(onnx.ModelProto.FromString(small)):
        location = {entry.key: entry.value for entry in tensor.external_data}["location"]
        region = regions[location]
        found[place] = data[region.offset : region.offset + region.length]
    wanted = {place: numpy_helper.to_array(tensor).tobytes() for place, tensor in tensors(model)}
    assert found == wanted


def test_loaded_saved_and_loaded_again_it_is_the_same_model(tmp_path: Path) -> None:
    model = whole_model()
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    loaded = load_model(path)
    weights = {name: value.const_value for name, value in loaded.graph.initializers.items()}
    assert {"w", "f", "double"} <= {name for name, t in weights.items() if isinstance(t, EmbeddedTensor)}
    again = load_model(save_model(loaded, tmp_path / "out"))
    for tensor in model.graph.initializer:
        for read in (loaded, again):
            stored = read.graph.initializers[tensor.name].const_value
            assert stored is not None
            np.testing.assert_array_equal(stored.numpy(), numpy_helper.to_array(tensor))


@pytest.mark.parametrize("shift", range(8))
def test_arrays_are_aligned_wherever_the_bytes_lie(tmp_path: Path, shift: int) -> None:
    model = whole_model()
    model.producer_name = "p" * shift
    onnx.save(model, tmp_path / "m.onnx")
    for name in ("w", "double"):
        tensor = load_model(tmp_path / "m.onnx").graph.initializers[name].const_value
        assert isinstance(tensor, EmbeddedTensor)
        array = tensor.numpy()
        assert array.flags.aligned
        assert not array.flags.writeable
        assert tensor.tobytes() == array.tobytes()
        release_mapping(tensor)
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_data_of_the_wrong_size_or_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for edit in (
        lambda t: t.dims.append(2),
        lambda t: t.float_data.append(1),
        lambda t: t.ClearField("dims"),
        lambda t: t.dims.append(0),
    ):
        model = whole_model()
        edit(model.graph.initializer[0])
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ModelFileError, match="the file is damaged"):
            load_model(path)


def test_a_file_cannot_name_a_region_of_its_own(tmp_path: Path) -> None:
    """The stand-ins of one reading are worth nothing in a file."""
    small, _ = cut_tensors(whole_model().SerializeToString())
    (tmp_path / "m.onnx").write_bytes(small)
    with pytest.raises(ModelFileError, match="is no file name"):
        load_model(tmp_path / "m.onnx")


def test_the_file_is_not_overwritten_while_it_is_read(tmp_path: Path) -> None:
    onnx.save(whole_model(), tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    with pytest.raises(UsageError, match="reads its weights from this file"):
        save_model(load_model(tmp_path / "model.onnx"), tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("how", ["replaced", "written", "deleted"])
def test_a_file_that_changes_meanwhile_is_said(tmp_path: Path, how: str) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(whole_model(), path)
    model = load_model(path)
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    if how == "replaced":
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
    elif how == "written":
        with open(path, "ab") as file:
            file.write(b"x")
    else:
        path.unlink()
    for use in (
        tensor.numpy,
        tensor.tobytes,
        lambda: np.asarray(tensor),
        lambda: save_model(model, tmp_path / "o"),
    ):
        with pytest.raises(ModelFileError, match=r"m\.onnx: has changed or vanished while it was read"):
            use()


WHOLE = whole_model().SerializeToString()


def restored(data: bytes) -> bytes:
    """What :func:`cut_tensors` gives, parsed, with the regions put back, serialized."""
    small, regions = cut_tensors(data)
    model = onnx.ModelProto.FromString(small)
    for _, tensor in tensors(model):
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location")
        if location in regions:
            region = regions[location]
            raw = data[region.offset : region.offset + region.length]
            for field in ("external_data", "data_location"):
                tensor.ClearField(field)
            if tensor.name in ("f", "double"):
                kind, field = ("<f4", "float_data") if tensor.name == "f" else ("<f8", "double_data")
                getattr(tensor, field).extend(np.frombuffer(raw, kind).tolist())
            else:
                tensor.raw_data = raw
    return model.SerializeToString(deterministic=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3), st.integers(0, 200)
)
@example([], 0)
def test_damaged_bytes_mean_the_same_as_to_the_parser(edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(WHOLE)
    for position, value in edits:
        data[position] = value
    damaged = bytes(data[: len(data) - cut])
    try:
        wanted = onnx.ModelProto.FromString(damaged).SerializeToString(deterministic=True)
    except DecodeError:  # what the parser refuses, it refuses without its tensors, too
        with pytest.raises(DecodeError):
            onnx.ModelProto.FromString(cut_tensors(damaged)[0])
        return
    assert restored(damaged) == wanted


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_any_bytes_are_walked(data: bytes) -> None:
    assert cut_tensors(data) == (data, {})


def test_nesting_without_end_is_left_to_the_parser() -> None:
    data = b"\x0a" + bytes(5000)
    for _ in range(200):  # a graph in an attribute of a node of a graph, and so on
        for number in (1, 5, 6):
            data = bytes([number << 3 | 2]) + _varint(len(data)) + data
    data = b"\x3a" + _varint(len(data)) + data
    assert cut_tensors(data) == (data, {})


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


MEASURE = """
import sys
from sparse_onnx.running.host import peak_rss_bytes as peak
from sparse_onnx.tools.cli import main
import numpy, onnx, onnx_ir, onnxruntime
before = peak()
try:
    main(sys.argv[1:])
finally:
    print("PEAK", peak() - before, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("constants", [False, True], ids=["initializers", "Constant nodes"])
@pytest.mark.parametrize("command", ["inspect", "optimize", "analyze"])
def test_memory_for_weights_inside_the_file(tmp_path: Path, command: str, constants: bool) -> None:
    """At most 3 bytes for each byte of the file."""
    size, layers = 2048, 16
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for index in range(layers):
        array = rng.standard_normal((size, size), dtype=np.float32) / size**0.5
        array[rng.random((size, size), dtype=np.float32) < 0.85] = 0
        tensor = numpy_helper.from_array(array, f"w{index}")
        if constants:
            nodes.append(helper.make_node("Constant", [], [f"w{index}"], value=tensor))
        else:
            weights.append(tensor)
        nodes.append(helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"h{index}"]))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [f"x{index + 1}"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["n", size])],
        weights,
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    options = {"optimize": ["-o", str(tmp_path / "out"), "--no-benchmark"], "inspect": [], "analyze": []}[
        command
    ]
    shapes = [] if command == "inspect" else ["--input-shape", f"x0:4,{size}", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, command, str(path), *options, *shapes],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stderr.split("PEAK")[1])
    assert peak < 3 * path.stat().st_size, peak / path.stat().st_size
