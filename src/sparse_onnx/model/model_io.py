"""Reading and writing model files: safely, without loss, one weight in memory at a time.

Weights stay on disk as memory-mapped :class:`onnx_ir.ExternalTensor` from :func:`load_model` to
:func:`save_model`, those inside the model file as well (:mod:`.embedded`); a pass that computes new ones
puts them into a :class:`Spool`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import mmap
import os
import secrets
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from sparse_onnx.errors import HostError, ModelFileError, UsageError
from sparse_onnx.model.check import (
    MAX_IR_VERSION,
    MIN_OPSET,
    PROTOBUF_LIMIT,
    attributes,
    check_model,
    quote,
    scopes,
    tensors,
)
from sparse_onnx.model.dimensions import forget_unknown
from sparse_onnx.model.embedded import EmbeddedTensor, FileStamp, Region, cut_tensors, file_stamp
from sparse_onnx.model.node_order import sort_nodes
from sparse_onnx.model.opset_conversion import CONVERTED_FROM, convert_opset, default_opset
from sparse_onnx.model.storage import OutputFolder, PathLike, Spool, release_mapping, write_error
from sparse_onnx.units import format_bytes

__all__ = [
    "OutputFolder",
    "Spool",
    "file_bytes",
    "load_model",
    "release_mapping",
    "save_model",
    "skeleton",
    "weight_bytes",
]

_EXTERNAL_BYTES = 256  # tensors of this size and above leave the model file
_PAGE_BYTES = 64 * 1024  # tensors of this size and above start on a page, smaller ones on a cache line
_PAGE, _CACHE_LINE = 4096, 64
_GAP = 64 * 1024  # what lies between two tensors of a data file and is not larger belongs to them

_FILES = "sparse_onnx.files"  # key of a lazy tensor's metadata: the files that it reads


# Reading


def load_model(path: PathLike) -> ir.Model:
    """Read an ``.onnx`` file; large weights, in it or in external data files, are mapped when they are first used.

    Every rule of :func:`sparse_onnx.model.check.check_model` is checked. Sparse initializers, and Constant
    nodes with a sparse value, become dense ones of the same name that are unpacked when used. In files of IR
    version 3 and older, initializers stop being graph inputs: there they were constants all the same.
    Training information is dropped. Nodes are sorted, and models of opset 7 to 12 converted to 13: then
    ``model.meta[CONVERTED_FROM]`` is the opset of the file.

    Raises:
        ModelFileError: the file is missing, damaged, unsafe, too old or too new.
        HostError: the file or its external data may not be read.
    """
    path = Path(os.path.abspath(path))
    proto, embedded, stamp = _read_proto(path)
    data_files = check_model(proto, path, {key: region.length for key, region in embedded.items()})
    places = _Places(path, stamp, embedded, data_files)
    _normalize(proto)
    sparse = _replace_sparse(proto, places)
    sort_nodes(proto, path)
    opset = default_opset(proto)
    if opset < MIN_OPSET:
        proto = convert_opset(proto, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises what it meets, wrapped once for every level of the graph
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ModelFileError(f"{path}: not a valid ONNX graph: {quote(reason)}; export it again") from error
    for slot in _tensor_slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            if (dense := sparse.get(str(slot.tensor.location))) is not None:
                slot.put(dense)
            else:
                slot.put(places.find(slot.tensor))
    if opset < MIN_OPSET:
        model.meta[CONVERTED_FROM] = opset
    return model


@dataclass(frozen=True)
class _Places:
    """Where the bytes of a model's tensors are: regions of the file ``path`` and data files, by location."""

    path: Path
    stamp: FileStamp
    embedded: Mapping[str, Region]
    data_files: Mapping[str, Path]

    def find(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        """``tensor``, to be read from its place."""
        location = str(tensor.location)
        if (region := self.embedded.get(location)) is not None:
            return EmbeddedTensor(self.path, region, tensor, self.stamp)
        real = self.data_files[location]
        return ir.ExternalTensor(
            real.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=real.parent,
        )


def _read_proto(path: Path) -> tuple[onnx.ModelProto, dict[str, Region], FileStamp]:
    """The model without its large tensors, where in the file these are, see :func:`.embedded.cut_tensors`, and which
    file it is."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            found = sorted(file.name for file in path.glob("*.onnx"))
            hint = f"give a file in it: {', '.join(found[:5])}" if found else "it holds no .onnx file"
            raise ModelFileError(f"{path}: is a folder, not an .onnx file; {hint}")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: is not a regular file; give an .onnx file")
        if status.st_size == 0:
            raise ModelFileError(f"{path}: is empty; export or copy the model again")
        if status.st_size > PROTOBUF_LIMIT:
            raise ModelFileError(
                f"{path}: {format_bytes(status.st_size)} are more than an ONNX file can hold (2 GiB); "
                "export the model with external data"
            )
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            is_ort_format = mapped[4:8] == b"ORTM"
            data, embedded = (b"", {}) if is_ort_format else cut_tensors(mapped)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFileError(f"{path}: does not exist; give the path of an .onnx file") from None
    except PermissionError as error:
        raise HostError(f"{path}: no permission to read it; change its mode or owner") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ModelFileError(f"{path}: cannot be read: {error}; copy it again") from error
    if is_ort_format:
        raise ModelFileError(f"{path}: is in the ORT format; give the .onnx file that it was made from")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelFileError(
            f"{path}: is not an ONNX model, or is cut off ({error}); export or copy it again"
        ) from error
    if not proto.HasField("graph"):
        raise ModelFileError(f"{path}: is not an ONNX model: it has no graph; export it again")
    return proto, embedded, file_stamp(status)


def _normalize(proto: onnx.ModelProto) -> None:
    """Bring the variants that the format allows into one form. ``proto`` has passed the checks."""
    if proto.ir_version < 4:
        constant = {tensor.name for tensor in proto.graph.initializer}
        constant |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
        inputs = [value for value in proto.graph.input if value.name not in constant]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        proto.ir_version = 4
    for owner in (proto, *proto.functions):
        imports = {entry.domain: entry.version for entry in owner.opset_import}
        if "ai.onnx" in imports:  # the long name of the default domain; onnx_ir knows the short one
            imports[""] = imports.pop("ai.onnx")
        del owner.opset_import[:]
        owner.opset_import.extend(onnx.helper.make_opsetid(*item) for item in imports.items())
    forget_unknown(proto.graph)
    for _, tensor in tensors(proto):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        if 0 in tensor.dims:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.raw_data = b""
        else:  # ONNX Runtime adds keys of its own, of which onnx_ir would warn
            known = [entry for entry in tensor.external_data if entry.key in ("location", "offset", "length")]
            del tensor.external_data[:]
            tensor.external_data.extend(known)


def _replace_sparse(proto: onnx.ModelProto, places: _Places) -> dict[str, ir.LazyTensor]:
    """Put an external dense tensor in the place of each sparse one, as onnx_ir knows no sparse tensors.

    Returns the lazy dense tensors by the location of what stands for them. A location begins with a null
    character, which the checks allow in no real one.
    """
    lazy: dict[str, ir.LazyTensor] = {}

    def stand_in(sparse: onnx.SparseTensorProto, place: str, into: onnx.TensorProto) -> None:
        location = f"\0sparse:{len(lazy)}"
        values, indices = (
            places.find(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor
            for tensor in map(ir.serde.deserialize_tensor, (sparse.values, sparse.indices))
        )
        lazy[location] = _lazy_dense(values, indices, tuple(sparse.dims), f"{places.path}: {place}")
        into.name = sparse.values.name
        into.data_type = sparse.values.data_type
        into.dims.extend(sparse.dims)
        into.data_location = onnx.TensorProto.EXTERNAL
        into.external_data.add(key="location", value=location)

    for scope in scopes(proto):
        if isinstance(scope, onnx.GraphProto):
            for sparse in scope.sparse_initializer:
                stand_in(sparse, f"sparse initializer {quote(sparse.values.name)}", scope.initializer.add())
            del scope.sparse_initializer[:]
        for place, _, attribute in attributes(scope):
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                stand_in(attribute.sparse_tensor, place, attribute.t)
                attribute.ClearField("sparse_tensor")
                attribute.name = "value"
                attribute.type = onnx.AttributeProto.TENSOR
    return lazy


def _lazy_dense(
    values: ir.TensorProtocol, indices: ir.TensorProtocol, shape: tuple[int, ...], place: str
) -> ir.LazyTensor:
    _linear_indices(indices.numpy(), shape, place)  # proved now; kept on disk until they are used
    release_mapping(indices)

    def unpack() -> ir.TensorProtocol:
        dense = np.zeros(shape, values.dtype.numpy())
        dense.reshape(-1)[_linear_indices(indices.numpy(), shape, place)] = values.numpy()
        release_mapping(indices)
        release_mapping(values)
        return ir.Tensor(dense, dtype=values.dtype, name=values.name)

    tensor = ir.LazyTensor(unpack, values.dtype, ir.Shape(shape), name=values.name)
    tensor.meta[_FILES] = [part.path for part in (values, indices) if isinstance(part, ir.ExternalTensor)]
    return tensor


def _linear_indices(indices: np.ndarray, shape: tuple[int, ...], place: str) -> np.ndarray:
    """Positions [nnz] int64 in the flattened ``shape``, from ``indices`` [nnz] or [nnz, rank]."""
    limits = np.array(shape if indices.ndim == 2 else [np.prod(shape)], np.int64)
    columns = indices.astype(np.int64).reshape(-1, limits.size)
    if (columns < 0).any() or (columns >= limits).any():
        raise ModelFileError(f"{place}: an index lies outside shape {list(shape)}; export it again")
    # Row-major strides in elements.
    strides = np.append(np.cumprod(limits[:0:-1])[::-1], 1)
    linear: np.ndarray = columns @ strides
    if np.unique(linear).size != linear.size:
        raise ModelFileError(f"{place}: an index is given twice; export it again")
    return linear


# Tensors of a model


@dataclass(frozen=True)
class _Slot:
    """A place in a model that holds a tensor."""

    tensor: ir.TensorProtocol
    weight: bool  # an initializer or the value of a Constant node: what may live in the data file
    put: Callable[[ir.TensorProtocol], None]
    undo: Callable[[], None]


def _roots(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for root in _roots(model):
        for graph in (root, *root.subgraphs()):
            if isinstance(graph, ir.Graph):
                yield from graph.initializers.values()


def _tensor_slots(model: ir.Model) -> Iterator[_Slot]:
    """Every tensor of ``model``, subgraphs and functions included, in a fixed order."""
    for value in _initializers(model):
        if value.const_value is None:
            raise ValueError(f"initializer {value.name!r} has no data")
        put = partial(setattr, value, "const_value")
        yield _Slot(value.const_value, True, put, partial(put, value.const_value))
    for root in _roots(model):
        if isinstance(root, ir.Function):
            yield from _attribute_slots(root, constant=False)
        for node in root.all_nodes():
            yield from _attribute_slots(node, constant=node.op_type == "Constant" and node.domain == "")


def _attribute_slots(owner: ir.Node | ir.Function, *, constant: bool) -> Iterator[_Slot]:
    for key, attribute in list(owner.attributes.items()):
        if attribute.is_ref():
            continue
        undo = partial(owner.attributes.__setitem__, key, attribute)
        if attribute.type == ir.AttributeType.TENSOR:
            yield _Slot(attribute.value, constant, partial(_put_attribute, owner, key, None), undo)
        elif attribute.type == ir.AttributeType.TENSORS:
            for index, tensor in enumerate(attribute.value):
                yield _Slot(tensor, False, partial(_put_attribute, owner, key, index), undo)


def _put_attribute(
    owner: ir.Node | ir.Function, key: str, index: int | None, tensor: ir.TensorProtocol
) -> None:
    old = owner.attributes[key]
    value = tensor if index is None else (*old.value[:index], tensor, *old.value[index + 1 :])
    owner.attributes[key] = ir.Attr(key, old.type, value, doc_string=old.doc_string)


def _identity(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors that share their storage."""
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset or 0, tensor.nbytes)
    return id(tensor)


