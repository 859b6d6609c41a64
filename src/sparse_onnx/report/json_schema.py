"""A JSON Schema (draft 2020-12) of typed dictionaries: their keys, all described, and no others."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

from sparse_onnx.document import Limits

__all__ = ["json_schema"]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NAMES = {bool: "boolean", float: "number", int: "integer", str: "string", type(None): "null"}


def json_schema(document: type, title: str) -> dict[str, Any]:
    """The schema of ``document``, a TypedDict; its docstring is the description, other TypedDicts in it are ``$defs``.

    A key's annotation is ``Annotated[type, "what it is"]``, with :class:`Limits` in it or not, around which
    ``NotRequired`` may stand. Raises TypeError for a type that a schema is not made of here.
    """
    about = " ".join((document.__doc__ or "").split())
    parts = dict.fromkeys(_parts(document))
    return {
        "$schema": _DRAFT,
        "title": title,
        "description": about,
        **_object(document),
        "$defs": {_name(part): _object(part) for part in parts},
    }


def _parts(document: type) -> Iterator[type]:
    """The TypedDicts that ``document`` is made of."""
    for hint in get_type_hints(document).values():
        for part in _within(hint):
            yield part
            yield from _parts(part)


def _within(hint: Any) -> Iterator[type]:
    if typing.is_typeddict(hint):
        yield hint
    for argument in get_args(hint):
        yield from _within(argument)


def _name(document: type) -> str:
    """In snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", document.__name__).lower()


def _object(document: type) -> dict[str, Any]:
    hints = get_type_hints(document, include_extras=True)
    keys = {key: _without_marker(hint) for key, hint in hints.items()}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [key for key, hint in hints.items() if get_origin(hint) is not NotRequired],
        "properties": {key: _key(hint) for key, hint in keys.items()},
    }


def _without_marker(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is NotRequired else hint


def _key(hint: Any) -> dict[str, Any]:
    about = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, str)]
    return {"description": about[0], **_value(hint)}


def _value(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Annotated:
        found = _value(get_args(hint)[0])
        for note in hint.__metadata__:
            if isinstance(note, Limits):
                found |= _keywords(note)
        return found
    if typing.is_typeddict(hint):
        return {"$ref": f"#/$defs/{_name(hint)}"}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if kind is list:
        return {"type": "array", "items": _value(arguments[0])}
    if kind is dict:
        values = {} if arguments[1] is Any else {"additionalProperties": _value(arguments[1])}
        return {"type": "object", **values}
    if kind in (Union, types.UnionType):
        if all(argument in _NAMES for argument in arguments):
            return {"type": [_NAMES[argument] for argument in arguments]}
        return {"anyOf": [_value(argument) for argument in arguments]}
    raise TypeError(f"no schema is made of {hint!r}")


def _keywords(limits: Limits) -> dict[str, Any]:
    """By their names in JSON Schema."""
    return {
        re.sub(r"_(\w)", lambda letter: letter[1].upper(), name): value
        for name, value in dataclasses.asdict(limits).items()
        if value is not None
    }
