"""The passes that every compilation runs around its recipe."""

from __future__ import annotations

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

__all__ = ["CLEAN_PASSES", "FUSION_PASSES", "PREPARATION_PASSES"]

CLEAN_PASSES: tuple[Pass, ...] = (
    ForeignFunctions(),
    Constants(),
    Identities(),
    FoldWeights(),
    FoldConstants(),
    IdleNodes(),
    Reshapes(),
    IdleNodes(),
    GemmRows(),
    Duplicates(),
    Unused(),
)
"""What every model goes through first, in this order."""

PREPARATION_PASSES = (*CLEAN_PASSES, FuseBatchNorm())
"""What comes before pruning."""

FUSION_PASSES = (FuseAttention(), FuseSkipLayerNorm())
"""What follows pruning: ORT's own fusions look for MatMul nodes, which lowering replaces."""
