"""Calibration data: from an .npz, a folder of them, a Python function, or text with a tokenizer, to checked batches."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.data.inputs import (
    Feeds,
    InputSpec,
    check_samples,
    first_samples,
    fixed_batch,
    read_arrays,
    sample_count,
    split_batches,
)
from sparse_onnx.data.text import read_passages, tokenize
from sparse_onnx.errors import DataError, SparseOnnxError, UsageError

__all__ = [
    "Samples",
    "Source",
    "from_function",
    "from_npz",
    "from_npz_folder",
    "from_text",
    "import_function",
    "is_function",
    "open_samples",
    "weighted_source",
]

_WEIGHTED = re.compile(r"(?P<source>.+):(?P<weight>[0-9]*\.?[0-9]+)")
_FUNCTION = re.compile(r"(?P<module>[\w./\\-]+):(?P<name>[A-Za-z_]\w*)")


class Samples:
    """Batches of checked inputs that can be gone through again and again, in the same order.

    ``batches`` are functions that give one batch each, so that files need not stay in memory. ``weights`` say how much
    each batch counts in what is summed over them; None: all alike.
    """

    def __init__(
        self, batches: Sequence[Callable[[], Feeds]], source: str, weights: Sequence[float] | None = None
    ) -> None:
        if not batches:
            raise DataError(f"{source}: no calibration data in it")
        self._batches = tuple(batches)
        self.source = source
        self.weights = (1,) * len(batches) if weights is None else tuple(weights)

    @classmethod
    def of(cls, batches: Iterable[Feeds], source: str) -> Samples:
        """Batches that are in memory already."""
        return cls([functools.partial(_same, feeds) for feeds in batches], source)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Feeds]:
        return (batch() for batch in self._batches)

    @classmethod
    def together(cls, sources: Sequence[Samples]) -> Samples:
        """The batches of several sources, each spread evenly over the whole: every stretch has all of them."""
        ordered = sorted(
            ((index + 0.5) / len(samples), number, index)
            for number, samples in enumerate(sources)
            for index in range(len(samples))
        )
        return cls(
            [sources[number]._batches[index] for _, number, index in ordered],
            ", ".join(samples.source for samples in sources),
            [sources[number].weights[index] for _, number, index in ordered],
        )

    @property
    def weighted(self) -> bool:
        """Whether some batches count for more or less than others would."""
        return any(weight != 1 for weight in self.weights)

    def counting(self, weight: float) -> Samples:
        """The same batches, each counting ``weight`` times as much."""
        return Samples(self._batches, self.source, [weight * own for own in self.weights])

    def chosen(
        self, numbers: Sequence[int], change: Callable[[Callable[[], Feeds], int], Feeds] | None = None
    ) -> Samples:
        """The batches of these numbers, as they are or as ``change(batch, number)`` makes each."""
        parts = [self._batches[number] for number in numbers]
        if change is not None:
            parts = [functools.partial(change, *pair) for pair in zip(parts, numbers, strict=True)]
        return Samples(parts, self.source, [self.weights[number] for number in numbers])

    def part(self, start: int, end: int) -> Samples:
        """Batches start..end-1."""
        return Samples(self._batches[start:end], self.source, self.weights[start:end])

    def without(self, name: str) -> Samples:
        """The same batches without the array ``name``."""
        parts = [functools.partial(_without, batch, name) for batch in self._batches]
        return Samples(parts, self.source, self.weights)

    def digest(self) -> str:
        """SHA-256 over names, types, shapes and values of all batches, and their weights where these differ from 1."""
        digest = hashlib.sha256()
        for feeds in self:
            for name, array in sorted(feeds.items()):
                digest.update(f"{name} {array.dtype} {array.shape};".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        if self.weighted:
            digest.update(repr(self.weights).encode())
        return digest.hexdigest()


def _same(feeds: Feeds) -> Feeds:
    return feeds


def _without(batch: Callable[[], Feeds], name: str) -> Feeds:
    return {key: array for key, array in batch().items() if key != name}


Source = str | Path | Callable[[], Iterable[Mapping[str, np.ndarray]]]
"""Where real inputs come from, see :func:`open_samples`."""


def weighted_source(source: Source) -> tuple[Source, float]:
    """A source and its weight, which text has behind a colon (``glosses.npz:0.5``); 1 where it has none.

    A file whose whole name looks like that is a file. Raises UsageError for a weight that is not above 0.
    """
    found = _WEIGHTED.fullmatch(source) if isinstance(source, str) else None
    if found is None or Path(str(source)).exists():
        return source, 1
    weight = float(found["weight"])
    if not weight > 0:
        raise UsageError(f"{source}: the weight of a source must be above 0, not {weight:g}")
    return found["source"], weight


def open_samples(
    source: Source | Sequence[Source],
    specs: Sequence[InputSpec],
    *,
    limit: int | None = None,
    batch: int = 8,
    tokenizer: str | Path | None = None,
    paragraphs: bool = False,
    max_length: int = 128,
    labels: str | None = None,
) -> Samples:
    """Calibration data for a model with the inputs ``specs``.

    Args:
        source: An ``.npz`` (arrays by input name, samples along the first axis); a folder of them (one batch a file,
            in the order of their names); a function, or ``module:function`` or ``file.py:function``, that yields
            dictionaries of arrays (one batch each); or a text file, with ``tokenizer``. Several of these are mixed
            evenly; ``:0.5`` behind one says that its samples count half.
        limit: Take the first so many samples of every source; None: all.
        batch: Samples in one batch, of an ``.npz`` and of text.
        tokenizer: A folder that ``transformers.AutoTokenizer`` can load.
        paragraphs: A passage of the text ends at an empty line, not at the end of its line.
        max_length: Tokens of a passage; the rest is cut off.
        labels: The name of an array of integers that every batch has beside the inputs, and keeps.

    Raises:
        DataError: The data is missing, empty, damaged, holds NaN or Inf, or does not fit the inputs.
        UsageError: An option out of range, or what is named cannot be imported.
        HostError: transformers is not installed, or the file may not be read.
    """
    for name, value in (
        ("num_calibration_samples", limit),
        ("batch size", batch),
        ("max_length", max_length),
    ):
        if value is not None and value < 1:
            raise UsageError(f"calibration: {name} must be at least 1, not {value}")
    sources = source if isinstance(source, list | tuple) else (source,)
    if not sources:
        raise UsageError("calibration: no source of data is given")
    parts = []
    for given in sources:
        one, weight = weighted_source(given)
        opened = _open(
            one,
            specs,
            limit=limit,
            batch=batch,
            tokenizer=tokenizer,
            paragraphs=paragraphs,
            max_length=max_length,
            labels=labels,
        )
        parts.append(opened.counting(weight))
    return parts[0] if len(parts) == 1 else Samples.together(parts)


def _open(
    source: Source,
    specs: Sequence[InputSpec],
    *,
    limit: int | None,
    batch: int,
    tokenizer: str | Path | None,
    paragraphs: bool,
    max_length: int,
    labels: str | None,
) -> Samples:
    """What one source holds."""
    if callable(source):
        return from_function(source, specs, limit=limit, labels=labels)
    path = Path(source)
    if path.is_dir():
        return from_npz_folder(path, specs, limit=limit, labels=labels)
    if path.suffix == ".npz" or (path.is_file() and path.suffix in (".npy", ".zip")):
        return from_npz(path, specs, limit=limit, batch=batch, labels=labels)
    if is_function(str(source)):
        function = import_function(str(source))
        return from_function(function, specs, limit=limit, source=str(source), labels=labels)
    if tokenizer is not None:
        if labels is not None:
            raise DataError(f"{path}: text holds no labels {labels!r}; give an .npz or module:function")
        return from_text(
            path, specs, tokenizer, limit=limit, batch=batch, paragraphs=paragraphs, max_length=max_length
        )
    if path.is_file():
        raise DataError(f"{path}: is no .npz; for a text file give the tokenizer's folder as well")
    raise DataError(
        f"{source}: no such file or folder; give an .npz, a folder of .npz files, module:function, "
        "or a text file with a tokenizer"
    )


def from_npz(
    path: Path,
    specs: Sequence[InputSpec],
    *,
    limit: int | None = None,
    batch: int = 8,
    labels: str | None = None,
) -> Samples:
    """All samples of one file, in batches."""
    arrays = read_arrays(path, specs, labels)
    if limit is not None:
        arrays = first_samples(arrays, limit, specs)
    return Samples.of(split_batches(arrays, specs, batch, str(path)), str(path))


def from_npz_folder(
    folder: Path, specs: Sequence[InputSpec], *, limit: int | None = None, labels: str | None = None
) -> Samples:
    """One batch a file, in the order of their names; every file is read and checked now, and again when it is used."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise DataError(
            f"{folder}: holds no .npz file; expected arrays {'; '.join(s.describe() for s in specs)}"
        )
    batches: list[Callable[[], Feeds]] = []
    left = limit
    for path in paths:
        if left == 0:
            break
        feeds = read_arrays(path, specs, labels)
        _check_batch(feeds, specs, str(path))
        count = sample_count(feeds, specs)
        take = count if left is None else min(count, left)
        batches.append(functools.partial(_read_first, path, specs, take, labels))
        left = None if left is None else left - take
    return Samples(batches, str(folder))


