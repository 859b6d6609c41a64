"""Fuse attention into ``sparse_onnx.Attention``, which takes the projections as they are.

Before, D being the head size, H the number of heads and E = H·D; scale and mask in any number and order::

    Q = Transpose[0,2,1,3](Reshape(q))        q [B, Sq, E] -> [B, Sq, H, D] -> [B, H, Sq, D]
    K = Transpose[0,2,3,1](Reshape(k))        k [B, Sk, E] -> [B, H, D, Sk]
    V = Transpose[0,2,1,3](Reshape(v))        v [B, Sk, E] -> [B, H, Sk, D]
    S = MatMul(Q · scale, K · scale) · scale
    S = Add(S, mask)                          or Where(keep, S, fill), fill being -Inf or at most -1e30
    P = Softmax[-1](S)                        perhaps followed by Where(IsNaN(P), 0, P)
    Y = Reshape(Transpose[0,2,1,3](MatMul(P, V)))

After::

    Y = sparse_onnx.AttentionMasked<num_heads = H, scale>(q, k, v, mask)

or ``Attention`` without a mask. The operator broadcasts the mask, so that an Expand in front of it goes. Several
masks are added up, and ``Where(keep, S, fill)`` becomes ``Where(keep, 0, fill)``, once for all layers that share
them. A mask that is known to keep everything is dropped. A test for NaN moves to Y if the mask can make one.

Keys and values that exist only per head, [B, H, Sk, D] (after a Concat with a cache, the repetition of heads for
grouped queries, rotary embeddings), go into ``AttentionSplit`` and ``AttentionSplitMasked`` as they are. Queries
cannot; to merge them again gains nothing, and such attentions are declined.

The model still runs without our library, since the operators' bodies come along as functions.

What must hold is read from the shapes that ONNX shape inference finds, symbols included; a dimension that was
symbolic stays so. Scores are taken to be finite, and masks not to be larger than the scores (else the operator
fails). Fully masked rows keep their result: a fill of at most -1e30 absorbs every score below 1e22, and the
operator and Softmax agree on rows of -Inf (NaN) and of equal scores (the mean).

ONNX ``Attention`` nodes stay: they are fused already, and ONNX Runtime 1.24 and 1.31 give fully masked rows
different results.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sparse_onnx.graph import all_graphs, drop_if_unused, is_standard, value_names
from sparse_onnx.passes.base import Declined, Pass, PassContext, PassResult, Stage
from sparse_onnx.sparse_ops import attention
from sparse_onnx.sparse_ops.attention import DOMAIN, Signature

__all__ = ["FuseAttention"]

_OP_TYPES = {signature: op_type for op_type, signature in attention.OP_TYPES.items()}
_OPSETS = range(13, 27)  # those that the operators' bodies can be written in
_LARGEST_FILL = -1e30  # adding a score to it changes nothing in float32
_MAX_CHAIN = 12  # nodes between a product and the Softmax; exporters write up to five

Dims = tuple[int | str | None, ...]


class _Declined(Exception):
    """This is an attention, but not one that can be fused; the text says why."""


@dataclasses.dataclass(frozen=True)
class _Heads:
    """One operand of an attention. ``merged`` is [B, S, H·D], ``split`` [B, H, S, D]; one may be None.

    ``length`` is S, ``count`` H and ``size`` D, as far as known.
    """

    merged: ir.Value | None
    split: ir.Value | None
    length: int | str | None
    count: int | None
    size: int | None


@dataclasses.dataclass(frozen=True)
class _Mask:
    """One step from scores to Softmax: ``Add(scores, value)``, or ``Where``, which puts ``fill`` at the places
    where ``value`` is not ``keep``."""

    value: ir.Value
    fill: ir.Value | None = None
    keep: bool = True


@dataclasses.dataclass(frozen=True)
class _Attention:
    """What a fused operator is made of.

    ``softmax`` is the anchor. ``q`` is merged; ``k`` and ``v`` are both merged or, if ``split``, both per head.
    ``output`` is replaced: it is [B, Sq, E], or [B, Sq, H, D] if ``split_to`` says H and D. ``nan_to_zero``: a NaN
    among the weights becomes zero, and there may be one even if all scores are finite.
    """

    softmax: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    split: bool
    heads: int
    scale: float
    masks: tuple[_Mask, ...]
    nan_to_zero: bool
    output: ir.Value
    split_to: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """See the module's docstring. Attentions in subgraphs and functions are left alone."""

    name: ClassVar[str] = "fuse.attention"
    stage: ClassVar[Stage] = Stage.FUSE

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        found, declined = list[_Attention](), list[Declined]()
        facts = _Facts(model) if any(is_standard(node, "Softmax") for node in model.graph) else None
        for graph in all_graphs(model):
            for node in graph:
                if is_standard(node, "Attention"):
                    reason = "is fused already, as ONNX Attention"
                elif not is_standard(node, "Softmax") or (products := _products(node)) is None:
                    continue
                elif graph is not model.graph or facts is None:
                    reason = "lies in a function or in the body of If, Loop or Scan"
                elif facts.opset not in _OPSETS:
                    reason = f"opset {facts.opset} is none of {_OPSETS[0]} to {_OPSETS[-1]}"
                else:
                    try:
                        found.append(_match(node, *products, facts))
                        continue
                    except _Declined as error:
                        reason = str(error)
                declined.append(self.declined(node.name or node.outputs[0].name or "?", reason))
        if found and facts is not None:
            rewriter = _Rewriter(model, facts.opset)
            for match in found:
                rewriter.fuse(match)
        statistics: dict[str, int | float] = {"found": len(found) + len(declined), "fused": len(found)}
        return PassResult(model, bool(found), statistics, tuple(declined))


