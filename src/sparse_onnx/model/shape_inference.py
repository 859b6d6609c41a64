"""ONNX shape inference, which no other module calls: what a model's values are, or what is wrong with it.

:class:`sparse_onnx.model.shapes.Shapes` answers what is known of a model's values; ask it.
"""

from __future__ import annotations

import onnx
import onnx.shape_inference

__all__ = ["inferred", "proven", "type_error"]


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with what is found, in bodies of If, Loop and Scan as well; ``model`` where it cannot be
    read."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # of whatever kind: the runtime will tell what is wrong with the model
        return model


def proven(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with what is found. Raises an exception of whatever kind if a node does not fit."""
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def type_error(model: onnx.ModelProto) -> str:
    """What is wrong with the types in ``model``; "" if nothing is."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # it is C++ and raises what it likes
        return " ".join(str(error).split())[-200:]
    return ""
