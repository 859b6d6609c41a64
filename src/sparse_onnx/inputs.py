"""Inputs to run a model with: shapes chosen, values generated or read from a file.

Shapes come from the user, else from the model, else from a guess by the name of the dimension that is announced.
Generated values are seeded; indices into an embedding stay below its number of rows; masks are ones.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.graph import is_standard

__all__ = [
    "Feeds",
    "InputSpec",
    "check_samples",
    "fixed_batch",
    "generate",
    "input_specs",
    "parse_shape_flags",
    "parse_target_flags",
    "read_arrays",
    "read_samples",
    "resolve_shapes",
    "sample_count",
    "split_batches",
]

Feeds = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One input of a model; a dimension is a number, a symbol, or None. ``rows`` bounds an index input: the
    rows of the smallest table that it looks up, or None. ``steps`` is the number or symbol of the steps that sequences
    have at most, of an input that says their lengths to an LSTM or GRU; else None."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    rows: int | None
    steps: int | str | None = None

    def describe(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs that a caller must give (initializers listed as inputs have a value already)."""
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if value.dtype is None or value.shape is None or value.dtype == ir.DataType.STRING:
            raise UsageError(
                f"input {value.name!r} is no tensor with a known rank and numeric type: cannot be run"
            )
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        specs.append(
            InputSpec(value.name or "", value.dtype.numpy(), dims, _table_rows(value), _steps(value))
        )
    return tuple(specs)


def _steps(value: ir.Value) -> int | str | None:
    """The size of the first axis of what an LSTM or GRU reads, where ``value`` says how long its sequences are."""
    for use in value.uses():
        if is_standard(use.node, "LSTM", "GRU") and use.idx == 4:
            return _size(use.node.inputs[0], 0)
        if is_standard(use.node, "Cast", "Identity") and (found := _steps(use.node.outputs[0])) is not None:
            return found
    return None


def _size(value: ir.Value | None, axis: int) -> int | str | None:
    """A dimension, also of what a Transpose makes."""
    if value is None:
        return None
    if value.shape is not None and axis < len(value.shape):
        dim = value.shape[axis]
        return dim if isinstance(dim, int) else dim.value
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


def _guess(symbol: str | None, position: int, rank: int) -> int:
    name = (symbol or "").lower()
    if "past" in name or "cache" in name:
        return 0
    if "batch" in name or position == 0:
        return 1
    if any(word in name for word in ("height", "width")) or rank == 4:
        return 224
    return 128


