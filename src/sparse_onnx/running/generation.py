"""Tokens of a decoder with a cache, one after the other, always the likeliest: for a first look and for its speed.

A session is fed with what a step needs: the new tokens, a mask of ones, positions, lengths, and as the cache what the
step before gave back. Sampling, beams and batches are onnxruntime-genai's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import InputSpec, cache_axis, counted, input_specs
from sparse_onnx.errors import UsageError
from sparse_onnx.running.input_choice import choose_inputs

__all__ = ["Generated", "Generator"]


@dataclasses.dataclass(frozen=True)
class Generated:
    """``tokens`` behind the prompt, and the milliseconds of the run that gave each: the first is that of the prompt."""

    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]


class Generator:
    """Greedy generation with ``session``, an ONNX Runtime session of ``model``.

    Raises UsageError for a model that is no decoder with a cache, or has inputs that nothing is known of.
    """

    def __init__(self, model: ir.Model, session: Any) -> None:
        self._session = session
        self._specs = input_specs(model)
        self._ids = next((spec for spec in self._specs if spec.name == "input_ids"), None)
        outputs = [value.name or "" for value in model.graph.outputs]
        caches = {spec.name: axis for spec in self._specs if (axis := cache_axis(spec)) is not None}
        if self._ids is None or not caches or "logits" not in outputs:
            raise UsageError(
                "the model is no decoder with a cache: it needs input_ids, past_key_values.0.key and so on, and logits"
            )
        self._made = {name: _made_as(name, outputs) for name in caches}
        shapes = choose_inputs(model, self._specs, {"input_ids": (1, 2)}).shapes
        self._empty = {
            spec.name: np.zeros(_cut(shapes[spec.name], caches[spec.name]), spec.dtype)
            for spec in self._specs
            if spec.name in caches
        }
        self._axes = caches
        self._wanted = ["logits", *self._made.values()]

    def __call__(self, prompt: Sequence[int], new: int, stop: Collection[int] = ()) -> Generated:
        """At most ``new`` tokens behind ``prompt``; the last is one of ``stop`` if that came first."""
        if not prompt:
            raise UsageError("a prompt has one token or more")
        tokens, times = [], []
        for token, spent in self._steps(prompt):
            tokens.append(token)
            times.append(spent)
            if len(tokens) >= new or token in stop:
                break
        return Generated(tuple(tokens), tuple(times))

    def _steps(self, prompt: Sequence[int]) -> Iterator[tuple[int, float]]:
        cache, fed = self._empty, list(prompt)
        while True:
            feeds = {**self._feeds(fed, cache), **cache}
            start = time.perf_counter()
            found = self._session.run(self._wanted, feeds)
            spent = 1000 * (time.perf_counter() - start)
            logits, *made = found
            cache = dict(zip(self._made, made, strict=True))
            fed = [int(logits[0, -1].argmax())]
            yield fed[0], spent

    def _feeds(self, tokens: Sequence[int], cache: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        past = max(array.shape[self._axes[name]] for name, array in cache.items())
        return {
            spec.name: _value(spec, tokens, past).astype(spec.dtype)
            for spec in self._specs
            if spec.name not in cache
        }


def _value(spec: InputSpec, tokens: Sequence[int], past: int) -> np.ndarray:
    """What an input is where ``tokens`` come behind ``past`` others."""
    name, new, rank = spec.name.lower(), len(tokens), len(spec.shape or ())
    if name == "input_ids":
        return np.array([tokens])
    if "mask" in name and rank == 2:
        return np.ones((1, past + new))
    if (length := counted(name, past, new)) is not None and rank < 2:
        return np.full((1,) * rank, length)
    if "position" in name and rank in (1, 2):
        positions = past + np.arange(new)
        return positions[None] if rank == 2 else positions
    if "use_cache" in name:
        return np.full((1,) * rank, past > 0)
    given = spec.array((1,) * rank)
    if given is None:
        raise UsageError(f"generation knows nothing of the input {spec.describe()}: use onnxruntime-genai")
    return given


def _made_as(name: str, outputs: Collection[str]) -> str:
    """The output that is the input ``name`` of the next step."""
    for past in ("past_key_values", "past"):
        if (found := name.replace(past, "present")) in outputs:
            return found
    raise UsageError(f"the cache {name} has no output present..., so nothing can be generated")


def _cut(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """``shape`` with nothing along ``axis``."""
    return tuple(0 if index == axis else size for index, size in enumerate(shape))
