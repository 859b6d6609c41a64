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

__all__ = ["UNSEEN_SHARE", "widened", "with_unseen_tokens"]

UNSEEN_SHARE = 0.5
"""Of the batches, where a method is free to choose: other text loses a third less, like text hardly more."""

_REPLACED = 0.5
"""Of all tokens. Measured on layers of a sentence encoder: .2 of them, or all, help less on other text."""


def widened(samples: Samples, model: ir.Model, share: float, mask: str | None) -> Samples:
    """``samples`` of ``model`` with unseen tokens in ``share`` of their batches; as they are if it reads no tokens."""
    tokens = find_tokens(model) if share else None
    return samples if tokens is None else with_unseen_tokens(samples, tokens, share, mask)


def with_unseen_tokens(samples: Samples, tokens: TokenInput, share: float, mask: str | None) -> Samples:
    """``samples`` and, spread evenly among them, ``share`` of their batches with half of the tokens drawn anew.

    Tokens that are in every sample (marks of beginning and end) stay, and padding, where the input ``mask`` is 0.
    Equal data gives equal tokens. Ids beyond the table are left as they are.
    """
    count = min(len(samples), math.ceil(share * len(samples) - 1e-9))
    if not count:
        return samples
    marks = _in_all(samples, tokens.name)
    change = functools.partial(_changed, tokens=tokens, marks=marks, mask=mask)
    chosen = [index * len(samples) // count for index in range(count)]
    return Samples.together([samples, samples.chosen(chosen, change)])


def _in_all(samples: Samples, name: str) -> np.ndarray:
    """The tokens that every sample has."""
    common: np.ndarray | None = None
    for feeds in samples:
        for row in feeds[name]:
            common = np.unique(row) if common is None else np.intersect1d(common, row)
    return np.zeros(0, np.int64) if common is None else common


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
