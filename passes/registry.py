"""Every pass, and those of them that recipes can name."""

from __future__ import annotations

from sparse_onnx.errors import UsageError
from sparse_onnx.options import unknown
from sparse_onnx.passes.base import Pass
from sparse_onnx.passes.clean.cleanup import Constants, Duplicates, Identities, Unused
from sparse_onnx.passes.clean.fold_constants import FoldConstants
from sparse_onnx.passes.clean.fold_weights import FoldWeights
from sparse_onnx.passes.clean.foreign_functions import ForeignFunctions
from sparse_onnx.passes.clean.gemm_rows import GemmRows
from sparse_onnx.passes.clean.idle_nodes import IdleNodes
from sparse_onnx.passes.clean.reshapes import Reshapes
from sparse_onnx.passes.fuse.attention import FuseAttention
from sparse_onnx.passes.fuse.batch_norm import FuseBatchNorm
from sparse_onnx.passes.fuse.skip_layer_norm import FuseSkipLayerNorm
from sparse_onnx.passes.lower.candidates import LOWERINGS
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.prune.gradient import Gradient
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot_methods import (
    Admm,
    Alps,
    Auto,
    Iht,
    Lasso,
    Omp,
    Ria,
    SparseGPT,
    Taylor,
    Wanda,
)
from sparse_onnx.passes.prune.random import Random
from sparse_onnx.passes.prune.threshold import Threshold
from sparse_onnx.passes.quantize.dynamic import Dynamic
from sparse_onnx.passes.quantize.embedding import QuantizeEmbeddings
from sparse_onnx.passes.quantize.open_blocks import OpenBlocks
from sparse_onnx.passes.quantize.smooth import Smooth
from sparse_onnx.passes.quantize.static import Static
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.structured.channels import Channels
from sparse_onnx.passes.structured.ffn import Ffn
from sparse_onnx.passes.structured.heads import Heads

__all__ = ["PASSES", "pass_by_name"]

_ROWS: tuple[type[Pass], ...] = (
    Constants,
    Duplicates,
    FoldConstants,
    FoldWeights,
    ForeignFunctions,
    GemmRows,
    Identities,
    IdleNodes,
    Reshapes,
    Unused,
    FuseAttention,
    FuseBatchNorm,
    FuseSkipLayerNorm,
    FuseFeedForward,
    MergeLinears,
    Admm,
    Alps,
    Auto,
    Channels,
    Ffn,
    Gradient,
    Heads,
    Iht,
    Lasso,
    Magnitude,
    Omp,
    Random,
    Ria,
    SparseGPT,
    Taylor,
    Threshold,
    Wanda,
    Dynamic,
    OpenBlocks,
    QuantizeEmbeddings,
    QuantizeWeights,
    Smooth,
    Static,
)

PASSES: tuple[type[Pass], ...] = tuple(sorted((*_ROWS, *LOWERINGS), key=lambda cls: cls.name))
"""Every pass, sorted by name."""


def pass_by_name(name: str) -> type[Pass]:
    """The pass that recipes call ``name``; UsageError with the nearest name and the list if there is none."""
    by_name = {cls.name: cls for cls in PASSES if cls.in_recipes}
    if name not in by_name:
        raise UsageError(unknown("modifier", name, by_name))
    return by_name[name]
