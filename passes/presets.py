"""The passes that every compilation runs around its recipe."""

from __future__ import annotations

from sparse_onnx.passes.clean.cleanup import CLEAN_PASSES
from sparse_onnx.passes.fuse.attention import FuseAttention
from sparse_onnx.passes.fuse.batch_norm import FuseBatchNorm
from sparse_onnx.passes.fuse.skip_layer_norm import FuseSkipLayerNorm

__all__ = ["FUSION_PASSES", "PREPARATION_PASSES"]

PREPARATION_PASSES = (*CLEAN_PASSES, FuseBatchNorm())
"""What comes before pruning."""

FUSION_PASSES = (FuseAttention(), FuseSkipLayerNorm())
"""What follows pruning: ORT's own fusions look for MatMul nodes, which lowering replaces."""