def _read_first(path: Path, specs: Sequence[InputSpec], count: int, labels: str | None) -> Feeds:
    return first_samples(read_arrays(path, specs, labels), count, specs)


def from_function(
    function: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    specs: Sequence[InputSpec],
    *,
    limit: int | None = None,
    source: str | None = None,
    labels: str | None = None,
) -> Samples:
    """The batches that ``function()`` yields; they are kept in memory."""
    source = source or f"function {getattr(function, '__qualname__', function)}"
    expected = "; ".join(spec.describe() for spec in specs)
    batches: list[Feeds] = []
    left = limit
    try:
        for number in itertools.count():
            if number == 0:
                batches_of = iter(function())
            if left == 0 or (given := next(batches_of, None)) is None:
                break
            if not isinstance(given, Mapping):
                raise DataError(
                    f"{source} yields {type(given).__name__}; expected a dictionary with {expected}"
                )
            arrays = {str(name): np.asarray(value) for name, value in given.items()}
            feeds = check_samples(arrays, specs, f"{source}, batch {number}", labels)
            _check_batch(feeds, specs, f"{source}, batch {number}")
            if left is not None:
                feeds = first_samples(feeds, left, specs)
                left -= sample_count(feeds, specs)
            batches.append(feeds)
    except SparseOnnxError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{source} failed: {type(error).__name__}: {error}") from error
    return Samples.of(batches, source)


