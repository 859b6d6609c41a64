"""Write integers on a grid into a graph, in place of a float weight, as standard ONNX.

Three ways to store them, of which all stand for the same numbers:

``unpack``      bytes with as many bits as needed, which a function of standard operators unpacks, see
                :mod:`sparse_onnx.model.bit_packing`. Any bits, groups and opset from 13 on. ONNX Runtime from 1.17 on
                computes the floats once, when it loads the model: small on disk, as large and as fast as floats in
                memory, and the same answers in every version.
``dequantize``  integers and ``DequantizeLinear``, which other tools read as well: one scale for each channel of 8 bits
                from opset 13 on, groups and 4 bits from opset 21 on; what it cannot hold is unpacked, and said.
                ONNX Runtime decides what becomes of it: 1.17 to 1.19 decode in every run; later ones make
                MatMulNBits of a MatMul, which rounds *activations* to 8 bits as well.
``float``       the rounded values as floats: nothing is smaller, all kernels take them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sparse_onnx.model.bit_packing import (
    UNPACK_DOMAIN,
    UNPACK_VERSION,
    pack,
    stored_bits,
    unpack_function,
    unpack_name,
)
from sparse_onnx.model.graph import add_function, add_initializer, new_name
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import in_memory
from sparse_onnx.passes.solvers.grid import QuantizedMatrix

__all__ = ["Storage", "reason_against_dequantize", "write_quantized"]

Storage: TypeAlias = Literal["unpack", "dequantize", "float"]
_Store: TypeAlias = Callable[[np.ndarray, str], ir.TensorProtocol]

_BLOCKS = 21  # the opset in which DequantizeLinear learned blocks and 4 bits
_ONCE = 13
_LAYERS = ("MatMul", "Gemm", "Conv")


def write_quantized(
    model: ir.Model,
    weight: Weight,
    quantized: QuantizedMatrix,
    storage: Storage = "unpack",
    store: _Store = in_memory,
) -> None:
    """Let the layers of a float ``weight`` of ``model`` read the values of ``quantized`` [K, N], stored by ``storage``.

    The initializer keeps its name and holds the integers; scales and zero points are new ones, which ``store`` makes
    tensors of. Scales have the type that ``quantized.options`` names. The layers see the type that they saw before: a
    model of float16 rounds the values to that.

    ``dequantize`` takes what :func:`reason_against_dequantize` has no reason against.
    """
    if storage == "float":
        values = weight.stored(quantized.matrix()).astype(weight.tensor.dtype.numpy(), copy=False)
        weight.value.const_value = store(values, weight.name)
    elif storage == "dequantize":
        _write_dequantize(model, weight, quantized, store)
    else:
        _write_unpack(model, weight, quantized, store)


def reason_against_dequantize(model: ir.Model, weight: Weight, quantized: QuantizedMatrix) -> str | None:
    """Why ``DequantizeLinear`` cannot hold it, or None if it can."""
    options, opset = quantized.options, model.opset_imports.get("", _ONCE)
    if any(node.op_type not in _LAYERS for node in weight.nodes):
        return "an LSTM or GRU has more axes than DequantizeLinear has scales for"
    one = len(quantized.scale) == 1
    if stored_bits(options.bits) in (2, 3):
        return f"{options.bits} bits have no type of their own"
    if stored_bits(options.bits) == 4 and opset < _BLOCKS:
        return f"4 bits need opset {_BLOCKS}, the model has {opset}"
    if not one:
        if opset < _BLOCKS:
            return f"groups need opset {_BLOCKS}, the model has {opset}"
        if any(node.op_type == "Conv" for node in weight.nodes):
            return "groups of a convolution do not lie along one axis"
        if len(quantized.integers) % options.group_size:
            return f"{len(quantized.integers)} inputs are no multiple of the group size {options.group_size}"
    if options.scale_type == "float16" and weight.tensor.dtype != ir.DataType.FLOAT16:
        return "float16 scales would make float16 weights"
    if options.scale_type == "float32" and weight.tensor.dtype != ir.DataType.FLOAT:
        return f"float32 scales do not make {weight.tensor.dtype.name} weights"
    return None


def _write_unpack(model: ir.Model, weight: Weight, quantized: QuantizedMatrix, store: _Store) -> None:
    options, (K, N) = quantized.options, quantized.integers.shape
    bits, groups, size = stored_bits(options.bits), len(quantized.scale), options.span(K)
    result, dims, uses = weight.tensor.dtype, weight.tensor.shape.numpy(), _uses(weight)
    shift = (1 << bits - 1) if options.symmetric else 0
    padded = np.zeros((groups * size, N), np.uint8)
    padded[:K] = (quantized.integers.astype(np.int16) + shift).astype(np.uint8)
    _hold(weight, store(pack(padded, bits), weight.name))
    scale = np.ascontiguousarray(quantized.scale[:, None].astype(options.scale_type))
    inputs = [weight.value, _add(model, weight, "scale", scale, store)]
    if not options.symmetric:
        packed = pack(quantized.zero_point, bits)
        inputs.append(_add(model, weight, "zero_point", packed, store))
    name = unpack_name(bits, not options.symmetric)
    attributes: dict[str, int | list[int]] = {
        "rows": [groups * size],
        "grid": [groups, size, -1],
        "channels": [K],
        "to": int(result),
    }
    nodes = [_node(model, weight, "unpacked", name, inputs, attributes, (K, N), result, UNPACK_DOMAIN)]
    if weight.transposed:
        operand = nodes[-1].outputs[0]
        nodes.append(_node(model, weight, "rows", "Transpose", [operand], {"perm": [1, 0]}, (N, K), result))
    if len(dims) != 2:
        shape = _add(model, weight, "shape", np.array(dims, np.int64), in_memory)
        operands = [nodes[-1].outputs[0], shape]
        nodes.append(_node(model, weight, "filters", "Reshape", operands, {}, dims, result))
    _put(weight, nodes, uses)
    opset = max(model.opset_imports.get("", _ONCE), _ONCE)
    add_function(model, unpack_function(bits, not options.symmetric, opset), UNPACK_VERSION)


def _write_dequantize(model: ir.Model, weight: Weight, quantized: QuantizedMatrix, store: _Store) -> None:
    options, one = quantized.options, len(quantized.scale) == 1
    result, dims, uses = weight.tensor.dtype, tuple(weight.tensor.shape.numpy()), _uses(weight)
    few = stored_bits(options.bits) == 4
    kinds = (ml_dtypes.int4, np.int8) if options.symmetric else (ml_dtypes.uint4, np.uint8)
    dtype = kinds[0] if few else kinds[1]
    arrays = [quantized.integers, quantized.scale.astype(options.scale_type)]
    if not options.symmetric:
        arrays.append(quantized.zero_point)
    integers, *grid = (np.ascontiguousarray(array.T if weight.transposed else array) for array in arrays)
    _hold(weight, store(integers.reshape(dims).astype(dtype), weight.name))
    if one:
        grid = [array.reshape(-1) for array in grid]
    inputs = [weight.value, _add(model, weight, "scale", grid[0], store)]
    if not options.symmetric:
        inputs.append(_add(model, weight, "zero_point", grid[1].astype(dtype), store))
    outputs_axis = 0 if weight.transposed else 1
    attributes = (
        {"axis": outputs_axis} if one else {"axis": 1 - outputs_axis, "block_size": options.group_size}
    )
    node = _node(model, weight, "dequantized", "DequantizeLinear", inputs, attributes, dims, result)
    _put(weight, [node], uses)


def _uses(weight: Weight) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in weight.value.uses()]


def _hold(weight: Weight, tensor: ir.TensorProtocol) -> None:
    """Let the initializer hold ``tensor``, of another type and shape."""
    weight.release()
    value = weight.value
    value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(list(tensor.shape.numpy()))


def _add(model: ir.Model, weight: Weight, what: str, array: np.ndarray, store: _Store) -> ir.Value:
    name = new_name(model, f"{weight.name}.{what}")
    graph = weight.value.graph
    assert isinstance(graph, ir.Graph)
    return add_initializer(graph, name, store(array, name))


def _node(
    model: ir.Model,
    weight: Weight,
    what: str,
    op_type: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, int | list[int]],
    shape: Sequence[int],
    dtype: ir.DataType,
    domain: str = "",
) -> ir.Node:
    name = new_name(model, f"{weight.name}.{what}")
    node = ir.node(op_type, inputs, attributes, domain=domain, name=name)
    (output,) = node.outputs
    output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(list(shape))
    return node


def _put(weight: Weight, nodes: Sequence[ir.Node], uses: Sequence[tuple[ir.Node, int]]) -> None:
    """Put ``nodes`` first in the graph of the weight; ``uses`` read what the last one makes."""
    graph = weight.value.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(graph[0], nodes)
    for user, index in uses:
        user.replace_input_with(index, nodes[-1].outputs[0])
