"""What calibration will hold in memory, and how the work is divided so that it fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.errors import HostError
from sparse_onnx.passes.calibration.captures import Capture, View
from sparse_onnx.passes.calibration.moments import Layout
from sparse_onnx.units import format_bytes

__all__ = ["Demand", "Sweep", "activation_bytes", "divide", "fitting"]


@dataclasses.dataclass(frozen=True)
class Demand:
    """What one capture needs: ``layout`` is the best it may have, ``activation`` the bytes of a batch of its values.

    ``pulls`` are bytes of sums that are kept beside a full Gram only."""

    capture: Capture
    layout: Layout
    activation: int
    pulls: int = 0

    def sums(self, layout: Layout | None = None) -> int:
        """Bytes of all sums in ``layout`` (its own), and of the product that is added to them."""
        layout = layout or self.layout
        one = layout.nbytes(self.capture.size)
        product = 4 * min(self.capture.size, 1024 if layout is Layout.BLOCKS else self.capture.size) ** 2
        if layout is Layout.DIAGONAL:
            product = 0
        return one * self.capture.groups + product + (self.pulls if layout is Layout.FULL else 0)

    @property
    def nbytes(self) -> int:
        return self.sums() + self.activation


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Captures that are summed in one pass over the data."""

    demands: tuple[Demand, ...]

    @property
    def sums(self) -> int:
        return sum(demand.sums() for demand in self.demands)

    @property
    def activations(self) -> int:
        return sum(demand.activation for demand in self.demands)


def activation_bytes(
    captures: Sequence[Capture], shapes: Mapping[str, tuple[int, ...]], feeds: Feeds
) -> list[int]:
    """About how many bytes the captured values take for one batch ``feeds``, their copies as rows included.

    A value without a known shape is taken to have one row for each token: for each index, or each position that
    has a vector, of the largest input.
    """
    tokens = max(
        (array.size if array.dtype.kind in "iu" else math.prod(array.shape[:-1]) for array in feeds.values()),
        default=1,
    )

    def elements(view: View, channels: int) -> int:
        return math.prod(shapes[view.tensor]) if view.tensor in shapes else tokens * channels

    return [
        sum(2 * 4 * elements(view, capture.size * capture.groups) for view in capture.views)
        for capture in captures
    ]


def divide(demands: Sequence[Demand], budget: int) -> tuple[list[Sweep], list[str]]:
    """Passes over the data that hold at most ``budget`` bytes each, and a line for every Gram that is cut down.

    Raises HostError if not even a diagonal fits.
    """
    said: list[str] = []
    passes: list[list[Demand]] = []
    held = budget + 1
    for demand in (fitting(demand, budget, said.append) for demand in demands):
        if held + demand.nbytes > budget:
            passes.append([])
            held = 0
        passes[-1].append(demand)
        held += demand.nbytes
    return [Sweep(tuple(group)) for group in passes], said


def fitting(demand: Demand, budget: int, say: Callable[[str], None]) -> Demand:
    """``demand`` with the fullest layout that takes at most ``budget`` bytes; ``say`` is told if that is another one.

    Raises HostError if not even a diagonal fits.
    """
    room = budget - demand.activation
    layouts = list(Layout)[list(Layout).index(demand.layout) :]
    layout = next((layout for layout in layouts if demand.sums(layout) <= room), None)
    name, size = demand.capture.name, demand.capture.size
    if layout is None:
        raise HostError(
            f"calibration: {format_bytes(budget)} are too little memory for {name}: one batch takes "
            f"{format_bytes(demand.activation)}, the smallest statistics "
            f"{format_bytes(demand.sums(Layout.DIAGONAL))}; "
            "give smaller batches or a larger memory budget"
        )
    if layout is not demand.layout:
        say(
            f"note: calibration: the Gram of {name} [{size}, {size}] takes {format_bytes(demand.sums())}, "
            f"more than the {format_bytes(max(room, 0))} left of the memory budget: {layout} statistics instead"
        )
    return dataclasses.replace(demand, layout=layout)