def _strings(tensor: ir.TensorProtocol) -> list[bytes]:
    if isinstance(tensor, ir.StringTensor):
        return list(tensor.string_data())
    elements = tensor.numpy().reshape(-1).tolist()
    return [element.encode() if isinstance(element, str) else element for element in elements]


def _nbytes(tensor: ir.TensorProtocol) -> int:
    return sum(map(len, _strings(tensor))) if tensor.dtype == ir.DataType.STRING else tensor.nbytes


def weight_bytes(model: ir.Model) -> int:
    """Bytes that all weights take in memory: initializers and values of Constant nodes, subgraphs included; tensors
    that share their storage count once. For what files take, see :func:`file_bytes`."""
    tensors = [slot.tensor for slot in _tensor_slots(model) if slot.weight]
    return sum({_identity(tensor): _nbytes(tensor) for tensor in tensors}.values())


def file_bytes(path: Path, model: ir.Model) -> int:
    """Bytes that ``model``, loaded from ``path``, takes on disk: the file, and of its external data files what the
    model reads, with gaps of less than 64 KiB, which align tensors."""
    whole = os.stat(path)
    size = whole.st_size
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for slot in _tensor_slots(model):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor):
            start = tensor.offset or 0
            used[tensor.path].append((start, start + tensor.nbytes))
        elif isinstance(tensor, ir.LazyTensor):
            for file in tensor.meta.get(_FILES, ()):
                used[file].append((0, os.stat(file).st_size))
    for file, ranges in used.items():
        status = os.stat(file)
        if os.path.samestat(status, whole):
            continue
        end = 0
        for start, stop in [*sorted(ranges), (status.st_size, status.st_size)]:
            if start - end < _GAP:
                start = min(start, end)
            size += max(0, stop - max(start, end))
            end = max(end, stop)
    return size


