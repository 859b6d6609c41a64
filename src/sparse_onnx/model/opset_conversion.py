"""Models of opset 7 to 12 as models of opset 13, by ONNX's own converter, with what it leaves wrong put right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx.version_converter

from sparse_onnx.errors import ModelFileError
from sparse_onnx.model.check import (
    MAX_OPSET,
    MIN_OPSET,
    OLDEST_OPSET,
    is_constant,
    scopes,
    tensors,
)

__all__ = ["CONVERTED_FROM", "conversion_note", "convert_opset", "default_opset", "refusal"]

CONVERTED_FROM = "sparse_onnx.converted_from"
"""Key of a model's metadata in memory: the opset of its file, if it had to be converted."""

_RESIZE_11 = 11
"""The opset in which Resize learned where a pixel lies; before, and in Upsample, its left edge counted."""


def default_opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators that ``model`` imports; MIN_OPSET if it uses none."""
    return next((entry.version for entry in model.opset_import if entry.domain == ""), MIN_OPSET)


def conversion_note(opset: int) -> str:
    """What to say of a model of ``opset`` that was converted."""
    return (
        f"note: the model of opset {opset} was converted to {MIN_OPSET} inside; the file stays the original"
    )


def refusal(path: Path, opset: int, reason: str = "") -> ModelFileError:
    """The error that says that the model at ``path`` is too old, and why it cannot be converted."""
    why = f" ({reason})" if reason else ""
    return ModelFileError(
        f"{path}: header: opset {opset} is too old: {MIN_OPSET} to {MAX_OPSET} are supported, and {OLDEST_OPSET} to "
        f"{MIN_OPSET - 1} where they can be converted{why}; convert the model with "
        "onnx.version_converter.convert_version(model, 21)"
    )


def convert_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """``model``, checked and sorted and read from ``path``, as one of opset 13. Tensors outside of it stay there.

    Raises ModelFileError if it cannot be converted: it is then as it was.
    """
    opset = default_opset(model)
    if model.functions:
        raise refusal(path, opset, "it has functions")
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(model, MIN_OPSET)
    except Exception as error:  # the converter is C++ and raises what it likes
        raise refusal(path, opset, " ".join(str(error).split())[-200:]) from error
    if default_opset(converted) != MIN_OPSET or _outside(converted) != _outside(model):
        raise refusal(path, opset, "the converter loses a part of it")
    if [value.name for value in converted.graph.output] != [value.name for value in model.graph.output]:
        raise refusal(path, opset, "the converter renames its outputs")
    _restore(converted, model)
    if opset < _RESIZE_11:
        _place_pixels(converted)
    if (reason := _type_error(converted)) and not _type_error(model):
        raise refusal(path, opset, reason)
    return converted


def _outside(model: onnx.ModelProto) -> Counter[str]:
    """Where the tensors lie that are not inside."""
    return Counter(
        str([(entry.key, entry.value) for entry in tensor.external_data])
        for _, tensor in tensors(model)
        if tensor.data_location == tensor.EXTERNAL
    )


def _restore(converted: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """What the converter has no words for: types of inputs and outputs other than tensors, and all metadata."""
    for field in ("input", "output", "metadata_props"):
        kept = list(getattr(model.graph, field))
        converted.graph.ClearField(field)
        getattr(converted.graph, field).extend(kept)
    converted.ClearField("metadata_props")
    converted.metadata_props.extend(model.metadata_props)
    known = {
        name: node.metadata_props
        for scope in scopes(model)
        for node in scope.node
        for name in node.output
        if name
    }
    for scope in scopes(converted):
        for node in scope.node:
            props = next((known[name] for name in node.output if name in known), ())
            if not node.metadata_props:
                node.metadata_props.extend(props)


def _place_pixels(model: onnx.ModelProto) -> None:
    """Say in every Resize of an older model how pixels were placed: the converter leaves it to the new default."""
    constants = {tensor.name: tensor for scope in scopes(model) for tensor in scope.initializer}
    for scope in scopes(model):
        for node in scope.node:
            if is_constant(node):
                values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
                constants.update(zip(node.output, values, strict=False))
    for scope in scopes(model):
        for node in scope.node:
            if node.op_type != "Resize" or node.domain != "":
                continue
            scales = constants.get(node.input[2]) if len(node.input) > 2 else None
            smaller = scales is not None and (onnx.numpy_helper.to_array(scales) < 1).any()
            placed = {
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "ceil" if smaller else "floor",
            }
            kept = [attribute for attribute in node.attribute if attribute.name not in placed]
            node.ClearField("attribute")
            node.attribute.extend(kept)
            node.attribute.extend(onnx.helper.make_attribute(*item) for item in placed.items())


def _type_error(model: onnx.ModelProto) -> str:
    """What is wrong with the types in ``model``; "" if nothing is."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # of whatever kind: it is told as a reason
        return " ".join(str(error).split())[-200:]
    return ""
