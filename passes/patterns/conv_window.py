"""How the filters of a Conv move over its input: what its attributes say, and the padding that follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["ConvWindow"]


@dataclasses.dataclass(frozen=True)
class ConvWindow:
    """The window of a convolution over its d spatial axes; ``pads`` are d begins and d ends, as ONNX has them.

    ``auto_pad`` other than NOTSET determines the pads from the input's size.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int = 1
    auto_pad: str = "NOTSET"

    @classmethod
    def of(cls, node: ir.Node, kernel: tuple[int, ...]) -> ConvWindow:
        """The window of a Conv node whose filters have the spatial sizes ``kernel``."""
        axes = len(kernel)
        return cls(
            kernel,
            tuple(node.attributes.get_ints("strides", (1,) * axes)),
            tuple(node.attributes.get_ints("pads", (0,) * (2 * axes))),
            tuple(node.attributes.get_ints("dilations", (1,) * axes)),
            node.attributes.get_int("group", 1),
            node.attributes.get_string("auto_pad", "NOTSET"),
        )

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.kernel))]
        for name, value, default in (
            ("stride", self.strides, 1),
            ("pad", self.pads, 0),
            ("dilation", self.dilations, 1),
        ):
            if any(size != default for size in value):
                parts.append(f"{name} {','.join(map(str, value))}")
        if self.groups > 1:
            parts.append(f"{self.groups} groups")
        if self.auto_pad not in ("NOTSET", "VALID"):
            parts.append(self.auto_pad)
        return f"window {' '.join(parts)}"

    @property
    def fits(self) -> bool:
        """Whether the attributes are of as many axes as the filters, as a valid model has them."""
        axes = len(self.kernel)
        pads = 2 * axes if self.auto_pad == "NOTSET" else len(self.pads)
        return self.groups > 0 and (len(self.strides), len(self.dilations), len(self.pads)) == (
            axes,
            axes,
            pads,
        )

    @property
    def needs_size(self) -> bool:
        """Whether the padding depends on the input's size."""
        return self.auto_pad in ("SAME_UPPER", "SAME_LOWER")

    def explicit_pads(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Zeros before, then after each spatial axis of an input with these spatial ``sizes``."""
        if self.needs_size:
            return _same_pads(sizes, self.kernel, self.strides, self.dilations, self.auto_pad == "SAME_UPPER")
        return self.pads if self.auto_pad == "NOTSET" else (0,) * (2 * len(self.kernel))

    def padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """The same as a pair for each axis."""
        axes, pads = len(self.kernel), self.explicit_pads(sizes)
        return list(zip(pads[:axes], pads[axes:], strict=True))

    def positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial sizes of the output for an input with these spatial ``sizes``."""
        return tuple(
            (size + before + after - (kernel - 1) * dilation - 1) // stride + 1
            for size, (before, after), kernel, stride, dilation in zip(
                sizes, self.padding(sizes), self.kernel, self.strides, self.dilations, strict=True
            )
        )


def _same_pads(
    sizes: Sequence[int],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    upper: bool,
) -> tuple[int, ...]:
    """The pads of SAME_UPPER (``upper``) or SAME_LOWER for an input with these spatial ``sizes``: begins, then ends.

    As the ONNX standard says: the output has size / stride elements, rounded up.
    """
    before, after = [], []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        before.append(small if upper else large)
        after.append(large if upper else small)
    return (*before, *after)
