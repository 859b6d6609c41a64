"""What is constant in a graph: initializers that no caller can replace, and the results of Constant nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["constant_array", "constant_number", "constant_tensor"]


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that ``value`` always is, if there is one; its elements are not read."""
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


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
