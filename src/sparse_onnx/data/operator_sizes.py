"""Sizes that operators and weights fix: a product with a weight of 64 rows takes 64 inputs, attention with 8 heads a
cache of 8 heads.

Shapes are inferred with the names of the inputs' dimensions in them; where an operator then wants a number at a place
with a name, that is a fact about the name. What subgraphs want, which may not run, and what broadcasting suggests is
only likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from sparse_onnx.model.dimensions import Dim, read_dim, unnamed
from sparse_onnx.model.graph import input_at, is_standard
from sparse_onnx.model.shapes import Dims, Shapes, without_claims

__all__ = ["Fact", "operator_sizes"]

_STEPS = 8
"""Nodes that a width is looked for behind, at most."""


class Fact(NamedTuple):
    """The dimension ``name`` of an input has ``size``, or that of the dimension of that name; see
    :func:`sparse_onnx.model.dimensions.unnamed` for one without a name."""

    name: str
    size: int | str


def operator_sizes(model: ir.Model) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """What is sure about the dimensions of the inputs of ``model``, and what is likely, the likeliest first.

    ``model`` is left as it was.
    """
    model = without_claims(model)  # what was written there may be called otherwise
    names = {value.name or "": _names(value) for value in model.graph.inputs if value.shape is not None}
    shapes = _Shapes(Shapes(model, inputs=names))
    main = list(model.graph)
    inner = [node for graph in model.graph.subgraphs() for node in graph]
    sure = tuple(dict.fromkeys(_facts(main, _RULES, shapes)))
    likely = (*_facts(main, _LIKELY, shapes), *_facts(inner, _RULES, shapes), *_facts(inner, _LIKELY, shapes))
    return sure, tuple(dict.fromkeys(likely))


def _names(value: ir.Value) -> list[Dim]:
    """The dimensions of an input, each with a name if it has no size."""
    dims = enumerate(value.shape or ())
    return [unnamed(value.name or "", axis) if (dim := read_dim(d)) is None else dim for axis, d in dims]


class _Shapes:
    """Shapes of values; () for one that is not known or not there."""

    def __init__(self, known: Shapes) -> None:
        self._known = known

    def of(self, node: ir.Node, index: int) -> Dims:
        return self._known.dims(input_at(node, index))

    def width(self, node: ir.Node, index: int) -> Dim:
        """The last dimension; of a product with a weight also behind operators whose shapes cannot be inferred."""
        value = input_at(node, index)
        for _ in range(_STEPS):
            dims = self.of(node, index)
            maker = None if value is None else value.producer()
            if isinstance(_at(dims, -1), int) or maker is None:
                return _at(dims, -1)
            if maker.op_type == "MatMul" and isinstance(found := _at(self.of(maker, 1), -1), int):
                return found
            if maker.op_type == "MatMulNBits":
                return _integer(maker, "N") or None
            if maker.op_type == "Add":  # of a bias
                node, index = (
                    maker,
                    next((i for i in range(2) if isinstance(_at(self.of(maker, i), -1), int)), 0),
                )
            elif maker.op_type in ("RotaryEmbedding", "Cast", "Identity"):
                node, index = maker, 0
            else:
                return None
            value = node.inputs[index]
        return None


_Pairs = Iterator[tuple[Dim, Dim]]
"""Dimensions that are equal."""

_Rule = Callable[[ir.Node, _Shapes], _Pairs]


def _facts(nodes: Sequence[ir.Node], rules: Mapping[str, _Rule], shapes: _Shapes) -> Iterator[Fact]:
    for node in nodes:
        rule = rules.get(node.op_type)
        if rule is None or not (is_standard(node, node.op_type) or node.domain == "com.microsoft"):
            continue
        for a, b in rule(node, shapes):
            if isinstance(a, str) and b is not None and a != b:
                yield Fact(a, b)
            elif isinstance(b, str) and isinstance(a, int):
                yield Fact(b, a)


def _at(dims: Dims, axis: int) -> Dim:
    return dims[axis] if -len(dims) <= axis < len(dims) else None


def _integer(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes.get_int(name, default)


def _matmul(node: ir.Node, shapes: _Shapes) -> _Pairs:
    a, b = shapes.of(node, 0), shapes.of(node, 1)
    yield _at(a, -1), _at(b, -2 if len(b) > 1 else -1)


def _gemm(node: ir.Node, shapes: _Shapes) -> _Pairs:
    a, b = shapes.of(node, 0), shapes.of(node, 1)
    yield _at(a, 0 if _integer(node, "transA") else 1), _at(b, 1 if _integer(node, "transB") else 0)


def _conv(node: ir.Node, shapes: _Shapes) -> _Pairs:
    inside = _at(shapes.of(node, 1), 1)
    yield _at(shapes.of(node, 0), 1), inside * _integer(node, "group", 1) if isinstance(inside, int) else None


def _conv_transpose(node: ir.Node, shapes: _Shapes) -> _Pairs:
    yield _at(shapes.of(node, 0), 1), _at(shapes.of(node, 1), 0)


def _recurrent(node: ir.Node, shapes: _Shapes) -> _Pairs:
    x, w, r = (shapes.of(node, index) for index in range(3))
    yield _at(x, 2), _at(w, 2)
    batch = 0 if _integer(node, "layout") else 1
    for state in (shapes.of(node, 5), shapes.of(node, 6) if node.op_type == "LSTM" else ()):
        yield _at(state, 1 - batch), _at(w, 0)
        yield _at(state, batch), _at(x, batch)
        yield _at(state, 2), _at(r, 2)


def _channels(node: ir.Node, shapes: _Shapes) -> _Pairs:
    yield _at(shapes.of(node, 0), 1), _at(shapes.of(node, 1), 0)


def _last_axis(node: ir.Node, shapes: _Shapes) -> _Pairs:
    if _integer(node, "axis", -1) == -1:
        yield _at(shapes.of(node, 0), -1), _at(shapes.of(node, 1), -1)


def _skip_norm(node: ir.Node, shapes: _Shapes) -> _Pairs:
    for index in range(2):
        yield _at(shapes.of(node, index), -1), _at(shapes.of(node, 2), -1)


def _concat(node: ir.Node, shapes: _Shapes) -> _Pairs:
    every = [dims for index in range(len(node.inputs)) if (dims := shapes.of(node, index))]
    if not every:
        return
    axis = _integer(node, "axis") % len(every[0])
    for place in range(len(every[0])):
        sizes = [_at(dims, place) for dims in every]
        known = next((size for size in sizes if isinstance(size, int)), sizes[0])
        if place != axis:
            yield from ((size, known) for size in sizes)


def _heads(width: Dim, heads: int) -> Dim:
    return width // heads if isinstance(width, int) and heads > 0 and width % heads == 0 else None


def _cache(past: Dims, heads: Dim, size: Dim) -> _Pairs:
    """A cache [B, heads, length, size]."""
    yield _at(past, 1), heads or None
    yield _at(past, 3), size


def _group_query(node: ir.Node, shapes: _Shapes) -> _Pairs:
    """``com.microsoft::GroupQueryAttention``: query, key, value (or all packed in the first), caches of keys and of
    values, lengths, and the cosines of half a head."""
    heads, pairs = _integer(node, "num_heads"), _integer(node, "kv_num_heads")
    half = _at(shapes.of(node, 7), -1)
    if node.inputs[1] is None:
        sizes = [_heads(shapes.width(node, 0), heads + 2 * pairs)]
    else:
        sizes = [
            _heads(shapes.width(node, index), count) for index, count in ((0, heads), (1, pairs), (2, pairs))
        ]
    sizes.append(
        2 * half if isinstance(half, int) and half else None
    )  # the least sure: part of a head may turn
    size = next((size for size in sizes if size is not None), None)
    for index in (3, 4):
        yield from _cache(shapes.of(node, index), pairs, size)


def _multi_head(node: ir.Node, shapes: _Shapes) -> _Pairs:
    """``com.microsoft::MultiHeadAttention`` and its decoder: caches are inputs 6 and 7, or 5 and 6."""
    heads, first = _integer(node, "num_heads"), 6 if node.op_type == "MultiHeadAttention" else 5
    query, value = shapes.of(node, 0), shapes.of(node, 2)
    if len(query) == 5:  # packed [B, S, heads, 3, size]
        size = value_size = _at(query, -1)
    else:
        size = _heads(shapes.width(node, 0), heads)
        value_size = _at(value, -1) if len(value) == 4 else _heads(shapes.width(node, 2), heads) or size
    yield from _cache(shapes.of(node, first), heads, size)
    yield from _cache(shapes.of(node, first + 1), heads, value_size)


def _attention(node: ir.Node, shapes: _Shapes) -> _Pairs:
    if node.domain == "com.microsoft":  # weights [in, q + k + v], the cache [2, B, heads, length, size]
        heads, widths = _integer(node, "num_heads"), _at(shapes.of(node, 1), 1)
        parts = node.attributes.get_ints("qkv_hidden_sizes", ())
        size = _heads(parts[1] if len(parts) > 1 else _heads(widths, 3), heads)
        past = shapes.of(node, 4)
        yield _at(shapes.of(node, 0), -1), _at(shapes.of(node, 1), 0)
        yield from zip(
            map(past.__getitem__, (2, 4)) if len(past) == 5 else (), (heads or None, size), strict=False
        )
        return
    for index in (1, 2):
        current, heads = shapes.of(node, index), _integer(node, "kv_num_heads")
        if len(current) == 4:
            yield from _cache(shapes.of(node, index + 3), _at(current, 1), _at(current, 3))
        else:
            yield from _cache(shapes.of(node, index + 3), heads, _heads(shapes.width(node, index), heads))


def _broadcast(node: ir.Node, shapes: _Shapes) -> _Pairs:
    """A constant of more than one element along an axis: the other has as many, or one."""
    constant = [value is not None and value.const_value is not None for value in node.inputs]
    if constant.count(True) != 1 or len(constant) != 2:
        return
    fixed, other = (shapes.of(node, constant.index(there)) for there in (True, False))
    for axis in range(-min(len(fixed), len(other)), 0):
        if (size := fixed[axis]) != 1:
            yield other[axis], size


def _quantized(node: ir.Node, shapes: _Shapes) -> _Pairs:
    """``com.microsoft::MatMulNBits``."""
    yield _at(shapes.of(node, 0), -1), _integer(node, "K") or None


_RULES: Mapping[str, _Rule] = {
    "MatMul": _matmul,
    "MatMulNBits": _quantized,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "BatchNormalization": _channels,
    "InstanceNormalization": _channels,
    "LayerNormalization": _last_axis,
    "RMSNormalization": _last_axis,
    "SimplifiedLayerNormalization": _last_axis,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "Concat": _concat,
    "GroupQueryAttention": _group_query,
    "MultiHeadAttention": _multi_head,
    "DecoderMaskedMultiHeadAttention": _multi_head,
    "Attention": _attention,
}

_LIKELY: Mapping[str, _Rule] = dict.fromkeys(("Add", "Sub", "Mul", "Div"), _broadcast)
