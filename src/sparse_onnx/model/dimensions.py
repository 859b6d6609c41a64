"""Sizes of dimensions by their names: which names say something, expressions, and solving for sizes that must agree.

A dimension of a model is a number, a name or nothing. Equal names mean equal sizes, and a name may be an expression:
``past_sequence_length + sequence_length``, ``batch_size*num_heads``, ``2*batch``. Some writers put a word for
"unknown" where nothing belongs (``?``, ``None``, -1): two of these say nothing about each other.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx
import onnx_ir as ir

__all__ = [
    "Contradiction",
    "Dim",
    "Equation",
    "Expression",
    "Unsolvable",
    "equal",
    "forget_unknown",
    "is_unknown",
    "names_of",
    "parse",
    "put",
    "read_dim",
    "solve",
    "unnamed",
    "value_of",
]

Dim = int | str | None
"""A dimension as it is used here: a size of 0 or more, a name that says something, or None for unknown."""

Expression = Mapping[tuple[str, ...], int]
"""A sum of products: names, sorted, with the factor in front of them; ``()`` has the constant."""

_NOTHING = {"", "none", "null", "nan", "unknown", "undefined", "unk", "dynamic", "any"}
_LONGEST, _MOST_TERMS = 120, 16
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+)(?![A-Za-z_])|(?P<name>[A-Za-z_][\w.]*(?:-[A-Za-z_][\w.]*)*)|(?P<sign>[-+*()]))\s*"
)


def is_unknown(name: str) -> bool:
    """Whether a dimension's name stands for "unknown", so that two of them need not be equal: no letter or digit in it
    (``?``), a negative number, or a word such as ``None``. ``unk__12`` is a name like any other."""
    bare = name.strip().lower()
    return bare in _NOTHING or not re.search(r"\w", bare) or re.fullmatch(r"-\s*\d+", bare) is not None


def read_dim(dim: int | ir.SymbolicDim) -> Dim:
    """A dimension of a shape of ``onnx_ir``; negative sizes and names for "unknown" are None."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return None if dim.value is None or is_unknown(dim.value) else dim.value


