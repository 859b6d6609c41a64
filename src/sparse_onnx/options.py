"""Checks of options: types from the annotations, ranges, and unknown names with the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from sparse_onnx.errors import UsageError

__all__ = ["check_types", "require", "unknown"]


def require(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raise a UsageError that names the option, its value and what is allowed, unless ``holds``."""
    if not holds:
        raise UsageError(f"{option} must be {allowed}, not {reprlib.repr(value)}")


def unknown(what: str, word: object, known: Iterable[str]) -> str:
    """Say that ``word`` is no valid ``what``, which valid one is nearest, and which there are."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    return f"unknown {what} {reprlib.repr(word)}{nearest} (valid: {', '.join(names) or 'none'})"


def check_types(options: Any) -> None:
    """Raise a UsageError unless every field of the dataclass ``options`` holds a value of its declared type.

    Understood are bool, int, float (finite; an int will do), str, None, ``Literal``, unions of these,
    ``tuple[T, ...]`` and ``Mapping[str, T]``, and object for any.
    """
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        require(_fits(value, hint), field.name, value, _describe(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str) and value in args
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            isinstance(key, args[0]) and _fits(item, args[1]) for key, item in value.items()
        )
    if hint is object:
        return True
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        limit = sys.float_info.max
        return isinstance(value, int | float) and -limit <= value <= limit  # neither NaN nor infinite
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(args)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arg) for arg in args if arg is not type(None))
    if origin is tuple and typing.get_origin(args[0]) is Mapping:
        return f"a list of {_describe(args[0])}"
    if origin is tuple:
        return f"a list of {_describe(args[0]).split()[-1]}s"
    if origin is Mapping:
        return f"names with {_describe(args[1])} each"
    return {
        float: "a finite number",
        int: "an integer",
        bool: "true or false",
        str: "a string",
        object: "a value",
    }.get(hint, str(hint))
