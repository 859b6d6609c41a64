"""What two models predict: how far the distributions lie apart that their outputs stand for, and perplexity.

An output holds *logits* if its last axis is a choice among classes: its name says so, or it is [B, S, V] with as many
classes as there are tokens. The outputs of encoders, whose last axis is a vector, are no logits. Perplexity has a
meaning for causal language models only, so models are asked: if another last token changes what is predicted before
it, the model is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds, InputSpec, input_specs
from sparse_onnx.document import PredictionRow, finite

__all__ = [
    "Head",
    "Prediction",
    "Probe",
    "compare_predictions",
    "confirm",
    "find_heads",
    "kept_positions",
    "make_probe",
    "named_head",
    "unread",
]

_PIECE = 1 << 20  # logits that are looked at together: bounds the scratch
_UNCHANGED = 1e-5
"""Of the largest logit: far above the noise of one runtime at one shape, far below what attention to a token does."""


@dataclasses.dataclass(frozen=True)
class Head:
    """An ``output`` that holds logits. Where it is [B, S, V], ``tokens`` is the integer input [B, S] of which position
    s + 1 may be what it predicts at s, and ``mask`` the input [B, S] that is 0 at padding."""

    output: str
    tokens: str | None = None
    mask: str | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How a candidate's predictions differ from the reference's at one ``output``, over all batches.

    rows: distributions compared: one for each index of all axes but the last, padding left out.
    kl_divergence: mean of KL(reference ‖ candidate) over rows, in nats; infinite if one of them is not finite.
    top1_agreement: share of rows with the same most probable class.
    reference_perplexity, candidate_perplexity: exp of the mean negative log-likelihood of the next token; None where
        the model is no causal language model, or the inputs are no real text.
    tokens: next tokens that the perplexities are over.
    """

    output: str
    rows: int
    kl_divergence: float
    top1_agreement: float
    reference_perplexity: float | None = None
    candidate_perplexity: float | None = None
    tokens: int = 0

    def to_dict(self) -> PredictionRow:
        """For JSON, which has no Inf and NaN: None there."""
        return {
            "output": self.output,
            "rows": self.rows,
            "kl_divergence": finite(self.kl_divergence),
            "top1_agreement": finite(self.top1_agreement),
            "reference_perplexity": finite(self.reference_perplexity),
            "candidate_perplexity": finite(self.candidate_perplexity),
            "tokens": self.tokens,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """``feeds`` with another token of input ``tokens`` at (``row``, ``position``)."""

    feeds: Feeds
    tokens: str
    row: int
    position: int


def find_heads(model: ir.Model) -> tuple[Head, ...]:
    """The outputs of ``model`` that hold logits, in its order; see the module's docstring for the rule."""
    tokens = _token_input(input_specs(model))
    names = {value.name for value in model.graph.inputs}
    heads = []
    for value in model.graph.outputs:
        name = value.name or ""
        if (
            value.dtype is None
            or not value.dtype.is_floating_point()
            or isinstance(value.type, ir.SequenceType)
        ):
            continue
        rank = None if value.shape is None else len(value.shape)
        classes = value.shape[-1] if value.shape else None
        if (rank is not None and rank < 2) or (isinstance(classes, int) and classes < 2):
            continue
        vocabulary = rank == 3 and tokens is not None and tokens.rows is not None and classes == tokens.rows
        if "logits" not in name.lower() and not vocabulary:
            continue
        heads.append(_head(value, tokens, names))
    return tuple(heads)


def named_head(model: ir.Model, output: str) -> Head:
    """The ``output`` of ``model`` that the user says to hold logits, whatever its name; KeyError if there is none."""
    values = {value.name: value for value in model.graph.outputs}
    names = {value.name for value in model.graph.inputs}
    return _head(values[output], _token_input(input_specs(model)), names)


def _head(value: ir.Value, tokens: InputSpec | None, names: set[str | None]) -> Head:
    """``value``, an output with logits, with the token input and its mask where there are any."""
    name, rank = value.name or "", None if value.shape is None else len(value.shape)
    if tokens is None or rank not in (None, 3):
        return Head(name)
    mask = f"{tokens.name.removesuffix('input_ids')}attention_mask" if _is_ids(tokens) else "attention_mask"
    return Head(name, tokens.name, mask if mask in names else None)


def _is_ids(spec: InputSpec) -> bool:
    return spec.name.endswith("input_ids")


def _token_input(specs: Sequence[InputSpec]) -> InputSpec | None:
    """The integer input [B, S] with the tokens that the outputs belong to: those of the decoder if there is one."""
    known = {
        spec.name: spec
        for spec in specs
        if spec.dtype.kind in "iu" and spec.shape is not None and len(spec.shape) == 2
    }
    for name in ("decoder_input_ids", "input_ids"):
        if name in known:
            return known[name]
    looked_up = [
        spec
        for name, spec in known.items()
        if spec.rows is not None and not any(word in name.lower() for word in ("mask", "position", "type"))
    ]
    return looked_up[0] if len(looked_up) == 1 else None


def make_probe(heads: Sequence[Head], feeds: Feeds) -> Probe | None:
    """``feeds`` with another last token in one sample, or None if there is nothing to ask: no head with tokens, or no
    sample with two of them. Padding does not count as a token."""
    for head in heads:
        if head.tokens is None or head.tokens not in feeds:
            continue
        ids = feeds[head.tokens]
        kept = kept_positions(head, feeds, (ids.shape[0], ids.shape[1]))
        if kept is None or not ids.size:
            continue
        row = int(kept.sum(axis=1).argmax())
        places = np.flatnonzero(kept[row])
        if len(places) < 2:
            continue
        position = int(places[-1])
        changed = ids.copy()
        changed[row, position] = ids[row, position] - 1 if ids[row, position] > 0 else 1
        return Probe({**feeds, head.tokens: changed}, head.tokens, row, position)
    return None


def confirm(heads: Sequence[Head], probe: Probe | None, before: Feeds, after: Feeds) -> tuple[Head, ...]:
    """``heads`` with ``tokens`` where the model is causal: what it predicts before the token that ``probe`` changed is
    the same in its outputs ``after`` as in those ``before``."""
    return tuple(
        head if probe is not None and _is_causal(head, probe, before, after) else unread(head)
        for head in heads
    )


def unread(head: Head) -> Head:
    """``head`` without perplexity."""
    return dataclasses.replace(head, tokens=None)


def _is_causal(head: Head, probe: Probe, before: Feeds, after: Feeds) -> bool:
    if head.tokens != probe.tokens:
        return False
    first, second = before[head.output], after[head.output]
    ids = probe.feeds[probe.tokens]
    if first.ndim != 3 or first.shape != second.shape or first.shape[:2] != ids.shape:
        return False
    kept = kept_positions(head, probe.feeds, (ids.shape[0], ids.shape[1]))
    if kept is None:
        return False
    earlier = np.flatnonzero(kept[probe.row, : probe.position])
    a, b = (np.asarray(x[probe.row][earlier], np.float64) for x in (first, second))
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return False
    scale = np.abs(a[finite]).max(initial=0)
    return bool(np.abs(a[finite] - b[finite]).max(initial=0) <= _UNCHANGED * scale)


def compare_predictions(
    heads: Sequence[Head], reference: Sequence[Feeds], candidate: Sequence[Feeds], inputs: Sequence[Feeds]
) -> tuple[Prediction, ...]:
    """One result for each head whose outputs are float [.., V] of rank 2 or more and V at least 2.

    ``reference`` and ``candidate`` are the outputs of two models on the batches ``inputs``, of equal shapes. For
    every head with ``tokens`` the perplexities of both are taken, too.
    """
    results = []
    for head in heads:
        arrays = [outputs[head.output] for outputs in (*reference, *candidate)]
        if any(x.dtype.kind != "f" or x.ndim < 2 or x.shape[-1] < 2 for x in arrays):
            continue
        sums = np.zeros(6)
        for a, b, feeds in zip(reference, candidate, inputs, strict=True):
            for piece in _pieces(head, a[head.output], b[head.output], feeds):
                sums += _sums(*piece)
        rows, divergence, agreeing, tokens, first, second = sums.tolist()
        if rows:
            results.append(
                Prediction(
                    head.output,
                    int(rows),
                    _or_infinite(max(divergence, 0.0) / rows),
                    agreeing / rows,
                    _perplexity(first, tokens),
                    _perplexity(second, tokens),
                    int(tokens),
                )
            )
    return tuple(results)


def kept_positions(head: Head, feeds: Feeds, shape: tuple[int, int]) -> np.ndarray | None:
    """Where ``feeds`` holds no padding, bool [B, S] = ``shape``; None if the mask does not fit. Behind a cache the mask
    covers the tokens in it, too: the last columns are those of the tokens given."""
    if head.mask is None or head.mask not in feeds:
        return np.ones(shape, np.bool_)
    mask = feeds[head.mask]
    if mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        return None
    return np.asarray(mask[:, mask.shape[1] - shape[1] :] != 0)


def _pieces(
    head: Head, reference: np.ndarray, candidate: np.ndarray, feeds: Feeds
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Logits of both [rows, V], and the class that follows [rows], -1 where none is known; few rows at a time."""
    classes = reference.shape[-1]
    kept = np.ones(reference.shape[:-1], np.bool_)
    follows = np.full(reference.shape[:-1], -1)
    if reference.ndim == 3:
        shape = (reference.shape[0], reference.shape[1])
        found = kept_positions(head, feeds, shape)
        ids = feeds.get(head.tokens) if head.tokens is not None else None
        if found is not None:
            kept = found
            if ids is not None and ids.shape == shape:
                known = kept[:, :-1] & kept[:, 1:] & (ids[:, 1:] >= 0) & (ids[:, 1:] < classes)
                follows[:, :-1] = np.where(known, ids[:, 1:], -1)
    first, second = reference.reshape(-1, classes), candidate.reshape(-1, classes)
    places, targets = np.flatnonzero(kept), follows.reshape(-1)
    step = max(1, _PIECE // classes)
    for start in range(0, len(places), step):
        rows = places[start : start + step]
        yield first[rows], second[rows], targets[rows]


def _sums(reference: np.ndarray, candidate: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """Rows, their KL divergences, equal first choices, known next tokens, and the losses of both at these."""
    p, q = _log_softmax(reference), _log_softmax(candidate)
    with np.errstate(invalid="ignore"):
        terms = np.exp(p) * (p - q)
    terms[np.isneginf(p)] = 0  # what the reference never predicts adds nothing
    known = np.flatnonzero(follows >= 0)
    chosen = follows[known]
    return np.array(
        [
            len(p),
            terms.sum(),
            np.count_nonzero(reference.argmax(-1) == candidate.argmax(-1)),
            len(known),
            -p[known, chosen].sum(),
            -q[known, chosen].sum(),
        ]
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis; NaN for a row with NaN or +Inf, or with nothing but -Inf."""
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        values -= values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))


def _perplexity(loss: float, tokens: float) -> float | None:
    if not tokens:
        return None
    mean = loss / tokens
    return math.exp(mean) if mean < 700 else math.inf


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
