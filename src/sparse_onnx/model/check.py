"""What must hold of an ONNX file before anything is built from it.

Everything here works on the parsed protobuf message and reads no weight, apart from the indices of sparse
tensors. A model file is input from a stranger: sizes, types, names and paths are proved first, so that no
later stage meets an index out of range, a path outside the model's folder, or a size nobody can allocate.

Sources: the ONNX intermediate representation and external data specifications, and ``onnx.proto``.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, NoReturn

import onnx
import onnx_ir as ir

from sparse_onnx.errors import HostError, ModelFileError
from sparse_onnx.model.graph import STANDARD_DOMAINS

__all__ = [
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "MIN_OPSET",
    "OLDEST_OPSET",
    "PROTOBUF_LIMIT",
    "attributes",
    "check_model",
    "describe_node",
    "is_constant_node",
    "quote",
    "scopes",
    "sparse_tensors",
    "subgraphs",
    "tensors",
]

# What ONNX Runtime 1.31 reads; 13 is the oldest opset whose shape arguments are all inputs, as in the newest.
MAX_IR_VERSION = 13
MAX_OPSET = 26
MIN_OPSET = 13
OLDEST_OPSET = (
    7  # what is older than MIN_OPSET is converted; ONNX Runtime itself reads nothing older than this
)
PROTOBUF_LIMIT = 2**31 - 1  # bytes of one serialized message

_MAX_RANK = 32  # of NumPy 1; NumPy 2 and ONNX allow more
_MAX_BYTES = 2**63 - 1
_NEWEST_TYPE = ir.DataType.INT2  # of IR version 13

_Attribute = onnx.AttributeProto
_Scope = onnx.GraphProto | onnx.FunctionProto
_Owner = onnx.NodeProto | onnx.FunctionProto

# The field that holds a type's elements when `raw_data` does not; `int32_data` holds all the others.
_TYPED_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}
_ALL_TYPED_FIELDS = (*dict.fromkeys(_TYPED_FIELDS.values()), "int32_data")


def quote(name: object) -> str:
    """``name`` for a message: quoted, shortened, control characters escaped."""
    text = str(name)
    return repr(text if len(text) <= 80 else text[:77] + "...")


def scopes(model: onnx.ModelProto) -> Iterator[_Scope]:
    """Every graph and function of ``model``: the main graph, functions, and all subgraphs of both."""
    pending: list[_Scope] = [*reversed(model.functions), model.graph]
    while pending:
        scope = pending.pop()
        yield scope
        for _, _, attribute in attributes(scope):
            pending.extend(subgraphs(attribute))


def attributes(scope: _Scope) -> Iterator[tuple[str, _Owner, onnx.AttributeProto]]:
    """``(place, owner, attribute)`` of the nodes of ``scope`` (not of subgraphs), and a function's defaults.

    References to a function's attributes hold no value and are left out.
    """
    for node in scope.node:
        for attribute in node.attribute:
            if not attribute.ref_attr_name:
                yield f"attribute {quote(attribute.name)} of {describe_node(node)}", node, attribute
    if isinstance(scope, onnx.FunctionProto):
        for attribute in scope.attribute_proto:
            yield f"attribute {quote(attribute.name)} of function {quote(scope.name)}", scope, attribute


def is_constant_node(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is the standard operator Constant."""
    return node.op_type == "Constant" and node.domain in STANDARD_DOMAINS


def tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """``(place, tensor)`` for every dense tensor, and for the values and indices of every sparse one."""
    for scope in scopes(model):
        if isinstance(scope, onnx.GraphProto):
            for tensor in scope.initializer:
                yield f"initializer {quote(tensor.name)}", tensor
        for place, _, attribute in attributes(scope):
            if attribute.type == _Attribute.TENSOR:
                yield place, attribute.t
            elif attribute.type == _Attribute.TENSORS:
                yield from ((place, tensor) for tensor in attribute.tensors)
    for place, sparse in sparse_tensors(model):
        yield f"values of {place}", sparse.values
        yield f"indices of {place}", sparse.indices