def forget_unknown(graph: onnx.GraphProto) -> None:
    """Clear dimensions of ``graph`` and the graphs inside that say nothing: negative sizes, names for "unknown"."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0 or (dim.HasField("dim_param") and is_unknown(dim.dim_param)):
                dim.ClearField("value")
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                forget_unknown(inner)


def unnamed(value: str, axis: int) -> str:
    """What the dimension ``axis`` of the input ``value`` is called where the model gives it no name."""
    return f"{value}.{axis}"


def parse(text: str) -> Expression:
    """``text`` as sums and products of names and integers; a name of its own if it is no such expression.

    A minus directly between letters belongs to a name (``batch-size``), an ``x`` between two names multiplies
    (``batch_size x num_heads``). A number alone is a name, too: ONNX Runtime does not take it for a size.
    """
    try:
        tokens = _tokens(text)
        expression = _Parser(tokens).whole() if len(tokens) > 1 else None
    except _NoExpressionError:
        expression = None
    if expression is None or not any(expression):  # nothing but a number
        return {(text,): 1}
    return expression


class _NoExpressionError(Exception):
    pass


def _tokens(text: str) -> list[str]:
    if len(text) > _LONGEST:
        raise _NoExpressionError
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _NoExpressionError
        tokens.append(match[0].strip())
        position = match.end()
    return tokens


@dataclasses.dataclass
class _Parser:
    """sum = product (± product)*, product = factor (* factor)*, factor = number | name | -factor | (sum)."""

    tokens: Sequence[str]
    position: int = 0

    def whole(self) -> Expression:
        found = self._sum()
        if self.position < len(self.tokens):
            raise _NoExpressionError
        return found

    def _next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self.position += 1
        return token

    def _sum(self) -> Expression:
        found = self._product()
        while self._next() in ("+", "-"):
            factor = 1 if self._take() == "+" else -1
            found = _add(found, self._product(), factor)
        return found

    def _product(self) -> Expression:
        found = self._factor()
        while self._next() in ("*", "x"):
            self._take()
            found = _multiply(found, self._factor())
        return found

    def _factor(self) -> Expression:
        token = self._take()
        if token == "-":
            return _add({}, self._factor(), -1)
        if token == "(":
            found = self._sum()
            if self._take() != ")":
                raise _NoExpressionError
            return found
        if token.isdecimal():
            return {(): int(token)}
        if not token or token in "+*)":
            raise _NoExpressionError
        return {(token,): 1}


def _add(first: Expression, second: Expression, factor: int = 1) -> Expression:
    total = Counter(dict(first))
    for names, count in second.items():
        total[names] += factor * count
    return _checked(total)


def _multiply(first: Expression, second: Expression) -> Expression:
    total: Counter[tuple[str, ...]] = Counter()
    for a, count in first.items():
        for b, other in second.items():
            total[tuple(sorted((*a, *b)))] += count * other
    return _checked(total)


def _checked(total: Mapping[tuple[str, ...], int]) -> Expression:
    found = {names: count for names, count in total.items() if count}
    if len(found) > _MOST_TERMS or any(len(names) > _MOST_TERMS for names in found):
        raise _NoExpressionError
    return found


def names_of(expression: Expression) -> tuple[str, ...]:
    """The names in it, in their order."""
    return tuple(dict.fromkeys(name for names in expression for name in names))


def put(expression: Expression, sizes: Mapping[str, int]) -> Expression:
    """``expression`` with the known ``sizes`` in place of their names."""
    total: Counter[tuple[str, ...]] = Counter()
    for names, count in expression.items():
        for name in names:
            count *= sizes.get(name, 1)
        total[tuple(name for name in names if name not in sizes)] += count
    return {names: count for names, count in total.items() if count}


def value_of(expression: Expression, sizes: Mapping[str, int]) -> int | None:
    """Its value, or None while a name in it has no size."""
    left = put(expression, sizes)
    return None if any(left) else left.get((), 0)


@dataclasses.dataclass(frozen=True)
class Equation:
    """``expression`` must be ``size``; ``text`` is what a message calls it."""

    expression: Expression
    size: int
    text: str


def equal(name: str, other: int | str) -> Equation:
    """The dimension ``name`` has the size ``other``, or that of the dimension of that name."""
    if isinstance(other, int):
        return Equation(parse(name), other, name)
    difference = Counter(dict(parse(name)))
    difference.subtract(dict(parse(other)))
    return Equation(dict(difference), 0, name)


@dataclasses.dataclass
class Contradiction(Exception):
    """The dimension ``text`` would have to be ``size``, but is ``found``."""

    text: str
    size: int
    found: int


@dataclasses.dataclass
class Unsolvable(Exception):
    """No size of 0 or more of ``name`` makes the dimension ``text`` have ``size``."""

    text: str
    size: int
    name: str


def solve(equations: Iterable[Equation], known: Mapping[str, int]) -> dict[str, int]:
    """``known`` and what follows from it: an equation that is linear in its only unknown name gives its size.

    Raises Contradiction or Unsolvable.
    """
    sizes, waiting = dict(known), list(equations)
    while True:
        left, before = [], len(sizes)
        for equation in waiting:
            rest = dict(put(equation.expression, sizes))
            constant = rest.pop((), 0)
            if not rest:
                if constant != equation.size:
                    raise Contradiction(equation.text, equation.size, constant)
            elif len(rest) == 1 and len(names := next(iter(rest))) == 1:
                size, remainder = divmod(equation.size - constant, rest[names])
                if remainder or size < 0:
                    raise Unsolvable(equation.text, equation.size, names[0])
                sizes[names[0]] = size
            else:
                left.append(equation)
        if len(sizes) == before:
            return sizes
        waiting = left
