"""What a stored format is: the one thing that knows how the bytes of a compressed weight lie.

A weight W is a matrix [K, N]: K inputs, N outputs. A format packs it into *parts*, vectors that become constant inputs
of an operator, and *sizes*, integers that become attributes. Passes, timing, inspection and verification move both
about and ask the format for everything else. Standard operators unpack them by the lines of
:meth:`StoredFormat.decoder`, kernels read them in place (``csrc/formats/``): both read the same bytes.

The op type of a node says which parts it has, see :meth:`StoredFormat.op_type`; its attribute ``format`` is one of the
format's ``variants``: how they lie.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_onnx.errors import SparseOnnxError

__all__ = ["ONE_RUN", "FormatError", "Outputs", "Packed", "Part", "StoredFormat"]


class FormatError(SparseOnnxError, ValueError):
    """Stored tensors that do not describe a weight."""


@dataclass(frozen=True)
class Part:
    """A vector of a stored weight: the ``name`` of the operator's input, and its elements."""

    name: str
    dtype: type[np.generic]


@dataclass(frozen=True)
class Outputs:
    """What the operator that reads a weight asks of the order of its outputs.

    Attributes:
        run: So many neighbouring outputs belong together, as the channels of one group of a convolution or the elements
            of one gate; None: all of them.
        apart: What is computed together must not hold outputs of two runs; otherwise it is only better so.
        maps: They are channels of feature maps.
    """

    run: int | None = None
    apart: bool = False
    maps: bool = False


ONE_RUN = Outputs()


@dataclass(frozen=True)
class Packed(abc.ABC):
    """A weight [K, N] float32 in a format: of one linear, or of several side by side."""

    @property
    @abc.abstractmethod
    def stored_format(self) -> StoredFormat:
        """The format that packed it."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(K, N)"""

    @property
    @abc.abstractmethod
    def linears(self) -> tuple[int, ...]:
        """Outputs of each linear."""

    @abc.abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """The parts by name, in the order of the operator's inputs."""

    @abc.abstractmethod
    def attributes(self) -> dict[str, int | str]:
        """The sizes in order, and ``format``."""

    @abc.abstractmethod
    def validate(self) -> None:
        """Raise FormatError unless the arrays obey every rule of the format (the kernel checks the same)."""

    @abc.abstractmethod
    def unpack(self) -> np.ndarray:
        """The dense weight [K, N], exactly (bit for bit, but for the sign of zero). Raises FormatError."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())


@dataclass(frozen=True)
class StoredFormat(abc.ABC):
    """A format. Weights are float32.

    Attributes:
        variants: The values of the attribute ``format``: first that of one linear.
        word: What op types have behind ``Sparse``.
        parts: In the order of the operator's inputs; the first holds the values of the weights that are stored.
        sizes: The names of the attributes, K and N first.
        max_elements: The largest weight.
    """

    variants: tuple[str, ...]
    word: str
    parts: tuple[Part, ...]
    sizes: tuple[str, ...]
    max_elements: int

    @property
    def name(self) -> str:
        return self.variants[0]

    def op_type(self, operator: str) -> str:
        """The op type of ``operator`` (``SparseMatMul``, ...) whose weights are in this format."""
        return operator.replace("Sparse", f"Sparse{self.word}", 1)

    def reads_alike(self, variant: str, other: str) -> bool:
        """Whether a weight of one linear in the variant ``other`` is one in ``variant``, too."""
        return other == variant or (other == self.name and variant in self.variants)

    @abc.abstractmethod
    def pack(self, weight: np.ndarray, outputs: Outputs = ONE_RUN) -> Packed:
        """Compress ``weight`` [K, N] float32. NaN and Inf are entries like any other; -0.0 counts as zero.

        Raises ValueError for another rank or dtype, an empty weight, or one that is too large.
        """

    @abc.abstractmethod
    def read(
        self, variant: str, sizes: Mapping[str, int], arrays: Sequence[np.ndarray], split: Sequence[int]
    ) -> Packed:
        """The weight of a node with these attributes and parts; ``split`` has the outputs of each linear where it is
        that of several. Raises FormatError if they cannot be one; what the parts hold is not looked at."""

    @abc.abstractmethod
    def may_join(self, sizes: Mapping[str, int], widest: Mapping[str, int]) -> bool:
        """Whether weights stored with these sizes may become one with the ``widest`` of them."""

    @abc.abstractmethod
    def join(self, weights: Sequence[Packed]) -> Packed:
        """The weights [K, Ni] of several linears side by side, as one [K, sum of Ni]. Raises ValueError unless they
        fit."""

    @abc.abstractmethod
    def decoder(self, prefix: str = "", *, count: int = 1, linears: str = "") -> str:
        """Lines of a function body that make W [K, N] from the stored tensors; every operator with such a weight uses
        them. ``k_1``, ``n_1`` and ``flat_shape`` may be used behind them: [K], [N] and [-1]. No name may be one that
        the steps of an operator make.

        With ``prefix`` every value and attribute has it before its name, for the second weight of an operator. For a
        weight of ``count`` linears, the lines ``linears`` make the value ``sizes`` [count] int64, the outputs of each.
        They may use ``n`` and ``axis0``, N and [0]; ``sizes`` may be used behind the decoder.
        """

    @abc.abstractmethod
    def expected_nbytes(
        self, K: int, N: int, sparsity: float, outputs: Outputs = ONE_RUN, *, together: int = 1
    ) -> float:
        """Bytes that :meth:`pack` needs for a weight [K, N] of which ``sparsity`` in [0, 1) is zero at random places,
        in groups of ``together`` neighbouring outputs: the mean over such weights."""

    def joint_sizes(self, stored: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """Those of one weight that the same kernel takes as weights of all these sizes in one operator."""
        return {name: max(sizes[name] for sizes in stored) for name in self.sizes}
