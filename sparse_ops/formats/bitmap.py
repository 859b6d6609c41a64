"""``bitmap``: the weights that are not zero in the order of W, and one bit for every weight that says whether it is.

======  =======  ===============  ==================================================================
part    dtype    shape            meaning
======  =======  ===============  ==================================================================
values  float32  [entries]        stored weights, row by row of W [K, N]
mask    uint8    [ceil(K·N / 8)]  bit i of byte b is weight 8·b + i of W, flat; bits behind W are 0
======  =======  ===============  ==================================================================

Sizes: K and N. Where nothing is kept, one zero is. Cost: 4 bytes an entry and 1 bit a weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_onnx.sparse_ops.formats.base import ONE_RUN, FormatError, Outputs, Packed, Part, StoredFormat

__all__ = ["BITMAP", "Bitmap", "PackedBitmap"]

_NAME = "bitmap"

_DECODER = """
    k = Constant<value_int: int = @K>()
    n = Constant<value_int: int = @N>()
    zero = Constant<value = int64 {0}>()
    one_32 = Constant<value = int32 {1}>()
    two_32 = Constant<value = int32 {2}>()
    axis0 = Constant<value = int64[1] {0}>()
    flat_shape = Constant<value = int64[1] {-1}>()
    column_shape = Constant<value = int64[2] {-1, 1}>()
    powers = Constant<value = int32[8] {1, 2, 4, 8, 16, 32, 64, 128}>()
    k_1 = Unsqueeze(k, axis0)
    n_1 = Unsqueeze(n, axis0)
    size_1 = Mul(k_1, n_1)
    bytes_32 = Cast<to = 6>(mask)
    byte_column = Reshape(bytes_32, column_shape)
    moved_bits = Div(byte_column, powers)
    bit_grid = Mod(moved_bits, two_32)
    all_bits = Reshape(bit_grid, flat_shape)
    bits = Slice(all_bits, axis0, size_1, axis0)
    seen = CumSum(bits, zero)
    less = Sub(seen, one_32)
    none_32 = Sub(one_32, one_32)
    place = Max(less, none_32)
    kept = Cast<to = 9>(bits)
    taken = Gather<axis = 0>(values, place)
    nothing = Constant<value = float {0.0}>()
    flat = Where(kept, taken, nothing)
    shape = Concat<axis = 0>(k_1, n_1)
    W = Reshape(flat, shape)
"""


@dataclass(frozen=True)
class PackedBitmap(Packed):
    """A weight in this format; see the module's table for the arrays."""

    K: int
    N: int
    values: np.ndarray
    mask: np.ndarray
    split: tuple[int, ...] = ()

    @property
    def stored_format(self) -> StoredFormat:
        return BITMAP

    @property
    def shape(self) -> tuple[int, int]:
        return self.K, self.N

    @property
    def linears(self) -> tuple[int, ...]:
        return self.split or (self.N,)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"values": self.values, "mask": self.mask}

    def attributes(self) -> dict[str, int | str]:
        return {"K": self.K, "N": self.N, "format": _NAME}

    def validate(self) -> None:
        size = self.K * self.N
        if self.mask.shape != (-(-size // 8),):
            raise FormatError(f"mask must have {-(-size // 8)} bytes, a bit for each of {size} weights")
        bits = np.unpackbits(self.mask, bitorder="little")
        if bits[size:].any():
            raise FormatError("mask has bits behind the last weight")
        if self.values.shape != (max(1, int(bits.sum())),):
            raise FormatError(f"values must have {max(1, int(bits.sum()))} elements, the bits of mask")

    def unpack(self) -> np.ndarray:
        self.validate()
        kept = np.unpackbits(self.mask, count=self.K * self.N, bitorder="little").astype(bool)
        dense = np.zeros(self.K * self.N, np.float32)
        dense[kept] = self.values[: np.count_nonzero(kept)]
        return dense.reshape(self.K, self.N)


class Bitmap(StoredFormat):
    """See the module's docstring."""

    def pack(self, weight: np.ndarray, outputs: Outputs = ONE_RUN) -> PackedBitmap:
        if weight.ndim != 2 or weight.dtype != np.float32 or 0 in weight.shape:
            raise ValueError(
                f"pack() takes a non-empty float32 matrix [K, N], not {weight.dtype}{list(weight.shape)}"
            )
        kept = (weight != 0).reshape(-1)
        values = np.ascontiguousarray(weight).reshape(-1)[kept]
        values = values if values.size else np.zeros(1, np.float32)
        return PackedBitmap(*weight.shape, values, np.packbits(kept, bitorder="little"))

    def read(
        self, variant: str, sizes: Mapping[str, int], arrays: Sequence[np.ndarray], split: Sequence[int]
    ) -> PackedBitmap:
        return PackedBitmap(sizes["K"], sizes["N"], *arrays, split=tuple(split))

    def may_join(self, sizes: Mapping[str, int], widest: Mapping[str, int]) -> bool:
        return sizes["K"] == widest["K"]

    def join(self, weights: Sequence[Packed]) -> PackedBitmap:
        if len({weight.shape[0] for weight in weights}) > 1:
            raise ValueError("join() takes weights with equal K")
        whole = self.pack(np.concatenate([weight.unpack() for weight in weights], axis=1))
        return PackedBitmap(
            *whole.shape, whole.values, whole.mask, tuple(weight.shape[1] for weight in weights)
        )

    def decoder(self, prefix: str = "", *, count: int = 1, linears: str = "") -> str:
        text = _DECODER + linears
        names = "|".join(("values", "mask", *re.findall(r"^ *(\w+) = ", text, re.MULTILINE)))
        return re.sub(rf"@|\b(?=(?:{names})\b)", rf"\g<0>{prefix}", text) if prefix else text

    def expected_nbytes(
        self, K: int, N: int, sparsity: float, outputs: Outputs = ONE_RUN, *, together: int = 1
    ) -> float:
        return 4 * (1 - sparsity) * K * N + K * N / 8

    def kernel(self, stored: Sequence[Mapping[str, int]], rows: int) -> str:
        raise FormatError("no kernel computes weights in the format bitmap yet")


BITMAP = Bitmap(
    variants=(_NAME,),
    word="Bitmap",
    parts=(Part("values", np.float32), Part("mask", np.uint8)),
    sizes=("K", "N"),
    max_elements=2**31 - 2**24,
)