def sparse_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.SparseTensorProto]]:
    """``(place, tensor)`` for every sparse tensor."""
    for scope in scopes(model):
        if isinstance(scope, onnx.GraphProto):
            for sparse in scope.sparse_initializer:
                yield f"sparse initializer {quote(sparse.values.name)}", sparse
        for place, _, attribute in attributes(scope):
            if attribute.type == _Attribute.SPARSE_TENSOR:
                yield place, attribute.sparse_tensor
            elif attribute.type == _Attribute.SPARSE_TENSORS:
                yield from ((place, sparse) for sparse in attribute.sparse_tensors)


def check_model(
    model: onnx.ModelProto, path: Path, embedded: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Path]:
    """Raise unless ``model``, parsed from the file ``path`` without external data, is sound. ``embedded`` has the sizes
    in bytes of the tensors that were cut out of it, by location, see :func:`.embedded.cut_tensors`. Returns the data
    files by location, all links resolved: to be opened by that path, so that no link is followed twice.

    Checked: text is UTF-8; versions; every name that is used is defined, once; types; the size of each tensor
    against its shape; and external data: a regular file that holds the whole region, in the model's folder or
    below, or where symbolic links are in the way, in or below the folder that the model's own link leads to.
    The order of sparse indices is checked where they are read.

    Raises:
        ModelFileError: the file breaks a rule; the message names file, place and remedy.
        HostError: a data file may not be read.
    """
    check = _ModelCheck(path, embedded)
    check.run(model)
    return check.data_files


