"""Recognise attention, in every way that exporters write it.

D being the head size, H the number of heads and E = H·D; scale and mask in any number and order::

    Q = Transpose[0,2,1,3](Reshape(q))        q [B, Sq, E] -> [B, Sq, H, D] -> [B, H, Sq, D]
    K = Transpose[0,2,3,1](Reshape(k))        k [B, Sk, E] -> [B, H, D, Sk]
    V = Transpose[0,2,1,3](Reshape(v))        v [B, Sk, E] -> [B, H, Sk, D]
    S = MatMul(Q · scale, K · scale) · scale
    S = Add(S, mask)                          or Where(keep, S, fill), fill being -Inf or at most -1e30
    P = Softmax[-1](S)                        perhaps followed by Where(IsNaN(P), 0, P)
    Y = Reshape(Transpose[0,2,1,3](MatMul(P, V)))

Keys and values may exist only per head, [B, H, Sk, D]: after a Concat with a cache, the repetition of heads for
grouped queries, rotary embeddings. So may queries, together with them.

What must hold is read from the shapes that ONNX shape inference finds, symbols included. Scores are taken to be
finite. The graph is only read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.constants import constant_array, constant_number
from sparse_onnx.model.dimensions import Dim
from sparse_onnx.model.graph import is_standard
from sparse_onnx.model.shapes import Dims, Shapes, keeps

__all__ = ["Attention", "Mask", "is_attention", "match_attention"]

_LARGEST_FILL = -1e30  # adding a score to it changes nothing in float32
_MAX_CHAIN = 12  # nodes between a product and the Softmax; exporters write up to five


@dataclasses.dataclass(frozen=True)
class Mask:
    """One step from scores to Softmax: ``Add(scores, value)``, or ``Where``, which puts ``fill`` at the places
    where ``value`` is not ``keep``. Both repeat the scores where ``value`` is larger."""

    value: ir.Value
    fill: ir.Value | None = None
    keep: bool = True

    @property
    def key(self) -> object:
        """Equal for masks that are equal; exporters write ``Where(condition, 0, fill)`` anew for each layer."""
        if self.fill is not None:
            return "where", self.value, constant_number(self.fill), self.keep
        where = _producer(self.value, "Where")
        numbers = [constant_number(value) for value in where.inputs[1:]] if where is not None else [None]
        if where is not None and None not in numbers:
            return "add where", where.inputs[0], *numbers
        return "add", self.value


@dataclasses.dataclass(frozen=True)
class Attention:
    """What a fused operator is made of: ``output`` from ``q``, ``k`` and ``v``, whose ``softmax`` this is.

    ``q`` is merged, or per head if ``heads_apart``; ``k`` and ``v`` are both merged or, if ``split``, both per head.
    ``output`` is [B, Sq, E], or [B, Sq, H, D] if ``split_to`` says H and D. ``nan_to_zero``: there are masks, and
    what is NaN among the weights becomes zero.
    """

    softmax: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    split: bool
    heads_apart: bool
    heads: int
    scale: float
    masks: tuple[Mask, ...]
    nan_to_zero: bool
    output: ir.Value
    split_to: tuple[int, int] | None


def is_attention(node: ir.Node) -> bool:
    """Whether ``node`` is a Softmax between two MatMuls: without them it is no attention."""
    if not is_standard(node, "Softmax"):
        return False
    return _scores(node.inputs[0]) is not None and _weighted(node.outputs[0]) is not None


def match_attention(softmax: ir.Node, shapes: Shapes) -> Attention | str:
    """The attention that ``softmax`` is part of, or why it cannot be fused.

    ``softmax`` is one that :func:`is_attention` accepts, in the main graph of a model of opset 13 or later, and
    ``shapes`` are those of this model.
    """
    try:
        return _match(softmax, shapes)
    except _Declined as error:
        return str(error)


class _Declined(Exception):
    """This is an attention, but not one that can be fused; the text says why."""


@dataclasses.dataclass(frozen=True)
class _Heads:
    """One operand of an attention. ``merged`` is [B, S, H·D], ``split`` [B, H, S, D]; either may be None.

    ``length`` is S, ``count`` H and ``size`` D, as far as known.
    """

    merged: ir.Value | None = None
    split: ir.Value | None = None
    length: int | str | None = None
    count: int | None = None
    size: int | None = None


# -- small questions ---------------------------------------------------------------------------------------


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value``, if it is one of these operators."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_standard(node, *op_types) else None


def _transposed(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    """What ``value`` is the transpose of, with this permutation."""
    node = _producer(value, "Transpose")
    if node is None or tuple(node.attributes.get_ints("perm", ())) != perm:
        return None
    return node.inputs[0]


def _casts_to_float(node: ir.Node) -> bool:
    """Whether ``node``, a Cast or an Identity, is a Cast to FLOAT."""
    return node.attributes.get_int("to", 0) == ir.DataType.FLOAT


def _consumers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def _weighted(weights: ir.Value, budget: int = 3) -> ir.Node | None:
    """The MatMul that weights go into, through Where(IsNaN(P), 0, P) and conversions."""
    for node in _consumers(weights):
        if is_standard(node, "MatMul") and node.inputs[0] is weights:
            return node
        if is_standard(node, "Where", "Cast", "Identity") and budget > 0:
            found = _weighted(node.outputs[0], budget - 1)
            if found is not None:
                return found
    return None


def _scores(value: ir.Value | None, budget: int = _MAX_CHAIN) -> ir.Node | None:
    """The MatMul that scores come from, through scales and masks."""
    node = value.producer() if value is not None else None
    if (
        node is None
        or budget == 0
        or not is_standard(node, "MatMul", "Add", "Mul", "Div", "Where", "Cast", "Identity", "Reshape")
    ):
        return None
    if node.op_type == "MatMul":
        return node
    operands = node.inputs[:1] if node.op_type in ("Div", "Cast", "Identity", "Reshape") else node.inputs
    return next((found for x in operands if (found := _scores(x, budget - 1)) is not None), None)


# -- matching ----------------------------------------------------------------------------------------------


def _match(softmax: ir.Node, shapes: Shapes) -> Attention:
    scores, weighted = _scores(softmax.inputs[0]), _weighted(softmax.outputs[0])
    assert scores is not None
    assert weighted is not None
    if len(shapes.dims(softmax.inputs[0])) != 4:
        raise _Declined("scores are not known to be [batch, heads, queries, keys]")
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise _Declined("Softmax is not over the keys")
    if not shapes.is_float32(softmax.outputs[0]):
        raise _Declined("is not FLOAT, the type of the CPU kernel")
    scale, masks = _chain(softmax.inputs[0], scores, shapes)
    query, q_scale = _unscaled(scores.inputs[0], shapes)
    key, k_scale = _unscaled(scores.inputs[1], shapes)
    value = weighted.inputs[1]
    q, v = _heads(query, shapes), _heads(value, shapes)
    k, inner_scale = _key_heads(key, shapes)
    scale *= q_scale * k_scale * inner_scale
    if not np.isfinite(np.float32(scale)) or np.float32(scale) == 0:
        raise _Declined(f"has scale {scale}")
    queries = q.merged if q.merged is not None else q.split
    if queries is None:
        raise _Declined("queries are not known to be [batch, heads, queries, channels]")
    if q.count is None or q.count != k.count or q.count != v.count:
        raise _Declined("queries, keys and values are not known to have the same number of heads")
    if q.size is None or q.size != k.size or v.size is None:
        raise _Declined("head sizes are not known to fit")
    if k.merged is not None and v.merged is not None and q.merged is not None:
        keys, values, split = k.merged, v.merged, False
    elif k.split is not None and v.split is not None:
        keys, values, split = k.split, v.split, True
    else:
        raise _Declined("queries, keys and values are neither all merged nor all per head")
    batch = _names(shapes.dims(queries)[0], shapes.dims(query)[0])
    rows = _names(q.length, shapes.dims(query)[2])
    k_batch = _axis(keys, -len(shapes.dims(keys)), shapes) | _axis(key, -4, shapes)
    v_batch = _axis(values, -len(shapes.dims(values)), shapes) | _axis(value, -4, shapes)
    # What masks may not change: every name is right. As many keys as values are as many whatever the mask.
    product = scores.outputs[0]
    target = (
        (batch if _stays(batch, k_batch) else _names()) | _axis(product, -4, shapes),
        _names(q.count),
        rows | _axis(product, -2, shapes),
        None if _names(k.length) & _names(v.length) else _names(k.length) | _axis(product, -1, shapes),
    )
    masks = tuple(needed for mask in masks if (needed := _needed(mask, target, shapes)) is not None)
    if q.count == 1 and not all(_axis(mask.value, -3, shapes) == {1} for mask in masks):
        raise _Declined("its only head may be repeated for a mask with more of them")
    nan_to_zero = _turns_nan_to_zero(weighted.inputs[0], softmax, shapes)
    others = [k_batch, v_batch, *(_axis(mask.value, -4, shapes) for mask in masks)]
    if not all(_stays(batch, other) for other in others):
        batch = _names()
    if not all(_stays(rows, _axis(mask.value, -2, shapes)) for mask in masks):
        rows = _names()
    made = [(b, q.count, r, v.size) for b in batch or (None,) for r in rows or (None,)]
    output, merged = _output(weighted.outputs[0], made, shapes)
    if not _only_for(scores, output):
        raise _Declined("scores or weights are used elsewhere too")
    return Attention(
        softmax=softmax,
        q=queries,
        k=keys,
        v=values,
        split=split,
        heads_apart=q.merged is None,
        heads=q.count,
        scale=scale,
        masks=masks,
        nan_to_zero=nan_to_zero and bool(masks),  # finite scores without a mask give no NaN
        output=output,
        split_to=None if merged else (q.count, v.size),
    )


_Names = frozenset[int | str]
"""What one dimension is known as; shape inference may have given it several symbols, and all of them are right."""


def _names(*dims: Dim) -> _Names:
    return frozenset(dim for dim in dims if dim is not None)


def _axis(value: ir.Value | None, axis: int, shapes: Shapes) -> _Names:
    """The dimension of ``value`` at a negative ``axis``, 1 where it has fewer."""
    rank = shapes.rank(value)
    if rank is None:
        return _names()
    return _names(shapes.dims(value)[axis] if rank >= -axis else 1)


def _stays(dim: _Names, other: _Names) -> bool:
    """Whether a dimension is known to stay what it is when another one is broadcast with it."""
    return any(keeps((name,), (size,)) for name in dim for size in (other or (None,)))


def _needed(mask: Mask, target: Sequence[_Names | None], shapes: Shapes) -> Mask | None:
    """``mask`` before it was expanded to a shape that it broadcasts to anyway; None if it changes nothing at all.

    It stays as it is unless it is known not to enlarge scores with the dimensions ``target`` (None: any).
    """
    value = mask.value
    axes = enumerate(reversed(target), 1)
    if not all(dim is None or _stays(dim, _axis(value, -place, shapes)) for place, dim in axes):
        return mask
    if _keeps_all(mask):
        return None
    while (node := _producer(value, "Expand")) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
    return dataclasses.replace(mask, value=value)


def _chain(value: ir.Value | None, scores: ir.Node, shapes: Shapes) -> tuple[float, tuple[Mask, ...]]:
    """The scale and the masks between the product and Softmax, in the order in which they are applied."""
    scale, masks = 1.0, list[Mask]()
    budget = _MAX_CHAIN
    while (node := value.producer() if value is not None else None) is not scores:
        assert node is not None  # _scores has been here
        budget -= 1  # as _scores counted
        index = next(i for i, x in enumerate(node.inputs) if _scores(x, budget) is scores)
        if (factor := _factor(node, index, shapes)) is not None:
            scale *= factor
        elif node.op_type in ("Add", "Where") and scale != 1:
            raise _Declined("scores are scaled after they are masked")
        elif node.op_type == "Add":
            mask = node.inputs[1 - index]
            assert mask is not None
            masks.append(Mask(mask))
        elif node.op_type == "Where":
            masks.append(_where(node, index))
        elif not _does_nothing(node, shapes):
            raise _Declined(f"scores go through a {node.op_type} of something that is no constant")
        value = node.inputs[index]
    return scale, tuple(reversed(masks))


def _where(node: ir.Node, index: int) -> Mask:
    """Of a Where whose input ``index`` is the scores."""
    condition, fill = node.inputs[0], node.inputs[3 - index] if index else None
    number = constant_number(fill)
    if condition is None or number is None or not number <= _LARGEST_FILL:
        raise _Declined("masked scores become something other than -Inf or a number of at most -1e30")
    return Mask(condition, fill, keep=index == 1)


def _factor(node: ir.Node, index: int, shapes: Shapes) -> float | None:
    """What a Mul or Div multiplies its input ``index`` with, if that is one known number."""
    if not is_standard(node, "Mul", "Div") or (node.op_type == "Div" and index == 1):
        return None
    rank = shapes.rank(node.inputs[index])
    number = shapes.number(node.inputs[1 - index], rank=1 if rank is None else rank)
    if number is None or number == 0:
        return None
    return number if node.op_type == "Mul" else 1 / number


def _does_nothing(node: ir.Node, shapes: Shapes) -> bool:
    if is_standard(node, "Cast"):
        source = node.inputs[0]
        return _casts_to_float(node) and source is not None and shapes.is_float32(source)
    if is_standard(node, "Reshape"):
        before, after = shapes.dims(node.inputs[0]), shapes.dims(node.outputs[0])
        return len(before) == len(after) and _unknown(before, after) <= 1
    return is_standard(node, "Identity")


def _unknown(*alternatives: Dims) -> int:
    """In how many places the last of these shapes is not known to equal one of the others. If the sizes of
    two tensors agree and all dimensions but one do, that one does too."""
    *others, last = alternatives
    return sum(dim is None or all(dim != other[i] for other in others) for i, dim in enumerate(last))


def _unscaled(value: ir.Value | None, shapes: Shapes) -> tuple[ir.Value | None, float]:
    """``value`` without the constant factors and empty steps that it went through last, and their product."""
    scale = 1.0
    while (node := _producer(value, "Mul", "Div", "Identity", "Cast", "Reshape")) is not None:
        for index in range(len(node.inputs)):
            if (factor := _factor(node, index, shapes)) is not None:
                value, scale = node.inputs[index], scale * factor
                break
        else:
            if node.op_type in ("Mul", "Div") or not _does_nothing(node, shapes):
                break
            value = node.inputs[0]
    return value, scale


def _heads(value: ir.Value | None, shapes: Shapes) -> _Heads:
    """Of a value that is [B, H, S, D], if it is anything."""
    dims = shapes.dims(value)
    if value is None or len(dims) != 4:
        return _Heads()
    heads = _merged_heads(_transposed(value, (0, 2, 1, 3)), shapes)
    if heads is not None:
        return dataclasses.replace(heads, split=value)
    size = dims[3] if isinstance(dims[3], int) else None
    count = dims[1] if isinstance(dims[1], int) else None
    if (concat := _producer(value, "Concat")) is not None and concat.attributes.get_int("axis", 0) in (2, -2):
        parts = [_heads(part, shapes) for part in concat.inputs]
        count = next((part.count for part in parts if part.count is not None), count)
        size = next((part.size for part in parts if part.size is not None), size)
    return _Heads(None, value, dims[2], count, size)


def _merged_heads(value: ir.Value | None, shapes: Shapes) -> _Heads | None:
    """Of a value [B, S, H, D] that is a Reshape of [B, S, H·D]."""
    node = _producer(value, "Reshape")
    merged = node.inputs[0] if node is not None else None
    before, after = shapes.dims(merged), shapes.dims(value)
    if len(before) != 3 or len(after) != 4 or not isinstance(before[2], int):
        return None
    width, (count, size) = before[2], after[2:]
    rows_agree = sum(x is not None and x == y for x, y in zip(before[:2], after[:2], strict=True))
    if isinstance(count, int) and isinstance(size, int):
        proven = count * size == width and rows_agree >= 1
    elif rows_agree == 2 and isinstance(size, int) and size and width % size == 0:
        proven, count = True, width // size
    elif rows_agree == 2 and isinstance(count, int) and count and width % count == 0:
        proven, size = True, width // count
    else:
        proven = False
    if not proven or not isinstance(count, int) or not isinstance(size, int):
        return None
    return _Heads(merged, None, before[1], count, size)


def _key_heads(value: ir.Value | None, shapes: Shapes) -> tuple[_Heads, float]:
    """Of a value that is [B, H, D, S], and the factor that was applied before it was transposed."""
    heads = _merged_heads(_transposed(value, (0, 2, 3, 1)), shapes)
    if heads is not None:
        return heads, 1.0
    split = _transposed(value, (0, 1, 3, 2)) or _transposed_as_matrices(value, shapes)
    split, scale = _unscaled(split, shapes)
    return _heads(split, shapes), scale


def _transposed_as_matrices(value: ir.Value | None, shapes: Shapes) -> ir.Value | None:
    """K of ``Reshape(Transpose[0,2,1](Reshape(K, [B·H, S, D])), [B, H, D, S])``."""
    node = _producer(value, "Reshape")
    matrices = _transposed(node.inputs[0], (0, 2, 1)) if node is not None else None
    node = _producer(matrices, "Reshape")
    source = node.inputs[0] if node is not None else None
    split, middle, result = shapes.dims(source), shapes.dims(matrices), shapes.dims(value)
    if len(split) != 4 or len(middle) != 3 or len(result) != 4:
        return None
    b, h, s, d = split
    proven = _unknown((s, d), middle[1:]) == 0 and _unknown((b, h, d, s), result) <= 1
    return source if proven else None


def _turns_nan_to_zero(weights: ir.Value | None, softmax: ir.Node, shapes: Shapes) -> bool:
    """Whether that is all that happens to the weights after Softmax, rather than nothing; raises otherwise."""
    cleaned = False
    while (node := weights.producer() if weights is not None else None) is not softmax:
        assert node is not None  # _weighted has been here
        if not cleaned and is_standard(node, "Where"):
            condition, zero, weights = node.inputs
            test = _producer(condition, "IsNaN")
            cleaned = test is not None and test.inputs[0] is weights and constant_number(zero, rank=4) == 0
            if cleaned:
                continue
        elif _does_nothing(node, shapes):
            weights = node.inputs[0]
            continue
        raise _Declined(f"weights go through a {node.op_type} after Softmax")
    return cleaned


def _source(value: ir.Value | None) -> ir.Value | None:
    """Where the elements of ``value`` come from: through nodes that only repeat or arrange them."""
    while (node := _producer(value, "Expand", "Identity", "Unsqueeze", "Reshape", "Squeeze")) is not None:
        value = node.inputs[0]
    return value


def _keeps_all(mask: Mask) -> bool:
    """Whether the mask is known to change no score."""
    elements = constant_array(_source(mask.value))
    if mask.fill is not None:
        return elements is not None and bool((elements == mask.keep).all())
    if elements is not None:
        return not elements.any()
    where = _producer(_source(mask.value), "Where")
    if where is None:
        return False
    condition = constant_array(_source(where.inputs[0]))
    return condition is not None and bool(condition.all()) and constant_number(where.inputs[1]) == 0


def _output(value: ir.Value, made: Sequence[Dims], shapes: Shapes) -> tuple[ir.Value, bool]:
    """What is made of the product ``value`` by merging the heads: [B, Sq, H·D] and True, or [B, Sq, H, D] and
    False. The shape of the product, [B, H, Sq, D], is all of ``made``."""
    found = shapes.dims(value)
    known = [*made, *([found] if len(found) == 4 else [])]
    node = _only_reader(value)
    if node is not None and is_standard(node, "Identity", "Reshape"):
        copied = shapes.dims(node.outputs[0])
        if len(copied) == 4 and _unknown(*known, copied) <= 1:
            value = node.outputs[0]
            node = _only_reader(value)
    if node is None or _transposed(node.outputs[0], (0, 2, 1, 3)) is not value:
        raise _Declined("heads are not merged by a Transpose")
    rows = node.outputs[0]
    node = _only_reader(rows)
    if node is not None and is_standard(node, "Reshape"):
        merged, heads, size = shapes.dims(node.outputs[0]), made[0][1], made[0][3]
        assert isinstance(heads, int)
        assert isinstance(size, int)
        rows_known = [(dims[0], dims[2], heads * size) for dims in known]
        if len(merged) == 3 and _unknown(*rows_known, merged) <= 1:
            return node.outputs[0], True
    return rows, False


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads more than the shape of ``value``."""
    readers = {node for node in _consumers(value) if not is_standard(node, "Shape")}
    return readers.pop() if len(readers) == 1 and not value.is_graph_output() else None


def _only_for(node: ir.Node, output: ir.Value) -> bool:
    """Whether all that depends on ``node`` goes through ``output``; False if that is too much to look at."""
    waiting, seen = [node], {node}
    while waiting:
        for value in waiting.pop().outputs:
            if value is output:
                continue
            if value.is_graph_output() or len(seen) > 64:
                return False
            following = {user for user in _consumers(value) if user not in seen}
            if any(user.graph is not node.graph for user in following):
                return False
            waiting += following
            seen |= following
    return True
