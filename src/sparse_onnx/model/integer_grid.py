"""The integers of a weight as a matrix, however it is stored: what other ways to store them are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from sparse_onnx.model.bit_packing import unpack
from sparse_onnx.model.encodings import Affine, Packed, quantize, spread
from sparse_onnx.model.weights import Weight

__all__ = ["IntegerGrid", "read_grid"]


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerGrid:
    """W [K, N] = (``integers`` - ``zero_point``) · ``scale``, of 2, 3, 4 or 8 ``bits``.

    ``scale`` [groups, N] float32 and ``zero_point`` [groups, N] uint8 hold for ``group_size`` inputs each, the last
    group for the rest. ``read`` gives the integers, uint8 [K, N]: a grid is known without them.
    """

    bits: int
    inputs: int
    read: Callable[[], np.ndarray]
    scale: np.ndarray
    zero_point: np.ndarray
    group_size: int

    @functools.cached_property
    def integers(self) -> np.ndarray:
        """uint8 [K, N]; zero is never negative."""
        return self.read()

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are the middle, 2^(bits - 1)."""
        return bool((self.zero_point == 1 << self.bits - 1).all())


def read_grid(weight: Weight, *, rounded: bool = False) -> IntegerGrid | str:
    """The integers of ``weight``, or the reason why there are none. With ``rounded``, those of floats that the graph
    rounds in every run, too."""
    encoding, stored = weight.encoding, weight.tensor.numpy()
    if isinstance(encoding, Packed):
        scale = encoding.scale.numpy()[:, 0].astype(np.float32)
        middle = np.full(scale.shape, 1 << encoding.bits - 1, np.uint8)
        zeros = encoding.zero_point
        zero_point = middle if zeros is None else unpack(zeros.numpy(), encoding.bits, len(scale))
        return IntegerGrid(
            encoding.bits,
            encoding.inputs,
            lambda: weight.in_order(unpack(stored, encoding.bits, encoding.inputs)),
            scale,
            zero_point,
            encoding.group_size,
        )
    if not isinstance(encoding, Affine) or (encoding.rounded and not rounded):
        return f"is stored as {encoding}"
    if encoding.rounded and not np.isfinite(stored).all():
        return "has NaN or Inf, which become integers by no rule"
    bits = encoding.dtype.bitwidth
    if bits not in (4, 8):
        return f"has integers of {encoding.dtype.name}"
    shift = 1 << bits - 1 if encoding.dtype.is_signed() else 0
    scale, zero_point = encoding.grid(stored.shape)
    size = _group_size(weight, encoding, stored.shape)
    if size is None:
        return "has scales that are not of groups of inputs"
    scale, zero_point = (weight.in_order(np.broadcast_to(part, stored.shape)) for part in (scale, zero_point))
    return IntegerGrid(
        bits,
        weight.shape[0],
        lambda: (weight.in_order(_integers(encoding, stored)).astype(np.int16) + shift).astype(np.uint8),
        np.ascontiguousarray(scale[::size], np.float32),
        (zero_point[::size].astype(np.int16) + shift).astype(np.uint8),
        size,
    )


def _integers(encoding: Affine, stored: np.ndarray) -> np.ndarray:
    if not encoding.rounded:
        return stored
    return quantize(np.asarray(stored, np.float32), *encoding.grid(stored.shape), encoding.dtype)


def _group_size(weight: Weight, encoding: Affine, shape: tuple[int, ...]) -> int | None:
    """How many inputs share their scales; None: scales do not differ in groups of inputs."""
    K = weight.shape[0]
    if encoding.axis is None:
        return K
    count = np.arange(encoding.scale.size).reshape(encoding.scale.shape.numpy())
    index = np.broadcast_to(spread(count, shape, encoding.axis, encoding.block_size), shape)
    which = weight.in_order(index)  # of the scales each element of W has
    changes = np.flatnonzero((which[1:] != which[:-1]).any(axis=1)) + 1
    size = int(changes[0]) if len(changes) else K
    return size if np.array_equal(changes, np.arange(size, K, size)) else None
