"""Grids of few bits: the scale and zero point of every group of weights, and the integers on them.

A group is ``group_size`` consecutive inputs of one output channel (Gholami et al. 2021, section III.B, groups as in
GPTQ, Frantar et al. 2023). Its weights are (q − z) · s: the scale s is a float, q and the zero point z are integers of
the same few bits, so the weight 0 is q = z exactly, and a pruned weight stays 0.

Scales are rounded to the type that will store them before any integer is chosen: the integers are then the best ones
for the scale that the model really has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sparse_onnx.errors import UsageError
from sparse_onnx.options import check_types, require

__all__ = [
    "Grid",
    "GridOptions",
    "QuantizedMatrix",
    "fitted_grid",
    "round_to_grid",
    "stored_scale",
]

ScaleType = Literal["float32", "float16"]

_FLOAT16 = (2.0**-24, 65504.0)  # the smallest, which is subnormal there and exact, and the largest


@dataclasses.dataclass(frozen=True)
class GridOptions:
    """What grid is allowed.

    Attributes:
        bits: Of an integer, 2 to 8.
        group_size: Inputs that share a scale, 16 to 256 (the last group may be shorter); 0: all inputs of an output.
        symmetric: Zero points are 0 and integers signed; otherwise every group has its own zero point.
        scale_type: How scales will be stored: they are rounded to that.
    """

    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    scale_type: ScaleType = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        require(2 <= self.bits <= 8, "bits", self.bits, "2 to 8")
        require(
            self.group_size == 0 or 16 <= self.group_size <= 256,
            "group_size",
            self.group_size,
            "16 to 256, or 0 for one scale for each output channel",
        )

    @property
    def lowest(self) -> int:
        """The smallest integer: -2^(bits-1) if symmetric, else 0."""
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest integer: 2^(bits-1) - 1 if symmetric, else 2^bits - 1."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def dtype(self) -> type[np.int8 | np.uint8]:
        """Of integers and zero points: int8 if symmetric, else uint8."""
        return np.int8 if self.symmetric else np.uint8

    def span(self, inputs: int) -> int:
        """How many of ``inputs`` share a scale."""
        return min(self.group_size, inputs) or inputs

    def groups(self, inputs: int) -> int:
        """How many groups ``inputs`` make."""
        return -(-inputs // self.span(inputs))

    def starts(self, inputs: int) -> np.ndarray:
        """The first input of every group: [groups]."""
        return np.arange(0, inputs, self.span(inputs))


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points of a weight [K, N], both [groups, N]: float32, positive and of the stored type; ``dtype``
    of ``options``. Group i of size g holds the inputs i·g to min((i+1)·g, K) - 1."""

    scale: np.ndarray
    zero_point: np.ndarray
    options: GridOptions

    def of_inputs(self, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of every weight, [K, N]: float32."""
        index = np.arange(inputs) // self.options.span(inputs)
        return self.scale[index], self.zero_point[index].astype(np.float32)

    def levels(
        self, inputs: int, kept: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scale, lowest and highest *level* of every weight, [K, N] float32 each; a level is q − z, so the weight is
        level · scale. Where ``kept`` bool [K, N] is False the only level is 0."""
        scale, zero = self.of_inputs(inputs)
        low, high = self.options.lowest - zero, self.options.highest - zero
        if kept is not None:
            low *= kept
            high *= kept
        return scale, low, high

    def at(self, levels: np.ndarray) -> QuantizedMatrix:
        """The matrix of these ``levels`` [K, N], float32 whole numbers within what :meth:`levels` says."""
        _, zero = self.of_inputs(len(levels))
        return QuantizedMatrix(
            (levels + zero).astype(self.options.dtype), self.scale, self.zero_point, self.options
        )


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A weight [K, N] as integers: what every solver of weight quantization returns.

    Attributes:
        integers: [K, N], int8 in -2^(bits-1) .. 2^(bits-1) - 1 (the full range) if symmetric, uint8 in
            0 .. 2^bits - 1 otherwise.
        scale: [groups, N] float32, positive and finite, already rounded to ``options.scale_type``.
        zero_point: [groups, N], dtype and range of ``integers``; zeros if symmetric.
        options: The grid. Group i of size g holds inputs i·g .. min((i+1)·g, K) - 1: the last may be shorter.

    Raises UsageError for arrays that do not fit ``options`` and each other, or scales that are not positive and finite.
    """

    integers: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    options: GridOptions

    def __post_init__(self) -> None:
        options = self.options
        if self.integers.ndim != 2 or not self.integers.size:
            raise UsageError(f"integers must be [K, N] and not empty, not {list(self.integers.shape)}")
        shape = (options.groups(len(self.integers)), self.integers.shape[1])
        for name, part in (("scale", self.scale), ("zero_point", self.zero_point)):
            if part.shape != shape:
                raise UsageError(f"{name} must be {list(shape)}, not {list(part.shape)}")
        for name, part in (("integers", self.integers), ("zero_point", self.zero_point)):
            if part.dtype != options.dtype:
                raise UsageError(f"{name} must be {np.dtype(options.dtype)}, not {part.dtype}")
            if part.min() < options.lowest or part.max() > options.highest:
                raise UsageError(f"{name} must lie in {options.lowest} to {options.highest}")
        if self.scale.dtype != np.float32 or not (np.isfinite(self.scale) & (self.scale > 0)).all():
            raise UsageError("scale must be float32, positive and finite")
        if options.symmetric and self.zero_point.any():
            raise UsageError("zero_point must be 0 where the grid is symmetric")

    @classmethod
    def side_by_side(cls, parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
        """The outputs of all ``parts``, which have the same inputs and options."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.integers for part in parts], axis=1),
            np.concatenate([part.scale for part in parts], axis=1),
            np.concatenate([part.zero_point for part in parts], axis=1),
            parts[0].options,
        )

    @property
    def grid(self) -> Grid:
        """Its scales and zero points."""
        return Grid(self.scale, self.zero_point, self.options)

    def matrix(self) -> np.ndarray:
        """The weight that the integers stand for: [K, N] float32, (integers - zero_point) · scale."""
        scale, zero = self.grid.of_inputs(len(self.integers))
        return np.asarray((self.integers - zero) * scale, np.float32)


