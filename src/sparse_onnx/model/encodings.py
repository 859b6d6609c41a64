"""How the values of a weight are stored, as standard ONNX has it, and the arithmetic of each kind.

===========  =========================================  ============================================
encoding     the graph computes the weight by           value of an element
===========  =========================================  ============================================
`Dense`      nothing                                    the stored float
`Affine`     ``DequantizeLinear`` of stored integers,   (integer - zero point) · scale, both one for
             or of floats that ``QuantizeLinear``       all, for each index of an axis, or for each
             rounds in every run                        block along an axis
`Palette`    ``Gather`` of stored indices from a        codebook[index]
             codebook
`Packed`     a function ``Unpack`` of operators that    as `Affine`, for blocks of inputs
             shift bits, of packed integers
===========  =========================================  ============================================

An encoding decodes a stored array to float32 and encodes values back. Encoding rounds nothing: it takes only values
that the encoding has, and what did not change keeps its integer. So a zero of an `Affine` weight is exactly its zero
point, and a palette without a zero refuses it.

The functions on arrays compute as ONNX Runtime does: in float32, rounding to the nearest, ties to even.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import ModelFileError, UsageError
from sparse_onnx.model.bit_packing import pack, unpack
from sparse_onnx.model.model_io import release_mapping

__all__ = [
    "DENSE",
    "Affine",
    "Dense",
    "Encoding",
    "Packed",
    "Palette",
    "dequantize",
    "find_in_codebook",
    "quantize",
    "restore",
    "spread",
]


def spread(parameters: np.ndarray, shape: tuple[int, ...], axis: int | None, block_size: int) -> np.ndarray:
    """Scales or zero points as an array that broadcasts to ``shape``.

    One number for all (``axis`` None), one for each index of ``axis`` [shape[axis]], or one for each ``block_size``
    elements along ``axis`` [.., ⌈shape[axis] / block_size⌉, ..], of which the last block may be shorter.
    """
    if axis is None:
        return parameters.reshape(())
    if block_size:
        return np.take(parameters, np.arange(shape[axis]) // block_size, axis)
    return parameters.reshape([-1 if index == axis else 1 for index in range(len(shape))])


def dequantize(
    integers: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, result: ir.DataType
) -> np.ndarray:
    """(integers - zero_point) · scale in float32, rounded to the float type ``result``, as float32.

    ``integers`` have at most 16 bits; ``scale`` and ``zero_point`` broadcast to their shape.
    """
    steps = integers.astype(np.int32) - zero_point.astype(np.int32)
    with np.errstate(all="ignore"):  # as the operator: what is too large becomes Inf
        values: np.ndarray = steps.astype(np.float32) * scale.astype(np.float32)
        if result != ir.DataType.FLOAT:
            values = values.astype(result.numpy()).astype(np.float32)
    return values


def quantize(values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """round(values / scale) + zero_point, where that is too large or small for ``dtype`` the largest or smallest of it.

    ``values`` are float32; a quotient that is NaN becomes the zero point. int32 with the values of ``dtype``.
    """
    with np.errstate(all="ignore"):
        steps = np.rint(values / scale.astype(np.float32))
    np.nan_to_num(steps, copy=False, posinf=np.inf, neginf=-np.inf)
    integers: np.ndarray = np.clip(steps + zero_point.astype(np.float32), dtype.min, dtype.max)
    return integers.astype(np.int32)


def restore(
    values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, dtype: ir.DataType, result: ir.DataType
) -> tuple[np.ndarray, np.ndarray]:
    """The integers of ``dtype`` that :func:`dequantize` turns into exactly ``values``, and where there are none."""
    integers = quantize(values, scale, zero_point, dtype)
    missing = dequantize(integers, scale, zero_point, result) != values
    for neighbour in (-1, 1):  # a value that was rounded to a short float may lie nearer to one of them
        if missing.any():
            near = np.clip(integers + neighbour, dtype.min, dtype.max)
            found = missing & (dequantize(near, scale, zero_point, result) == values)
            integers = np.where(found, near, integers)
            missing &= ~found
    return integers.astype(dtype.numpy()), missing


def find_in_codebook(
    values: np.ndarray, codebook: np.ndarray, dtype: ir.DataType
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of ``dtype`` of ``values`` in ``codebook`` [size], and where there are none."""
    codebook = codebook[: int(dtype.max) + 1]  # what an index can reach
    order = np.argsort(codebook, kind="stable")
    if not order.size:
        return np.zeros(values.shape, dtype.numpy()), np.ones(values.shape, bool)
    places = np.searchsorted(codebook, values, sorter=order)
    indices = order[np.minimum(places, order.size - 1)]
    return indices.astype(dtype.numpy()), codebook[indices] != values


