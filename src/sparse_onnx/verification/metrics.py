"""Metrics of a model's quality: a user's own function, or built in; before and after.

A *measure* is called as ``measure(run, batches)`` and returns one number. ``run(feeds)`` gives all outputs of the
model by name, as arrays; ``batches`` are the metric's data: dictionaries of arrays, the inputs by name and the labels
if there are any. Higher is better, unless the measure has the attribute ``lower_is_better``. A user's own is a function
of these two arguments in a module or a Python file::

    def error_rate(run, batches):
        wrong = [run(feeds)["logits"].argmax(-1) != feeds["label"] for feeds in batches]
        return np.concatenate(wrong).mean()

    error_rate.lower_is_better = True

Built in:

===================  ==================================================================================================
accuracy             the share of labels that the most probable class is
recall, f1           as means over classes (macro average); padding and other labels below 0 are left out
recall@K             embeddings: the share of the K nearest neighbours (cosine) in the original model that are among
                     the K nearest in this one; with labels, the share of samples with one of equal label among their K
                     nearest. An output [B, S, D] is averaged over the positions that are no padding
perplexity           of a causal language model, on the inputs' own tokens; lower is better
token_agreement      the share of rows of logits with the same most probable class as in the original
cosine               to the original's output, the mean over samples
===================  ==================================================================================================

:func:`open_metric` opens one with its data; the :class:`Metric` then measures as many models as are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds, input_specs, sample_count
from sparse_onnx.data.samples import import_function, is_function
from sparse_onnx.document import MetricRow, finite
from sparse_onnx.errors import SparseOnnxError, UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.probe import uses_library
from sparse_onnx.options import unknown
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.verification import quality
from sparse_onnx.verification.comparison import compare
from sparse_onnx.verification.predictions import (
    Head,
    compare_predictions,
    confirm,
    find_heads,
    kept_positions,
    make_probe,
    named_head,
)

__all__ = ["BUILT_IN", "Measure", "Metric", "MetricResult", "Run", "check_metric_name", "open_metric"]

Run = Callable[[Feeds], Feeds]

_RECALL_AT = re.compile(r"recall@(?P<k>[1-9]\d{0,5})")


class Measure(Protocol):
    """What is measured; see the module's docstring."""

    def __call__(self, run: Run, batches: Sequence[Feeds], /) -> float:
        """The value for the model that ``run`` runs."""
        ...


