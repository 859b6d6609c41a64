"""Passes: changes of an ``onnx_ir.Model``, one subject per module; :data:`PASSES` lists those of recipes."""

from __future__ import annotations

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.attention import FuseAttention
from sparse_onnx.passes.base import Pass
from sparse_onnx.passes.batch_norm import FuseBatchNorm
from sparse_onnx.passes.cleanup import Constants, Duplicates, Identities, Unused
from sparse_onnx.passes.fold_constants import FoldConstants
from sparse_onnx.passes.fold_weights import FoldWeights
from sparse_onnx.passes.foreign_functions import ForeignFunctions
from sparse_onnx.passes.gemm_rows import GemmRows
from sparse_onnx.passes.gradient import Gradient
from sparse_onnx.passes.idle_nodes import IdleNodes
from sparse_onnx.passes.magnitude import Magnitude
from sparse_onnx.passes.oneshot_methods import ONE_SHOT_PASSES
from sparse_onnx.passes.options import unknown
from sparse_onnx.passes.random_pruning import Random
from sparse_onnx.passes.reshapes import Reshapes
from sparse_onnx.passes.skip_layer_norm import FuseSkipLayerNorm
from sparse_onnx.passes.structured import STRUCTURED_PASSES
from sparse_onnx.passes.threshold import Threshold

__all__ = ["PASSES", "pass_by_name"]

PASSES: tuple[type[Pass], ...] = tuple(
    sorted(
        (
            Constants,
            Duplicates,
            FoldConstants,
            FoldWeights,
            ForeignFunctions,
            Identities,
            IdleNodes,
            Unused,
            FuseAttention,
            FuseBatchNorm,
            FuseSkipLayerNorm,
            GemmRows,
            Gradient,
            Magnitude,
            Random,
            Reshapes,
            Threshold,
            *ONE_SHOT_PASSES,
            *STRUCTURED_PASSES,
        ),
        key=lambda cls: cls.name,
    )
)


def pass_by_name(name: str) -> type[Pass]:
    """The pass that recipes call ``name``; UsageError with the nearest name and the list if there is none."""
    by_name = {cls.name: cls for cls in PASSES}
    if name not in by_name:
        raise UsageError(unknown("modifier", name, by_name))
    return by_name[name]
