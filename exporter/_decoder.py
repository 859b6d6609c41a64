"""A causal language model of transformers as a function of tensors alone: the cache of keys and values as inputs and
outputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_onnx.exporter._extras import require

__all__ = ["Decoder", "decoder"]

_TOKENS = {0: "batch", 1: "sequence"}
_CACHE = {0: "batch", 2: "past_sequence"}
_SIZES = ((2, 8, 5), (1, 11, 0), (3, 1, 9))
"""Batch, tokens, and tokens in the cache: all above 1 for tracing, then a prefill and a step of decoding."""


@dataclass(frozen=True)
class Decoder:
    """``module(**case)`` gives logits [batch, sequence, V] and, with a cache, its keys and values [batch, heads,
    past + sequence, size] layer by layer. ``cases`` are inputs of several sizes; the cache is a list in them."""

    module: Any
    cases: tuple[Mapping[str, Any], ...]
    dynamic_shapes: Mapping[str, Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


def decoder(model: Any, *, past: bool) -> Decoder:
    """``model``, a ``...ForCausalLM``, with its cache (``past``) or without."""
    parameters = inspect.signature(model.forward).parameters
    positions = "position_ids" in parameters
    sizes = _cache_sizes(model) if past else []
    cases = [_case(model.config, sizes, positions, *(size if past else (*size[:2], 0))) for size in _SIZES]
    shapes: dict[str, Any] = {"input_ids": _TOKENS, "attention_mask": {0: "batch", 1: "sequence"}}
    if positions:
        shapes["position_ids"] = _TOKENS
    if past:
        shapes["attention_mask"] = {0: "batch", 1: "total_sequence"}
        shapes["past"] = [_CACHE for _ in range(2 * len(sizes))]
    parts = [f"{index}.{part}" for index in range(len(sizes)) for part in ("key", "value")]
    return Decoder(
        _of_tensors(model, "cache" if "cache" in parameters else "past_key_values"),
        tuple(cases),
        shapes,
        (*(name for name in shapes if name != "past"), *(f"past_key_values.{part}" for part in parts)),
        ("logits", *(f"present.{part}" for part in parts)),
    )


def _cache_sizes(model: Any) -> list[tuple[int, int, int]]:
    """Heads, size of a key and size of a value in the cache of every layer."""
    torch = require("torch")
    tokens = torch.zeros((1, 2), dtype=torch.int64)
    with torch.no_grad():
        cache = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True
        ).past_key_values
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]


def _case(
    config: Any, sizes: list[tuple[int, int, int]], positions: bool, batch: int, length: int, past: int
) -> dict[str, Any]:
    """Seeded inputs without padding."""
    torch = require("torch")
    generator = torch.Generator().manual_seed(length)
    case: dict[str, Any] = {
        "input_ids": torch.randint(config.vocab_size, (batch, length), generator=generator),
        "attention_mask": torch.ones((batch, past + length), dtype=torch.int64),
    }
    if positions:
        case["position_ids"] = torch.arange(past, past + length).repeat(batch, 1)
    if sizes:
        case["past"] = [
            torch.randn((batch, heads, past, size), generator=generator)
            for heads, *both in sizes
            for size in both
        ]
    return case


def _of_tensors(model: Any, cache_name: str) -> Any:
    """``model`` with a forward of tensors: of its own class, so that its parts keep their names."""
    cache_type = require("transformers").DynamicCache
    kind = type(model)

    def forward(
        self: Any, input_ids: Any, attention_mask: Any, position_ids: Any = None, past: Any = None
    ) -> tuple[Any, ...]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": past is not None}
        if position_ids is not None:
            given["position_ids"] = position_ids
        if past is None:
            return (kind.forward(self, **given).logits,)
        cache = cache_type(list(zip(past[::2], past[1::2], strict=True)))
        logits = kind.forward(self, **given, **{cache_name: cache}).logits
        return (logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))

    changed = copy.copy(model)
    changed.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return changed
