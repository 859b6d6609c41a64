"""Recipes: what to do with a model, as a YAML file and as a value.

::

    version: 1
    stages:
      - name: prune
        modifiers:
          - prune.magnitude: {sparsity: 0.8, ignore: ["re:.*classifier.*"]}
          - prune.threshold: {theta: 1e-4}
    target: {shapes: {input_ids: [1, 128]}, input_values: {rate: 16000}, threads: 4}
    calibration: {data: samples.npz, num_calibration_samples: 512, seed: 0}
    goal: {max_drop: 0.01, target_speedup: 2, target_size: 50%, min_speedup: 1.05}

A modifier is a pass by its ``name`` with its options; the same one may come several times with other options, for other
targets. The order is that of :class:`~sparse_onnx.passes.base.Stage`, whatever the stages of a recipe are called. The
keys of the sections are the fields in :mod:`.groups`. Everything is optional but ``version``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sparse_onnx.compilation.groups import Calibration, Goal, Section, Target
from sparse_onnx.errors import UsageError
from sparse_onnx.passes.base import Pass, Pipeline
from sparse_onnx.yaml_text import write_yaml

__all__ = ["SECTIONS", "VERSION", "Recipe", "RecipeStage", "dump_recipe", "recipe_document"]

VERSION = 1


@dataclasses.dataclass(frozen=True)
class RecipeStage:
    """Modifiers under one name, which is for the reader."""

    name: str
    modifiers: tuple[Pass, ...]


SECTIONS: dict[str, type[Section]] = {"target": Target, "calibration": Calibration, "goal": Goal}
"""The parts of a recipe beside its stages, by key."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """See the module's docstring. Built only if the order of the modifiers is right and none comes twice."""

    stages: tuple[RecipeStage, ...] = ()
    target: Target = dataclasses.field(default_factory=Target)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    goal: Goal = dataclasses.field(default_factory=Goal)

    def __post_init__(self) -> None:
        seen: list[Pass] = []
        for modifier in self.modifiers():
            if modifier in seen:
                raise UsageError(f"{modifier.name} comes twice with the same options: leave one out")
            seen.append(modifier)
        self.pipeline()

    def modifiers(self) -> Iterator[Pass]:
        for stage in self.stages:
            yield from stage.modifiers

    def pipeline(self) -> Pipeline:
        """All modifiers in order; UsageError if a later stage would undo an earlier one."""
        return Pipeline(tuple(self.modifiers()))


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every option that has a value: what the YAML file holds."""
    stages = [
        {
            "name": stage.name,
            "modifiers": [{modifier.name: _plain(modifier.options())} for modifier in stage.modifiers],
        }
        for stage in recipe.stages
    ]
    document: dict[str, Any] = {"version": VERSION, "stages": stages}
    for key in SECTIONS:
        document[key] = _plain(dataclasses.asdict(getattr(recipe, key)))
    return document


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text; reading it gives an equal recipe."""
    return write_yaml(recipe_document(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
