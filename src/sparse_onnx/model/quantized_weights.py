"""What a model has of weights that are quantized already: how they are stored, and how many of them are zero."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import ModelFileError
from sparse_onnx.model.encodings import Affine, Dense, Encoding, Packed, Palette
from sparse_onnx.model.nbits import PackedBlocks
from sparse_onnx.model.weights import Weight, find_weights
from sparse_onnx.units import format_share

__all__ = ["QuantizedWeight", "describe", "quantized_weights"]


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight of a layer that is not stored as floats.

    Attributes:
        name, module, op_type: Of the initializer, and of what multiplies by it.
        shape: (K, N).
        bits: Of a stored element: of its integer, or of an index into a codebook.
        group_size: Elements that share a scale; 0: all, or all of an output.
        encoding: The same in words.
        nbytes: Of what is stored, without scales.
        zeros, nan, inf: How many elements stand for these.
        reason: Why they could not be counted; empty: they were.
    """

    name: str
    module: str
    op_type: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    encoding: str
    nbytes: int
    zeros: int
    nan: int = 0
    inf: int = 0
    reason: str = ""

    @property
    def size(self) -> int:
        """Elements."""
        return self.shape[0] * self.shape[1]


def quantized_weights(model: ir.Model) -> list[QuantizedWeight]:
    """Those of layers of ``model``, in graph order, depthwise convolutions included. One is in memory at a time."""
    weights, _ = find_weights(model, depthwise=True, encoded=True)
    return [_measured(weight) for weight in weights if not isinstance(weight.encoding, Dense)]


def describe(bits: Sequence[int], zeros: float, pruned: int = 0) -> str:
    """What weights of these ``bits`` are and what can be done with them, in a line; ``zeros`` is the share of zeros,
    ``pruned`` how many got some just now."""
    kinds = ", ".join(
        f"{count} in {width} bits" for width, count in sorted(collections.Counter(bits).items(), reverse=True)
    )
    text = (
        f"{len(bits)} weight{' is' if len(bits) == 1 else 's are'} quantized already ({kinds}), with "
        f"{format_share(zeros)} zeros: layers of 8 bits whose input is rounded, too, have kernels that leave zeros out"
    )
    return (
        f"{text}; {pruned} pruned further"
        if pruned
        else f"{text}; where zeros gain nothing, they are pruned with --keep-pruned only"
    )


def _measured(weight: Weight) -> QuantizedWeight:
    encoding = weight.encoding
    assert not isinstance(encoding, Dense)
    zeros = nan = inf = 0
    reason = ""
    try:
        matrix = weight.matrix()
    except ModelFileError as error:
        reason = str(error)
    else:
        zeros = matrix.size - int(np.count_nonzero(matrix))
        nan, inf = int(np.count_nonzero(np.isnan(matrix))), int(np.count_nonzero(np.isinf(matrix)))
        del matrix
    weight.release()
    return QuantizedWeight(
        weight.name,
        weight.module,
        weight.nodes[0].op_type,
        weight.shape,
        _bits(encoding),
        _group_size(encoding),
        str(encoding),
        weight.tensor.nbytes,
        zeros,
        nan,
        inf,
        reason,
    )


def _group_size(encoding: Encoding | PackedBlocks) -> int:
    match encoding:
        case Packed():
            return encoding.group_size if encoding.group_size < encoding.inputs else 0
        case Affine() | PackedBlocks():
            return encoding.block_size
    return 0


def _bits(encoding: Encoding | PackedBlocks) -> int:
    match encoding:
        case Affine() | PackedBlocks():
            return encoding.dtype.bitwidth
        case Packed():
            return encoding.bits
        case Palette():
            return max(1, (encoding.codebook.size - 1).bit_length())
    return 32