class _Facts:
    """Shapes and types of the values of the main graph as ONNX shape inference finds them; the model stays as
    it is. Dimensions with the same symbol are equal."""

    def __init__(self, model: ir.Model) -> None:
        inferred = model.clone()
        common.ShapeInferencePass(check_type=False, strict_mode=False)(inferred)
        values = [*inferred.graph.inputs, *inferred.graph.initializers.values()]
        values += [value for node in inferred.graph for value in node.outputs]
        self._by_name = {value.name: value for value in values}
        self.opset = model.opset_imports.get("", 1)

    def dims(self, value: ir.Value | None) -> Dims:
        """() if the rank is unknown; an attention has no scalars."""
        known = self._by_name.get(value.name) if value is not None else None
        if known is None or known.shape is None:
            return ()
        return tuple(dim if isinstance(dim, int) else dim.value for dim in known.shape)

    def number(self, value: ir.Value | None) -> float | None:
        """The only element of a constant, or of what is computed from constants and known dimensions: some
        exports take the scale from the head size, as Sqrt(1 / Sqrt(Cast(Slice(Shape(q)))))."""
        node = _producer(value, "Cast", "Identity", "Sqrt", "Mul", "Div", "Slice", "Gather")
        if node is None:
            return _number(value)
        if node.op_type in ("Slice", "Gather"):
            return self._dimension(node)
        operands = [self.number(operand) for operand in node.inputs]
        first, last = operands[0], operands[-1]
        if first is None or last is None:
            return None
        match node.op_type:
            case "Sqrt":
                return math.sqrt(first) if first >= 0 else None
            case "Mul":
                return first * last
            case "Div":
                return first / last if last else None
        return first if node.op_type == "Identity" or _casts_to_float(node) else None

    def _dimension(self, node: ir.Node) -> float | None:
        """The dimension that a Slice or Gather takes from a Shape, if it is known."""
        shape, start = _producer(node.inputs[0], "Shape"), _number(node.inputs[1])
        if shape is None or shape.attributes or start is None:
            return None
        dims = self.dims(shape.inputs[0])
        one = node.op_type == "Gather" or self.dims(node.outputs[0]) == (1,)
        dim = dims[int(start)] if one and -len(dims) <= start < len(dims) else None
        return float(dim) if isinstance(dim, int) else None

    def is_float32(self, value: ir.Value) -> bool:
        known = self._by_name.get(value.name)
        return known is not None and known.dtype == ir.DataType.FLOAT


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


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _number(value: ir.Value | None) -> float | None:
    """The only element of a constant."""
    array = _constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _casts_to_float(node: ir.Node) -> bool:
    return is_standard(node, "Cast") and node.attributes.get_int("to", 0) == ir.DataType.FLOAT


