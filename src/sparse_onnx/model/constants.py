"""What is constant in a graph: initializers that no caller can replace, and the results of Constant nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.graph import input_at

__all__ = [
    "constant_array",
    "constant_integers",
    "constant_number",
    "constant_tensor",
    "is_constant",
    "tensor_shape",
]


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that ``value`` always is, if there is one; its elements are not read."""
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The sizes of a tensor, which are always known."""
    return tuple(int(size) for size in tensor.shape.numpy())


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``value`` is always the same; its elements are not read."""
    return constant_tensor(value) is not None


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The array that ``value`` always is, if there is one."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def constant_number(value: ir.Value | None, rank: int | None = None) -> float | None:
    """The only element of a constant.

    A constant of more than ``rank`` axes (None: any number) counts as none: it would add axes to a value of that
    rank, which is more than a factor or a term does.
    """
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.size != 1:
        return None
    if rank is not None and len(tensor.shape) > rank:
        return None
    return float(np.asarray(tensor.numpy(), np.float64).reshape(()))


def constant_integers(node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
    """What the attribute ``name`` of ``node`` says or, where it has none, its constant input ``index``: in later opsets
    many attributes are inputs. None if neither is there or the input is no constant."""
    if name in node.attributes:
        return tuple(node.attributes[name].as_ints())
    array = constant_array(input_at(node, index))
    return None if array is None else tuple(int(element) for element in array.reshape(-1))
