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

A modifier is a pass by its ``name`` with its options. Everything is optional but ``version``. Numbers and
words are read as in YAML 1.2 (``1e-4`` is a number; ``2:4``, ``on`` and dates are words), aliases and tags
are refused, and every unknown or repeated key is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import reprlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.data.inputs import holds_numbers
from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.options import check_types, require, unknown
from sparse_onnx.passes.base import Pass, Pipeline, Stage
from sparse_onnx.passes.registry import PASSES, pass_by_name
from sparse_onnx.units import parse_size
from sparse_onnx.verification.tolerance import MAX_COMPILER_ERROR
from sparse_onnx.yaml_text import read_yaml, write_yaml

__all__ = [
    "DEFAULT_METHOD",
    "Calibration",
    "Goal",
    "Recipe",
    "RecipeStage",
    "Target",
    "dump_recipe",
    "load_recipe",
    "override",
    "parse_recipe",
    "recipe_document",
    "recipe_from_flags",
]

DEFAULT_METHOD = "magnitude"
"""The pruning method where flags ask for a sparsity or a mask structure and nothing names a method."""

_VERSION = 1
_MAX_BYTES = 1 << 20
_METHOD_PREFIX = "prune."
# Fields whose name alone would say too little.
_FLAG_OF_FIELD = {"data": "calibration_data", "weights": "shape_weights"}


@dataclasses.dataclass(frozen=True)
class _Section:
    """A part of a recipe: a frozen dataclass whose fields are the keys."""

    def __post_init__(self) -> None:
        check_types(self)
        self.check()

    def check(self) -> None:
        """Raise UsageError if a value is out of range."""


@dataclasses.dataclass(frozen=True)
class Target(_Section):
    """What to decide and time for.

    Attributes:
        shapes: Input shapes by name, or a list of these for several targets.
        threads: Intra-op threads; None: all cores.
        weights: Of several targets, how much each counts in the mean time that decides; None: the worst decides.
        input_values: Values for inputs that steer the graph, by name: a number, true or false, or a list of values.
        fixed_inputs: The same, but they become constants of the result.
    """

    shapes: Mapping[str, tuple[int, ...]] | tuple[Mapping[str, tuple[int, ...]], ...] = dataclasses.field(
        default_factory=dict
    )
    threads: int | None = None
    weights: tuple[float, ...] | None = None
    input_values: Mapping[str, object] | None = None
    fixed_inputs: Mapping[str, object] | None = None

    @property
    def all_shapes(self) -> tuple[Mapping[str, tuple[int, ...]], ...]:
        """The input shapes of every target."""
        return (self.shapes,) if isinstance(self.shapes, Mapping) else self.shapes

    def check(self) -> None:
        require(len(self.all_shapes) > 0, "shapes", self.shapes, "one target or more")
        for index, shapes in enumerate(self.all_shapes):
            where = "shapes" if isinstance(self.shapes, Mapping) else f"shapes[{index}]"
            for name, shape in shapes.items():
                require(
                    all(size >= 1 for size in shape), f"{where}.{name}", list(shape), "sizes of 1 or more"
                )
        for option in ("input_values", "fixed_inputs"):
            for name, value in (getattr(self, option) or {}).items():
                require(
                    holds_numbers(value),
                    f"{option}.{name}",
                    value,
                    "a number, true or false, or a list of these",
                )
        if self.weights is not None:
            count = len(self.all_shapes)
            fits = len(self.weights) == count and min(self.weights) > 0
            allowed = f"numbers above 0, as many as shapes has targets ({count})"
            require(fits, "weights (--shape-weights)", list(self.weights), allowed)
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")


