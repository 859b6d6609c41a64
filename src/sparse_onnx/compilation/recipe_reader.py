"""Read recipes.

Numbers and words are read as in YAML 1.2 (``1e-4`` is a number; ``2:4``, ``on`` and dates are words), aliases and tags
are refused, and every unknown or repeated key is an error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.compilation.recipe import SECTIONS, VERSION, Recipe, RecipeStage
from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.options import at, build, option_names, unknown
from sparse_onnx.passes.registry import pass_by_name
from sparse_onnx.yaml_text import read_yaml

__all__ = ["load_recipe", "parse_recipe"]

_MAX_BYTES = 1 << 20


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file of at most 1 MiB.

    Raises UsageError that says what is wrong and where, HostError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such recipe file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: is a folder, not a recipe file") from error
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}") from error
    with at(str(path)):
        if len(data) > _MAX_BYTES:
            raise UsageError("larger than 1 MiB, so no recipe")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError("is not text in UTF-8") from error
        return parse_recipe(text)


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from YAML text; UsageError says what is wrong and where."""
    document = read_yaml(text)
    top = _mapping(document, "the recipe", {"version", "stages", *SECTIONS})
    version = top.get("version")
    if version != VERSION or isinstance(version, bool):
        raise UsageError(f"version must be {VERSION}, not {reprlib.repr(version)}")
    sections: dict[str, Any] = {}
    for key, cls in SECTIONS.items():
        options = _mapping(top.get(key), key, option_names(cls))
        with at(key):
            sections[key] = build(cls, options)
    entries = enumerate(_list(top.get("stages"), "stages"))
    return Recipe(tuple(_stage(entry, f"stages[{index}]") for index, entry in entries), **sections)


def _stage(entry: Any, where: str) -> RecipeStage:
    keys = _mapping(entry, where, {"name", "modifiers"})
    name = keys.get("name")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: name must be a word, not {reprlib.repr(name)}")
    modifiers = []
    for index, item in enumerate(_list(keys.get("modifiers"), f"{where}.modifiers")):
        with at(f"{where}.modifiers[{index}]"):
            if not isinstance(item, Mapping) or len(item) != 1:
                raise UsageError(
                    "must be one pass with its options, such as 'prune.magnitude: {sparsity: 0.8}'"
                )
            ((word, options),) = item.items()
            cls = pass_by_name(word)
            modifiers.append(build(cls, _mapping(options, word, option_names(cls))))
    return RecipeStage(name, tuple(modifiers))


def _mapping(value: Any, where: str, known: set[str]) -> Mapping[str, Any]:
    """``value``, checked to have only ``known`` keys; nothing at all means no keys."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: must be keys and values, not {_kind(value)}")
    for key in value:
        if key not in known:
            raise UsageError(f"{where}: {unknown('key', key, known)}")
    return value


def _list(value: Any, where: str) -> Sequence[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{where}: must be a list (lines that start with '- '), not {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names: dict[type, str] = {dict: "keys and values", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")