class _ModelCheck:
    """One run of the checks; keeps the data files it has met, and their sizes."""

    def __init__(self, path: Path, embedded: Mapping[str, int]) -> None:
        self._path = path
        self._embedded = embedded
        self._file_sizes: dict[str, int] = {}
        self.data_files: dict[str, Path] = {}

    def run(self, model: onnx.ModelProto) -> None:
        self._check_text(model)
        self._check_versions(model)
        for scope in scopes(model):
            self._check_types(scope)
        for place, tensor in tensors(model):
            self._check_tensor(tensor, place)
        for place, sparse in sparse_tensors(model):
            self._check_sparse(sparse, place)
        self._check_names(model.graph, ())
        for function in model.functions:
            self._check_names(function, ())

    def _fail(self, place: str, problem: str) -> NoReturn:
        raise ModelFileError(f"{self._path}: {place}: {problem}")

    # Text

    def _check_text(self, message: Any) -> None:
        # The protobuf runtime hands out invalid UTF-8 as bytes. Fields of tensors are listed by hand, because
        # `ListFields` copies what it lists, weights included.
        if isinstance(message, onnx.TensorProto):
            texts: Iterable[Any] = (message.name, message.doc_string)
            children: Iterable[Any] = (*message.external_data, *message.metadata_props)
        else:
            fields = message.ListFields()
            texts = (t for f, v in fields if f.type == f.TYPE_STRING for t in _listed(v))
            children = (m for f, v in fields if f.type == f.TYPE_MESSAGE for m in _listed(v))
        for text in texts:
            if isinstance(text, bytes):
                self._fail(
                    f"text {quote(text)}", "is not valid UTF-8; the file is damaged: copy or export it again"
                )
        for child in children:
            self._check_text(child)

    # Versions

    def _check_versions(self, model: onnx.ModelProto) -> None:
        if model.ir_version < 1:
            self._fail("header", "has no IR version, so this is no ONNX model; export it again")
        if model.ir_version > MAX_IR_VERSION:
            self._fail(
                "header",
                f"IR version {model.ir_version} is too new: ONNX Runtime 1.31 reads up to {MAX_IR_VERSION}; "
                f"re-export with opset <= {MAX_OPSET}",
            )
        opset = self._default_opset(model.opset_import, "model")
        uses_default = any(node.domain in STANDARD_DOMAINS for node in model.graph.node)
        if opset is None and uses_default:
            self._fail("header", "imports no version of the standard operators; export it again")
        if opset is not None and opset < OLDEST_OPSET:
            self._fail(
                "header",
                f"opset {opset} is too old: {OLDEST_OPSET} to {MAX_OPSET} are supported; convert the model with "
                "onnx.version_converter.convert_version(model, 21)",
            )
        for function in model.functions:
            self._default_opset(function.opset_import, f"function {quote(function.name)}")

    def _default_opset(self, imports: Iterable[onnx.OperatorSetIdProto], place: str) -> int | None:
        versions = {entry.version for entry in imports if entry.domain in STANDARD_DOMAINS}
        if len(versions) > 1:
            self._fail(place, "imports two versions of the standard operators; export it again")
        for version in versions:
            if version > MAX_OPSET:
                self._fail(
                    place,
                    f"opset {version} is too new: ONNX Runtime 1.31 reads up to {MAX_OPSET}; "
                    f"re-export with opset <= {MAX_OPSET}",
                )
            return version
        return None

    # Names

    def _check_names(self, scope: _Scope, outer: tuple[set[str], ...]) -> None:
        """Every name read in ``scope`` must be defined there or further out, and none defined twice."""
        place = f"{'graph' if isinstance(scope, onnx.GraphProto) else 'function'} {quote(scope.name)}"
        inputs = [_name(value) for value in scope.input]
        defined = set(inputs)
        if len(defined) < len(inputs):
            self._fail(place, "declares two inputs of the same name; export it again")
        if isinstance(scope, onnx.GraphProto):
            dense = {tensor.name for tensor in scope.initializer}
            sparse = [tensor.values.name for tensor in scope.sparse_initializer]
            if "" in sparse or len({*sparse}) < len(sparse) or dense & {*sparse}:
                self._fail(place, "a sparse initializer has no name, or one that is taken; export it again")
            defined |= dense | {*sparse}
        for node in scope.node:
            for name in filter(None, node.output):
                if name in defined:
                    self._fail(
                        describe_node(node),
                        f"writes {quote(name)}, which is already defined; export it again",
                    )
                defined.add(name)
        known = (defined, *outer)
        for node in scope.node:
            for name in filter(None, node.input):
                if not any(name in names for names in known):
                    self._fail(
                        describe_node(node), f"reads {quote(name)}, which nothing defines; export it again"
                    )
            for attribute in node.attribute:
                for graph in subgraphs(attribute):
                    self._check_names(graph, known)
        for name in map(_name, scope.output):
            if name not in defined:
                self._fail(place, f"output {quote(name)} is not computed in it; export it again")

    # Types

    def _check_types(self, scope: _Scope) -> None:
        infos = list(scope.value_info)
        if isinstance(scope, onnx.GraphProto):
            infos += [*scope.input, *scope.output]
        for info in infos:
            self._check_type(info.type, f"value {quote(info.name)}")
        for place, owner, attribute in attributes(scope):
            if attribute.type == _Attribute.UNDEFINED:
                self._fail(place, "has no type, or one that is too new; export it again")
            for type_proto in (attribute.tp, *attribute.type_protos):
                self._check_type(type_proto, place)
            constant = isinstance(owner, onnx.NodeProto) and is_constant_node(owner)
            if attribute.type == _Attribute.SPARSE_TENSORS or (
                attribute.type == _Attribute.SPARSE_TENSOR and not constant
            ):
                self._fail(place, "sparse tensors are supported as initializers and in Constant nodes only")
        for node in scope.node:
            for attribute in node.attribute:
                if attribute.ref_attr_name and attribute.type in (_Attribute.GRAPH, _Attribute.GRAPHS):
                    self._fail(describe_node(node), "takes a graph from its function; inline the function")
            for device in node.device_configurations:
                if not device.configuration_id or not all(spec.tensor_name for spec in device.sharding_spec):
                    self._fail(
                        describe_node(node), "has a device configuration without names; export it again"
                    )

    def _check_type(self, type_proto: onnx.TypeProto, place: str) -> None:
        kind = type_proto.WhichOneof("value")
        if kind == "map_type":
            self._fail(place, "map types are not supported; export without them (sklearn: zipmap=False)")
        if kind in ("sequence_type", "optional_type"):
            self._check_type(getattr(type_proto, kind).elem_type, place)
        if kind in ("tensor_type", "sparse_tensor_type"):
            number = getattr(type_proto, kind).elem_type
            if not 0 <= number <= _NEWEST_TYPE:
                self._fail(place, f"unknown element type {number}; re-export with opset <= {MAX_OPSET}")

    # Tensors

    def _check_tensor(self, tensor: onnx.TensorProto, place: str) -> None:
        if not 0 < tensor.data_type <= _NEWEST_TYPE:
            self._fail(place, f"unknown element type {tensor.data_type}; re-export with opset <= {MAX_OPSET}")
        if tensor.HasField("segment"):
            self._fail(place, "is stored in segments, which nothing reads; export it again")
        dtype = ir.DataType(tensor.data_type)
        size = self._element_count(tensor.dims, place)
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        stored = self._embedded.get(location, len(tensor.raw_data))
        if dtype == ir.DataType.STRING:
            if tensor.data_location == tensor.EXTERNAL or tensor.HasField("raw_data"):
                self._fail(place, "strings must be in string_data; export it again")
            self._check_typed_data(tensor, dtype, size, place)
            return
        nbytes = -(-size * dtype.bitwidth // 8)
        if nbytes > _MAX_BYTES:
            self._fail(place, f"shape {_shape(tensor.dims)} is too large; the file is damaged")
        if tensor.data_location == tensor.EXTERNAL and location not in self._embedded:
            if size:
                self._check_external(tensor, nbytes, place)
        elif location in self._embedded or tensor.HasField("raw_data"):
            if stored != nbytes or any(len(getattr(tensor, field)) for field in _ALL_TYPED_FIELDS):
                self._fail(
                    place,
                    f"holds {stored} bytes of raw data where shape {_shape(tensor.dims)} of {dtype} takes "
                    f"{nbytes}, or holds its data twice; the file is damaged: copy or export it again",
                )
        else:
            self._check_typed_data(tensor, dtype, size, place)

    def _element_count(self, dims: Iterable[int], place: str) -> int:
        shape = list(dims)
        if len(shape) > _MAX_RANK or any(dim < 0 for dim in shape):
            self._fail(
                place,
                f"shape {_shape(shape)} has a negative or more than {_MAX_RANK} dimensions; "
                "the file is damaged: copy or export it again",
            )
        if math.prod(dim for dim in shape if dim) > _MAX_BYTES:  # NumPy refuses it even with a 0 in it
            self._fail(place, f"shape {_shape(shape)} is too large; the file is damaged")
        return math.prod(shape)

    def _check_typed_data(self, tensor: onnx.TensorProto, dtype: ir.DataType, size: int, place: str) -> None:
        wanted = _TYPED_FIELDS.get(dtype, "int32_data")
        count = size
        if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            count = 2 * size
        elif wanted == "int32_data" and dtype.bitwidth < 8:
            count = -(-size * dtype.bitwidth // 8)  # packed: one byte an entry
        for field in _ALL_TYPED_FIELDS:
            stored = len(getattr(tensor, field))
            if stored != (count if field == wanted else 0):
                self._fail(
                    place,
                    f"holds {stored} entries of {field} where shape {_shape(tensor.dims)} of {dtype} takes "
                    f"{count} of {wanted}; the file is damaged: copy or export it again",
                )

    def _check_sparse(self, sparse: onnx.SparseTensorProto, place: str) -> None:
        nonzeros = list(sparse.values.dims)
        size = self._element_count(sparse.dims, place)
        dtype = ir.DataType(sparse.values.data_type)
        if dtype == ir.DataType.STRING:
            self._fail(place, "sparse strings are not supported; store them densely")
        if size * dtype.bitwidth // 8 > PROTOBUF_LIMIT:
            self._fail(
                place, f"shape {_shape(sparse.dims)} takes more than 2 GiB when dense; store it densely"
            )
        if sparse.indices.data_type not in (
            ir.DataType.INT64,
            ir.DataType.INT32,
            ir.DataType.INT16,
            ir.DataType.INT8,
        ):
            self._fail(place, "indices must be int64; export it again")
        layouts = (nonzeros, [*nonzeros, len(sparse.dims)])
        if len(nonzeros) != 1 or not sparse.dims or list(sparse.indices.dims) not in layouts:
            self._fail(
                place,
                f"values {_shape(nonzeros)} and indices {_shape(sparse.indices.dims)} do not fit shape "
                f"{_shape(sparse.dims)}: values [nnz] and indices [nnz] or [nnz, rank] are wanted",
            )

    # External data

    def _check_external(self, tensor: onnx.TensorProto, nbytes: int, place: str) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) < len(tensor.external_data):
            self._fail(place, "an external data key is given twice; export it again")
        location = entries.get("location", "")
        offset = self._integer(entries.get("offset", "0"), "offset", place)
        length = self._integer(entries.get("length", str(nbytes)), "length", place)
        if length != nbytes:
            self._fail(
                place,
                f"external data length {length} does not match the {nbytes} bytes of shape "
                f"{_shape(tensor.dims)}; export it again",
            )
        if location not in self._file_sizes:
            self.data_files[location], self._file_sizes[location] = self._data_file(location, place)
        size = self._file_sizes[location]
        if offset + length > size:
            self._fail(
                place,
                f"needs bytes {offset} to {offset + length} of data file {quote(location)}, which has only "
                f"{size}; it is cut off or belongs to another model: copy or export it again",
            )

    def _integer(self, text: str, key: str, place: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
            self._fail(place, f"external data {key} {quote(text)} is no byte count; export it again")
        return int(text)

    def _data_file(self, location: str, place: str) -> tuple[Path, int]:
        """The data file and its bytes, after proving that reading it stays inside the model's folder.

        The Hugging Face cache keeps all files of a model in one folder, under the hash of their content, and links to
        them: so a link may lead to where the model's own link leads.
        """
        relative = PurePosixPath(location)
        windows = PureWindowsPath(location)
        where = f"data file {quote(location)}"
        if not relative.parts or "\0" in location:
            self._fail(place, f"external data location {quote(location)} is no file name; export it again")
        if relative.is_absolute() or windows.anchor or ".." in (*relative.parts, *windows.parts):
            self._fail(
                place,
                f"{where} lies outside the model's folder, where nothing is read; move it beside the model "
                "and export again with a relative name",
            )
        file = self._path.parent / relative
        try:
            real = Path(os.path.realpath(file, strict=True))
            folders = (os.path.realpath(self._path.parent), os.path.dirname(os.path.realpath(self._path)))
            if not any(real.is_relative_to(folder) for folder in folders):
                self._fail(
                    place,
                    f"{where} is reached through a symbolic link that leads out of the model's folder, to "
                    f"{quote(real)}, where nothing is read; copy the model with its links resolved (cp -rL)",
                )
            if not stat.S_ISREG(os.lstat(real).st_mode):
                self._fail(place, f"{where} is not a regular file; put the data file there")
            with open(real, "rb", opener=_open_itself) as data:
                status = os.fstat(data.fileno())
            if status.st_nlink > 1:
                self._fail(
                    place,
                    f"{where} has other names (hard links), which may lead outside the model's folder; "
                    "copy the model folder (cp -r) and use the copy",
                )
            return real, status.st_size
        except (FileNotFoundError, NotADirectoryError):
            self._fail(place, f"{where} does not exist; copy it beside the model, or export the model again")
        except PermissionError as error:
            raise HostError(f"{file}: no permission to read it; change its mode or owner") from error
        except OSError as error:
            self._fail(place, f"{where} cannot be read: {error.strerror}")


def _open_itself(path: str, flags: int) -> int:
    """A file that has become a link meanwhile is not opened, one that has become a pipe not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _listed(value: Any) -> Iterable[Any]:
    return (value,) if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value


def subgraphs(attribute: onnx.AttributeProto) -> Iterable[onnx.GraphProto]:
    """The graphs that ``attribute`` holds."""
    if attribute.type == _Attribute.GRAPH:
        return (attribute.g,)
    return attribute.graphs if attribute.type == _Attribute.GRAPHS else ()


def _name(value: str | onnx.ValueInfoProto) -> str:
    return value if isinstance(value, str) else value.name


def describe_node(node: onnx.NodeProto) -> str:
    """What to call ``node`` in a message."""
    return f"node {quote(node.name)} ({quote(node.op_type)[1:-1]})"


def _shape(dims: Iterable[int]) -> str:
    shape = list(dims)
    return str(shape) if len(shape) <= 8 else f"{shape[:8]}..."
