"""From an activation tensor to the rows that a weight W [K, N] multiplies: flattened, unfolded or shifted by one step,
padding left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from sparse_onnx.passes.patterns.conv_window import ConvWindow

__all__ = ["Dequantized", "Gathered", "Recurrence", "channel_rows", "linear_rows", "unfolded_rows"]

_GATHERED = 2048  # rows: adding their products to a sum takes little beside making them

_CHUNK_BYTES = 64 << 20  # of unfolded rows at a time: unfolding repeats each element once per window position


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """Integers that stand for (integer - zero point) · scale: the names of these two values, each one number (None: 1
    and 0).

    ``constants`` has those that are constant.
    """

    scale: str | None = None
    zero_point: str | None = None
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The values beside the integers that :meth:`floats` needs."""
        names = (self.scale, self.zero_point)
        return tuple(name for name in names if name is not None and name not in self.constants)

    def __str__(self) -> str:
        return f"dequantized by {self.scale or 1}, {self.zero_point or 0}"

    def floats(self, x: np.ndarray, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the integers ``x`` stand for, float32 in their shape."""
        given = {**values, **self.constants}
        steps = x.astype(np.float32)
        if self.zero_point is not None:
            steps -= given[self.zero_point].astype(np.float32).reshape(())
        if self.scale is not None:
            steps *= given[self.scale].astype(np.float32).reshape(())
        return steps


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """What a weight of an LSTM or GRU multiplies: the input at every step, or with ``states`` the state before it.

    ``reverse`` says that the first direction goes backwards in time; a second one always does. ``lengths`` [B] and
    ``initial`` [D, B, H] are the values with the steps of each sequence and the first state, if there are such;
    ``constants`` has those that are constant.
    """

    states: bool
    reverse: bool
    lengths: str | None = None
    initial: str | None = None
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The values beside the activations that :meth:`rows` needs."""
        names = (self.lengths, self.initial)
        return tuple(name for name in names if name is not None and name not in self.constants)

    def __str__(self) -> str:
        parts = ["before each step" if self.states else "at each step"]
        if self.reverse:
            parts.append("backwards")
        if self.lengths is not None:
            parts.append(f"lengths {self.lengths}")
        if self.initial is not None:
            parts.append(f"from {self.initial}")
        return ", ".join(parts)

    def rows(
        self, x: np.ndarray, values: Mapping[str, np.ndarray], mask: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """The rows [n, K] of ``x``, the input [S, B, K]; with ``states`` those of every direction, and ``x`` is what
        the node makes, [S, D, B, K]. ``mask`` [B, S] leaves out the rows where it is 0, if it fits."""
        given = {**values, **self.constants}
        steps, batch = x.shape[0], x.shape[-2]
        lengths = np.full(batch, steps) if self.lengths is None else given[self.lengths]
        keep = np.arange(steps)[:, None] < lengths
        if mask is not None and mask.shape == (batch, steps):
            keep &= mask.T != 0
        if not self.states:
            return [x[keep]]
        first = np.zeros(x.shape[1:], x.dtype) if self.initial is None else given[self.initial]
        parts = []
        for direction, start in enumerate(first):
            before = np.zeros_like(x[:, direction])
            if direction == 1 or self.reverse:
                before[:-1] = x[1:, direction]
                some = lengths > 0
                before[lengths[some] - 1, np.flatnonzero(some)] = start[some]
            elif steps:
                before[1:] = x[:-1, direction]
                before[0] = start
            parts.append(before[keep])
        return parts


def linear_rows(x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The rows [n, K] of ``x`` [..., K].

    ``mask`` [B, S] leaves out the rows where it is 0, if ``x`` has the leading dimensions [B, S] or is [B·S, K].
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or not mask.size:
        return rows
    flat = x.ndim == 2 and x.shape[0] == mask.size
    if not flat and (x.ndim < 3 or x.shape[:2] != mask.shape):
        return rows
    keep = np.repeat(mask.reshape(-1) != 0, len(rows) // mask.size)
    return rows if keep.all() else rows[keep]


def channel_rows(x: np.ndarray, mask: np.ndarray | None = None, *, images: bool = False) -> np.ndarray:
    """The rows [n, K] of ``x`` [..., K] that are no padding; of ``images`` [B, C, sizes...] the positions [n, C]."""
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]) if images else linear_rows(x, mask)


def unfolded_rows(x: np.ndarray, window: ConvWindow) -> Iterator[list[np.ndarray]]:
    """The rows [n, C / groups · window] of ``x`` [B, C, sizes...], one array a group, a bounded part at a time.

    One row a position of the output; its elements in the order of the filters [C / groups, window...].
    """
    axes = len(window.kernel)
    padding = window.padding(x.shape[2:])
    span = [
        (kernel - 1) * dilation + 1 for kernel, dilation in zip(window.kernel, window.dilations, strict=True)
    ]
    every = [slice(None, None, stride) for stride in window.strides]
    taps = [slice(None, None, dilation) for dilation in window.dilations]
    channels = x.shape[1] // window.groups
    size = channels * math.prod(window.kernel)

    def patches_of(images: np.ndarray) -> np.ndarray:
        padded = np.pad(images, [(0, 0), (0, 0), *padding])
        patches = np.lib.stride_tricks.sliding_window_view(padded, span, tuple(range(2, axes + 2)))
        return np.moveaxis(patches[(slice(None), slice(None), *every, *taps)], 1, axes + 1)

    def rows_of(patches: np.ndarray) -> list[np.ndarray]:
        """``patches`` [n, out..., C, window...], a view."""
        return [part.reshape(-1, size) for part in np.split(patches, window.groups, axis=axes + 1)]

    image_bytes = math.prod(patches_of(x[:1]).shape) * x.itemsize
    images = max(1, _CHUNK_BYTES // max(image_bytes, 1))
    slices = -(-image_bytes // _CHUNK_BYTES)  # of one image, where it is larger than a chunk
    for first in range(0, len(x), images):
        patches = patches_of(x[first : first + images])
        step = max(1, patches.shape[1] // max(slices, 1))
        for start in range(0, patches.shape[1], step):
            yield rows_of(patches[:, start : start + step])


class Gathered:
    """Rows of arrays side by side, by name, that wait until there are enough of them to be multiplied at once: to add a
    product to a sum takes as long as to make one of a few hundred rows."""

    def __init__(self) -> None:
        self._parts: dict[str, np.ndarray] = {}
        self._count = 0

    def add(self, rows: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Add ``rows``, arrays [n, ...] by name; gives those that need not wait, until the next call."""
        alike = {name: part.dtype for name, part in self._parts.items()} == {
            name: array.dtype for name, array in rows.items()
        }
        more = len(next(iter(rows.values())))
        if not alike or self._count + more > _GATHERED:
            yield from self.rest()
        if more > _GATHERED // 2:
            yield dict(rows)
            return
        if not alike:
            self._parts = {
                name: np.empty((_GATHERED, *array.shape[1:]), array.dtype) for name, array in rows.items()
            }
        for name, array in rows.items():
            self._parts[name][self._count : self._count + more] = array
        self._count += more

    def rest(self) -> Iterator[dict[str, np.ndarray]]:
        """All that wait."""
        count, self._count = self._count, 0
        if count:
            yield {name: part[:count] for name, part in self._parts.items()}
