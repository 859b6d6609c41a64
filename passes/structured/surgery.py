"""Take units out of a graph: constants, shapes and attributes of a region."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array
from sparse_onnx.model.graph import (
    add_initializer,
    drop_if_unused,
    input_at,
    is_read_once,
    new_name,
    remove_if_unread,
)
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.structured.groups import rows_of
from sparse_onnx.passes.structured.region import Blocks, Region, Removal, Reshaped, Swapped

__all__ = ["cut_region", "shift_bias", "write_reader"]


def cut_region(model: ir.Model, region: Region, removed: np.ndarray, context: PassContext) -> None:
    """Remove the units everywhere but in the weights of the readers.

    The constants that a node reads are replaced for this node alone.
    """
    left = region.units - len(removed)
    for removal in region.removals:
        _cut(model, removal, region.units, removed, context)
        if removal.node.op_type == "Conv" and input_at(removal.node, 2) is not None:
            _cut(model, Removal(removal.node, 2, -1, removal.blocks), region.units, removed, context)
    for node in region.grouped:
        node.attributes["group"] = ir.AttrInt64("group", left)
    for change in region.reshaped:
        if change.dims is None:
            _replace_piece(model, change, left * sum(change.blocks))
            continue
        dims = list(change.dims)
        if change.axis is not None:
            dims[change.axis] = left * sum(change.blocks)
        change.node.attributes.pop("allowzero", None)  # a 0 copies the size of the input
        _replace_sizes(model, change.node, dims)
    for split in region.divided:
        _replace_sizes(model, split.node, [left * size for size in split.sizes])
    for value, axis, blocks in region.values:
        if value.shape is not None:
            sizes = list(value.shape)
            sizes[axis] = left * sum(blocks)
            value.shape = ir.Shape(sizes)
    for swap in region.swapped:
        _swap_directly(swap)


def _cut(model: ir.Model, removal: Removal, units: int, removed: np.ndarray, context: PassContext) -> None:
    array = constant_array(removal.node.inputs[removal.index])
    assert array is not None
    array = np.delete(array, _elements_of(removed, units, removal.blocks), axis=removal.axis)
    _replace_constant(model, removal.node, removal.index, array, context)


def _elements_of(removed: np.ndarray, units: int, blocks: Blocks) -> np.ndarray:
    """The indices of the elements of ``removed`` units in all segments of an axis."""
    starts = units * np.cumsum([0, *blocks[:-1]])
    return np.concatenate(
        [start + rows_of(removed, block) for start, block in zip(starts, blocks, strict=True)]
    )


def _replace_sizes(model: ir.Model, node: ir.Node, sizes: list[int]) -> None:
    """Let input 1 of ``node`` be a constant, and remove what computed it."""
    old = node.inputs[1]
    name = new_name(model, f"{node.outputs[0].name}.sizes")
    assert isinstance(node.graph, ir.Graph)
    array = np.array(sizes, np.int64)
    node.replace_input_with(1, add_initializer(node.graph, name, ir.tensor(array, name=name)))
    if old is not None:
        _drop(old)


def _replace_piece(model: ir.Model, change: Reshaped, size: int) -> None:
    """Let the Reshape read a Concat of its own, in which one constant is another."""
    node, (index, position) = change.node, change.piece
    old = node.inputs[1]
    assert old is not None
    concat, graph = old.producer(), node.graph
    assert concat is not None
    assert isinstance(graph, ir.Graph)
    array = constant_array(concat.inputs[index])
    assert array is not None
    array = array.copy()
    array[position] = size
    name = new_name(model, f"{node.outputs[0].name}.size")
    pieces = list(concat.inputs)
    pieces[index] = add_initializer(graph, name, ir.tensor(array, name=name))
    copy = ir.node("Concat", pieces, {"axis": 0})
    copy.outputs[0].name = new_name(model, f"{node.outputs[0].name}.sizes")
    copy.outputs[0].type, copy.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, copy)
    node.replace_input_with(1, copy.outputs[0])
    _drop(old)


def _swap_directly(swap: Swapped) -> None:
    """[B, H, S, D] to [B, H, D, S] by the Transpose alone."""
    source, output, result = swap.first.inputs[0], swap.last.outputs[0], swap.transpose.outputs[0]
    swap.transpose.replace_input_with(0, source)
    swap.transpose.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])
    result.type, result.shape = output.type, output.shape
    output.replace_all_uses_with(result)
    for value in (output, swap.first.outputs[0]):
        _drop(value)


def _drop(value: ir.Value) -> None:
    """Remove what only served to compute ``value``, which nothing reads any more."""
    node = value.producer()
    if node is None:
        drop_if_unused(value)
    else:
        remove_if_unread(node, with_makers=True)


def _replace_constant(
    model: ir.Model, node: ir.Node, index: int, array: np.ndarray, context: PassContext
) -> None:
    """Let ``node`` read ``array`` in place of its constant input, in which other readers see no change."""
    old = node.inputs[index]
    assert old is not None
    own = is_read_once(old) and not old.is_graph_input()
    if own and old.is_initializer() and old.graph is node.graph:
        old.const_value = context.store(array, old.name or "")
        old.shape = ir.Shape(array.shape)
        old.metadata_props.pop(STRUCTURE_KEY, None)  # of the weight before
        return
    name = new_name(model, f"{old.name}.cut")
    assert isinstance(node.graph, ir.Graph)
    node.replace_input_with(index, add_initializer(node.graph, name, context.store(array, name)))
    _drop(old)


def write_reader(model: ir.Model, weight: Weight, matrix: np.ndarray, context: PassContext) -> None:
    """Give a layer its new W [kept K, N]."""
    (node,) = weight.nodes
    dtype, shape = weight.tensor.dtype.numpy(), weight.tensor.shape.numpy()
    stored = np.ascontiguousarray(matrix.T if weight.transposed else matrix)
    if node.op_type == "Conv":
        stored = stored.reshape(shape[0], -1, *shape[2:])
    weight.release()
    _replace_constant(model, node, 1, stored.astype(dtype, copy=False), context)


def shift_bias(model: ir.Model, node: ir.Node, index: int, shift: np.ndarray, context: PassContext) -> None:
    """Add ``shift`` [N] to the bias that is input ``index`` of ``node``; a Conv without one gets it."""
    array = constant_array(input_at(node, index))
    if array is not None:
        shifted = (array.astype(np.float64) + shift.reshape(array.shape)).astype(array.dtype)
        _replace_constant(model, node, index, shifted, context)
        return
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    assert isinstance(node.graph, ir.Graph)
    name = new_name(model, f"{weight.name}.bias")
    tensor = context.store(shift.astype(weight.const_value.dtype.numpy()), name)
    node.resize_inputs(3)
    node.replace_input_with(2, add_initializer(node.graph, name, tensor))