def resolve_shapes(
    specs: Sequence[InputSpec], given: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """A shape for every input, and the dimensions that were guessed (name: size).

    A symbol that a given shape fixes has that size in every input.
    """
    known = {spec.name: spec for spec in specs}
    for name, shape in given.items():
        if name not in known:
            raise UsageError(
                f"--input-shape names {name!r}; the inputs are {'; '.join(s.describe() for s in specs)}"
            )
        spec = known[name]
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise UsageError(
                f"--input-shape {name}:{','.join(map(str, shape))} does not fit {spec.describe()}"
            )
    symbols: dict[str, int] = {}
    for name, shape in given.items():
        for dim, size in zip(known[name].shape, shape, strict=True):
            if isinstance(dim, str) and symbols.setdefault(dim, size) != size:
                raise UsageError(f"--input-shape makes dimension {dim} both {symbols[dim]} and {size}")
    guessed: dict[str, int] = {}
    shapes = {}
    for spec in specs:
        if spec.name in given:
            shapes[spec.name] = tuple(given[spec.name])
            continue
        dims = []
        for position, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                dims.append(dim)
            elif dim is not None and dim in symbols:
                dims.append(symbols[dim])
            else:
                size = _guess(dim, position, len(spec.shape))
                guessed[dim or f"{spec.name}.{position}"] = size
                if dim is not None:
                    symbols[dim] = size
                dims.append(size)
        shapes[spec.name] = tuple(dims)
    return shapes, guessed


def generate(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Feeds:
    """Random values of the given shapes: standard normal floats, indices within their table, masks of ones,
    positions that count up, lengths of full sequences, zeros for other integers."""
    symbols = {dim: size for spec in specs for dim, size in zip(spec.shape, shapes[spec.name], strict=False)}
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for spec in specs:
        shape, name = shapes[spec.name], spec.name.lower()
        if spec.dtype == np.bool_ or "mask" in name:
            feeds[spec.name] = np.ones(shape, spec.dtype)
        elif np.issubdtype(spec.dtype, np.integer):
            if "position" in name:
                values: np.ndarray = np.broadcast_to(np.arange(shape[-1] if shape else 1), shape)
            elif spec.steps is not None:
                steps = symbols.get(spec.steps, 0) if isinstance(spec.steps, str) else spec.steps
                values = np.full(shape, steps)
            elif spec.rows is not None and "type" not in name:
                values = rng.integers(0, spec.rows, shape)
            else:
                values = np.zeros(shape)
            feeds[spec.name] = values.astype(spec.dtype)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def _may_be_empty(spec: InputSpec, array: np.ndarray) -> bool:
    """Whether all dimensions of size 0 are those of a cache, which is empty before the first token."""
    return len(spec.shape) == array.ndim and all(
        isinstance(dim, str) and _guess(dim, 1, array.ndim) == 0
        for dim, size in zip(spec.shape, array.shape, strict=True)
        if size == 0
    )


def check_samples(
    arrays: Mapping[str, np.ndarray], specs: Sequence[InputSpec], where: str, labels: str | None = None
) -> Feeds:
    """The inputs among ``arrays``, cast to the model's types if that loses nothing but precision. With ``labels``, the
    array of that name is kept beside them: integers, one or several a sample.

    Raises UsageError with ``where`` they come from and what was expected: missing, wrong rank, size or type,
    empty, NaN or Inf, values beyond the type, arrays that differ in their number of samples (first axis).
    """
    expected = "; ".join(spec.describe() for spec in specs)
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        raise UsageError(
            f"{where} has no {', '.join(missing)}; it has {', '.join(arrays)}; expected {expected}"
        )
    checked: Feeds = {}
    for spec in specs:
        array = arrays[spec.name]
        if array.ndim != len(spec.shape) or (array.size == 0 and not _may_be_empty(spec, array)):
            raise UsageError(
                f"{where}: {spec.name} is {array.dtype}{list(array.shape)}; expected {spec.describe()}"
            )
        if any(
            isinstance(d, int) and i > 0 and d != s
            for i, (d, s) in enumerate(zip(spec.shape, array.shape, strict=True))
        ):
            raise UsageError(
                f"{where}: {spec.name} is {array.dtype}{list(array.shape)}; expected {spec.describe()}"
            )
        if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise UsageError(f"{where}: {spec.name} has dtype {array.dtype}; expected {spec.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(spec.dtype, order="C")
        if cast.dtype.kind == "f" and not np.isfinite(cast).all():
            raise UsageError(f"{where}: {spec.name} holds NaN, Inf or values beyond {spec.dtype}")
        if cast.dtype.kind in "iu" and not np.array_equal(cast, array):
            raise UsageError(f"{where}: {spec.name} holds values beyond {spec.dtype}")
        if spec.rows is not None and cast.size and cast.max() >= spec.rows:
            raise UsageError(
                f"{where}: {spec.name} holds the index {cast.max()}, but the table has {spec.rows} rows"
            )
        checked[spec.name] = cast
    if labels is not None and labels not in checked:
        checked[labels] = _check_labels(arrays, labels, where)
    lengths = {name: array.shape[0] for name, array in checked.items() if array.ndim}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"{where}: the arrays differ in their number of samples: {lengths}")
    return checked


def _check_labels(arrays: Mapping[str, np.ndarray], labels: str, where: str) -> np.ndarray:
    if labels not in arrays:
        raise UsageError(f"{where} has no labels {labels!r}; it has {', '.join(arrays)}")
    array = arrays[labels]
    if array.dtype.kind not in "iub" or array.ndim == 0:
        raise UsageError(
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
        raise UsageError(f"{path}: no such file; expected an .npz with {expected}") from error
    except (ValueError, TypeError, OSError, zipfile.BadZipFile, EOFError) as error:
        # TypeError: a single .npy array, which is no context
        raise UsageError(f"{path} cannot be read as .npz ({error}); expected arrays {expected}") from error
    return check_samples(arrays, specs, str(path), labels)


def sample_count(feeds: Feeds) -> int:
    """How many samples a batch holds; 1 if no input has an axis."""
    return next((len(array) for array in feeds.values() if array.ndim), 1)


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that the model's inputs demand, or None if it is free."""
    return next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)), None)


def split_batches(arrays: Feeds, specs: Sequence[InputSpec], batch: int, where: str) -> list[Feeds]:
    """``arrays`` cut along the first axis into batches of ``batch`` samples, or of the size that the model demands."""
    total, fixed = sample_count(arrays), fixed_batch(specs)
    step = fixed or batch
    if fixed and total % fixed:
        raise UsageError(f"{where}: {total} samples are no multiple of the model's fixed batch of {fixed}")
    starts = range(0, total, step)
    return [{k: array[i : i + step] if array.ndim else array for k, array in arrays.items()} for i in starts]


def read_samples(path: Path, specs: Sequence[InputSpec], *, batch: int = 8) -> list[Feeds]:
    """Real inputs from an ``.npz`` file: one array an input, samples along the first axis, cut into batches.

    Arrays are cast to the input's type if that loses nothing but precision.
    """
    return split_batches(read_arrays(path, specs), specs, batch, str(path))
