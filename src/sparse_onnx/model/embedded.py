"""Weights inside a model file, read where they lie: the file is walked in its wire format, and never parsed whole.

:func:`cut_tensors` gives the bytes of a model whose large tensors refer to regions of its own file; parsed, they are a
model of a few kilobytes. :class:`EmbeddedTensor` maps such a region.

Source: the protocol buffers encoding specification, and ``onnx.proto``.
"""

from __future__ import annotations

import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparse_onnx.errors import ModelFileError

__all__ = ["EmbeddedTensor", "FileStamp", "Region", "cut_tensors", "file_stamp"]

_MIN_BYTES = 4096  # tensors below this size stay in the message
_MAX_DEPTH = 100  # of nested messages, as in the protobuf runtimes

# Which fields of a message hold messages that may hold tensors.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse tensor",
        23: "sparse tensor",
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
}
_DATA_TYPE, _RAW_DATA, _LOCATION = 2, 9, 14
# Packed fields whose bytes are those of raw data, and the types that use them.
_PACKED = {
    4: (onnx.TensorProto.FLOAT, onnx.TensorProto.COMPLEX64),
    10: (onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX128),
}
_OTHER_DATA = (3, 5, 6, 7, 11, 13)  # segments, elements of other types, external data
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Region:
    """``length`` bytes of a file from ``offset`` on."""

    offset: int
    length: int


FileStamp = tuple[int, int, int, int]


def file_stamp(status: os.stat_result) -> FileStamp:
    """What changes when a file is written or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class EmbeddedTensor(ir.ExternalTensor):
    """A tensor of a model file, mapped when it is used. Its array is aligned: a copy where the file's bytes are not.

    ``stamp`` is the :func:`file_stamp` of the file that ``region`` was found in: using the tensor when it is another
    one raises ModelFileError.
    """

    __slots__ = ("_stamp",)

    def __init__(self, path: Path, region: Region, like: ir.ExternalTensor, stamp: FileStamp) -> None:
        super().__init__(
            path,
            region.offset,
            region.length,
            like.dtype,
            shape=ir.Shape(like.shape.numpy()),
            name=like.name,
            doc_string=like.doc_string,
            metadata_props=dict(like.metadata_props),
        )
        self._stamp = stamp

    def _prove_unchanged(self) -> None:
        try:
            unchanged = file_stamp(os.stat(self.path)) == self._stamp
        except OSError:
            unchanged = False
        if not unchanged:
            raise ModelFileError(f"{self.path}: has changed or vanished while it was read; start again")

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype)

    def tofile(self, file: Any) -> None:
        self._prove_unchanged()
        super().tofile(file)

    def numpy(self) -> np.ndarray:
        self._prove_unchanged()
        if self._array is None:
            array = super().numpy()
            if not array.flags.aligned:
                copy = array.copy()
                copy.flags.writeable = False
                del array
                self.release()
                self._array = copy
        return super().numpy()

    def tobytes(self) -> bytes:
        self._prove_unchanged()
        if self.raw is None:
            self._array = None  # a copy; it is mapped anew
        return super().tobytes()


def cut_tensors(file: mmap.mmap | bytes) -> tuple[bytes, dict[str, Region]]:
    """The model message ``file`` with every large dense tensor made external, and where their bytes lie.

    The regions are keyed by the location that the tensor then has, which no file can have guessed. A message that is
    damaged, or of a form that no writer uses, stays whole: the parser judges it.
    """
    cutter = _Cutter(file)
    try:
        pieces = cutter.message(0, len(file), "model", 0)
    except _MalformedError:
        return bytes(file), {}
    return b"".join(file[piece] if isinstance(piece, slice) else piece for piece in pieces), cutter.regions


class _MalformedError(Exception):
    pass


_Pieces = list[slice | bytes]


class _Cutter:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._prefix = f"\0{secrets.token_hex(8)}:"
        self.regions: dict[str, Region] = {}

    def message(self, start: int, end: int, kind: str, depth: int) -> _Pieces:
        """What the message between ``start`` and ``end`` becomes."""
        if depth > _MAX_DEPTH:
            raise _MalformedError
        if kind == "tensor":
            return self._tensor(start, end)
        children = _CHILDREN[kind]
        pieces: _Pieces = []
        copied = position = start
        while position < end:
            begin = position
            number, wire, content, position = self._field(position, end)
            if number in children and wire == _BYTES and position - content >= _MIN_BYTES:
                child = self.message(content, position, children[number], depth + 1)
                size = sum(
                    piece.stop - piece.start if isinstance(piece, slice) else len(piece) for piece in child
                )
                if size != position - content:  # smaller: something was cut
                    pieces += [slice(copied, begin), _header(number, size), *child]
                    copied = position
        return [*pieces, slice(copied, end)]

    def _tensor(self, start: int, end: int) -> _Pieces:
        fields: dict[int, list[tuple[int, int, int, int]]] = {}
        position = start
        while position < end:
            begin = position
            number, wire, content, position = self._field(position, end)
            fields.setdefault(number, []).append((begin, wire, content, position))
        data = [(number, field) for number in (_RAW_DATA, *_PACKED) for field in fields.get(number, ())]
        if len(data) != 1 or any(number in fields for number in (*_OTHER_DATA, _LOCATION)):
            return [slice(start, end)]
        number, (begin, wire, content, stop) = data[0]
        types = [self._varint(field[2], field[3])[0] for field in fields.get(_DATA_TYPE, ())]
        fits = number == _RAW_DATA or (len(types) == 1 and types[0] in _PACKED[number])
        if wire != _BYTES or stop - content < _MIN_BYTES or not fits:
            return [slice(start, end)]
        location = f"{self._prefix}{len(self.regions)}"
        self.regions[location] = Region(content, stop - content)
        stand_in = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", str(content)), ("length", str(stop - content))):
            stand_in.external_data.add(key=key, value=value)
        return [slice(start, begin), stand_in.SerializeToString(), slice(stop, end)]

    def _field(self, position: int, end: int) -> tuple[int, int, int, int]:
        """Number, wire type, start of the content and end of the field at ``position``."""
        tag, content = self._varint(position, end)
        wire = tag & 7
        if wire == _VARINT:
            stop = self._varint(content, end)[1]
        elif wire == _BYTES:
            length, content = self._varint(content, end)
            stop = content + length
        elif wire in (_FIXED32, _FIXED64):
            stop = content + (8 if wire == _FIXED64 else 4)
        else:
            raise _MalformedError
        if stop > end or not tag >> 3:
            raise _MalformedError
        return tag >> 3, wire, content, stop

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                break
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise _MalformedError


def _header(number: int, size: int) -> bytes:
    """Tag and length of a field that holds a message of ``size`` bytes."""
    return _encode(number << 3 | _BYTES) + _encode(size)


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