# Writing


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class _Sink:
    """Counts what is written to ``file``, and tells failures to write from failures to read."""

    def __init__(self, file: _Writable, path: Path, needed: int) -> None:
        self._file = file
        self._path = path
        self._needed = needed
        self.written = 0

    def write(self, data: bytes) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:
            raise write_error(error, self._path, self._needed) from error
        self.written += count
        return count


def save_model(model: ir.Model, folder: PathLike, *, name: str = "model") -> Path:
    """Write ``folder/<name>.onnx`` and ``folder/<name>.onnx.data``; return the path of the former.

    Initializers and values of Constant nodes of 256 bytes and more go to the data file, once for each
    storage: at multiples of 4096 bytes from 64 KiB on, of 64 bytes below. Strings stay in the model file. If
    nothing goes to the data file, none is left. The same model gives the same bytes. Both files have mode
    0644 and replace older ones only when complete.

    The IR version becomes the lowest one, but at least 8 and if possible at most 9, that knows all types and
    features in use, so that ONNX Runtime 1.17 and later read the file.

    ``model`` is left as it was. Memory: the largest tensor that is not external, and a copy of the graph.

    Raises:
        UsageError: the folder's parent does not exist, or the model reads from the file to be replaced.
        ModelFileError: the model does not fit the format, or a file it reads from has changed or vanished.
        HostError: no space or no permission.
    """
    folder = Path(os.path.abspath(folder))
    if name in ("", "..") or Path(name).name != name:
        raise UsageError(f"{quote(name)} is no file name; give a name without folders")
    path, data_path = folder / f"{name}.onnx", folder / f"{name}.onnx.data"
    slots = list(_tensor_slots(model))
    _check_sources(slots, (path, data_path))
    layout = _Layout(slots)
    content = _serialize(model, slots, layout, data_path.name)
    needed = layout.nbytes + len(content)
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
    except FileNotFoundError:
        raise UsageError(f"{folder.parent}: does not exist; create it first") from None
    except FileExistsError:
        raise UsageError(f"{folder}: is not a folder; choose another name") from None
    except OSError as error:
        raise write_error(error, folder, needed) from error
    if free < needed:
        raise HostError(
            f"{folder}: {format_bytes(needed)} are needed but {format_bytes(free)} are free; "
            "free space or choose another disk"
        )
    with contextlib.ExitStack() as pending:
        data_part = path_part = None
        if layout.nbytes:
            data_part = pending.enter_context(_part(data_path, needed, layout.write))
        path_part = pending.enter_context(_part(path, needed, lambda sink: sink.write(content)))
        try:
            if data_part is not None:
                os.replace(data_part, data_path)
            else:
                data_path.unlink(missing_ok=True)
            os.replace(path_part, path)
        except OSError as error:
            raise write_error(error, path, needed) from error
    return path


