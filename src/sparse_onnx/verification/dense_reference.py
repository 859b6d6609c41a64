"""The model that a compiled one stands for: its stored weights unpacked, in standard operators only.

Every operator of ours becomes the operators of its contract, with the weight that NumPy unpacks as a constant::

    Y = sparse_onnx.SparseMatMulGelu(X, stored parts of W, bias)

    Y = sparse_onnx.dense.SparseMatMulGelu(X, W, bias)        a function: MatMul, Add, Gelu

So neither the kernels nor the decoder that the model carries for runtimes without them have a part in it: it is what
both are measured against.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from sparse_onnx.errors import ModelFileError
from sparse_onnx.model.graph import add_function, add_initializer, drop_if_unused, name_of, new_name
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.model.stored_weights import StoredWeight, stored_weights
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = ["dense_reference"]

_DENSE_DOMAIN = f"{DOMAIN}.dense"


def dense_reference(model: ir.Model, store: Callable[[np.ndarray, str], ir.TensorProtocol]) -> ir.Model:
    """A copy of ``model`` without operators of ours; values inside keep their names.

    ``store`` takes each dense weight with its name and returns a tensor of it, see
    :class:`sparse_onnx.model.storage.Spool`: one of them is in memory at a time.

    Raises ModelFileError if a stored weight is damaged, or an operator is of a newer version of this package.
    """
    result = model.clone()
    weights: dict[tuple[ir.Value | None, ...], ir.Value] = {}
    bodies: dict[str, onnx.FunctionProto] = {}
    for node in [node for node in result.graph.all_nodes() if node.domain == DOMAIN]:
        if node.op_type not in OP_TYPES:
            raise ModelFileError(
                f"{name_of(node)}: there is no operator {DOMAIN}.{node.op_type} in this version"
            )
        body = OP_TYPES[node.op_type].function_body(result.opset_imports[""])
        before, inputs = list(node.inputs), list(node.inputs)
        stored = stored_weights(node)
        for weight in stored:
            if weight.parts not in weights:
                weights[weight.parts] = _dense_weight(result, weight, store)
        for weight in reversed(stored):
            inputs[weight.first : weight.first + len(weight.parts)] = [weights[weight.parts]]
        bodies[node.op_type] = body
        _replace(node, inputs)
        for value in before:
            if value is not None:
                drop_if_unused(value)
    for identifier in [key for key in result.functions if key[0] == DOMAIN]:
        del result.functions[identifier]
    result.opset_imports.pop(DOMAIN, None)
    for body in bodies.values():
        add_function(result, _without_decoder(body), VERSION)
    return result


def _replace(node: ir.Node, inputs: list[ir.Value | None]) -> None:
    """Put the operator without stored tensors in the place of ``node``; the outputs are the same values."""
    node.domain = _DENSE_DOMAIN
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _dense_weight(
    model: ir.Model, weight: StoredWeight, store: Callable[[np.ndarray, str], ir.TensorProtocol]
) -> ir.Value:
    """The initializer [K, N] that is stored as ``weight``."""
    try:
        dense = weight.unpack()
    except (FormatError, ValueError, IndexError) as error:
        raise ModelFileError(f"{name_of(weight.node)}: its stored weight is damaged: {error}") from error
    name = new_name(model, weight.name or "W")
    value = add_initializer(model.graph, name, store(dense, name))
    del dense
    for tensor in weight.tensors:
        release_mapping(tensor)
    return value


def _without_decoder(body: onnx.FunctionProto) -> onnx.FunctionProto:
    """``body`` with every weight W [K, N] as an input in the place of its stored tensors; what made W is gone."""
    short = onnx.FunctionProto()
    short.CopyFrom(body)
    short.domain = _DENSE_DOMAIN
    op_type = OP_TYPES[body.name]
    parts = [part.name for part in op_type.stored.parts] if op_type.stored else []
    decoded = {prefix + parts[0]: f"{prefix}W" for prefix in op_type.prefixes}
    gone = {prefix + name for prefix in op_type.prefixes for name in parts[1:]}
    short.ClearField("input")
    short.input.extend(decoded.get(name, name) for name in body.input if name not in gone)
    needed, kept = set(body.output), []
    for step in reversed(body.node):
        if needed.intersection(step.output) and not set(decoded.values()).intersection(step.output):
            needed.update(step.input)
            kept.append(step)
    short.ClearField("node")
    short.node.extend(reversed(kept))
    return short
