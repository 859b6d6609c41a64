"""Options of the commands, made of what is declared where the option belongs: see :mod:`sparse_onnx.options`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparse_onnx.compilation.groups import Section
from sparse_onnx.options import Kind, option_of

__all__ = ["option", "options"]

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(group: type[Any], *fields: str) -> _Decorator:
    """These options of ``group``, in the order of --help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(fields):
            command = option(group, name)(command)
        return command

    return decorate


def option(
    group: type[Any], field: str, help: str | None = None, *, default: object = None, kind: Kind | None = None
) -> _Decorator:
    """One option of ``group``. A command that uses it otherwise has its own ``help``, ``default`` or ``kind``; click
    shows that default. Without one the command says nothing, which leaves it to the function."""
    said = option_of(group, field)
    assert said.flag is not None
    how: dict[str, Any] = {"help": help or (said.help if default is not None else said.with_default)}
    if default is not None:
        how |= {"default": default, "show_default": True}
    hint = typing.get_type_hints(group)[field]
    parse = _PARSERS.get(kind or said.kind)
    if parse is not None:
        how |= {"callback": parse, "multiple": (kind or said.kind) != "numbers"}
    elif said.kind == "path":
        how["type"] = click.Path(path_type=Path)
    elif _is(hint, bool):
        own = next(known.default for known in dataclasses.fields(group) if known.name == field)
        overrides = issubclass(group, Section) or own is None  # not given, it leaves a recipe as it is
        if own is False and not overrides:
            how["is_flag"] = True
        else:
            return click.option(
                f"{said.flag}/--no-{said.flag[2:]}",
                said.keyword,
                **how | ({"default": None if overrides else own}),
            )
    elif _is(hint, tuple):
        how |= {"multiple": True, "callback": _if_any}
    elif _is(hint, int):
        how["type"] = int if said.least is None else click.IntRange(said.least)
    elif _is(hint, str):
        how["type"] = str
    else:
        how["type"] = float if said.above is None else click.FloatRange(said.above, min_open=True)
    return click.option(said.flag, said.keyword, **how)


def _is(hint: Any, kind: type[Any]) -> bool:
    """Whether an option with this type may be such a value."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return kind in [typing.get_origin(part) or part for part in parts]


# -- callbacks: what is not given is None, or what the function has by default ---------------------


def _if_any(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> Any:
    return values or None


def _sources(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> Any:
    """Of several sources a tuple, else the only one."""
    return values if len(values) > 1 else next(iter(values), None)


def _shape(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> Any:
    from sparse_onnx.data.inputs import parse_shape_flags

    return parse_shape_flags(values) or None


def _shapes(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> Any:
    """Of several targets a tuple, of one its shapes by name."""
    from sparse_onnx.data.inputs import parse_target_flags

    targets = parse_target_flags(values)
    return targets if len(targets) > 1 else targets[0] or None


def _values(_context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
    from sparse_onnx.data.inputs import parse_value_flags

    return parse_value_flags(values, option.opts[0]) or None


def _settings(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> Any:
    from sparse_onnx.compilation.recipe_flags import parse_settings

    return parse_settings(values) or None


def _numbers(_context: click.Context, _option: click.Parameter, value: str | None) -> Any:
    try:
        return None if value is None else tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: write numbers with commas between them, e.g. 3,1") from None


_PARSERS: dict[Kind, Callable[[click.Context, click.Parameter, Any], Any]] = {
    "sources": _sources,
    "shape": _shape,
    "shapes": _shapes,
    "values": _values,
    "numbers": _numbers,
    "settings": _settings,
}
