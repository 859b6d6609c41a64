"""``clean.reshapes``: write a Reshape so that what it makes can be seen.

The target is a constant where it only names sizes that are there already, x being [batch, sequence, 768]::

    s = Shape(x)                                           Y = Reshape(x, [0, 0, 12, 64])
    b, l = Gather(s, 0), Gather(s, 1)
    Y = Reshape(x, Concat([b], [l], [-1], [64]))

Exporters write this for every axis that may have any size. What comes behind it has no known sizes then, for want of
numbers in ``-1`` and of names, and the nodes run at every call. A 0 takes over the size of the same axis of x; it
stands where inference knows the two to be equal, for all inputs. One size that is left over is what the numbers of
elements say.

Matrices are transposed behind a Reshape that tells their heads, not before it, x being [B·H, S, D] (dynamo exports the
keys of an attention like this)::

    Y = Reshape(Transpose[0,2,1](x), [B, H, D, S])         Y = Transpose[0,1,3,2](Reshape(x, [B, H, S, D]))

The size -1 of ``torch.expand`` is decided, t being sizes of other values and constants, some of them -1::

    Y = Expand(x, Where(Equal(t, -1), 1, t))               Y = Expand(x, t)               with 1 for -1

A Softmax needs no matrix (opset 12 and older, converted)::

    Y = Reshape(Softmax[-1](Flatten[last axis](x)), t)     Y = Softmax[-1](x)             t being the sizes of x

Everything else stays as it is, and so do subgraphs and functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array
from sparse_onnx.model.graph import (
    add_initializer,
    axis_from_end,
    drop_if_unused,
    is_read_once,
    is_standard,
    new_name,
    producer,
    remove_if_unread,
)
from sparse_onnx.model.shapes import Dims, Shapes, agree, same
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.patterns.match import is_last_axis, other_operand, transposed

__all__ = ["Reshapes"]


@dataclasses.dataclass(frozen=True)
class Reshapes(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "clean.reshapes"
    stage: ClassVar[Stage] = Stage.CLEAN

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        done = {"targets": 0, "transposes": 0, "softmax": 0, "expanded": _decide_expanded(model)}
        while True:
            # What the file declares for values in between is left out, as if other inputs were given.
            shapes = Shapes(model, inputs={})
            found = 0
            for node in [node for node in model.graph if is_standard(node, "Reshape")]:
                for name, step in _STEPS:
                    applied = step(model, node, shapes)
                    done[name] += applied
                    found += applied
            if not found:  # what is known of one may tell the sizes of the next
                break
        return PassResult(model, any(done.values()), {**done})


# -- targets -----------------------------------------------------------------------------------------


def _write_target(model: ir.Model, node: ir.Node, shapes: Shapes) -> bool:
    """Give ``node`` a constant target, or one without -1; whether that could be done."""
    target = constant_array(node.inputs[1])
    if target is not None and -1 not in target:
        return False
    before, after = shapes.dims(node.inputs[0]), shapes.dims(node.outputs[0])
    sizes = _sizes(before, after) if before and after else None
    zero_is_zero = bool(node.attributes.get_int("allowzero", 0))
    if sizes is None or (zero_is_zero and -1 in sizes) or (target is not None and sizes == target.tolist()):
        return False
    _set_target(model, node, sizes)
    return True


def _sizes(before: Dims, after: Dims) -> list[int] | None:
    """The constant that makes ``after`` of ``before``, if there is one; at most one -1 is in it."""
    taken = [i < len(before) and same(dim, before[i]) for i, dim in enumerate(after)]
    sizes = [
        dim if isinstance(dim, int) else 0 if there else -1 for there, dim in zip(taken, after, strict=True)
    ]
    if sizes.count(-1) > 1 or any(dim == 0 for dim in after):
        return None
    if -1 in sizes:
        sizes[sizes.index(-1)] = _rest(before, after, taken)
    return sizes


def _rest(before: Dims, after: Dims, taken: Sequence[bool]) -> int:
    """What stands for the only size of ``after`` that is not known: it, 0 if the axis keeps its size, or -1."""
    if len(before) == len(after) and taken.count(False) == 1:
        return 0
    left = [dim for i, dim in enumerate(before) if i >= len(taken) or not taken[i]]
    whole = [dim for dim in left if isinstance(dim, int)]
    part = [dim for there, dim in zip(taken, after, strict=True) if isinstance(dim, int) and not there]
    total, known = math.prod(whole), math.prod(part)
    return total // known if len(whole) == len(left) and total and total % known == 0 else -1


def _set_target(model: ir.Model, node: ir.Node, sizes: Sequence[int]) -> None:
    old = node.inputs[1]
    node.replace_input_with(1, _target(model, sizes))
    node.attributes.pop("allowzero", None)
    if old is not None and old.producer() is None:
        drop_if_unused(old)


def _target(model: ir.Model, sizes: Sequence[int]) -> ir.Value:
    """An initializer with these sizes, one for all that need it."""
    wanted = f"{Reshapes.name}.{'_'.join(str(size) if size >= 0 else 'rest' for size in sizes)}"
    known = model.graph.initializers.get(wanted)
    if known is not None and (array := constant_array(known)) is not None and array.tolist() == list(sizes):
        return known
    name = new_name(model, wanted)
    return add_initializer(model.graph, name, ir.tensor(np.array(sizes, np.int64), name=name))


# -- what stands in front ----------------------------------------------------------------------------


def _fixed(node: ir.Node) -> list[int] | None:
    """The target of a Reshape, if it says all sizes but one at most without looking at the input."""
    target = constant_array(node.inputs[1])
    return target.tolist() if target is not None and target.size and (target != 0).all() else None


def _swap_transpose(model: ir.Model, node: ir.Node, shapes: Shapes) -> bool:
    """Transpose matrices behind ``node`` rather than in front of it."""
    transpose, sizes = producer(node.inputs[0], "Transpose"), _fixed(node)
    if transpose is None or sizes is None or len(sizes) != 4 or -1 in sizes:
        return False
    source, output = transposed(node.inputs[0], 0, 2, 1), node.outputs[0]
    if source is None:
        return False
    *heads, size, length = sizes
    if shapes.dims(source) != (math.prod(heads), length, size):
        return False
    if (first := producer(source, "Reshape")) is not None and first.inputs[0] is not None:
        source = first.inputs[0]  # of which both make other axes
    nodes = []
    if shapes.dims(source) != (*heads, length, size):
        nodes = [ir.node("Reshape", [source, _target(model, [*heads, length, size])], name=node.name)]
        source = nodes[0].outputs[0]
        source.name = new_name(model, f"{output.name}.heads")
    nodes.append(ir.node("Transpose", [source], {"perm": [0, 1, 3, 2]}, name=transpose.name))
    new = nodes[-1].outputs[0]
    new.type, new.shape, new.doc_string = output.type, output.shape, output.doc_string
    new.metadata_props.update(output.metadata_props)
    model.graph.insert_before(node, nodes)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    output.name, new.name = None, output.name
    for old in (node, transpose, *([first] if first is not None else [])):
        remove_if_unread(old)
    return True


def _unflatten_softmax(model: ir.Model, node: ir.Node, shapes: Shapes) -> bool:
    """Let the Softmax in front of ``node`` work on what was made a matrix for it."""
    softmax = producer(node.inputs[0], "Softmax")
    flatten = producer(softmax.inputs[0], "Flatten") if softmax is not None else None
    if softmax is None or flatten is None or node.outputs[0].is_graph_output():
        return False
    source, result = flatten.inputs[0], softmax.outputs[0]
    dims, target = shapes.dims(source), producer(node.inputs[1], "Shape")
    back = agree(dims, shapes.dims(node.outputs[0])) if dims else False
    if not back and (target is None or target.attributes or target.inputs[0] is not source):
        return False
    if not is_last_axis(flatten.attributes.get_int("axis", 1), source, shapes) or shapes.rank(source) is None:
        return False
    if axis_from_end(softmax.attributes.get_int("axis", -1), 2) != -1 or not is_read_once(result):
        return False
    softmax.replace_input_with(0, source)
    softmax.attributes.add(ir.AttrInt64("axis", -1))
    result.shape = None if source is None else source.shape
    node.outputs[0].replace_all_uses_with(result)
    remove_if_unread(node)
    remove_if_unread(flatten)
    return True


_STEPS = (
    ("targets", _write_target),
    ("transposes", _swap_transpose),
    ("softmax", _unflatten_softmax),
)


# -- torch.expand ------------------------------------------------------------------------------------


def _decide_expanded(model: ir.Model) -> int:
    done = 0
    for node in [node for node in model.graph if is_standard(node, "Where")]:
        sizes = _sizes_of_expand(node)
        if sizes is None or node.outputs[0].is_graph_output():
            continue
        parts = [_without_rest(model, part) for part in sizes.inputs if part is not None]
        decided = ir.node("Concat", parts, {"axis": 0}, name=node.name)
        decided.outputs[0].name = new_name(model, f"{sizes.outputs[0].name}.decided")
        model.graph.insert_before(node, decided)
        node.outputs[0].replace_all_uses_with(decided.outputs[0])
        remove_if_unread(node)
        done += 1
    return done


def _sizes_of_expand(where: ir.Node) -> ir.Node | None:
    """The Concat t of ``Where(Equal(t, -1), 1, t)``, if all of it is constants and sizes of values."""
    condition, ones, sizes = where.inputs
    equal, one = producer(condition, "Equal"), constant_array(ones)
    if equal is None or one is None or (one != 1).any():
        return None
    if sizes is None or sizes not in equal.inputs:
        return None
    rest, concat = constant_array(other_operand(equal, sizes)), producer(sizes, "Concat")
    if rest is None or (rest != -1).any() or concat is None:
        return None
    known = all(constant_array(part) is not None or _is_size(part) for part in concat.inputs)
    return concat if known and concat.graph is where.graph else None


def _is_size(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether ``value`` has dimensions of other values: none of them is -1."""
    node = producer(value)
    if node is None or depth == 0:
        return False
    if is_standard(node, "Shape"):
        return True
    moved = is_standard(node, "Gather", "Slice", "Squeeze", "Unsqueeze", "Identity", "Reshape")
    return moved and _is_size(node.inputs[0], depth - 1)


def _without_rest(model: ir.Model, part: ir.Value) -> ir.Value:
    array = constant_array(part)
    if array is None or (array != -1).all():
        return part
    return _target(model, np.where(array == -1, 1, array).reshape(-1).tolist())
