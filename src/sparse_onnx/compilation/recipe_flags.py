"""Flags of a command line, or keyword arguments, over a recipe.

A flag belongs to a group of options (:mod:`.groups`) and reaches what the group is for, by name: a section of the
recipe, or the modifiers of one stage. Any option of any modifier is reached by a setting, ``NAME.OPTION``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sparse_onnx.compilation.groups import AUTO, INT4, INT8, Prune, Quantize
from sparse_onnx.compilation.recipe import SECTIONS, Recipe, RecipeStage
from sparse_onnx.errors import UsageError
from sparse_onnx.options import at, build, frozen, keywords, option_names, unknown
from sparse_onnx.passes.base import Pass, Stage
from sparse_onnx.passes.quantize.by_bits import usual_grid
from sparse_onnx.passes.quantize.layers import resolved_bits
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.registry import PASSES, pass_by_name
from sparse_onnx.yaml_text import read_yaml

__all__ = ["DEFAULT_METHOD", "override", "parse_settings", "settings_of"]

DEFAULT_METHOD = "magnitude"
"""The pruning method where flags ask for a sparsity or a mask structure and nothing names a method."""

_METHOD_PREFIX = "prune."

_FLAGS_OF_STAGE: Mapping[Stage, Collection[str]] = {
    # The seed of generated inputs is that of random pruning, too.
    Stage.PRUNE: (keywords(Prune).keys() - {"method"}) | {"seed"},
    Stage.QUANTIZE: keywords(Quantize).keys(),
}
"""The flags that modifiers take, where they have an option of the name. A modifier of another stage takes none."""


@dataclasses.dataclass
class _Draft:
    """A modifier that is not built yet."""

    cls: type[Pass]
    options: dict[str, Any]


def override(
    recipe: Recipe, method: str | None = None, settings: Mapping[str, object] | None = None, **flags: Any
) -> Recipe:
    """``recipe`` with the flags of a command line, which win over it; flags that are None are not given.

    ``method`` names a pruning pass without its ``prune.``. It is added, or takes the place of the recipe's only pruning
    modifier and then inherits what was set there, where both have it. Without it, ``sparsity`` or ``mask_structure`` on
    a recipe without pruning mean :data:`DEFAULT_METHOD`. Every other flag is set in the section that it belongs to, and
    in the pruning modifiers that have it if it is one of pruning.

    ``settings`` are options of modifiers and win over all else: ``NAME.OPTION`` for every modifier of that name,
    ``NAME[INDEX].OPTION`` for one of them, counted from 0. None is the default of the option.

    Raises UsageError for an unknown method, modifier or option, and for a flag or setting that applies to nothing.
    """
    given = {key: frozen(value) for key, value in flags.items() if value is not None}
    pruning = [modifier for modifier in recipe.modifiers() if modifier.stage is Stage.PRUNE]
    if method is None and not pruning and {"sparsity", "mask_structure"} & given.keys():
        method = DEFAULT_METHOD
    if method is not None and len(pruning) > 1:
        names = ", ".join(modifier.name for modifier in pruning)
        raise UsageError(f"method {method!r} cannot take the place of several pruning modifiers ({names})")
    stages = [
        (stage.name, [_drafted(modifier, method, given) for modifier in stage.modifiers])
        for stage in recipe.stages
    ]
    if method is not None and not pruning:
        cls = _method(method)
        stages.append(("prune", [_Draft(cls, _taken(cls, given))]))
    zeros = [draft.options.get("mask_structure", "") for _, drafts in stages for draft in drafts]
    if quantize := _quantizing(recipe, given, next(filter(None, zeros), "unstructured")):
        stages.append(("quantize", [quantize]))
    drafts = [draft for _, modifiers in stages for draft in modifiers]
    _apply_settings(drafts, settings or {})
    result = Recipe(
        tuple(
            RecipeStage(name, tuple(build(draft.cls, draft.options) for draft in modifiers))
            for name, modifiers in stages
        ),
        **_sections(recipe, given),
    )
    useful = keywords(*SECTIONS.values()).keys() | {
        flag for draft in drafts for flag in _taken(draft.cls, given)
    }
    for flag in given:
        if flag not in useful:
            raise UsageError(
                _useless(flag, [modifier for modifier in result.modifiers() if modifier.stage is Stage.PRUNE])
            )
    return result


def _drafted(modifier: Pass, method: str | None, given: Mapping[str, Any]) -> _Draft:
    """``modifier`` with the flags that it takes; a method takes the place of one that prunes."""
    cls, own = type(modifier), {name: getattr(modifier, name) for name in option_names(type(modifier))}
    if method is not None and modifier.stage is Stage.PRUNE:
        cls = _method(method)
        defaults = {field.name: field.default for field in dataclasses.fields(modifier)}  # type: ignore[arg-type]
        known = option_names(cls)
        own = {name: value for name, value in own.items() if name in known and value != defaults[name]}
    return _Draft(cls, own | _taken(cls, given))


def _quantizing(recipe: Recipe, given: Mapping[str, Any], structure: str) -> _Draft | None:
    """The modifier that bits are asked of, unless the recipe has one: the best method that the data allows, and a grid
    for zeros in the pattern ``structure``."""
    if any(modifier.stage is Stage.QUANTIZE for modifier in recipe.modifiers()):
        return None
    precision = given.get("precision", recipe.target.precision)
    bits = given.get("bits")
    if bits is None and precision in (INT4, AUTO):
        bits = 4
    if bits is None and precision == INT8:
        bits = resolved_bits(None)
    if bits is None:
        return None
    data = given.get("calibration_data", recipe.calibration.data)
    options = {
        "method": "hqq" if data is None else "auto",
        **usual_grid(bits, structure=structure)._asdict(),
    }
    return _Draft(QuantizeWeights, options | _taken(QuantizeWeights, given))


def _taken(cls: type[Pass], given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a pass takes."""
    names = option_names(cls).intersection(_FLAGS_OF_STAGE.get(cls.stage, ()))
    return {name: value for name, value in given.items() if name in names}


