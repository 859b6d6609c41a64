"""The forms that a layer can ship in: dense float32, which every layer has, and those that lowerings make.

A form says itself which weights are worth timing in it and what they would take; which one a layer gets is decided by
timing all that fit (:mod:`sparse_onnx.timing.choose`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparse_onnx.options import require
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.sparse_ops.formats.base import Outputs, StoredFormat
from sparse_onnx.sparse_ops.formats.registry import SPARSE_FORMAT

if TYPE_CHECKING:
    from sparse_onnx.passes.lower.lowering import Lowering

__all__ = ["DENSE", "FLOAT_BITS", "SPARSE", "TABLE_SPARSITY", "Form", "SparseForm", "sparse_form"]

DENSE = "dense"
"""The form that a layer has before any lowering: a float32 weight for the operators of the runtime."""

SPARSE = "sparse"

FLOAT_BITS = 32
"""Of a weight, or of activations, that are floats."""

TABLE_SPARSITY = 0.65
"""Without a benchmark: from this share of zeros on the sparse kernel was faster on every machine measured."""


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """A way to store a weight and to compute with it, other than dense.

    Attributes:
        name: What decisions, reports, curves and caches call it.
        lowering: The pass that puts it into a model.
        exact: Whether the weight keeps its numbers. A form that changes them (fewer bits) is considered only where it
            is allowed by name.
        least_zeros: The share of zeros below which it was never faster than dense: not worth timing. 0: it makes no use
            of them; the names of all others stand in :data:`sparse_onnx.document.SPARSE_FORMS`.
        sure_from: The share of zeros from which on it was faster than dense on every machine measured, so that it needs
            no timing; None: no share tells.
        stored: How its weights lie.
        bits: Of the weights that it is for; those of a form for floats are decoded.
        activations: Bits that it rounds its input to when it runs, with one scale for all of it or, ``by_token``, one
            for each vector of inputs; one that rounds blocks of such a vector, or nothing, has those of floats.
    """

    name: str
    lowering: type[Lowering]
    exact: bool = True
    least_zeros: float = 0.0
    sure_from: float | None = None
    stored: StoredFormat = SPARSE_FORMAT
    bits: int = FLOAT_BITS
    activations: int = FLOAT_BITS
    by_token: bool = False

    def __post_init__(self) -> None:
        require(self.name not in ("", DENSE), "name", self.name, f"a word other than {DENSE!r}")

    @property
    def is_coarse(self) -> bool:
        """Whether it rounds activations with one scale for all tokens, which loses much more than other forms do: it
        ships only where it is a tenth faster than these."""
        return self.activations < FLOAT_BITS and not self.by_token

    @property
    def lies(self) -> Mapping[str, int | str]:
        """How a weight on a grid lies in it: what its time depends on beside shape, zeros and encoding."""
        return {}

    def refusal(self, sparsity: float) -> str:
        """Why a weight with this share of zeros is not worth timing in this form; empty if it is."""
        few = sparsity < self.least_zeros
        return f"{sparsity:.1%} zeros: too few for any {self.name} kernel" if few else ""

    @abc.abstractmethod
    def expected_nbytes(
        self, shape: tuple[int, int], sparsity: float, structure: str, outputs: Outputs
    ) -> float:
        """What a weight [K, N] with this share and pattern of zeros would take; ``outputs`` is what its operator asks
        of their order."""

    def scale_nbytes(self, shape: tuple[int, int]) -> float:
        """What scales and zero points of a weight [K, N] take beside that."""
        return 0.0


@dataclasses.dataclass(frozen=True)
class SparseForm(Form):
    """Zeros are not stored, and not multiplied."""

    def expected_nbytes(
        self, shape: tuple[int, int], sparsity: float, structure: str, outputs: Outputs
    ) -> float:
        parsed = MaskStructure.parse(structure)
        rows = parsed.size[0] if parsed.kind == "block" else 1
        return self.stored.expected_nbytes(*shape, sparsity, outputs, together=rows)


def sparse_form(lowering: type[Lowering]) -> Form:
    """The sparse form as ``lowering`` makes it."""
    return SparseForm(SPARSE, lowering, least_zeros=MIN_SPARSITY, sure_from=TABLE_SPARSITY)