@dataclasses.dataclass(frozen=True)
class MetricResult:
    """A metric of two models. ``drop`` is what was lost, see :func:`.quality.drop`; ``samples`` were measured on."""

    name: str
    before: float
    after: float
    drop: float
    lower_is_better: bool
    samples: int

    @classmethod
    def of(cls, row: MetricRow) -> MetricResult | None:
        """As :meth:`to_dict` wrote it; None if a figure was not finite."""
        before, after, drop = row["before"], row["after"], row["drop"]
        if before is None or after is None or drop is None:
            return None
        return cls(row["name"], before, after, drop, row["lower_is_better"], row["samples"])

    def to_dict(self) -> MetricRow:
        """For JSON, which has no Inf and NaN: None there."""
        return {
            "name": self.name,
            "before": finite(self.before),
            "after": finite(self.after),
            "drop": finite(self.drop),
            "lower_is_better": self.lower_is_better,
            "samples": self.samples,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """A measure with its data, in memory. It can be pickled, and measured with in other processes, if the measure is
    built in or named as ``module:function``.

    Attributes:
        name: As it was asked for.
        measure: See the module's docstring.
        batches: What it is measured on.
        samples: How many samples that are.
        before: The value of the original model.
        lower_is_better: Whether the measure is better where it is lower.
    """

    name: str
    measure: Measure
    batches: tuple[Feeds, ...]
    samples: int
    before: float
    lower_is_better: bool

    def evaluate(
        self, model: str | Path | ir.Model, *, threads: int | None = None, library: bool | None = None
    ) -> float:
        """The value for ``model``, an ``.onnx`` file or a model in memory.

        Args:
            model: With the inputs and outputs of the original.
            threads: Intra-op threads; None: all cores of this process.
            library: Whether the kernel library is registered; None: if the model has operators for it.

        Raises:
            UsageError: The model cannot be run on the data, or the measure fails or gives no finite number. A built-in
                perplexity may be infinite.
        """
        with _opened(model, threads, library) as run:
            return _value(self.name, self.measure, run, self.batches)

    def compare(
        self, model: str | Path | ir.Model, *, threads: int | None = None, library: bool | None = None
    ) -> MetricResult:
        """The value for ``model`` beside that of the original; arguments and errors as for :meth:`evaluate`."""
        after = self.evaluate(model, threads=threads, library=library)
        lost = quality.drop(self.before, after, lower_is_better=self.lower_is_better)
        return MetricResult(self.name, self.before, after, lost, self.lower_is_better, self.samples)


def open_metric(
    metric: str | Measure,
    original: str | Path | ir.Model,
    batches: Sequence[Feeds],
    *,
    labels: str | None = None,
    output: str | None = None,
    threads: int | None = None,
) -> Metric:
    """A metric with its data; the original model is run on it, for its value and for what others are compared with.

    Args:
        metric: ``module:function`` or ``file.py:function``, a built-in name, or a function.
        original: An ``.onnx`` file or a model in memory.
        batches: The data: the model's inputs, and ``labels``; see :func:`sparse_onnx.data.samples.open_samples`. A
            user's own measure may have data of its own and take none.
        labels: The array with the labels, integers: ``accuracy``, ``recall`` and ``f1`` need it, ``recall@K`` may
            have it.
        output: The output that is measured; None: the one with logits, else the first one of floats.
        threads: Intra-op threads; None: all cores of this process.

    Raises:
        UsageError: An unknown metric, one that cannot be imported, fails or gives no finite number, or data or labels
            that are missing or do not fit.
    """
    name = metric if isinstance(metric, str) else getattr(metric, "__qualname__", type(metric).__qualname__)
    if isinstance(metric, str):
        check_metric_name(metric)
    data = tuple(batches)
    model = original if isinstance(original, ir.Model) else model_io.load_model(original)
    with _opened(original, threads, None) as run:
        if isinstance(metric, str) and (build := _builder(metric)) is not None:
            if not data:
                raise UsageError(f"metric {name} needs data: give an .npz, a folder, module:function or text")
            measure = build(_Setup(name, model, run, data, labels, output))
        else:
            measure = _Imported(metric) if isinstance(metric, str) else metric
        before = _value(name, measure, run, data)
    lower = bool(getattr(measure, "lower_is_better", False))
    return Metric(name, measure, data, sum(_counts(model, data)), before, lower)


def _counts(model: ir.Model, batches: Sequence[Feeds]) -> tuple[int, ...]:
    """How many samples each batch has."""
    specs = input_specs(model)
    return tuple(sample_count(feeds, specs) for feeds in batches)


def check_metric_name(metric: str) -> None:
    """Raise a UsageError unless ``metric`` is built in or a function that can be imported."""
    if _builder(metric) is None:
        if not is_function(metric):
            raise UsageError(f"{unknown('metric', metric, BUILT_IN)}; your own is written module:function")
        _function(metric)


@contextmanager
def _opened(model: str | Path | ir.Model, threads: int | None, library: bool | None) -> Iterator[Run]:
    path = None if isinstance(model, ir.Model) else Path(model)
    loaded = model_io.load_model(path) if path is not None else model
    assert isinstance(loaded, ir.Model)
    with (
        tempfile.TemporaryDirectory(prefix="sparse-onnx-") as work,
        open_runner(
            loaded,
            Workbench(threads or available_cores(), Path(work)),
            path,
            library=uses_library(loaded) if library is None else library,
        ) as runner,
    ):
        yield runner.run


def _value(name: str, measure: Measure, run: Run, batches: Sequence[Feeds]) -> float:
    try:
        value = measure(run, batches)
    except SparseOnnxError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"metric {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(value, numbers.Real | np.ndarray | np.generic) or np.size(value) != 1:
        raise UsageError(f"metric {name} gave {type(value).__name__} {value!r:.80}; expected one number")
    number = float(np.asarray(value).item())
    if math.isnan(number) or (math.isinf(number) and not isinstance(measure, Perplexity)):
        raise UsageError(f"metric {name} gave {number}; expected a finite number")
    return number


@dataclasses.dataclass(frozen=True)
class _Imported:
    """A user's function by its name, so that it can be pickled; imported in every process."""

    source: str

    def __call__(self, run: Run, batches: Sequence[Feeds], /) -> float:
        value: float = _function(self.source)(run, batches)
        return value

    @property
    def lower_is_better(self) -> bool:
        return bool(getattr(_function(self.source), "lower_is_better", False))


@functools.cache
def _function(source: str) -> Callable[..., Any]:
    # Once a process: what a module loads when it is imported may take long.
    return import_function(source)


# -- built in ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What a built-in measure is made from: the original model, a way to run it, and what was asked for."""

    name: str
    model: ir.Model
    run: Run
    batches: tuple[Feeds, ...]
    labels: str | None
    output: str | None

    def needed_labels(self) -> str:
        if self.labels is None:
            raise UsageError(
                f"metric {self.name} needs labels: say which array of the data holds them (--labels)"
            )
        return self.labels

    def head(self) -> Head:
        """The output with logits, or the one that was named."""
        heads = find_heads(self.model)
        names = [value.name or "" for value in self.model.graph.outputs]
        if self.output is not None:
            self.named(names)
            return named_head(self.model, self.output)
        if heads:
            return heads[0]
        if len(names) == 1:
            return named_head(self.model, names[0])
        raise UsageError(
            f"metric {self.name}: no output is known to hold logits; name one of {', '.join(names)} "
            "(--metric-output)"
        )

    def named(self, names: Sequence[str]) -> None:
        if self.output is not None and self.output not in names:
            raise UsageError(f"metric {self.name}: {unknown('output', self.output, names)}")

    def float_output(self) -> str:
        """The first output of floats, or the one that was named."""
        names = [value.name or "" for value in self.model.graph.outputs]
        self.named(names)
        if self.output is not None:
            return self.output
        for value in self.model.graph.outputs:
            if value.dtype is None or value.dtype.is_floating_point():
                return value.name or ""
        raise UsageError(f"metric {self.name}: no output of {', '.join(names)} holds floats")


@dataclasses.dataclass(frozen=True)
class Classification:
    """``figure`` (a method of :class:`.quality.Confusion`) of the classes that ``output`` gives, against ``labels``."""

    figure: str
    output: str
    labels: str

    def __call__(self, run: Run, batches: Sequence[Feeds], /) -> float:
        """Over all samples of ``batches``."""
        counts = quality.Confusion()
        for feeds in batches:
            scores, labels = run(feeds)[self.output], feeds[self.labels]
            if scores.dtype.kind == "f" and (scores.ndim < 2 or scores.shape[-1] < 2):
                raise UsageError(
                    f"output {self.output!r} is {list(scores.shape)}: no choice among classes; name another output "
                    "(--metric-output), or write a function of your own"
                )
            predicted = quality.predicted_classes(scores)
            if predicted.shape != labels.shape:
                raise UsageError(
                    f"the labels {self.labels!r} have shape {list(labels.shape)}, but output {self.output!r} predicts "
                    f"{list(predicted.shape)}"
                )
            if scores.dtype.kind == "f" and labels.max(initial=-1) >= scores.shape[-1]:
                raise UsageError(
                    f"the labels {self.labels!r} hold {labels.max()}, but output {self.output!r} has the classes "
                    f"0..{scores.shape[-1] - 1}"
                )
            counts.add(predicted, labels)
        if not counts.actual.sum():
            raise UsageError(f"the labels {self.labels!r} hold nothing but values below 0")
        return float(getattr(counts, self.figure)())


@dataclasses.dataclass(frozen=True, eq=False)
class RecallAt:
    """Recall of ``k`` neighbours: of those in the original, ``expected`` [N, k], or of a sample of equal ``labels``."""

    k: int
    output: str
    expected: np.ndarray | None = None
    labels: str | None = None

    def __call__(self, run: Run, batches: Sequence[Feeds], /) -> float:
        """Over all samples of ``batches``, each against all others."""
        found = _neighbours(run, batches, self.output, self.k)
        if self.expected is not None:
            return quality.neighbour_recall(self.expected, found)
        groups = np.concatenate([feeds[self.labels or ""].reshape(-1) for feeds in batches])
        if len(groups) != len(found):
            raise UsageError(
                f"recall@{self.k} takes one label a sample: {len(groups)} for {len(found)} samples"
            )
        recall = quality.group_recall(found, groups)
        if math.isnan(recall):
            raise UsageError(
                f"no two samples have equal labels {self.labels!r}, so recall@{self.k} has no meaning"
            )
        return recall


def _neighbours(run: Run, batches: Sequence[Feeds], output: str, k: int) -> np.ndarray:
    embeddings = np.concatenate([_pooled(run(feeds)[output], feeds, output) for feeds in batches])
    if k >= len(embeddings):
        raise UsageError(f"recall@{k} needs more than {k} samples; the data has {len(embeddings)}")
    return quality.nearest(embeddings, k)


def _pooled(values: np.ndarray, feeds: Feeds, output: str) -> np.ndarray:
    """``values`` [B, D], or the mean over the positions of [B, S, D] that are no padding."""
    if values.dtype.kind != "f" or values.ndim not in (2, 3):
        raise UsageError(
            f"output {output!r} is {values.dtype}{list(values.shape)}; embeddings are floats [B, D] or [B, S, D]"
        )
    if values.ndim == 2:
        return values
    mask = feeds.get("attention_mask")
    if mask is None or mask.shape != values.shape[:2]:
        return np.asarray(values.mean(axis=1))
    kept = (mask != 0)[..., None]
    return np.asarray(np.where(kept, values, 0).sum(axis=1) / np.maximum(kept.sum(axis=1), 1))


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the next token, at the logits ``head``."""

    head: Head
    lower_is_better: bool = dataclasses.field(default=True, init=False)

    def __call__(self, run: Run, batches: Sequence[Feeds], /) -> float:
        """Over all tokens of ``batches`` that are no padding; infinite if an output is not finite."""
        loss, tokens = 0.0, 0
        for feeds in batches:
            outputs = [run(feeds)]
            for found in compare_predictions([self.head], outputs, outputs, [feeds]):
                if found.reference_perplexity is None:
                    continue
                loss += math.log(found.reference_perplexity) * found.tokens
                tokens += found.tokens
        if not tokens:
            raise UsageError("perplexity: the data has no sample of two tokens or more")
        return math.exp(loss / tokens) if loss / tokens < 700 else math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAgreement:
    """The share of rows with the most probable class ``expected`` (one array a batch, -1 at padding)."""

    head: Head
    expected: tuple[np.ndarray, ...]

    def __call__(self, run: Run, batches: Sequence[Feeds], /) -> float:
        """Over all rows of ``batches``, which are those of ``expected``."""
        agreeing = rows = 0
        for feeds, expected in zip(batches, self.expected, strict=True):
            predicted = _predicted(self.head, run(feeds), feeds)
            if predicted.shape != expected.shape:
                raise UsageError(
                    f"output {self.head.output!r} predicts {list(predicted.shape)}, the original {list(expected.shape)}"
                )
            agreeing += int(((predicted == expected) & (expected >= 0)).sum())
            rows += int((expected >= 0).sum())
        if not rows:
            raise UsageError(f"output {self.head.output!r}: nothing but padding or NaN to agree on")
        return agreeing / rows


def _predicted(head: Head, outputs: Feeds, feeds: Feeds) -> np.ndarray:
    scores = outputs[head.output]
    if scores.dtype.kind != "f" or scores.ndim < 2:
        raise UsageError(
            f"output {head.output!r} is {scores.dtype}{list(scores.shape)}: no rows of logits; name another output "
            "(--metric-output)"
        )
    predicted = quality.predicted_classes(scores)
    kept = kept_positions(head, feeds, (scores.shape[0], scores.shape[1])) if scores.ndim == 3 else None
    return predicted if kept is None else np.where(kept, predicted, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Cosine:
    """The mean over samples of the cosine to ``expected`` (one array a batch), the original's ``output``; ``counts``
    says how many samples a batch has."""

    output: str
    expected: tuple[np.ndarray, ...]
    counts: tuple[int, ...]

    def __call__(self, run: Run, batches: Sequence[Feeds], /) -> float:
        """Over all samples of ``batches``, which are those of ``expected``."""
        total, samples = 0.0, 0
        for feeds, expected, count in zip(batches, self.expected, self.counts, strict=True):
            found = compare([{self.output: expected}], [{self.output: run(feeds)[self.output]}])
            total, samples = total + found.cosine * count, samples + count
        return total / samples


def _recall_at(setup: _Setup) -> Measure:
    match = _RECALL_AT.fullmatch(setup.name)
    assert match is not None
    k, output = int(match["k"]), setup.float_output()
    if setup.labels is not None:
        return RecallAt(k, output, labels=setup.labels)
    return RecallAt(k, output, expected=_neighbours(setup.run, setup.batches, output, k))


def _perplexity(setup: _Setup) -> Measure:
    heads = find_heads(setup.model) if setup.output is None else (setup.head(),)
    for feeds in setup.batches:
        if (probe := make_probe(heads, feeds)) is not None:
            confirmed = confirm(heads, probe, setup.run(feeds), setup.run(probe.feeds))
            if causal := [head for head in confirmed if head.tokens is not None]:
                return Perplexity(causal[0])
            break
    raise UsageError(
        "perplexity has a meaning for causal language models only: no output here holds logits over tokens that "
        "do not depend on later ones"
    )


def _token_agreement(setup: _Setup) -> Measure:
    head = setup.head()
    return TokenAgreement(head, tuple(_predicted(head, setup.run(feeds), feeds) for feeds in setup.batches))


def _cosine(setup: _Setup) -> Measure:
    output = setup.float_output()
    expected = tuple(setup.run(feeds)[output] for feeds in setup.batches)
    return Cosine(output, expected, _counts(setup.model, setup.batches))


def _classification(figure: str) -> Callable[[_Setup], Measure]:
    return lambda setup: Classification(figure, setup.head().output, setup.needed_labels())


_BUILDERS: Mapping[str, Callable[[_Setup], Measure]] = {
    "accuracy": _classification("accuracy"),
    "recall": _classification("recall"),
    "f1": _classification("f1"),
    "recall@10": _recall_at,
    "perplexity": _perplexity,
    "token_agreement": _token_agreement,
    "cosine": _cosine,
}

BUILT_IN = tuple(_BUILDERS)
"""Names of the built-in metrics; the K of ``recall@K`` is free."""


def _builder(name: str) -> Callable[[_Setup], Measure] | None:
    return _recall_at if _RECALL_AT.fullmatch(name) else _BUILDERS.get(name)