@contextlib.contextmanager
def _part(path: Path, needed: int, write: Callable[[_Sink], object]) -> Iterator[Path]:
    """A finished file beside ``path``, to be renamed to it; what is not renamed is deleted."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            with open(part, "xb") as file:
                os.chmod(part, 0o644)
                write(_Sink(file, path, needed))
        except OSError as error:
            raise write_error(error, path, needed) from error
        yield part
    finally:
        part.unlink(missing_ok=True)


class _Layout:
    """Which tensors go to the data file, and where."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self._places: dict[object, tuple[int, ir.TensorProtocol]] = {}
        self.nbytes = 0
        for slot in slots:
            tensor = slot.tensor
            movable = slot.weight and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _EXTERNAL_BYTES
            if movable and _identity(tensor) not in self._places:
                alignment = _PAGE if tensor.nbytes >= _PAGE_BYTES else _CACHE_LINE
                offset = -(-self.nbytes // alignment) * alignment
                self._places[_identity(tensor)] = (offset, tensor)
                self.nbytes = offset + tensor.nbytes

    def offset(self, slot: _Slot) -> int | None:
        """Where the tensor of ``slot`` goes in the data file; None if it stays in the model file."""
        place = self._places.get(_identity(slot.tensor)) if slot.weight else None
        return None if place is None else place[0]

    def write(self, sink: _Sink) -> None:
        for offset, tensor in self._places.values():
            sink.write(bytes(offset - sink.written))
            _copy(tensor, sink)


def _copy(tensor: ir.TensorProtocol, sink: _Sink) -> None:
    """Write the bytes of ``tensor``, little endian, through a small buffer where they come from a file."""
    start = sink.written
    try:
        if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor | ir.Tensor | ir.PackedTensor):
            tensor.tofile(sink)
        else:
            sink.write(tensor.tobytes())
    except OSError as error:
        raise ModelFileError(
            f"the file that holds tensor {quote(tensor.name)} cannot be read any more: {error}; start again"
        ) from error
    finally:
        release_mapping(tensor)
    if sink.written - start != tensor.nbytes:
        raise ValueError(
            f"tensor {tensor.name!r} wrote {sink.written - start} bytes; its shape takes {tensor.nbytes}"
        )