@dataclasses.dataclass(frozen=True)
class Calibration(_Section):
    """Real inputs, and how to run the model on them.

    Attributes:
        data: An .npz, a folder of .npz, ``module:function``, or a text file with a ``tokenizer``.
        num_calibration_samples: Use so many; None: all. An eighth of them is held out to measure the result.
        batch_size: Samples that are run together.
        tokenizer: A folder that holds the tokenizer of a text file.
        padding_mask: The input [B, S] whose zeros are padding, where the model has it.
        statistics: A file for what one-shot calibration finds: read if it fits, else written.
        checkpoint: A folder for finished layers: an interrupted run goes on from it.
        seed: Of generated inputs, where there are no real ones.
    """

    data: str | None = None
    num_calibration_samples: int | None = None
    batch_size: int = 4
    tokenizer: str | None = None
    padding_mask: str = "attention_mask"
    statistics: str | None = None
    checkpoint: str | None = None
    seed: int = 0

    def check(self) -> None:
        number = self.num_calibration_samples
        require(number is None or number >= 1, "num_calibration_samples", number, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class Goal(_Section):
    """What the result must reach; what is missed is said, and the best so far is still written.

    Attributes:
        max_drop: What quality may be lost, at most: of the metric, see :func:`sparse_onnx.verification.quality.drop`;
            without one of 1 − cosine between the outputs of the original and the result.
        metric: ``module:function``, or a built-in one, see :mod:`sparse_onnx.verification.metrics`.
        metric_data: Real inputs to measure it on, as for calibration; None: the calibration data, or what of it was
            held out.
        labels: The array of that data with the labels.
        metric_output: The output that the metric is of.
        min_speedup: What one layer must gain to become sparse, at least.
        max_compiler_error: What the compiled model's outputs may differ by from the pruned dense model's, as a relative
            error; more passes only where rounding explains it, see :mod:`sparse_onnx.verification.yardstick`.
        keep_pruned: Prune also what gains nothing from it, and let layers that stay dense keep their zeros.
        target_speedup: How many times faster the whole model must become, as timed.
        target_size: What its files may take: a share of the original files (0.5 or 50%), or a size (120MB).
    """

    max_drop: float | None = None
    min_speedup: float = 1.02
    max_compiler_error: float = MAX_COMPILER_ERROR
    keep_pruned: bool = False
    target_speedup: float | None = None
    target_size: float | str | None = None
    metric: str | None = None
    metric_data: str | None = None
    labels: str | None = None
    metric_output: str | None = None

    def check(self) -> None:
        require(self.max_drop is None or self.max_drop >= 0, "max_drop", self.max_drop, "0 or more")
        for option in ("metric_data", "labels", "metric_output"):
            given = getattr(self, option)
            require(
                given is None or self.metric is not None, option, given, "left out, or given with a metric"
            )
        error = self.max_compiler_error
        require(0 <= error < math.inf, "max_compiler_error", error, "0 or more")
        require(self.min_speedup > 0, "min_speedup", self.min_speedup, "above 0")
        speedup, size = self.target_speedup, self.target_size
        require(speedup is None or speedup > 0, "target_speedup", speedup, "above 0")
        require(size is None or _is_size(size), "target_size", size, "a share (0.5 or 50%) or a size (120MB)")


def _is_size(size: float | str) -> bool:
    try:
        parse_size(size, 1)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class RecipeStage:
    """Modifiers under one name, which is for the reader."""

    name: str
    modifiers: tuple[Pass, ...]


_SECTIONS: dict[str, type[_Section]] = {"target": Target, "calibration": Calibration, "goal": Goal}


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


# -- reading ---------------------------------------------------------------------------------------


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
    with _at(str(path)):
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
    top = _mapping(document, "the recipe", {"version", "stages", *_SECTIONS})
    version = top.get("version")
    if version != _VERSION or isinstance(version, bool):
        raise UsageError(f"version must be {_VERSION}, not {reprlib.repr(version)}")
    sections: dict[str, Any] = {}
    for key, cls in _SECTIONS.items():
        options = _mapping(top.get(key), key, _fields(cls))
        with _at(key):
            sections[key] = _build(cls, options)
    entries = enumerate(_list(top.get("stages"), "stages"))
    return Recipe(tuple(_stage(entry, f"stages[{index}]") for index, entry in entries), **sections)


def _stage(entry: Any, where: str) -> RecipeStage:
    keys = _mapping(entry, where, {"name", "modifiers"})
    name = keys.get("name")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: name must be a word, not {reprlib.repr(name)}")
    modifiers = []
    for index, item in enumerate(_list(keys.get("modifiers"), f"{where}.modifiers")):
        with _at(f"{where}.modifiers[{index}]"):
            if not isinstance(item, Mapping) or len(item) != 1:
                raise UsageError(
                    "must be one pass with its options, such as 'prune.magnitude: {sparsity: 0.8}'"
                )
            ((word, options),) = item.items()
            cls = pass_by_name(word)
            modifiers.append(_build(cls, _mapping(options, word, _fields(cls))))
    return RecipeStage(name, tuple(modifiers))


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Put the place in front of the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


_T = typing.TypeVar("_T")


def _build(cls: type[_T], options: Mapping[str, Any]) -> _T:
    """``cls`` with ``options``; those that are None are not given, and lists become tuples."""
    given = {key: _frozen(value) for key, value in options.items() if value is not None}
    required = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # all are dataclasses
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in given]:
        raise UsageError(f"{getattr(cls, 'name', cls.__name__)}: {' and '.join(missing)} must be given")
    return cls(**given)


def _fields(cls: type[Any]) -> set[str]:
    return {
        field.name for field in dataclasses.fields(cls) if field.compare
    }  # others are handed over, no options


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


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


