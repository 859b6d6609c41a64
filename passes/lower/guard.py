"""What may hold operators apart that could be one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import onnx_ir as ir

__all__ = ["Guard"]


class Guard(abc.ABC):
    """Tells whether operators are faster as one."""

    @abc.abstractmethod
    def __call__(
        self,
        model: ir.Model,
        nodes: Sequence[ir.Node],
        outputs: Sequence[ir.Value],
        join: Callable[[ir.Model], object],
    ) -> str:
        """Why ``nodes`` of ``model``, which make ``outputs`` and read the activations of the first one, stay apart;
        empty if they become one. ``join`` does that in a model that has nothing else."""