def _serialize(model: ir.Model, slots: Sequence[_Slot], layout: _Layout, data_name: str) -> bytes:
    """The bytes of the model file. ``model`` is changed while this runs, and changed back."""
    too_large = ModelFileError(
        "the graph without its weights takes more than 2 GiB, which no ONNX file can hold; "
        "turn large string or attribute tensors into model inputs"
    )
    inside = {_identity(slot.tensor): _nbytes(slot.tensor) for slot in slots if layout.offset(slot) is None}
    if sum(inside.values()) > PROTOBUF_LIMIT:
        raise too_large
    ir_version = _needed_ir_version(model, slots)
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, model, "ir_version", model.ir_version)
        model.ir_version = ir_version
        for slot in slots:
            undo.callback(slot.undo)
            slot.put(_stored(slot.tensor, layout.offset(slot), data_name))
        proto = ir.to_proto(model)
    try:
        content: bytes = proto.SerializeToString(deterministic=True)
    except (EncodeError, ValueError):
        raise too_large from None
    return content


def _stored(tensor: ir.TensorProtocol, offset: int | None, data_name: str) -> ir.TensorProtocol:
    """What stands for ``tensor`` in the model file: a reference into the data file, or a copy."""
    name, shape, doc = tensor.name or "", ir.Shape(tensor.shape.numpy()), tensor.doc_string
    stored: ir.TensorProtocol
    if offset is not None:
        stored = ir.ExternalTensor(
            data_name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, doc_string=doc
        )
    elif tensor.dtype == ir.DataType.STRING:
        stored = ir.StringTensor(_strings(tensor), shape=shape, name=name, doc_string=doc)
    else:
        buffer = io.BytesIO()
        _copy(tensor, _Sink(buffer, Path(), 0))
        proto = onnx.TensorProto(
            name=name,
            data_type=tensor.dtype,
            dims=tensor.shape.numpy(),
            raw_data=buffer.getvalue(),
            doc_string=doc or None,
        )
        stored = ir.serde.TensorProtoTensor(proto)
    stored.metadata_props.update(tensor.metadata_props)
    return stored