def from_text(
    path: Path,
    specs: Sequence[InputSpec],
    tokenizer: str | Path,
    *,
    limit: int | None = None,
    batch: int = 8,
    paragraphs: bool = False,
    max_length: int = 128,
) -> Samples:
    """The passages of a text file; a batch is padded to its longest passage, or to the size that the model demands."""
    passages = list(itertools.islice(read_passages(path, paragraphs=paragraphs), limit))
    if not passages:
        raise DataError(f"{path}: holds no text")
    step = fixed_batch(specs) or batch
    if len(passages) % step and fixed_batch(specs):
        raise DataError(
            f"{path}: {len(passages)} passages are no multiple of the model's fixed batch of {step}"
        )
    encoded = tokenize(passages, Path(tokenizer), specs, batch=step, max_length=max_length)
    return Samples.of((check_samples(feeds, specs, str(path)) for feeds in encoded), str(path))


def _check_batch(feeds: Feeds, specs: Sequence[InputSpec], where: str) -> None:
    fixed = fixed_batch(specs)
    if fixed is not None and sample_count(feeds, specs) != fixed:
        raise DataError(
            f"{where}: {sample_count(feeds, specs)} samples in a batch; the model takes exactly {fixed}"
        )


def is_function(source: str) -> bool:
    """Whether ``source`` is written as ``module:function`` or ``file.py:function`` and is no file."""
    return _FUNCTION.fullmatch(source) is not None and not Path(source).exists()


def import_function(source: str) -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names; UsageError if there is none."""
    module, _, name = source.rpartition(":")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None or not Path(module).is_file():
                raise UsageError(f"{module}: no such Python file")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        function = getattr(loaded, name)
    except SparseOnnxError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UsageError(f"{source} is no function")
    return function  # type: ignore[no-any-return]