def _unchanged(values: np.ndarray, before: np.ndarray) -> np.ndarray:
    same: np.ndarray = (values == before) | (np.isnan(values) & np.isnan(before))
    return same


def _first(values: np.ndarray, missing: np.ndarray) -> str:
    """How many values are missing, and the first of them."""
    return f"{np.count_nonzero(missing)} of {values.size} values, {values[missing][0]:g} for example,"


@dataclasses.dataclass(frozen=True)
class Dense:
    """Floats, as they are."""

    def __str__(self) -> str:
        return "floats"

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """``stored`` itself, in its own float type."""
        return stored

    def encode(self, values: np.ndarray, _stored: np.ndarray) -> np.ndarray:
        """``values`` themselves."""
        return values

    def release(self) -> None:
        """Nothing: there are no other tensors."""


DENSE = Dense()


@dataclasses.dataclass(frozen=True)
class Affine:
    """Integers on a grid.

    Attributes:
        dtype: Of the integers, 16 bits or fewer.
        scale: One number, one for each index of ``axis``, or one for each block along it; see :func:`spread`.
        zero_point: As many integers of ``dtype``; None: zeros.
        axis: The axis along which scales differ, of the stored tensor, not negative; None: there is one scale.
        block_size: Elements of a block along ``axis``; 0: there are no blocks.
        result: The float type that values are rounded to.
        rounded: Whether floats are stored, which become integers in every run.
    """

    dtype: ir.DataType
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None
    axis: int | None
    block_size: int
    result: ir.DataType
    rounded: bool = False

    def __str__(self) -> str:
        what = f"floats rounded to {self.dtype.name} in every run," if self.rounded else self.dtype.name
        if self.axis is None:
            return f"{what} with one scale"
        if self.block_size:
            return f"{what} with a scale for {self.block_size} elements along axis {self.axis}"
        return f"{what} with a scale for each index of axis {self.axis}"

    def grid(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points that broadcast to ``shape``."""
        scale = spread(self.scale.numpy(), shape, self.axis, self.block_size)
        if self.zero_point is None:
            return scale, np.zeros((), np.int32)
        return scale, spread(self.zero_point.numpy(), shape, self.axis, self.block_size)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """The float32 values of a stored array, in its shape. A stored float that is NaN stays NaN."""
        scale, zero_point = self.grid(stored.shape)
        if not self.rounded:
            return dequantize(stored, scale, zero_point, self.result)
        values = dequantize(quantize(stored, scale, zero_point, self.dtype), scale, zero_point, self.result)
        np.copyto(values, np.nan, where=np.isnan(stored))
        return values

    def encode(self, values: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """What to store for float32 ``values`` instead of ``stored``, which has the same shape.

        Raises UsageError if a value that changed is not on the grid.
        """
        same = _unchanged(values, self.decode(stored))
        scale, zero_point = self.grid(stored.shape)
        integers, missing = restore(values, scale, zero_point, self.dtype, self.result)
        missing &= ~same
        if missing.any():
            raise UsageError(
                f"{_first(values, missing)} are not on the grid of {self}; round them to it first"
            )
        return np.where(same, stored, values if self.rounded else integers)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """The values on the grid nearest to float32 ``values``, in the shape of the stored tensor; 0 stays 0."""
        scale, zero_point = self.grid(values.shape)
        return dequantize(quantize(values, scale, zero_point, self.dtype), scale, zero_point, self.result)

    def release(self) -> None:
        """Drop the mapped pages of scales and zero points that lie in a file."""
        release_mapping(self.scale)
        if self.zero_point is not None:
            release_mapping(self.zero_point)


@dataclasses.dataclass(frozen=True)
class Palette:
    """Indices into a ``codebook`` [size] of floats; negative ones count from its end."""

    codebook: ir.TensorProtocol

    def __str__(self) -> str:
        return f"indices into a codebook of {self.codebook.size} values"

    def _values(self) -> np.ndarray:
        return self.codebook.numpy().astype(np.float32)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """The float32 values of a stored array, in its shape.

        Raises ModelFileError if an index lies outside of the codebook.
        """
        indices, size = stored.astype(np.int64), self.codebook.size
        outside = (indices < -size) | (indices >= size)
        if outside.any():
            raise ModelFileError(
                f"index {indices[outside][0]} lies outside of its codebook of {size} values; export the model again"
            )
        values: np.ndarray = self._values()[indices]
        return values

    def encode(self, values: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """What to store for float32 ``values`` instead of ``stored``, which has the same shape.

        Raises UsageError if a value that changed is not in the codebook.
        """
        same = _unchanged(values, self.decode(stored))
        indices, missing = find_in_codebook(values, self._values(), ir.DataType.from_numpy(stored.dtype))
        missing &= ~same
        if missing.any():
            raise UsageError(
                f"{_first(values, missing)} are not in its codebook of {self.codebook.size} values"
            )
        return np.where(same, stored, indices)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """The values of the codebook that are nearest to float32 ``values``."""
        book = np.sort(self._values())
        places = np.searchsorted((book[1:] + book[:-1]) / 2, values)
        found: np.ndarray = book[places]
        return found

    def release(self) -> None:
        """Drop the mapped pages of a codebook that lies in a file."""
        release_mapping(self.codebook)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Integers of ``bits`` (2, 3, 4 or 8) in bytes, as :mod:`~sparse_onnx.model.bit_packing` has them. They stand for a
    matrix [K, N], whatever the shape of the bytes.

    Attributes:
        inputs: K.
        group_size: Inputs that share a scale.
        scale: float32 or float16 [groups, 1, N].
        zero_point: Packed integers, one for each scale; None: 2^(bits - 1) everywhere.
        result: The float type that values are rounded to.
    """

    bits: int
    inputs: int
    group_size: int
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None
    result: ir.DataType

    def __str__(self) -> str:
        zeros = "" if self.zero_point is None else " and a zero point"
        return f"{self.bits} bits with a scale{zeros} for {self.group_size} inputs"

    @property
    def dims(self) -> tuple[int, int]:
        """(K, N)."""
        return self.inputs, int(self.scale.shape.numpy()[-1])

    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points of every element, [K, N]."""
        scale = self.scale.numpy()[:, 0]
        index = np.arange(self.inputs) // self.group_size
        if self.zero_point is None:
            return scale[index], np.array(1 << self.bits - 1, np.int32)
        return scale[index], unpack(self.zero_point.numpy(), self.bits, len(scale))[index]

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """The float32 values [K, N] of stored bytes."""
        return dequantize(unpack(stored, self.bits, self.inputs), *self._grid(), self.result)

    def encode(self, values: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """What to store for float32 ``values`` [K, N] instead of ``stored``.

        Raises UsageError if a value that changed is not on the grid.
        """
        same = _unchanged(values, self.decode(stored))
        integers, missing = restore(values, *self._grid(), ir.DataType.UINT8, self.result)
        missing = (missing | (integers >= 1 << self.bits)) & ~same
        if missing.any():
            raise UsageError(
                f"{_first(values, missing)} are not on the grid of {self}; round them to it first"
            )
        padded = np.zeros((len(self.scale.numpy()) * self.group_size, stored.shape[2]), np.uint8)
        padded[: self.inputs] = np.where(same, unpack(stored, self.bits, self.inputs), integers)
        return pack(padded, self.bits)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """The values on the grid nearest to float32 ``values`` [K, N]; 0 stays 0."""
        scale, zero_point = self._grid()
        steps = np.rint(values / scale.astype(np.float32)) + zero_point
        integers = np.clip(steps, 0, (1 << self.bits) - 1).astype(np.int32)
        return dequantize(integers, scale, zero_point, self.result)

    def release(self) -> None:
        """Drop the mapped pages of scales and zero points that lie in a file."""
        release_mapping(self.scale)
        if self.zero_point is not None:
            release_mapping(self.zero_point)


Encoding: TypeAlias = Dense | Affine | Palette | Packed
