"""Options as fields of frozen dataclasses: how they are declared once, built from plain data, and checked.

A *group* is a frozen dataclass whose fields are options. Where a field is made with :func:`option`, it can be given
from outside, and all that is said of it there comes from the field: the flag of the command line, its help, the keyword
argument of the Python functions and its line in the docstring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import reprlib
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from sparse_onnx.errors import UsageError

__all__ = [
    "Kind",
    "Option",
    "at",
    "build",
    "check_types",
    "documented",
    "frozen",
    "holds_numbers",
    "keywords",
    "option",
    "option_names",
    "option_of",
    "require",
    "unknown",
]

Kind = Literal["plain", "path", "sources", "shape", "shapes", "values", "numbers", "settings"]
"""How the text of a flag is read: as the field's type says, or as a path, sources of data, shapes of one target or of
several, values of inputs, numbers with commas, or settings of passes."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What is said of an option outside.

    Attributes:
        help: What it does, for --help.
        about: The same for a docstring, where a function takes it otherwise; "" is the help.
        keyword: The keyword argument; "" is the field's name.
        flag: "" is the keyword with hyphens; None: the command line has none.
        otherwise: What holds where it is not given; "" is the field's default, if that is a number.
        kind: How the flag is read.
        least, above: The smallest whole number, or what a number must exceed.
    """

    help: str
    about: str = ""
    keyword: str = ""
    flag: str | None = ""
    otherwise: str = ""
    kind: Kind = "plain"
    least: int | None = None
    above: float | None = None

    @property
    def with_default(self) -> str:
        """The help, and what holds where the option is not given."""
        return f"{self.help}  [default: {self.otherwise}]" if self.otherwise else self.help

    @property
    def documentation(self) -> str:
        """The line of a docstring."""
        if self.about:
            return self.about
        return f"{self.help} Default: {self.otherwise}." if self.otherwise else self.help


_KEY = "option"


def option(default: Any, help: str, *, factory: Callable[[], Any] | None = None, **more: Any) -> Any:
    """A field with this default, or what ``factory`` makes, that can be given from outside; ``more`` as
    :class:`Option` has it."""
    metadata = {_KEY: Option(help, **more)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_of(group: type[Any], name: str) -> Option:
    """What is said of the field ``name``, with nothing left to be filled in."""
    field = next(field for field in dataclasses.fields(group) if field.name == name)
    said: Option = field.metadata[_KEY]
    otherwise, keyword = said.otherwise, said.keyword or name
    if not otherwise and isinstance(field.default, int | float) and not isinstance(field.default, bool):
        otherwise = f"{field.default:g}"
    flag = f"--{keyword.replace('_', '-')}" if said.flag == "" else said.flag
    return dataclasses.replace(said, keyword=keyword, flag=flag, otherwise=otherwise)


def keywords(*groups: type[Any]) -> dict[str, str]:
    """The fields that can be given from outside, by keyword argument."""
    return {
        field.metadata[_KEY].keyword or field.name: field.name
        for group in groups
        for field in dataclasses.fields(group)
        if _KEY in field.metadata
    }


_F = typing.TypeVar("_F", bound=Callable[..., Any])


def documented(*groups: type[Any]) -> Callable[[_F], _F]:
    """Put the options of ``groups`` in place of ``{options}`` in a function's docstring."""
    lines = []
    for group in groups:
        for keyword, name in keywords(group).items():
            text = f"{keyword}: {option_of(group, name).documentation}"
            lines += textwrap.wrap(
                text, 120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
            )

    def document(function: _F) -> _F:
        if function.__doc__ is not None:  # there is none with python -OO
            function.__doc__ = function.__doc__.replace(" " * 8 + "{options}", "\n".join(lines))
        return function

    return document


def option_names(cls: type[Any]) -> set[str]:
    """The fields that are options; what does not take part in comparisons is handed over."""
    return {field.name for field in dataclasses.fields(cls) if field.compare}


_T = typing.TypeVar("_T")


def build(cls: type[_T], options: Mapping[str, Any]) -> _T:
    """``cls`` with ``options``; those that are None are not given, and lists become tuples."""
    given = {key: frozen(value) for key, value in options.items() if value is not None}
    required = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # all are dataclasses
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in given]:
        raise UsageError(f"{getattr(cls, 'name', cls.__name__)}: {' and '.join(missing)} must be given")
    return cls(**given)


def frozen(value: Any) -> Any:
    """``value`` with tuples in place of all lists."""
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Put the place in front of the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def holds_numbers(value: Any) -> bool:
    """Whether ``value`` is a number, true or false, or a tuple of such values, none of them empty."""
    if isinstance(value, tuple):
        return bool(value) and all(map(holds_numbers, value))
    return isinstance(value, bool | int | float)


def require(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raise a UsageError that names the option, its value and what is allowed, unless ``holds``."""
    if not holds:
        raise UsageError(f"{option} must be {allowed}, not {reprlib.repr(value)}")


_MANY = 30  # names, which no message should list


def unknown(what: str, word: object, known: Iterable[str]) -> str:
    """Say that ``word`` is no valid ``what``, which valid one is nearest, and which there are: of many with families
    (``family.name``) those of the nearest one's, and the other families."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    if len(names) > _MANY:
        family = near[0].partition(".")[0] if near else ""
        names = sorted(
            {n if n.partition(".")[0] in (family, n) else f"{n.partition('.')[0]}.*" for n in names}
        )
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
