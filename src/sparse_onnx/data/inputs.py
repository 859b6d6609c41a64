"""Inputs to run a model with: shapes chosen, values generated or read from a file.

Shapes come from the user, else from the model, else from a guess by the name of the dimension that is announced, see
:mod:`.input_sizes`. Generated values are seeded; indices into an embedding stay below its number of rows; masks are
ones; lengths and positions agree with the shapes. The user may give values, too, for inputs that steer the graph.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.batches import batching
from sparse_onnx.data.input_sizes import is_cache_length, solve_shapes
from sparse_onnx.errors import DataError, UsageError
from sparse_onnx.model.dimensions import Dim, parse, read_dim
from sparse_onnx.model.graph import is_standard
from sparse_onnx.options import holds_numbers

__all__ = [
    "Feeds",
    "InputSpec",
    "Value",
    "cache_axis",
    "check_samples",
    "counted",
    "first_samples",
    "fixed_batch",
    "generate",
    "history",
    "input_specs",
    "parse_shape_flags",
    "parse_target_flags",
    "parse_value_flags",
    "plain_values",
    "read_arrays",
    "resolve_shapes",
    "sample_count",
    "split_batches",
    "steers",
    "typed_value",
]

Feeds = dict[str, np.ndarray]

Value = Any
"""The value of an input as a recipe has it: a number, true or false, or a tuple of values."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Its name.
        dtype: The type of its elements.
        shape: Its dimensions, each a number, a name or None; None if not even their number is known.
        rows: The bound of an input of indices: the rows of the smallest table that it looks up, or None.
        steps: Of an input that says the lengths of sequences to an LSTM or GRU: the number or name of the steps that
            they have at most; else None.
        compared: The first constant that the graph compares an input of integers with, or None.
        value: What the user gives it, of a type and shape that fit, or None. A number alone fills any shape.
        fixed: Whether the value is to become a constant of the model.
    """

    name: str
    dtype: np.dtype
    shape: tuple[Dim, ...] | None
    rows: int | None
    steps: Dim = None
    compared: int | None = None
    value: Value | None = None
    fixed: bool = False

    def describe(self) -> str:
        if self.shape is None:
            return f"{self.name}: {self.dtype} of unknown rank"
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether it may have that shape."""
        return self.shape is None or (
            len(shape) == len(self.shape)
            and all(
                not isinstance(dim, int) or dim == size for dim, size in zip(self.shape, shape, strict=True)
            )
        )

    @property
    def value_shape(self) -> tuple[int, ...] | None:
        """The shape that the value gives the input; None if it gives none."""
        if self.value is None or (not np.ndim(self.value) and self.shape != ()):
            return None
        return np.shape(self.value)

    def array(self, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
        """The value as an array, of ``shape`` if it is one number; None if there is none, or it has no shape yet."""
        if self.value is None:
            return None
        known = self.value_shape or shape
        if known is None and self.shape is not None:
            sizes = [dim for dim in self.shape if isinstance(dim, int)]
            known = tuple(sizes) if len(sizes) == len(self.shape) else None
        return None if known is None else np.full(known, np.asarray(self.value), self.dtype)


def input_specs(
    model: ir.Model,
    values: Mapping[str, Value] | None = None,
    fixed: Mapping[str, Value] | None = None,
) -> tuple[InputSpec, ...]:
    """The inputs that a caller must give (initializers listed as inputs have a value already, optional
    inputs need none), with the ``values`` that the user gives some of them, and those that become constants, ``fixed``.

    Raises UsageError for an input that is no tensor of numbers, and for a value of no input or that does not fit.
    """
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if isinstance(value.type, ir.OptionalType):
            continue  # nothing is given for it
        if (
            value.dtype is None
            or not isinstance(value.type, ir.TensorType)
            or value.dtype == ir.DataType.STRING
        ):
            raise UsageError(f"input {value.name!r} is no tensor with a known numeric type: cannot be run")
        dims = None if value.shape is None else tuple(map(read_dim, value.shape))
        name, dtype = value.name or "", value.dtype.numpy()
        specs.append(InputSpec(name, dtype, dims, _table_rows(value), _steps(value), _compared(value)))
    given, constant = values or {}, fixed or {}
    for option, names in (("--input", given), ("--fix-input", constant)):
        if strange := [name for name in names if name not in {spec.name for spec in specs}]:
            raise UsageError(
                f"{option} names {strange[0]!r}; the inputs are {'; '.join(spec.describe() for spec in specs)}"
            )
    if both := sorted(given.keys() & constant.keys()):
        raise UsageError(f"--input and --fix-input both give {both[0]!r}: give one of them")
    return tuple(_with_value(spec, given, constant) for spec in specs)


def _with_value(spec: InputSpec, given: Mapping[str, Value], constant: Mapping[str, Value]) -> InputSpec:
    for option, values in (("--input", given), ("--fix-input", constant)):
        if spec.name in values:
            value = typed_value(spec, values[spec.name], option)
            return dataclasses.replace(spec, value=value, fixed=values is constant)
    return spec


def typed_value(spec: InputSpec, value: Value, option: str = "--input") -> Value:
    """``value``, checked to be of the type of the input and of a shape that it takes."""
    shown = f"{option} {spec.name}={_written(value)}"
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" or not array.size:
        raise UsageError(f"{shown}: write a number, true or false, or a list of these, all rows equally long")
    if array.ndim and not spec.takes(array.shape):
        raise UsageError(f"{shown}: is of shape {list(array.shape)}, which does not fit {spec.describe()}")
    kind = "b" if spec.dtype == np.bool_ else spec.dtype.kind if spec.dtype.kind in "iu" else "f"
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(spec.dtype)
    if kind == "b":
        fits, wanted = bool(np.isin(array, (0, 1)).all()), "true or false"
    elif kind == "f":
        fits = array.dtype.kind != "b" and bool(np.isfinite(cast.astype(np.float64)).all())
        wanted = "a finite number"
    else:
        fits = array.dtype.kind in "iu" and np.array_equal(cast, array)
        wanted = "an integer that the type holds"
    if not fits:
        raise UsageError(f"{shown}: {spec.describe()} takes {wanted}")
    return _frozen(array.tolist())


def _written(value: Value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain_values(values: Mapping[str, Any] | None) -> dict[str, Value] | None:
    """Values of inputs, which may be arrays, as a recipe has them."""
    if values is None:
        return None
    return {
        name: _frozen(np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value)
        for name, value in values.items()
    }


def _frozen(value: Any) -> Value:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _steps(value: ir.Value) -> Dim:
    """The size of the first axis of what an LSTM or GRU reads, where ``value`` says how long its sequences are."""
    waiting = [value]
    for current in waiting:  # grows
        for use in current.uses():
            if is_standard(use.node, "LSTM", "GRU") and use.idx == 4:
                return _size(use.node.inputs[0], 0)
            if is_standard(use.node, "Cast", "Identity"):
                waiting.append(use.node.outputs[0])
    return None


def _size(value: ir.Value | None, axis: int) -> Dim:
    """A dimension, also of what a Transpose makes."""
    if value is None:
        return None
    if value.shape is not None and axis < len(value.shape):
        return read_dim(value.shape[axis])
    producer = value.producer()
    if producer is None or not is_standard(producer, "Transpose") or "perm" not in producer.attributes:
        return None
    return _size(producer.inputs[0], producer.attributes.get_ints("perm")[axis])


def _table_rows(value: ir.Value) -> int | None:
    rows = []
    for use in value.uses():
        if use.node.op_type == "Gather" and use.idx == 1:
            table = use.node.inputs[0]
            if table is not None and table.shape is not None and isinstance(table.shape[0], int):
                rows.append(table.shape[0])
        elif use.node.op_type == "Cast" and use.node.outputs:
            behind = _table_rows(use.node.outputs[0])
            if behind is not None:
                rows.append(behind)
    return min(rows, default=None)


_PASSING = ("Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten")


def _compared(value: ir.Value) -> int | None:
    """The first constant that ``value``, an input of integers, is compared with."""
    if value.dtype is None or not value.dtype.is_integer():
        return None
    waiting, seen = [value], {value}
    for current in waiting:  # grows
        for use in current.uses():
            node = use.node
            if node.op_type == "Equal" and len(node.inputs) == 2:
                other = node.inputs[1 - use.idx]
                constant = None if other is None else ir.convenience.get_const_tensor(other)
                if constant is not None and constant.size == 1 and constant.dtype.is_integer():
                    return int(constant.numpy().item())
            elif node.op_type in _PASSING and use.idx == 0 and node.outputs[0] not in seen:
                waiting.append(node.outputs[0])
                seen.add(node.outputs[0])
    return None


def parse_value_flags(flags: Sequence[str], option: str = "--input") -> dict[str, Value]:
    """``name=16000``, ``name=true``, ``name=1,0`` or ``name=[[1,2],[3,4]]`` for each flag of ``option``."""
    values: dict[str, Value] = {}
    for flag in flags:
        name, _, text = flag.partition("=")
        value = _parse_value(text)
        if not name or value is None:
            raise UsageError(
                f"{option} {flag!r}: write NAME=VALUE with a number, true or false, or a list, e.g. rate=16000 or "
                "flags=1,0"
            )
        if name in values:
            raise UsageError(f"{option} gives {name!r} twice")
        values[name] = value
    return values


def _parse_value(text: str) -> Value | None:
    for form in (text, f"[{text}]"):
        try:
            value = _frozen(json.loads(form.lower(), parse_constant=lambda _word: None))
        except (ValueError, RecursionError):
            continue
        return value if holds_numbers(value) else None
    return None


def parse_shape_flags(flags: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``name:1,128`` for each flag."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in map(_parse_shape, flags):
        if name in shapes:
            raise UsageError(f"--input-shape gives {name!r} twice")
        shapes[name] = shape
    return shapes


def parse_target_flags(flags: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Shapes for several targets: the n-th ``name:1,128`` of an input belongs to the n-th target, and an input that is
    given once has that shape in all of them. Without flags there is one target, with nothing given."""
    given: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in map(_parse_shape, flags):
        given.setdefault(name, []).append(shape)
    counts = {name: len(shapes) for name, shapes in given.items() if len(shapes) > 1}
    if len(set(counts.values())) > 1:
        counted = ", ".join(f"{name} {count} shapes" for name, count in counts.items())
        raise UsageError(
            f"--input-shape gives {counted}: give every input one shape, or as many as there are targets"
        )
    number = max(counts.values(), default=1)
    return tuple(
        {name: shapes[index if len(shapes) > 1 else 0] for name, shapes in given.items()}
        for index in range(number)
    )


def _parse_shape(flag: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = flag.rpartition(":")
    try:
        shape = tuple(int(dim) for dim in dims.split(","))
    except ValueError:
        shape = ()
    if not name or not shape or min(shape) < 1:
        raise UsageError(
            f"--input-shape {flag!r}: write NAME:DIM,DIM,.. with positive numbers, e.g. input_ids:1,128"
        )
    return name, shape


def resolve_shapes(
    specs: Sequence[InputSpec], given: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """A shape for every input, and the dimensions that were guessed (name: size).

    A symbol that a given shape fixes has that size in every input; see :func:`.input_sizes.solve_shapes`.

    Raises UsageError if given shapes do not fit, or one is missing for an input of unknown rank.
    """
    sizes = solve_shapes(specs, given)
    for spec in specs:
        if spec.name not in sizes.shapes:
            raise UsageError(
                f"the model does not say how many dimensions {spec.name} has: give --input-shape {spec.name}:DIM,.."
            )
    return dict(sizes.shapes), dict(sizes.guessed)


def generate(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Feeds:
    """Values of the given shapes: those that the user gives; else standard normal floats, indices within their table,
    masks of ones, positions that count up from what is in the cache, lengths as the shapes have them, the constant that
    a single integer is compared with, zeros for other integers, and true."""
    sizes = {
        dim: size
        for spec in specs
        for dim, size in zip(spec.shape or (), shapes[spec.name], strict=False)
        if isinstance(dim, str)
    }
    rng = np.random.default_rng(seed)
    past, new = history(specs, shapes)
    feeds: Feeds = {}
    for spec in specs:
        shape, name = shapes[spec.name], spec.name.lower()
        given = spec.array(shape)
        if given is not None:
            feeds[spec.name] = given
        elif spec.dtype == np.bool_ and "use_cache" in name:
            feeds[spec.name] = np.full(shape, past > 0)
        elif spec.dtype == np.bool_ or "mask" in name:
            feeds[spec.name] = np.ones(shape, spec.dtype)
        elif np.issubdtype(spec.dtype, np.integer):
            if spec.steps is not None:  # full sequences
                steps = sizes.get(spec.steps, 0) if isinstance(spec.steps, str) else spec.steps
                feeds[spec.name] = np.full(shape, steps, spec.dtype)
            else:
                feeds[spec.name] = _integers(spec, shape, past, new, rng).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def _integers(
    spec: InputSpec, shape: tuple[int, ...], past: int, new: int, rng: np.random.Generator
) -> np.ndarray:
    name = spec.name.lower()
    if (length := counted(name, past, new)) is not None and len(shape) < 2:
        return np.full(shape, length)
    if "position" in name:
        positions = past + np.arange(shape[-1] if shape else 1)
        last = positions[-1] if spec.rows is None or not positions.size else spec.rows - 1
        return np.broadcast_to(np.minimum(positions, last) if shape else positions[0], shape)
    if steers(spec, shape):
        return np.full(shape, spec.compared)
    if spec.rows is not None and "type" not in name:
        return rng.integers(0, spec.rows, shape)
    return np.zeros(shape)


def steers(spec: InputSpec, shape: tuple[int, ...]) -> bool:
    """Whether a single integer is generated as the constant that the graph compares it with; indices into a table steer
    nothing."""
    known = spec.value is None and spec.compared is not None and spec.rows is None
    return known and shape in ((), (1,)) and "mask" not in spec.name.lower()


def cache_axis(spec: InputSpec) -> int | None:
    """Along which axis of a cache of keys or values its tokens lie; None of any other input."""
    if spec.dtype.kind != "f":
        return None
    dims = spec.shape or ()
    for axis, dim in enumerate(dims):
        if isinstance(dim, str) and is_cache_length(dim) and parse(dim) == {(dim,): 1}:
            return axis
    return 2 if "past" in spec.name.lower() and len(dims) == 4 else None


def history(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """How many tokens are in the caches, and how many come."""
    past, new = 0, 0
    for spec in specs:
        shape = shapes[spec.name]
        if (axis := cache_axis(spec)) is not None:
            past = max(past, shape[axis])
        if spec.name.endswith(("input_ids", "inputs_embeds")) and len(shape) > 1:
            new = shape[1]
    return past, new


def counted(name: str, past: int, new: int) -> int | None:
    """What an integer of that name counts, or None."""
    if "total_seq" in name:
        return past + new
    if "seqlens_k" in name:  # of GroupQueryAttention: the last position
        return past + new - 1
    return past if "past_seq" in name or "past_len" in name else None


def _may_be_empty(spec: InputSpec, array: np.ndarray) -> bool:
    """Whether all dimensions of size 0 are those of a cache, which is empty before the first token."""
    return all(
        not isinstance(dim, int) and is_cache_length(dim or spec.name)
        for dim, size in zip(spec.shape or (None,) * array.ndim, array.shape, strict=True)
        if size == 0
    )


def check_samples(
    arrays: Mapping[str, np.ndarray], specs: Sequence[InputSpec], where: str, labels: str | None = None
) -> Feeds:
    """The inputs among ``arrays``, cast to the model's types if that loses nothing but precision; values that the user
    gives stand for what is missing. With ``labels``, the array of that name is kept beside them: integers, one or
    several a sample.

    Raises DataError with ``where`` they come from and what was expected: missing, wrong rank, size or type,
    empty, NaN or Inf, values beyond the type or other than the one that becomes a constant, arrays that differ in their
    number of samples.
    """
    expected = "; ".join(spec.describe() for spec in specs)
    given = {spec.name: array for spec in specs if (array := spec.array()) is not None}
    missing = [spec.name for spec in specs if spec.name not in arrays and spec.name not in given]
    if missing:
        raise DataError(
            f"{where} has no {', '.join(missing)}; it has {', '.join(arrays)}; expected {expected}"
            " (an input that is the same for all can be given with --input NAME=VALUE)"
        )
    found = {spec.name: arrays[spec.name] for spec in specs if spec.name in arrays}
    for spec in specs:
        if spec.name in found and (
            (spec.shape is not None and found[spec.name].ndim != len(spec.shape))
            or (found[spec.name].size == 0 and not _may_be_empty(spec, found[spec.name]))
        ):
            raise _does_not_fit(spec, found[spec.name], where)
    cut = batching(specs, found)
    checked: Feeds = {}
    for spec in specs:
        if spec.name not in found:
            checked[spec.name] = given[spec.name]
            continue
        array = found[spec.name]
        if spec.shape is not None and any(
            isinstance(dim, int) and axis != cut.axes.get(spec.name) and dim != size
            for axis, (dim, size) in enumerate(zip(spec.shape, array.shape, strict=True))
        ):
            raise _does_not_fit(spec, array, where)
        if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise DataError(f"{where}: {spec.name} has dtype {array.dtype}; expected {spec.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(spec.dtype, order="C")
        if cast.dtype.kind == "f" and not np.isfinite(cast).all():
            raise DataError(f"{where}: {spec.name} holds NaN, Inf or values beyond {spec.dtype}")
        if cast.dtype.kind in "iu" and not np.array_equal(cast, array):
            raise DataError(f"{where}: {spec.name} holds values beyond {spec.dtype}")
        if spec.rows is not None and cast.size and cast.max() >= spec.rows:
            raise DataError(
                f"{where}: {spec.name} holds the index {cast.max()}, but the table has {spec.rows} rows"
            )
        if spec.fixed and not (cast == spec.array(cast.shape)).all():
            raise DataError(
                f"{where}: {spec.name} holds other values than --fix-input {spec.name}={_written(spec.value)}"
            )
        checked[spec.name] = cast
    if labels is not None and labels not in checked:
        checked[labels] = _check_labels(arrays, labels, where)
    cut = batching(specs, {name: array for name, array in checked.items() if name in arrays})
    lengths = cut.counts(checked)
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: the arrays differ in their number of samples: {lengths}")
    if uneven := cut.uneven(checked):
        raise DataError(
            f"{where}: {uneven[0]} is {list(checked[uneven[0]].shape)}: axis {cut.axes[uneven[0]]} is no multiple of "
            f"{cut.samples(checked)} samples"
        )
    return checked


def _does_not_fit(spec: InputSpec, array: np.ndarray, where: str) -> DataError:
    return DataError(f"{where}: {spec.name} is {array.dtype}{list(array.shape)}; expected {spec.describe()}")


def _check_labels(arrays: Mapping[str, np.ndarray], labels: str, where: str) -> np.ndarray:
    if labels not in arrays:
        raise DataError(f"{where} has no labels {labels!r}; it has {', '.join(arrays)}")
    array = arrays[labels]
    if array.dtype.kind not in "iub" or array.ndim == 0:
        raise DataError(
            f"{where}: the labels {labels} are {array.dtype}{list(array.shape)}; expected integers, samples first"
        )
    return array.astype(np.int64)


def read_arrays(path: Path, specs: Sequence[InputSpec], labels: str | None = None) -> Feeds:
    """The checked inputs of an ``.npz`` file: one array an input, samples along the first axis; and ``labels`` as
    :func:`check_samples` has them."""
    expected = "; ".join(spec.describe() for spec in specs)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected an .npz with {expected}") from error
    except (ValueError, TypeError, OSError, zipfile.BadZipFile, EOFError) as error:
        # TypeError: a single .npy array, which is no context
        raise DataError(f"{path} cannot be read as .npz ({error}); expected arrays {expected}") from error
    return check_samples(arrays, specs, str(path), labels)


def sample_count(feeds: Feeds, specs: Sequence[InputSpec]) -> int:
    """How many samples a batch holds; 1 if no input has the batch in it."""
    return batching(specs, feeds).samples(feeds)


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that the model's inputs demand, or None if it is free."""
    return batching(specs, {}).fixed


def first_samples(arrays: Feeds, count: int, specs: Sequence[InputSpec]) -> Feeds:
    """The first ``count`` samples; where the batch size is fixed, as many whole batches as hold them."""
    cut = batching(specs, arrays)
    return cut.cut(arrays, 0, -(-count // cut.fixed) * cut.fixed if cut.fixed else count)


def split_batches(arrays: Feeds, specs: Sequence[InputSpec], batch: int, where: str) -> list[Feeds]:
    """``arrays`` cut into batches of ``batch`` samples, or of the size that the model demands; inputs without the batch
    go with every one, see :mod:`.batches`."""
    cut = batching(specs, arrays)
    total = cut.samples(arrays)
    step = cut.fixed or batch
    if cut.fixed and total % cut.fixed:
        raise DataError(f"{where}: {total} samples are no multiple of the model's fixed batch of {cut.fixed}")
    return [cut.cut(arrays, start, min(start + step, total)) for start in range(0, total, step)]
