"""A small language model of Python's own sources, trained here in minutes: a model with text to judge pruning by.

:func:`language_model` gives the folder of a decoder with 3.2 million weights in its 28 linears (4 pre-norm layers of
width 256 with RMSNorm and SwiGLU, no biases) over windows of 128 pieces of text. It is trained on the sources of the
standard library that runs it, with 5 % of the files held out. The order of batches is fixed; how many there are is a
matter of the minutes: of processor time on one thread, so that a busy machine trains the same model, only later.
"""

from __future__ import annotations

import collections
import functools
import heapq
import itertools
import json
import math
import random
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_onnx.exporter import export_torch
from sparse_onnx.model import model_io

__all__ = ["CONTEXT", "language_model", "merges", "pieces"]

WIDTH, INNER, HEADS, LAYERS, CONTEXT = 256, 704, 4, 4, 128
VOCABULARY = 2048
BATCH, LEARNING_RATE, WARM_UP = 8, 3e-3, 0.05
HELD_OUT = 0.05
_LEARNED_FROM = 3_000_000
"""Characters from which the vocabulary is learned."""
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Folders of code that is not the library's, and of tables."""
_WORD = re.compile(r" ?[A-Za-z]+|\n *| ?[^\sA-Za-z\d]+|\d|\s+?")

Merge = tuple[int, int]


class Layer(nn.Module):  # type: ignore[misc]
    """A pre-norm transformer layer with causal attention and a gated feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.inner_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value, self.output = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.attention_norm(x)
        query, key, value = (
            linear(read).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).flatten(-2))
        read = self.inner_norm(x)
        return x + self.down(nn.functional.silu(self.gate(read)) * self.up(read))


class LanguageModel(nn.Module):  # type: ignore[misc]
    """Tokens [B, CONTEXT] int64 to logits [B, CONTEXT, VOCABULARY] of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * LAYERS) if into_residual else 1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def language_model(folder: Path, minutes: float = 12) -> Path:
    """``folder`` with ``model.onnx``, ``train.npy`` and ``held_out.npy`` (windows [n, CONTEXT + 1], uint16) and
    ``training.json``; made if the model is not there."""
    path = folder / "model.onnx"
    if path.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = windows()
    np.save(folder / "train.npy", train)
    np.save(folder / "held_out.npy", held_out)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LanguageModel()
    log = [*fit(model, train, held_out, 60 * minutes)]
    (folder / "training.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
    tokens = torch.from_numpy(train[:2, :-1].astype(np.int64))
    exported = export_torch(
        model.eval(), (tokens,), output_names=["logits"], dynamic_shapes={"input_ids": {0: "batch"}}
    )
    model_io.save_model(exported.model, folder)
    return folder


def windows() -> tuple[np.ndarray, np.ndarray]:
    """Text to train on and text held out, each [windows, CONTEXT + 1] uint16; a window begins with the token that the
    one before ends with."""
    texts = list(_sources())
    random.Random(0).shuffle(texts)
    held = round(HELD_OUT * len(texts))
    order = merges("".join(texts[held:])[:_LEARNED_FROM], VOCABULARY - 256)
    rank = {pair: index for index, pair in enumerate(order)}
    return _windows(texts[held:], rank), _windows(texts[:held], rank)


def _sources() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(root).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _windows(texts: Iterable[str], rank: Mapping[Merge, int]) -> np.ndarray:
    split = functools.cache(lambda word: pieces(word, rank))
    stream = np.array([p for text in texts for word in _WORD.findall(text) for p in split(word)], np.uint16)
    starts = np.arange(0, len(stream) - CONTEXT, CONTEXT)
    return np.stack([stream[start : start + CONTEXT + 1] for start in starts])


def merges(text: str, count: int) -> list[Merge]:
    """Byte-pair encoding (Sennrich et al. 2016): the most frequent pair of neighbours inside a word becomes the token
    256, then 257 and so on, ``count`` times; tokens below 256 are bytes."""
    words = [(list(word.encode()), n) for word, n in sorted(collections.Counter(_WORD.findall(text)).items())]
    frequency: collections.Counter[Merge] = collections.Counter()
    places: dict[Merge, set[int]] = collections.defaultdict(set)
    for index, (tokens, n) in enumerate(words):
        for pair in itertools.pairwise(tokens):
            frequency[pair] += n
            places[pair].add(index)
    queue = [(-n, pair) for pair, n in frequency.items()]
    heapq.heapify(queue)
    found: list[Merge] = []
    while len(found) < count and queue:
        negative, best = heapq.heappop(queue)
        if -negative != frequency[best]:
            continue  # an entry from before the frequency changed
        changed: set[Merge] = set()
        for index in places.pop(best):
            tokens, n = words[index]
            for sign, merged in ((-1, tokens), (1, _merged(tokens, best, 256 + len(found)))):
                for pair in itertools.pairwise(merged):
                    frequency[pair] += sign * n
                    changed.add(pair)
                    if sign > 0:
                        places[pair].add(index)
            tokens[:] = merged
        found.append(best)
        for pair in changed:
            if frequency[pair] > 0:
                heapq.heappush(queue, (-frequency[pair], pair))
    return found


def pieces(word: str, rank: Mapping[Merge, int]) -> tuple[int, ...]:
    """The tokens of a word: merged in the order in which the merges were learned."""
    tokens = list(word.encode())
    while pairs := {pair for pair in itertools.pairwise(tokens) if pair in rank}:
        best = min(pairs, key=rank.__getitem__)
        tokens = _merged(tokens, best, 256 + rank[best])
    return tuple(tokens)


def _merged(tokens: Sequence[int], pair: Merge, new: int) -> list[int]:
    merged: list[int] = []
    position = 0
    while position < len(tokens):
        if tuple(tokens[position : position + 2]) == pair:
            merged.append(new)
            position += 2
        else:
            merged.append(tokens[position])
            position += 1
    return merged


def fit(
    model: LanguageModel, train: np.ndarray, held_out: np.ndarray, seconds: float
) -> Iterator[dict[str, Any]]:
    """Train for ``seconds`` of processor time; one record of losses (nats a token) every 200 steps and at the end."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers")]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and name.startswith("layers"))]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    generator = np.random.default_rng(0)
    batches = (rows for _ in itertools.count() for rows in _epoch(generator, len(train)))
    start = time.process_time()
    losses: list[float] = []
    for step, rows in enumerate(batches):
        share = (time.process_time() - start) / seconds
        if losses and (share >= 1 or step % 200 == 0):
            record = {
                "step": step,
                "seconds": share * seconds,
                "train": float(np.mean(losses)),
                "held_out": float(_loss(model, held_out[:64]).item()),
            }
            print(json.dumps(record), flush=True)
            yield record
            losses = []
        if share >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _rate(share)
        loss = _loss(model, train[rows], grad=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())


def _rate(share: float) -> float:
    """The factor of the learning rate after a ``share`` of the time: up in a line, then down in a cosine to 2 %."""
    if share < WARM_UP:
        return max(share / WARM_UP, 0.01)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _epoch(generator: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    order = generator.permutation(count)
    return (order[start : start + BATCH] for start in range(0, count - BATCH + 1, BATCH))


def _loss(model: LanguageModel, rows: np.ndarray, *, grad: bool = False) -> torch.Tensor:
    tokens = torch.from_numpy(rows.astype(np.int64))
    with torch.set_grad_enabled(grad):
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