def _consumers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def _products(softmax: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The MatMuls before and after, if there are both: without them a Softmax is no attention."""
    first, last = _scores(softmax.inputs[0], _MAX_CHAIN), _weighted(softmax.outputs[0], 3)
    return (first, last) if first is not None and last is not None else None


def _weighted(weights: ir.Value, budget: int) -> ir.Node | None:
    """The MatMul that weights go into, through Where(IsNaN(P), 0, P) and conversions."""
    for node in _consumers(weights):
        if is_standard(node, "MatMul") and node.inputs[0] is weights:
            return node
        if is_standard(node, "Where", "Cast", "Identity") and budget > 0:
            found = _weighted(node.outputs[0], budget - 1)
            if found is not None:
                return found
    return None


def _scores(value: ir.Value | None, budget: int) -> ir.Node | None:
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


def _match(softmax: ir.Node, scores: ir.Node, weighted: ir.Node, facts: _Facts) -> _Attention:
    if len(facts.dims(softmax.inputs[0])) != 4:
        raise _Declined("scores are not known to be [batch, heads, queries, keys]")
    if softmax.attributes.get_int("axis", -1 if facts.opset >= 13 else 1) not in (-1, 3):
        raise _Declined("Softmax is not over the keys")
    if not facts.is_float32(softmax.outputs[0]):
        raise _Declined("is not FLOAT, the type of the CPU kernel")
    scale, masks = _chain(softmax.inputs[0], scores, facts)
    query, q_scale = _unscaled(scores.inputs[0], facts)
    key, k_scale = _unscaled(scores.inputs[1], facts)
    q, v = _heads(query, facts), _heads(weighted.inputs[1], facts)
    k, inner_scale = _key_heads(key, facts)
    scale *= q_scale * k_scale * inner_scale
    if not np.isfinite(np.float32(scale)) or np.float32(scale) == 0:
        raise _Declined(f"has scale {scale}")
    if q.merged is None:
        raise _Declined(
            "queries exist only per head (rotary embedding, packed projections or unknown shapes)"
        )
    if q.count is None or q.count != k.count or q.count != v.count:
        raise _Declined("queries, keys and values are not known to have the same number of heads")
    if q.size is None or q.size != k.size or v.size is None:
        raise _Declined("head sizes are not known to fit")
    if k.merged is not None and v.merged is not None:
        keys, values, split = k.merged, v.merged, False
    elif k.split is not None and v.split is not None:
        keys, values, split = k.split, v.split, True
    else:
        raise _Declined("keys and values are neither both merged nor both per head")
    masks = tuple(mask for mask in masks if not _keeps_all(mask))
    # Two finite masks may add up to -Inf.
    may_be_nan = len(masks) > 1 or not all(map(_is_finite, masks))
    tested = _turns_nan_to_zero(weighted.inputs[0], softmax, facts)
    batch = facts.dims(q.merged)[0]
    shape, product = (batch, q.count, q.length, k.length), (batch, q.count, q.length, v.size)
    operands: list[tuple[Dims, Dims]] = [(facts.dims(keys)[:1], (batch,)), (facts.dims(values)[:1], (batch,))]
    operands += [(facts.dims(mask.value), shape) for mask in masks]
    if not all(_fits(dims, target) for dims, target in operands):
        raise _Declined("queries are repeated for larger keys, values or masks")
    output, merged = _output(weighted.outputs[0], product, facts.dims(query), facts)
    if not _only_for(scores, output):
        raise _Declined("scores or weights are used elsewhere too")
    return _Attention(
        softmax,
        q.merged,
        keys,
        values,
        split,
        q.count,
        scale,
        masks,
        tested and may_be_nan,
        output,
        None if merged else (q.count, v.size),
    )


def _fits(dims: Dims, target: Dims) -> bool:
    """Whether a tensor does not enlarge a ``target`` that it is broadcast with; different symbols may be equal,
    but a 1 there must be a 1 here."""
    if not dims and 1 in target:
        return False
    pairs = zip(reversed(dims), reversed(target), strict=False)
    return all(there != 1 or here == 1 for here, there in pairs)


def _chain(value: ir.Value | None, scores: ir.Node, facts: _Facts) -> tuple[float, tuple[_Mask, ...]]:
    """The scale and the masks between the product and Softmax, in the order in which they are applied."""
    scale, masks = 1.0, list[_Mask]()
    while (node := value.producer() if value is not None else None) is not scores:
        assert node is not None  # _scores has been here
        index = next(i for i, x in enumerate(node.inputs) if _scores(x, _MAX_CHAIN) is scores)
        if (factor := _factor(node, index, facts)) is not None:
            scale *= factor
        elif node.op_type in ("Add", "Where") and scale != 1:
            raise _Declined("scores are scaled after they are masked")
        elif node.op_type == "Add":
            mask = node.inputs[1 - index]
            assert mask is not None
            masks.append(_Mask(mask))
        elif node.op_type == "Where":
            masks.append(_where(node, index))
        elif not _does_nothing(node, facts):
            raise _Declined(f"scores go through a {node.op_type} of something that is no constant")
        value = node.inputs[index]
    return scale, tuple(reversed(masks))


def _where(node: ir.Node, index: int) -> _Mask:
    """Of a Where whose input ``index`` is the scores."""
    condition, fill = node.inputs[0], node.inputs[3 - index] if index else None
    number = _number(fill)
    if condition is None or number is None or not number <= _LARGEST_FILL:
        raise _Declined("masked scores become something other than -Inf or a number of at most -1e30")
    return _Mask(condition, fill, keep=index == 1)


def _factor(node: ir.Node, index: int, facts: _Facts) -> float | None:
    """What a Mul or Div multiplies its input ``index`` with, if that is one known number."""
    if not is_standard(node, "Mul", "Div") or (node.op_type == "Div" and index == 1):
        return None
    number = facts.number(node.inputs[1 - index])
    if number is None or number == 0:
        return None
    return number if node.op_type == "Mul" else 1 / number


def _does_nothing(node: ir.Node, facts: _Facts) -> bool:
    if is_standard(node, "Cast"):
        source = node.inputs[0]
        return _casts_to_float(node) and source is not None and facts.is_float32(source)
    if is_standard(node, "Reshape"):
        before, after = facts.dims(node.inputs[0]), facts.dims(node.outputs[0])
        return len(before) == len(after) and _unknown(before, after) <= 1
    return is_standard(node, "Identity")


def _unknown(*alternatives: Dims) -> int:
    """In how many places the last of these shapes is not known to equal one of the others. If the sizes of
    two tensors agree and all dimensions but one do, that one does too."""
    *others, last = alternatives
    return sum(dim is None or all(dim != other[i] for other in others) for i, dim in enumerate(last))


def _unscaled(value: ir.Value | None, facts: _Facts) -> tuple[ir.Value | None, float]:
    """``value`` without the constant factors and empty steps that it went through last, and their product."""
    scale = 1.0
    while (node := _producer(value, "Mul", "Div", "Identity", "Cast", "Reshape")) is not None:
        for index in range(len(node.inputs)):
            if (factor := _factor(node, index, facts)) is not None:
                value, scale = node.inputs[index], scale * factor
                break
        else:
            if node.op_type in ("Mul", "Div") or not _does_nothing(node, facts):
                break
            value = node.inputs[0]
    return value, scale


def _heads(value: ir.Value | None, facts: _Facts) -> _Heads:
    """Of a value that is [B, H, S, D], if it is anything."""
    dims = facts.dims(value)
    if value is None or len(dims) != 4:
        return _Heads(None, None, None, None, None)
    heads = _merged_heads(_transposed(value, (0, 2, 1, 3)), facts)
    if heads is not None:
        return dataclasses.replace(heads, split=value)
    size = dims[3] if isinstance(dims[3], int) else None
    count = dims[1] if isinstance(dims[1], int) else None
    if (concat := _producer(value, "Concat")) is not None and concat.attributes.get_int("axis", 0) in (2, -2):
        parts = [_heads(part, facts) for part in concat.inputs]
        count = next((part.count for part in parts if part.count is not None), count)
        size = next((part.size for part in parts if part.size is not None), size)
    return _Heads(None, value, dims[2], count, size)


def _merged_heads(value: ir.Value | None, facts: _Facts) -> _Heads | None:
    """Of a value [B, S, H, D] that is a Reshape of [B, S, H·D]."""
    node = _producer(value, "Reshape")
    merged = node.inputs[0] if node is not None else None
    before, after = facts.dims(merged), facts.dims(value)
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


def _key_heads(value: ir.Value | None, facts: _Facts) -> tuple[_Heads, float]:
    """Of a value that is [B, H, D, S], and the factor that was applied before it was transposed."""
    heads = _merged_heads(_transposed(value, (0, 2, 3, 1)), facts)
    if heads is not None:
        return heads, 1.0
    split = _transposed(value, (0, 1, 3, 2)) or _transposed_as_matrices(value, facts)
    split, scale = _unscaled(split, facts)
    return _heads(split, facts), scale


def _transposed_as_matrices(value: ir.Value | None, facts: _Facts) -> ir.Value | None:
    """K of ``Reshape(Transpose[0,2,1](Reshape(K, [B·H, S, D])), [B, H, D, S])``."""
    node = _producer(value, "Reshape")
    matrices = _transposed(node.inputs[0], (0, 2, 1)) if node is not None else None
    node = _producer(matrices, "Reshape")
    source = node.inputs[0] if node is not None else None
    split, middle, result = facts.dims(source), facts.dims(matrices), facts.dims(value)
    if len(split) != 4 or len(middle) != 3 or len(result) != 4:
        return None
    b, h, s, d = split
    proven = _unknown((s, d), middle[1:]) == 0 and _unknown((b, h, d, s), result) <= 1
    return source if proven else None


def _turns_nan_to_zero(weights: ir.Value | None, softmax: ir.Node, facts: _Facts) -> bool:
    """Whether that is all that happens to the weights after Softmax, rather than nothing; raises otherwise."""
    cleaned = False
    while (node := weights.producer() if weights is not None else None) is not softmax:
        assert node is not None  # _weighted has been here
        if not cleaned and is_standard(node, "Where"):
            condition, zero, weights = node.inputs
            test = _producer(condition, "IsNaN")
            cleaned = test is not None and test.inputs[0] is weights and _number(zero) == 0
            if cleaned:
                continue
        elif _does_nothing(node, facts):
            weights = node.inputs[0]
            continue
        raise _Declined(f"weights go through a {node.op_type} after Softmax")
    return cleaned


def _source(value: ir.Value | None) -> ir.Value | None:
    """Where the elements of ``value`` come from: through nodes that only repeat or arrange them."""
    while (node := _producer(value, "Expand", "Identity", "Unsqueeze", "Reshape", "Squeeze")) is not None:
        value = node.inputs[0]
    return value


def _keeps_all(mask: _Mask) -> bool:
    """Whether the mask is known to change no score."""
    elements = _constant(_source(mask.value))
    if mask.fill is not None:
        return elements is not None and bool((elements == mask.keep).all())
    if elements is not None:
        return not elements.any()
    where = _producer(_source(mask.value), "Where")
    if where is None:
        return False
    condition = _constant(_source(where.inputs[0]))
    return condition is not None and bool(condition.all()) and _number(where.inputs[1]) == 0


def _is_finite(mask: _Mask) -> bool:
    """Whether the mask is known to have no -Inf: then Softmax gives no NaN for finite scores."""
    if (fill := _number(mask.fill)) is not None:
        return bool(np.isfinite(fill))
    source = _source(mask.value)
    where = _producer(source, "Where")
    parts = [_constant(source)] if where is None else [_constant(part) for part in where.inputs[1:]]
    return all(part is not None and bool(np.isfinite(part).all()) for part in parts)


def _output(value: ir.Value, product: Dims, query: Dims, facts: _Facts) -> tuple[ir.Value, bool]:
    """What is made of the product ``value`` by merging the heads: [B, Sq, H·D] and True, or [B, Sq, H, D] and
    False. The shape of the product is ``product`` = [B, H, Sq, D]."""
    # Shape inference may have given the same dimension several symbols; all of them are right.
    found = facts.dims(value) if len(facts.dims(value)) == 4 else product
    known = (product, (*query[:3], product[3]), found)
    node = _only_reader(value)
    if node is not None and is_standard(node, "Identity", "Reshape"):
        copied = facts.dims(node.outputs[0])
        if len(copied) == 4 and _unknown(*known, copied) <= 1:
            value = node.outputs[0]
            node = _only_reader(value)
    if node is None or _transposed(node.outputs[0], (0, 2, 1, 3)) is not value:
        raise _Declined("heads are not merged by a Transpose")
    rows = node.outputs[0]
    node = _only_reader(rows)
    if node is not None and is_standard(node, "Reshape"):
        merged, heads, size = facts.dims(node.outputs[0]), product[1], product[3]
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


# -- rewriting ---------------------------------------------------------------------------------------------


class _Rewriter:
    """Puts the fused operators into the main graph; what several of them need is made once."""

    def __init__(self, model: ir.Model, opset: int) -> None:
        self._model, self._graph, self._opset = model, model.graph, opset
        self._names = value_names(model)
        self._biases: dict[object, ir.Value] = {}
        self._constants: dict[tuple[int, ...] | float, ir.Value] = {}
        self._replaced: dict[ir.Value, ir.Value] = {}
        model.opset_imports[DOMAIN] = attention.VERSION

    def fuse(self, match: _Attention) -> None:
        old, softmax = match.output, match.softmax
        last = old.producer()
        assert last is not None
        inputs = [self._now(x) for x in (match.q, match.k, match.v)]
        if match.masks:
            inputs.append(self._bias(match))
        op_type = _OP_TYPES[Signature(split=match.split, masked=bool(match.masks))]
        attributes = {"num_heads": match.heads, "scale": match.scale}
        fused = ir.node(op_type, inputs, attributes, domain=DOMAIN, name=softmax.name)
        self._add_body(op_type)
        nodes = [fused]
        if match.nan_to_zero:
            test = ir.node("IsNaN", [fused.outputs[0]])
            nodes += [test, ir.node("Where", [test.outputs[0], self._constant(0.0), fused.outputs[0]])]
        if match.split_to is not None:
            shape = self._constant((0, 0, *match.split_to))
            nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
        for node in nodes:
            node.metadata_props.update(softmax.metadata_props)
        for node in nodes[:-1]:
            node.outputs[0].name = self._name(f"{old.name}.{node.op_type}")
        new = nodes[-1].outputs[0]
        new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
        new.metadata_props.update(old.metadata_props)
        self._graph.insert_before(last, nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._replaced[old] = new
        old.name, new.name = None, old.name
        _remove_unused(last)

    def _now(self, value: ir.Value) -> ir.Value:
        """``value``, or what an earlier fusion put in its place."""
        return self._replaced.get(value, value)

    def _add_body(self, op_type: str) -> None:
        body = attention.function_body(op_type, self._opset)
        function = ir.serde.deserialize_function(body)
        self._model.functions[function.identifier()] = function

    def _bias(self, match: _Attention) -> ir.Value:
        """The sum of all masks, in front of the Softmax; it broadcasts to [B, H, Sq, Sk]."""
        key = tuple(map(_key, match.masks))
        if key in self._biases:
            return self._biases[key]
        bias: ir.Value | None = None
        for mask in match.masks:
            value = self._now(_unexpanded(mask.value))
            if mask.fill is not None:
                kept = bias if bias is not None else self._constant(0.0)
                choices = [kept, mask.fill] if mask.keep else [mask.fill, kept]
                bias = self._insert(match.softmax, "Where", [value, *choices])
            else:
                bias = value if bias is None else self._insert(match.softmax, "Add", [bias, value])
        assert bias is not None
        self._biases[key] = bias
        return bias

    def _insert(self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value]) -> ir.Value:
        node = ir.node(op_type, inputs)
        node.outputs[0].name = self._name(f"{before.outputs[0].name}.{op_type}")
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, content: tuple[int, ...] | float) -> ir.Value:
        if content not in self._constants:
            array = np.array(content, np.int64 if isinstance(content, tuple) else np.float32)
            label = "_".join(map(str, content)) if isinstance(content, tuple) else f"{content:g}"
            tensor = ir.tensor(array, name=self._name(f"{FuseAttention.name}.{label}"))
            value = ir.Value(
                name=tensor.name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
            self._graph.register_initializer(value)
            self._constants[content] = value
        return self._constants[content]

    def _name(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}.{count}", count + 1
        self._names.add(name)
        return name


def _unexpanded(mask: ir.Value) -> ir.Value:
    """``mask`` before it was expanded to a shape that it broadcasts to anyway."""
    while (node := _producer(mask, "Expand")) is not None and node.inputs[0] is not None:
        mask = node.inputs[0]
    return mask


def _key(mask: _Mask) -> object:
    """Equal for masks that are equal; exporters write ``Where(condition, 0, fill)`` anew for each layer."""
    where = _producer(mask.value, "Where")
    numbers = [_number(value) for value in where.inputs[1:]] if where is not None else [None]
    if where is not None and mask.fill is None and None not in numbers:
        return where.inputs[0], *numbers
    return mask.value, _number(mask.fill), mask.keep


def _remove_unused(node: ir.Node) -> None:
    """Remove ``node``, and with it everything before it that nothing else needs."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        node.graph.remove(node, safe=True)
        for value in dict.fromkeys(inputs):
            if (producer := value.producer()) is not None:
                waiting.append(producer)
            else:
                drop_if_unused(value)
