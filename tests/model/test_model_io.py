"""Saving models: nothing is lost, the layout is as promised, and failures leave no half-written file."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.errors import HostError, ModelFileError, UsageError
from sparse_onnx.model.model_io import Spool, file_bytes, load_model, save_model, weight_bytes

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def model_of(*tensors: ir.TensorProtocol, ir_version: int = 10) -> ir.Model:
    """A model that returns its input and has ``tensors`` as initializers."""
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape([2]))
    node = ir.node("Identity", [x])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", FLOAT, ir.Shape([2])
    initializers = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    graph = ir.Graph([x], [y], nodes=[node], initializers=initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=ir_version)


def floats(name: str, *shape: int, seed: int = 0) -> ir.Tensor[np.ndarray]:
    return ir.tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name=name)


def stored(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {name: value.const_value for name, value in model.graph.initializers.items()}  # type: ignore[misc]


# Round trip

NUMERIC = [dtype for dtype in ir.DataType if 0 < dtype <= ir.DataType.INT2 and dtype != ir.DataType.STRING]


@st.composite
def tensors(draw: st.DrawFn) -> list[ir.TensorProtocol]:
    found: list[ir.TensorProtocol] = []
    for index in range(draw(st.integers(0, 6))):
        # Around the threshold of 256 bytes and the one of 64 KiB.
        sizes = st.sampled_from([0, 1, 2, 3, 7, 63, 64, 65, 255, 256, 257, 513, 16383, 16384, 65537])
        shape = draw(st.sampled_from([(), (0, 5)]) | sizes.map(lambda size: (size,)))
        shape = draw(st.sampled_from([shape, (*shape, 1), (1, *shape)]))
        dtype = draw(st.sampled_from([*NUMERIC, ir.DataType.STRING]))
        name = f"t{index}"
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        size = int(np.prod(shape))
        if dtype == ir.DataType.STRING:
            strings = [rng.bytes(int(length)) for length in rng.integers(0, 40, size)]
            found.append(ir.StringTensor(strings, shape=ir.Shape(shape), name=name))
            continue
        raw = np.frombuffer(rng.bytes(-(-size * dtype.bitwidth // 8)), np.uint8)
        if dtype == ir.DataType.BOOL:
            raw = raw % 2
        proto = onnx.TensorProto(name=name, data_type=dtype, dims=shape, raw_data=raw.tobytes())
        in_file = ir.from_proto(proto)
        if dtype.bitwidth < 8 and draw(st.booleans()):
            found.append(ir.PackedTensor(raw, dtype, shape=shape, name=name))
        elif draw(st.booleans()):
            found.append(ir.Tensor(in_file.numpy(), dtype=dtype, name=name))
        elif draw(st.booleans()):
            found.append(
                ir.LazyTensor(lambda kept=in_file: kept, dtype=dtype, shape=ir.Shape(shape), name=name)
            )
        else:
            found.append(in_file)
    return found


def content(tensor: ir.TensorProtocol) -> object:
    if isinstance(tensor, ir.StringTensor):
        return list(tensor.string_data())
    if 0 in tensor.shape.numpy():
        return b""
    return tensor.tobytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("round-trip")
    yield folder
    shutil.rmtree(folder)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tensors())
def test_round_trip(scratch: Path, given_tensors: list[ir.TensorProtocol]) -> None:
    model = model_of(*given_tensors)
    before = {tensor.name: content(tensor) for tensor in given_tensors}
    first = save_model(model, scratch / "first")
    assert [value.const_value for value in model.graph.initializers.values()] == given_tensors
    assert {tensor.name: content(tensor) for tensor in given_tensors} == before

    loaded = load_model(first)
    assert {name: content(tensor) for name, tensor in stored(loaded).items()} == before
    for tensor in given_tensors:
        copy = stored(loaded)[tensor.name or ""]
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        outside = tensor.dtype != ir.DataType.STRING and tensor.nbytes >= 256
        assert isinstance(copy, ir.ExternalTensor) == outside
        if isinstance(copy, ir.ExternalTensor):
            assert copy.offset is not None
            assert copy.offset % (4096 if copy.nbytes >= 65536 else 64) == 0

    second = save_model(model, scratch / "second")
    for suffix in ("", ".data"):
        one, two = Path(f"{first}{suffix}"), Path(f"{second}{suffix}")
        assert one.exists() == two.exists()
        assert not one.exists() or one.read_bytes() == two.read_bytes(), "the same model gives the same bytes"


# What ONNX Runtime takes and returns through NumPy.
RUNNABLE = [np.float32, np.float64, np.float16, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16]
RUNNABLE += [np.uint32, np.uint64, np.bool_, np.str_]


@pytest.mark.parametrize("size", [0, 1, 3, 100, 20000])
def test_onnx_runtime_reads_the_same(tmp_path: Path, size: int) -> None:
    ort = pytest.importorskip("onnxruntime")
    arrays = {f"{np.dtype(dtype).name}": np.arange(size).astype(dtype) for dtype in RUNNABLE}
    model = model_of(*(ir.tensor(array, name=name) for name, array in arrays.items()))
    for name, value in list(model.graph.initializers.items()):
        node = ir.node("Identity", [value])
        node.outputs[0].name, node.outputs[0].shape = f"{name}_out", value.const_value.shape
        node.outputs[0].type = ir.TensorType(value.const_value.dtype)
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    session = ort.InferenceSession(save_model(model, tmp_path), providers=["CPUExecutionProvider"])
    outputs = session.run([f"{name}_out" for name in arrays], {"x": np.zeros(2, np.float32)})
    for array, output in zip(arrays.values(), outputs, strict=True):
        np.testing.assert_array_equal(output, array.astype(object) if array.dtype.kind == "U" else array)


@pytest.mark.parametrize(
    "dtype", [d for d in NUMERIC if d < ir.DataType.FLOAT4E2M1 and d.name not in ("COMPLEX64", "COMPLEX128")]
)
def test_onnx_runtime_loads_every_type(tmp_path: Path, dtype: ir.DataType) -> None:
    ort = pytest.importorskip("onnxruntime")
    raw = bytes(-(-1024 * dtype.bitwidth // 8))
    tensor = ir.from_proto(onnx.TensorProto(name="t", data_type=dtype, dims=[1024], raw_data=raw))
    session = ort.InferenceSession(save_model(model_of(tensor), tmp_path), providers=["CPUExecutionProvider"])
    x = np.array([1, 2], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)


BRANCHES = """
<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
main (float[64] x, bool c) => (float[64] y)
<float[64] w = {{{ones}}}>
{{
    k = Constant <value = float[64] {{{ones}}}> ()
    a = Add (x, w)
    b = Add (a, k)
    d = If (c) <
        then_branch = then () => (float[64] t) <float[64] u = {{{ones}}}> {{ t = Add (b, u) }},
        else_branch = otherwise () => (float[64] e)
            {{ v = Constant <value = float[64] {{{ones}}}> () e = Sub (b, v) }}
    >
    y = local.Plus (d)
}}
<domain: "local", opset_import: ["" : 20]>
Plus (p) => (q)
{{
    one = Constant <value = float[64] {{{ones}}}> ()
    q = Add (p, one)
}}
"""


def test_tensors_of_subgraphs_and_functions(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    text = BRANCHES.format(ones=", ".join(["1.0"] * 64))
    model = ir.from_proto(onnx.parser.parse_model(text))
    attributes = [node.attributes["value"] for node in model.graph.all_nodes() if node.op_type == "Constant"]
    path = save_model(model, tmp_path)
    assert path.stat().st_size < 2500
    assert (tmp_path / "model.onnx.data").stat().st_size == 5 * 256
    after = [node.attributes["value"] for node in model.graph.all_nodes() if node.op_type == "Constant"]
    assert all(one is two for one, two in zip(attributes, after, strict=True)), "the model is left as it was"
    assert model.ir_version == 10

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.arange(64, dtype=np.float32)
    for condition, sign in ((True, 1), (False, -1)):
        (y,) = session.run(None, {"x": x, "c": np.array(condition)})
        np.testing.assert_array_equal(y, x + 3 + sign)

    again = save_model(load_model(path), tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_other_attributes_stay_inside(tmp_path: Path) -> None:
    model = model_of(floats("w", 100))
    tensor = floats("inner", 200)
    node = ir.node("Custom", [model.graph.inputs[0]], domain="d")
    node.attributes.add(ir.AttrTensor("one", tensor))
    node.attributes.add(ir.AttrTensors("two", [tensor, floats("small", 1)]))
    model.graph.append(node)
    path = save_model(model, tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size == 400
    again = save_model(load_model(path), tmp_path / "again")  # from a file inside to a file inside
    copy = load_model(again).graph[-1].attributes
    assert copy["one"].as_tensor().tobytes() == tensor.tobytes()
    assert [part.nbytes for part in copy["two"].as_tensors()] == [800, 4]


def test_nothing_but_names_and_shapes_matter(tmp_path: Path) -> None:
    """Metadata, documentation and names of tensors survive, once."""
    for size in (1, 100):
        tensor = ir.tensor(np.zeros(size, np.float32), name="w", doc_string="what it is")
        tensor.metadata_props["b"] = "2"
        tensor.metadata_props["a"] = "1"
        model = model_of(tensor)
        model.metadata_props["m"] = "3"
        path = save_model(load_model(save_model(model, tmp_path / "one")), tmp_path / "two")
        proto = onnx.load(path, load_external_data=False)
        initializer = proto.graph.initializer[0]
        assert [(entry.key, entry.value) for entry in initializer.metadata_props] == [("a", "1"), ("b", "2")]
        assert initializer.doc_string == "what it is"
        assert [(entry.key, entry.value) for entry in proto.metadata_props] == [("m", "3")]


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    tensor = floats("a", 1000)
    model = model_of(tensor)
    model.graph.initializers.add(ir.Value(name="b", const_value=tensor))
    model.graph.initializers.add(ir.Value(name="c", const_value=floats("c", 1000)))
    path = save_model(model, tmp_path)
    assert tensor.name == "a"
    assert (tmp_path / "model.onnx.data").stat().st_size == 4032 + 4000
    assert weight_bytes(model) == 8000
    loaded = load_model(path)  # two tensors now, of one region
    assert weight_bytes(loaded) == 8000
    save_model(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx.data").stat().st_size == 4032 + 4000
    assert stored(loaded)["b"].tobytes() == tensor.tobytes()


def test_weight_bytes_counts_subgraphs_and_constant_nodes() -> None:
    text = BRANCHES.format(ones=", ".join(["1.0"] * 64))
    assert weight_bytes(ir.from_proto(onnx.parser.parse_model(text))) == 5 * 256
    assert weight_bytes(model_of()) == 0


def test_file_bytes_are_what_the_files_take(tmp_path: Path) -> None:
    text = BRANCHES.format(ones=", ".join(["1.0"] * 64))
    proto = onnx.parser.parse_model(text)
    inside = tmp_path / "inside.onnx"
    onnx.save(proto, inside)
    assert file_bytes(inside, load_model(inside)) == inside.stat().st_size
    path = save_model(load_model(inside), tmp_path / "out")
    files = path.stat().st_size + (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert file_bytes(path, load_model(path)) == files


def test_file_bytes_count_what_is_read_of_a_data_file(tmp_path: Path) -> None:
    """Weights of another model in the same file are not this model's; what aligns tensors is."""
    path = save_model(model_of(floats("a", 100_000), floats("b", 100_000)), tmp_path)
    data = tmp_path / "model.onnx.data"
    whole = path.stat().st_size + data.stat().st_size
    assert data.stat().st_size > 800_000, "the second begins on a page"
    assert file_bytes(path, load_model(path)) == whole
    with open(data, "ab") as file:
        file.write(bytes(1_000_000))
    assert file_bytes(path, load_model(path)) == whole
    proto = onnx.load(path, load_external_data=False)
    shared = onnx.TensorProto()
    shared.CopyFrom(proto.graph.initializer[0])
    shared.name = "again"
    proto.graph.initializer.append(shared)
    onnx.save(proto, path)
    assert file_bytes(path, load_model(path)) == path.stat().st_size + data.stat().st_size - 1_000_000