def stored_scale(scale: np.ndarray, options: GridOptions) -> np.ndarray:
    """``scale`` (not negative, any float type) rounded to ``options.scale_type``, as float32 of the same shape.

    What is too small for the type becomes its smallest positive value: 2^-24 for float16, the smallest normal number
    for float32. Raises UsageError for what is too large (above 65504; 2^-bits of the largest float32).
    """
    half = options.scale_type == "float16"
    smallest, largest = (
        _FLOAT16
        if half
        else (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max) / 2**options.bits)
    )
    if scale.size and not (top := float(scale.max())) <= largest:
        hint = "store scales as float32, or leave the weight out" if half else "leave the weight out"
        raise UsageError(
            f"a group of weights needs the scale {top:.3g}, above {largest:.3g}, the largest {options.scale_type}"
            f" scale: {hint}"
        )
    rounded = scale.astype(np.float16 if half else np.float32).astype(np.float32)
    return np.maximum(rounded, np.float32(smallest))


def fitted_grid(low: np.ndarray, high: np.ndarray, options: GridOptions) -> Grid:
    """The grid that just holds the weights from ``low`` to ``high`` of every group, [groups, N] each; 0 is always held.

    Symmetric: s = max(−low / 2^(bits-1), high / (2^(bits-1) − 1)). Asymmetric: s = (high − low) / (2^bits − 1) and
    z = round(−low / s). A group of zeros has the scale 1.
    """
    low = np.minimum(low.astype(np.float64), 0)
    high = np.maximum(high.astype(np.float64), 0)
    if options.symmetric:
        needed = np.maximum(low / options.lowest, high / options.highest)
    else:
        needed = (high - low) / options.highest
    scale = stored_scale(np.where(needed > 0, needed, 1.0), options)
    zero_point = np.zeros(scale.shape, options.dtype)
    if not options.symmetric:
        zero_point = np.clip(np.rint(-low / scale), 0, options.highest).astype(options.dtype)
    return Grid(scale, zero_point, options)


def round_to_grid(W: np.ndarray, grid: Grid) -> QuantizedMatrix:
    """The nearest point of ``grid`` for every element of W [K, N], halves to even; 0 is met exactly."""
    scale, low, high = grid.levels(len(W))
    return grid.at(np.clip(np.rint(W / scale), low, high))