def skeleton(model: ir.Model, min_bytes: int = 4096) -> tuple[bytes, dict[str, ir.TensorProtocol]]:
    """The bytes of a model file without its large weights, and these by name.

    Initializers of the main graph of at least ``min_bytes``, of numbers of a byte or more each, refer to a data
    file that does not exist; all other tensors, shapes among them, are inside. ``model`` is left as it was.

    Raises ModelFileError if the rest takes more than the 2 GiB of an ONNX file.
    """
    slots = list(_tensor_slots(model))
    outside: dict[str, ir.TensorProtocol] = {}
    too_large = ModelFileError("the graph without its initializers takes more than the 2 GiB of an ONNX file")
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, model, "ir_version", model.ir_version)
        model.ir_version = _needed_ir_version(model, slots)
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            # Types below a byte are packed, and no array of NumPy's.
            if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
                continue
            if tensor.nbytes >= min_bytes:
                outside[name] = tensor
        for slot in slots:
            undo.callback(slot.undo)
        apart = set(map(id, outside.values()))
        inside = [slot for slot in slots if id(slot.tensor) not in apart]
        if sum(_nbytes(slot.tensor) for slot in inside) > PROTOBUF_LIMIT:
            raise too_large
        for slot in inside:
            slot.put(_stored(slot.tensor, None, ""))
        for name, tensor in outside.items():
            model.graph.initializers[name].const_value = _stored(tensor, 0, "weights-from-outside")
        try:
            content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        except (EncodeError, ValueError):
            raise too_large from None
    return content, outside


# The IR version that first knows a type; types not listed are older than 8.
_TYPE_VERSIONS = {
    ir.DataType.FLOAT8E4M3FN: 9,
    ir.DataType.FLOAT8E4M3FNUZ: 9,
    ir.DataType.FLOAT8E5M2: 9,
    ir.DataType.FLOAT8E5M2FNUZ: 9,
    ir.DataType.UINT4: 10,
    ir.DataType.INT4: 10,
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.UINT2: 13,
    ir.DataType.INT2: 13,
}


def _needed_ir_version(model: ir.Model, slots: Sequence[_Slot]) -> int:
    needed = 11 if model.device_configurations else min(max(model.ir_version, 8), 9)
    types = {slot.tensor.dtype for slot in slots}
    for root in _roots(model):
        for graph in (root, *root.subgraphs()):
            types.update(value.dtype for value in (*graph.inputs, *graph.outputs) if value.dtype is not None)
        for node in root.all_nodes():
            types.update(value.dtype for value in node.outputs if value.dtype is not None)
            if node.overload:
                needed = max(needed, 10)
            if node.device_configurations:
                needed = max(needed, 11)
        if isinstance(root, ir.Function):
            # Default values of attributes are of version 9, overloads of 10.
            defaults = any(attribute.value is not None for attribute in root.attributes.values())
            needed = max(needed, 10 if root.overload else 9 if defaults else 8)
    unknown = [str(dtype) for dtype in types if dtype > ir.DataType.INT2]
    if unknown:
        raise ModelFileError(
            f"element type {', '.join(unknown)} needs an IR version above {MAX_IR_VERSION}, which ONNX "
            "Runtime 1.31 does not read; cast it to another type"
        )
    return max(needed, *(_TYPE_VERSIONS.get(dtype, 8) for dtype in types), 8)


def _check_sources(slots: Sequence[_Slot], targets: Sequence[Path]) -> None:
    sources: set[str] = set()
    for slot in slots:
        if isinstance(slot.tensor, ir.ExternalTensor):
            sources.add(slot.tensor.path)
        elif isinstance(slot.tensor, ir.LazyTensor):
            sources.update(slot.tensor.meta.get(_FILES, ()))
    for source, target in itertools.product(sources, targets):
        with contextlib.suppress(OSError):
            if os.path.samefile(source, target):
                raise UsageError(
                    f"{target}: the model reads its weights from this file; write to another folder"
                )
