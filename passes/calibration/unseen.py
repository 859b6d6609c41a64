"""Calibration data with tokens that it does not show.

What is fitted to the inputs of a layer leans on the directions that these have, and text of one kind has few words.
A part of the batches is run once more with half of their tokens drawn from the whole vocabulary. What these bring goes
through all layers in the company of real text, so it is shared by other kinds of text, whatever they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.data.samples import Samples
from sparse_onnx.passes.patterns.tokens import TokenInput, find_tokens

__all__ = ["UNSEEN_SHARE", "add_unseen_tokens", "with_unseen_tokens"]

UNSEEN_SHARE = 0.5
"""Of the batches, where a method is free to choose: other text loses a third less, like text hardly more."""

_REPLACED = 0.5
"""Of all tokens. Measured on layers of a sentence encoder: .2 of them, or all, help less on other text."""


def add_unseen_tokens(
    model: ir.Model, samples: Samples, share: float, mask: str | None, progress: Callable[[str], None]
) -> Samples:
    """What :func:`with_unseen_tokens` makes of the ``samples`` of ``model``, told; of a model that reads no tokens, or
    for a ``share`` of 0, the same ones."""
    tokens = find_tokens(model) if share else None
    if tokens is None:
        return samples
    more = with_unseen_tokens(samples, tokens, share, mask)
    if len(more) > len(samples):
        progress(
            f"calibration: {len(more) - len(samples)} of {len(samples)} batches once more, tokens of {tokens.name} "
            "drawn from the whole vocabulary among theirs"
        )
    return more


def with_unseen_tokens(samples: Samples, tokens: TokenInput, share: float, mask: str | None) -> Samples:
    """``samples`` and, spread evenly among them, ``share`` of their batches with half of the tokens drawn anew.

    Tokens that are in every sample (marks of beginning and end) stay, and padding, where the input ``mask`` is 0. Data
    that shows half of the vocabulary or more is taken as it is. Equal data gives equal tokens.
    """
    count = min(len(samples), math.ceil(share * len(samples) - 1e-9))
    if not count:
        return samples
    marks, seen = _survey(samples, tokens.name)
    if 2 * seen >= tokens.rows:
        return samples
    change = functools.partial(_changed, tokens=tokens, marks=marks, mask=mask)
    chosen = [index * len(samples) // count for index in range(count)]
    return Samples.together([samples, samples.chosen(chosen, change)])


def _survey(samples: Samples, name: str) -> tuple[np.ndarray, int]:
    """The tokens that every sample has, and how many different ones there are in all."""
    common: np.ndarray | None = None
    seen = np.zeros(0, np.int64)
    for feeds in samples:
        for row in feeds[name]:
            common = np.unique(row) if common is None else np.intersect1d(common, row)
        seen = np.union1d(seen, feeds[name])
    return seen[:0] if common is None else common, len(seen)


def _changed(
    batch: Callable[[], Feeds], number: int, *, tokens: TokenInput, marks: np.ndarray, mask: str | None
) -> Feeds:
    feeds: Mapping[str, np.ndarray] = batch()
    ids = feeds[tokens.name]
    draw = np.random.default_rng(number)
    change = (draw.random(ids.shape) < _REPLACED) & ~np.isin(ids, marks)
    padding = feeds.get(mask) if mask is not None else None
    if padding is not None and padding.shape == ids.shape:
        change &= padding != 0
    drawn = draw.integers(0, tokens.rows, ids.shape).astype(ids.dtype)
    return {**feeds, tokens.name: np.where(change, drawn, ids)}