def test_torch_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    adapters = pytest.importorskip("onnx_ir.tensor_adapters")
    weight = torch.arange(600, dtype=torch.bfloat16).reshape(20, 30)
    model = model_of(adapters.TorchTensor(weight.T, name="w"))
    copy = stored(load_model(save_model(model, tmp_path)))["w"]
    expected = weight.T.contiguous().view(torch.uint16).numpy()
    np.testing.assert_array_equal(copy.numpy().view(np.uint16), expected)


# IR version


@pytest.mark.parametrize(
    ("dtype", "given", "written"),
    [
        ("FLOAT", 3, 8),
        ("FLOAT", 8, 8),
        ("FLOAT", 9, 9),
        ("FLOAT", 13, 9),
        ("BFLOAT16", 10, 9),
        ("FLOAT8E5M2", 8, 9),
        ("INT4", 13, 10),
        ("UINT4", 8, 10),
        ("FLOAT4E2M1", 13, 11),
        ("FLOAT8E8M0", 9, 12),
        ("INT2", 13, 13),
    ],
)
def test_ir_version(tmp_path: Path, dtype: str, given: int, written: int) -> None:
    data_type = ir.DataType[dtype]
    raw = bytes(-(-4 * data_type.bitwidth // 8))
    tensor = ir.from_proto(onnx.TensorProto(name="t", data_type=data_type, dims=[4], raw_data=raw))
    model = model_of(tensor, ir_version=given)
    assert onnx.load(save_model(model, tmp_path)).ir_version == written
    assert model.ir_version == given


def test_ir_version_of_overloads_and_devices(tmp_path: Path) -> None:
    model = model_of(ir_version=13)
    model.graph[0].overload = "other"
    assert onnx.load(save_model(model, tmp_path)).ir_version == 10
    model.add_device_configuration("two", num_devices=2)
    assert onnx.load(save_model(model, tmp_path)).ir_version == 11


def test_ir_version_of_a_value(tmp_path: Path) -> None:
    model = model_of(ir_version=9)
    node = ir.node("Cast", [model.graph.inputs[0]], {"to": int(ir.DataType.INT4)})
    node.outputs[0].type = ir.TensorType(ir.DataType.INT4)
    model.graph.append(node)
    assert onnx.load(save_model(model, tmp_path)).ir_version == 10


def test_type_that_no_runtime_reads(tmp_path: Path) -> None:
    newest = getattr(ir.DataType, "FLOAT6E2M3", None)
    if newest is None:
        pytest.skip("this onnx_ir does not know the type")
    model = model_of(ir.Tensor(np.zeros(4, np.uint8), dtype=newest, name="t"))
    with pytest.raises(ModelFileError, match="FLOAT6E2M3 needs an IR version above 13"):
        save_model(model, tmp_path)


# Files


def test_modes_and_names(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        path = save_model(model_of(floats("w", 100)), tmp_path / "new", name="decoder")
    finally:
        os.umask(mask)
    assert path == tmp_path / "new" / "decoder.onnx"
    assert sorted(file.name for file in path.parent.iterdir()) == ["decoder.onnx", "decoder.onnx.data"]
    assert all(file.stat().st_mode & 0o7777 == 0o644 for file in path.parent.iterdir())


def test_no_data_file_without_large_tensors(tmp_path: Path) -> None:
    save_model(model_of(floats("w", 64)), tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size == 256
    save_model(model_of(floats("w", 63)), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "/model"])
def test_bad_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no file name"):
        save_model(model_of(), tmp_path, name=name)


def test_bad_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="create it first"):
        save_model(model_of(), tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a folder"):
        save_model(model_of(), tmp_path / "file")


def test_never_over_its_own_source(tmp_path: Path) -> None:
    path = save_model(model_of(floats("w", 100), floats("v", 100, seed=1)), tmp_path)
    before = path.read_bytes(), (tmp_path / "model.onnx.data").read_bytes()
    model = load_model(path)
    with pytest.raises(UsageError, match="reads its weights from this file"):
        save_model(model, tmp_path)
    assert (path.read_bytes(), (tmp_path / "model.onnx.data").read_bytes()) == before
    save_model(model, tmp_path, name="other")
    save_model(load_model(tmp_path / "other.onnx"), tmp_path)  # somebody else's data may be replaced


def test_source_that_vanishes(tmp_path: Path) -> None:
    model = load_model(save_model(model_of(floats("w", 100)), tmp_path / "one"))
    (tmp_path / "one" / "model.onnx.data").unlink()
    with pytest.raises(ModelFileError, match="'w' cannot be read any more"):
        save_model(model, tmp_path / "two")
    assert list((tmp_path / "two").iterdir()) == []


def test_source_that_shrinks(tmp_path: Path) -> None:
    model = load_model(save_model(model_of(floats("w", 100)), tmp_path / "one"))
    os.truncate(tmp_path / "one" / "model.onnx.data", 100)
    with pytest.raises(ModelFileError, match="shorter than expected"):
        save_model(model, tmp_path / "two")
    assert list((tmp_path / "two").iterdir()) == []


def test_initializer_without_data_is_a_defect(tmp_path: Path) -> None:
    model = model_of()
    model.graph.initializers.add(ir.Value(name="w"))
    with pytest.raises(ValueError, match="'w' has no data"):
        save_model(model, tmp_path)


def test_lazy_tensor_of_another_size_is_a_defect(tmp_path: Path) -> None:
    lazy = ir.LazyTensor(lambda: floats("w", 90), ir.DataType.FLOAT, ir.Shape([100]), name="w")
    with pytest.raises(ValueError, match="360 bytes; its shape takes 400"):
        save_model(model_of(lazy), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mapped_weights_stay_usable(tmp_path: Path) -> None:
    model = load_model(save_model(model_of(floats("w", 1000)), tmp_path / "one"))
    array = stored(model)["w"].numpy()
    expected = array.copy()
    save_model(model, tmp_path / "two")
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(stored(model)["w"].numpy(), expected)


# Failures of the disk


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("older", [False, True])
def test_disk_full_while_writing(tmp_path: Path, older: bool) -> None:
    if older:
        save_model(model_of(floats("w", 100)), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(HostError, match=r"model\.onnx\.data: no space left .* 404\.\d kB are needed"):
        save_model(model_of(floats("small", 100), floats("w", 100_000)), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("small_files")
def test_disk_full_in_the_model_file(tmp_path: Path) -> None:
    strings = ir.StringTensor([b"a" * 1000] * 200, shape=ir.Shape([200]), name="s")
    with pytest.raises(HostError, match=r"model\.onnx: no space left"):
        save_model(model_of(strings, floats("w", 100)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_disk_full_up_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HostError, match=r"4\.\d kB are needed but 1\.0 kB are free"):
        save_model(model_of(floats("w", 1000)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def failing(function: Callable[..., Any], code: int, word: str) -> Callable[..., Any]:
    """``function``, but raising the operating system's error ``code`` where an argument contains ``word``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(word in str(argument) for argument in args):
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "no permission to write"),
        (errno.EPERM, "no permission to write"),
        (errno.EROFS, "no permission to write"),
        (errno.ENOSPC, r"no space left .* are needed"),
        (errno.EDQUOT, r"no space left .* are needed"),
        (errno.EIO, "cannot be written"),
    ],
)
@pytest.mark.parametrize("step", ["builtins.open", "os.replace", "os.chmod"])
def test_errors_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str, step: str
) -> None:
    original = {"builtins.open": open, "os.replace": os.replace, "os.chmod": os.chmod}[step]
    monkeypatch.setattr(step, failing(original, code, ".part"))
    with pytest.raises(HostError, match=words):
        save_model(model_of(floats("w", 1000)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_real_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere; simulated above")
    for folder in (tmp_path / "locked", tmp_path / "locked" / "new"):
        with pytest.raises(HostError, match="no permission to write"):
            save_model(model_of(floats("w", 1000)), folder)


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt() -> ir.TensorProtocol:
        raise KeyboardInterrupt

    lazy = ir.LazyTensor(interrupt, ir.DataType.FLOAT, ir.Shape([100]), name="w")
    model = model_of(floats("v", 100), lazy)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert stored(model)["w"] is lazy


# Memory

MEASURE = """
import sys
from pathlib import Path
from sparse_onnx.model.model_io import Spool, load_model, save_model

def peak():  # of this program: ru_maxrss would begin with what its parent had
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) // 1024

model = load_model(sys.argv[1])
before = peak()
save_model(model, sys.argv[2])
saved = peak()
with Spool(sys.argv[2]) as spool:
    for value in list(model.graph.initializers.values())[:4]:
        value.const_value = spool.put(value.const_value.numpy()[:1024] + 1, value.name)
        spool.release()
    save_model(model, sys.argv[2], name="spooled")
print(saved - before, peak() - before)
"""


def test_saving_needs_little_memory(tmp_path: Path) -> None:
    """A model of 300 MB, most of it holes, is read and written again, in another process."""
    count, rows = 12, 6400
    with open(tmp_path / "w.data", "wb") as file:
        file.truncate(count * rows * 4096)
    tensors = [
        ir.ExternalTensor(
            "w.data",
            i * rows * 4096,
            rows * 4096,
            ir.DataType.FLOAT,
            shape=ir.Shape([rows, 1024]),
            name=f"w{i}",
        )
        for i in range(count)
    ]
    proto = ir.to_proto(model_of(*tensors, ir_version=9))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "model.onnx", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.data")]
    saved, spooled = map(int, result.stdout.split())
    assert max(sizes) == count * rows * 4096
    assert saved < 100, f"{saved} MiB more at the peak of saving"
    assert spooled < 100, f"{spooled} MiB more at the peak of spooling"
    shutil.rmtree(tmp_path / "out")


def test_spooled_weights_are_saved(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        expected = floats("w", 300)
        model = model_of(spool.put(expected.numpy(), "w"))
        path = save_model(model, tmp_path / "out")
    assert stored(load_model(path))["w"].tobytes() == expected.tobytes()
