"""Weights of ``com.microsoft::MatMulNBits``: packed integers of 2, 4 or 8 bits with a scale for every block of inputs.

The operator stores W [K, N] by outputs: B uint8 [N, blocks, block bytes], the inputs of an output in turn, the lowest
bits of a byte first. The last block of an output may be longer than what is left of K: what lies behind K is padding
and stays as it is. Scales are [N · blocks]; zero points are packed like B, each output's in bytes of their own, and
without them zero is the middle, 2^(bits - 1).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.constants import constant_tensor, tensor_shape
from sparse_onnx.model.encodings import dequantize, quantize, restore
from sparse_onnx.model.graph import input_at
from sparse_onnx.model.model_io import release_mapping

__all__ = ["PackedBlocks", "pack_bits", "read_packed_blocks", "unpack_bits"]

Shape = tuple[int, ...]

_TYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_SCALES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ZERO_POINTS, _ORDER = 3, 4


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` integers of ``bits`` bits (2, 4 or 8) in the last axis of ``packed`` [.., bytes] uint8, the
    lowest bits first: [.., count] uint8."""
    if bits == 8:
        return packed[..., :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)[..., :count]


def pack_bits(integers: np.ndarray, bits: int) -> np.ndarray:
    """What :func:`unpack_bits` reads: [.., bytes] of ``integers`` [.., count] uint8 below 2^bits, the rest of the last
    byte 0."""
    if bits == 8:
        return integers
    each = 8 // bits
    padding = [(0, 0)] * (integers.ndim - 1) + [(0, -integers.shape[-1] % each)]
    parts = np.pad(integers, padding).reshape(*integers.shape[:-1], -1, each)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return packed


@dataclasses.dataclass(frozen=True)
class PackedBlocks:
    """Packed integers; see the module's docstring. An array is stored as [outputs, blocks, block bytes] uint8 and
    stands for W' [outputs, inputs]: value = (integer - zero point) · scale.

    Attributes:
        bits: Of an integer: 2, 4 or 8.
        block_size: Inputs that share a scale.
        inputs, outputs: K and N.
        scale: [outputs · blocks] or [outputs, blocks].
        zero_point: uint8, packed for every output; None: all are 2^(bits - 1).
    """

    bits: int
    block_size: int
    inputs: int
    outputs: int
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None

    def __str__(self) -> str:
        return f"{self.dtype.name} with a scale for {self.block_size} inputs"

    @property
    def dims(self) -> Shape:
        """Of W'."""
        return self.outputs, self.inputs

    @property
    def dtype(self) -> ir.DataType:
        """Of the integers, once they are unpacked."""
        return _TYPES[self.bits]

    @property
    def blocks(self) -> int:
        """Of an output."""
        return -(-self.inputs // self.block_size)

    def by_block(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points, [outputs, blocks] each; a scale may be negative, as ONNX Runtime's quantizer makes
        them where the largest weight of a block is negative."""
        shape = (self.outputs, self.blocks)
        scale = self.scale.numpy().reshape(shape)
        if self.zero_point is None:
            zero_point = np.full(shape, 2 ** (self.bits - 1), np.uint8)
        else:
            zero_point = unpack_bits(
                self.zero_point.numpy().reshape(self.outputs, -1), self.bits, self.blocks
            )
        return scale, zero_point

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points, [outputs, inputs] each."""
        places = np.arange(self.inputs) // self.block_size
        scale, zero_point = self.by_block()
        return scale[:, places], zero_point[:, places]

    def integers(self, stored: np.ndarray) -> np.ndarray:
        """Those of a stored array, uint8 [outputs, inputs]."""
        flat = unpack_bits(stored, self.bits, self.block_size).reshape(self.outputs, -1)
        return flat[:, : self.inputs]

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """The float32 values [outputs, inputs] of a stored array."""
        return dequantize(self.integers(stored), *self.grid(), ir.DataType.FLOAT)

    def encode(self, values: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """What to store for float32 ``values`` [outputs, inputs] instead of ``stored``.

        Raises UsageError if a value that changed is not on the grid.
        """
        scale, zero_point = self.grid()
        before = self.integers(stored)
        same = values == dequantize(before, scale, zero_point, ir.DataType.FLOAT)
        integers, missing = restore(values, scale, zero_point, self.dtype, ir.DataType.FLOAT)
        missing &= ~same
        if missing.any():
            raise UsageError(
                f"{np.count_nonzero(missing)} of {values.size} values are not on the grid of {self}; round them first"
            )
        unpacked = np.array(unpack_bits(stored, self.bits, self.block_size)).reshape(self.outputs, -1)
        unpacked[:, : self.inputs] = np.where(same, before, integers.astype(np.uint8))
        return pack_bits(unpacked.reshape(self.outputs, self.blocks, -1), self.bits)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """The values on the grid that are nearest to float32 ``values`` [outputs, inputs]; 0 stays 0."""
        scale, zero_point = self.grid()
        return dequantize(
            quantize(values, scale, zero_point, self.dtype), scale, zero_point, ir.DataType.FLOAT
        )

    def scales(self) -> np.ndarray:
        """All scales, in some order."""
        return self.scale.numpy()

    def release(self) -> None:
        """Drop the mapped pages of scales and zero points that lie in a file."""
        release_mapping(self.scale)
        if self.zero_point is not None:
            release_mapping(self.zero_point)


def read_packed_blocks(node: ir.Node, tensor: ir.TensorProtocol) -> PackedBlocks | str:
    """How a ``MatMulNBits`` reads its weight ``tensor``, or the reason why that cannot be said.

    Sizes that the node claims are held to the sizes of the tensors before anything is computed with them.
    """
    names = ("bits", "block_size", "K", "N")
    bits, block_size, K, N = (node.attributes.get_int(name, 4 if name == "bits" else 0) for name in names)
    if bits not in _TYPES:
        return f"has {bits} bits; 2, 4 and 8 are known"
    if block_size < 16 or block_size & (block_size - 1):
        return f"has a block_size of {block_size}, which is no power of 2 from 16 on"
    if K < 1 or N < 1:
        return f"has K = {K} and N = {N}"
    blocks = -(-K // block_size)
    expected = (N, blocks, block_size * bits // 8)
    if tensor.dtype != ir.DataType.UINT8 or tensor_shape(tensor) != expected:
        return (
            f"has {tensor.dtype.name} of shape {tensor_shape(tensor)}, where K = {K}, N = {N}, {bits} bits and "
            f"block_size {block_size} need UINT8 of {expected}"
        )
    if input_at(node, _ORDER) is not None:
        return "has its inputs in another order, given by g_idx"
    scale = constant_tensor(input_at(node, 2))
    if scale is None:
        return "has a scale that is no constant"
    if scale.dtype not in _SCALES or tensor_shape(scale) not in ((N * blocks,), (N, blocks)):
        return f"has scales {scale.dtype.name} of shape {tensor_shape(scale)}, not ({N * blocks},)"
    zero_point = None
    if (value := input_at(node, _ZERO_POINTS)) is not None:
        zero_point = constant_tensor(value)
        if zero_point is None:
            return "has a zero point that is no constant"
        each = -(-blocks * bits // 8)
        if zero_point.dtype != ir.DataType.UINT8 or tensor_shape(zero_point) not in ((N * each,), (N, each)):
            found = f"{zero_point.dtype.name} of shape {tensor_shape(zero_point)}"
            return f"has zero points {found}, not UINT8 of ({N * each},)"
    return PackedBlocks(bits, block_size, K, N, scale, zero_point)