def _sections(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for key, cls in SECTIONS.items():
        values = {name: given[keyword] for keyword, name in keywords(cls).items() if keyword in given}
        sections[key] = dataclasses.replace(getattr(recipe, key), **values)
    return sections


def _methods() -> dict[str, type[Pass]]:
    prefix = _METHOD_PREFIX
    return {cls.name.removeprefix(prefix): cls for cls in PASSES if cls.stage is Stage.PRUNE}


def _method(method: str) -> type[Pass]:
    methods = _methods()
    if method not in methods:
        raise UsageError(unknown("method", method, methods))
    return methods[method]


def _useless(flag: str, pruning: Sequence[Pass]) -> str:
    """Why ``flag`` applies to nothing."""
    methods = _methods()
    takers = ", ".join(name for name, cls in methods.items() if _taken(cls, {flag: None}))
    if not takers and flag not in keywords(Quantize):
        return unknown("option", flag, keywords(Prune, Quantize, *SECTIONS.values()))
    if flag in keywords(Quantize):
        return f"{flag} has no effect, since nothing is quantized: give --bits or --precision"
    if pruning:
        return f"{flag} is no option of {' or '.join(p.name for p in pruning)}; it is one of method {takers}"
    return f"{flag} has no effect, since nothing is pruned: give a method ({takers})"


# -- settings --------------------------------------------------------------------------------------


def parse_settings(texts: Sequence[str]) -> dict[str, object]:
    """``NAME.OPTION=VALUE`` for each text; a value is a number, a word or a list as YAML has them."""
    settings: dict[str, object] = {}
    for text in texts:
        with at(f"--set {text}"):
            key, equals, value = text.partition("=")
            if not equals:
                raise UsageError("write NAME.OPTION=VALUE, for example prune.magnitude.sparsity=0.8")
            if key in settings:
                raise UsageError(f"{key} is given twice")
            settings[key] = read_yaml(value)
    return settings


def settings_of(settings: Mapping[str, object], *options: str) -> list[object]:
    """What ``settings`` say of these options, of whatever modifier."""
    return [value for key, value in settings.items() if key.rpartition(".")[2] in options]


def _apply_settings(drafts: Sequence[_Draft], settings: Mapping[str, object]) -> None:
    """Those of one modifier win over those of all of its name."""
    for key in sorted(settings, key=lambda key: "[" in key):
        with at(f"--set {key}"):
            place, _, name = key.rpartition(".")
            parts = re.fullmatch(r"([^\[\]]+)(?:\[([0-9]{1,9})\])?", place)
            if parts is None or key in {cls.name for cls in PASSES}:
                raise UsageError("names no option: write NAME.OPTION or NAME[INDEX].OPTION")
            cls = pass_by_name(parts[1])
            chosen = [draft for draft in drafts if draft.cls is cls]
            if not chosen:
                known = ", ".join(sorted({draft.cls.name for draft in drafts})) or "no modifier"
                raise UsageError(f"{cls.name} is not in the recipe, which has {known}: name it there first")
            if parts[2] is not None:
                index = int(parts[2])
                if index >= len(chosen):
                    raise UsageError(f"the recipe has {len(chosen)} of {cls.name}, counted from 0")
                chosen = [chosen[index]]
            if name not in option_names(cls):
                raise UsageError(unknown(f"option of {cls.name}", name, option_names(cls)))
            for draft in chosen:
                draft.options[name] = frozen(settings[key])
