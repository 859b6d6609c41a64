"""YAML as people mean it: the words of version 1.2, no aliases, tags and repeated keys.

Libraries of YAML 1.2 exist; PyYAML is what the rest of the field installs anyway, and fast enough.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from sparse_onnx.errors import UsageError
from sparse_onnx.printable import printable

__all__ = ["read_yaml", "write_yaml"]


def read_yaml(text: str) -> Any:
    """The document in ``text`` as plain data; UsageError says what is wrong, with line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"not valid YAML: {_one_line(error)}") from error
    except RecursionError as error:
        raise UsageError("not valid YAML: nested too deeply") from error


def write_yaml(document: Mapping[str, Any]) -> str:
    """Plain data as text, keys in their order; text that cannot be printed is escaped."""
    return yaml.dump(_printable(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _printable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or getattr(error, 'reason', 'unreadable')}{place}"


class _Loader(yaml.SafeLoader):
    """YAML's safe types with the words of YAML 1.2, without aliases, tags and repeated keys."""

    yaml_implicit_resolvers: typing.ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed", mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "tags (!name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value[:40]!r} comes twice"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _decimal(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)

_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]{1,18}", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


for _tag, (_pattern, _first) in _WORDS.items():
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
