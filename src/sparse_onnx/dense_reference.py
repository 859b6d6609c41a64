"""The model that a compiled one stands for: its stored weights unpacked, in standard operators only.

Every operator of ours becomes the operators of its contract, with the weight that NumPy unpacks as a constant::

    Y = sparse_onnx.SparseMatMulGelu(X, W.values, W.offsets, W.counts, W.rows, bias)

    Y = sparse_onnx.dense.SparseMatMulGelu(X, W, bias)        a function: MatMul, Add, Gelu

So neither the kernels nor the decoder that the model carries for runtimes without them have a part in it: it is what
both are measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from sparse_onnx.errors import ModelFileError
from sparse_onnx.graph import add_function, add_initializer, drop_if_unused, new_name
from sparse_onnx.model_io import release_mapping
from sparse_onnx.sparse_ops import (
    attention,
    skip_layer_norm,
    sparse_conv,
    sparse_conv_depthwise,
    sparse_matmul,
    sparse_matmul_split,
)
from sparse_onnx.sparse_ops.sparse_matmul import DOMAIN, FORMAT, VERSION, FormatError, PackedWeight

__all__ = ["dense_reference"]

_DENSE_DOMAIN = f"{DOMAIN}.dense"
_STORED = ("values", "offsets", "counts", "rows")
_SIZES = ("K", "N", "chunk", "block", "width")

_CONTRACTS: Mapping[str, Callable[[str, int], onnx.FunctionProto]] = {
    op_type: contract.function_body
    for contract in (
        sparse_matmul,
        sparse_matmul_split,
        sparse_conv,
        sparse_conv_depthwise,
        attention,
        skip_layer_norm,
    )
    for op_type in (sparse_matmul.ACTIVATIONS if contract is sparse_matmul else contract.OP_TYPES)
}
"""The body of every operator by its op type."""


def dense_reference(model: ir.Model, store: Callable[[np.ndarray, str], ir.TensorProtocol]) -> ir.Model:
    """A copy of ``model`` without operators of ours; values inside keep their names.

    ``store`` takes each dense weight with its name and returns a tensor of it, see :class:`.storage.Spool`: one of them
    is in memory at a time.

    Raises ModelFileError if a stored weight is damaged, or an operator is of a newer version of this package.
    """
    result = model.clone()
    weights: dict[tuple[ir.Value | None, ...], ir.Value] = {}
    bodies: dict[str, onnx.FunctionProto] = {}
    for node in [node for node in result.graph.all_nodes() if node.domain == DOMAIN]:
        if node.op_type not in _CONTRACTS:
            raise ModelFileError(
                f"{_name(node)}: there is no operator {DOMAIN}.{node.op_type} in this version"
            )
        body = _CONTRACTS[node.op_type](node.op_type, result.opset_imports[""])
        stored = dict(zip(body.input, node.inputs, strict=False))
        inputs = [value for name, value in stored.items() if name not in _STORED]
        if "values" in stored:
            parts = tuple(stored[name] for name in _STORED)
            if parts not in weights:
                weights[parts] = _dense_weight(result, node, parts, store)
            inputs.insert(1, weights[parts])
        bodies[node.op_type] = body
        _replace(node, inputs)
        for value in stored.values():
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
    model: ir.Model,
    node: ir.Node,
    parts: tuple[ir.Value | None, ...],
    store: Callable[[np.ndarray, str], ir.TensorProtocol],
) -> ir.Value:
    """The initializer [K, N] that ``node`` stores as ``parts``."""
    tensors = [None if part is None else part.const_value for part in parts]
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    if len(arrays) < len(parts) or node.attributes.get_string("format", "") != FORMAT:
        raise ModelFileError(f"{_name(node)}: its weight is no constant in the format {FORMAT}")
    K, N, chunk, block, width = (node.attributes.get_int(size, 0) for size in _SIZES)
    packed = PackedWeight(K, N, chunk, block, width, *arrays)
    try:
        dense = sparse_matmul.unpack(packed)
    except (FormatError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelFileError(f"{_name(node)}: its stored weight is damaged: {error}") from error
    name = new_name(model, (parts[0].name or "").removesuffix(".values") if parts[0] is not None else "W")
    value = add_initializer(model.graph, name, store(dense, name))
    del dense, packed, arrays
    for tensor in tensors:
        if tensor is not None:
            release_mapping(tensor)
    return value


def _without_decoder(body: onnx.FunctionProto) -> onnx.FunctionProto:
    """``body`` with W [K, N] as its second input in the place of the stored tensors; what made W is gone."""
    short = onnx.FunctionProto()
    short.CopyFrom(body)
    short.domain = _DENSE_DOMAIN
    decoded = "values" in body.input
    if decoded:
        inputs = [name for name in body.input if name not in _STORED]
        short.ClearField("input")
        short.input.extend([inputs[0], "W", *inputs[1:]])
    needed, kept = set(body.output), []
    for step in reversed(body.node):
        if needed.intersection(step.output) and not (decoded and "W" in step.output):
            needed.update(step.input)
            kept.append(step)
    short.ClearField("node")
    short.node.extend(reversed(kept))
    return short


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or "?"