# -- writing ---------------------------------------------------------------------------------------


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every option that has a value: what the YAML file holds."""
    stages = [
        {
            "name": stage.name,
            "modifiers": [{modifier.name: _plain(modifier.options())} for modifier in stage.modifiers],
        }
        for stage in recipe.stages
    ]
    document: dict[str, Any] = {"version": _VERSION, "stages": stages}
    for key in _SECTIONS:
        document[key] = _plain(dataclasses.asdict(getattr(recipe, key)))
    return document


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text; reading it gives an equal recipe."""
    return write_yaml(recipe_document(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# -- command line ----------------------------------------------------------------------------------


def recipe_from_flags(method: str | None = None, **flags: Any) -> Recipe:
    """The recipe that flags alone describe; see :func:`override`."""
    return override(Recipe(), method, **flags)


def override(recipe: Recipe, method: str | None = None, **flags: Any) -> Recipe:
    """``recipe`` with the flags of a command line, which win over it; flags that are None are not given.

    ``method`` names a pruning pass without its ``prune.``. It is added, or takes the place of the recipe's
    only pruning modifier and then inherits what was set there, where both have it. Without it, ``sparsity`` or
    ``mask_structure`` on a recipe without pruning mean :data:`DEFAULT_METHOD`. Every other flag is set
    wherever its name is a field: in all pruning modifiers, and in the sections of the recipe
    (``calibration_data`` stands for the calibration's ``data``).

    Raises UsageError for an unknown method, and for a flag that applies to nothing.
    """
    given = {key: _frozen(value) for key, value in flags.items() if value is not None}
    pruning = [modifier for modifier in recipe.modifiers() if modifier.stage is Stage.PRUNE]
    if method is None and not pruning and {"sparsity", "mask_structure"} & given.keys():
        method = DEFAULT_METHOD
    changed: dict[Pass, Pass] = {}
    added: tuple[RecipeStage, ...] = ()
    if method is None:
        changed = {old: _build(type(old), _own(old) | _of(type(old), given)) for old in pruning}
    elif not pruning:
        cls = _method(method)
        added = (RecipeStage("prune", (_build(cls, _of(cls, given)),)),)
    elif len(pruning) == 1:
        cls = _method(method)
        changed = {pruning[0]: _build(cls, _of(cls, _changed(pruning[0]) | given))}
    else:
        names = ", ".join(modifier.name for modifier in pruning)
        raise UsageError(f"method {method!r} cannot take the place of several pruning modifiers ({names})")
    stages = [
        RecipeStage(stage.name, tuple(changed.get(modifier, modifier) for modifier in stage.modifiers))
        for stage in recipe.stages
    ]
    result = Recipe((*stages, *added), **_override_sections(recipe, given))
    pruning = [modifier for modifier in result.modifiers() if modifier.stage is Stage.PRUNE]
    useful = _section_flags().union(*(_fields(type(modifier)) for modifier in pruning))
    for flag in given:
        if flag not in useful:
            raise UsageError(_useless(flag, pruning))
    return result


def _own(modifier: Pass) -> dict[str, Any]:
    return {name: getattr(modifier, name) for name in _fields(type(modifier))}


def _changed(modifier: Pass) -> dict[str, Any]:
    """The options that are not as the method has them by default."""
    defaults = {field.name: field.default for field in dataclasses.fields(modifier)}  # type: ignore[arg-type]
    return {name: value for name, value in _own(modifier).items() if value != defaults[name]}


def _of(cls: type[Pass], options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in _fields(cls)}


def _override_sections(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for key, cls in _SECTIONS.items():
        flags = {name: _FLAG_OF_FIELD.get(name, name) for name in _fields(cls)}
        values = {name: given[flag] for name, flag in flags.items() if flag in given}
        sections[key] = dataclasses.replace(getattr(recipe, key), **values)
    return sections


def _section_flags() -> set[str]:
    return {_FLAG_OF_FIELD.get(name, name) for cls in _SECTIONS.values() for name in _fields(cls)}


def _methods() -> dict[str, type[Pass]]:
    prefix = _METHOD_PREFIX
    return {cls.name.removeprefix(prefix): cls for cls in PASSES if cls.name.startswith(prefix)}


def _method(method: str) -> type[Pass]:
    methods = _methods()
    if method not in methods:
        raise UsageError(unknown("method", method, methods))
    return methods[method]


def _useless(flag: str, pruning: Sequence[Pass]) -> str:
    """Why ``flag`` applies to nothing."""
    methods = _methods()
    takers = ", ".join(name for name, cls in methods.items() if flag in _fields(cls))
    if not takers:
        return unknown("option", flag, _section_flags().union(*(_fields(cls) for cls in methods.values())))
    if pruning:
        return f"{flag} is no option of {' or '.join(p.name for p in pruning)}; it is one of method {takers}"
    return f"{flag} has no effect, since nothing is pruned: give a method ({takers})"
