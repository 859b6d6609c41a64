"""Train the demo's model: ``python -m sparse_onnx.tools.demo_model.train FOLDER``.

One transformer learns to highlight Python, dense. From there two copies go on for the same number of steps on
the same batches: one stays dense, one is pruned by magnitude on the cubic schedule of Zhu and Gupta ("To
prune, or not to prune", 2017) and then tuned with its zeros fixed. FOLDER gets ``model.onnx.xz`` (the pruned
one), ``held_out.npz`` (windows of modules that training never saw) and ``results.json`` (accuracy of both).

The shipped files were made with ``--threads 1``, in 33 minutes on a busy machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from sparse_onnx.exporter import export_torch
from sparse_onnx.tools.demo_model.highlighting import CLASSES, WINDOW, windows

__all__ = ["Highlighter", "main"]

HIDDEN, INNER, HEADS, LAYERS, NEIGHBOURS = 256, 2048, 4, 2, 8
BATCH = 16
DENSE_STEPS, PRUNED_STEPS = 1000, 1000
LEARNING_RATE = 2e-3
SPARSITY = 0.9
MASK_EVERY = 10
HELD_OUT_WINDOWS = 1024


class Layer(nn.Module):  # type: ignore[misc]
    """A pre-norm transformer layer; its linear layers hold nearly all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(HIDDEN)
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.output = nn.Linear(HIDDEN, HIDDEN)
        self.feed_forward_norm = nn.LayerNorm(HIDDEN)
        self.expand = nn.Linear(HIDDEN, INNER)
        self.contract = nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, HIDDEN // HEADS)).transpose(1, 2) for part in parts)
        scores = (query @ key.transpose(-1, -2)) * (HIDDEN // HEADS) ** -0.5
        x = x + self.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))
        return x + self.contract(torch.relu(self.expand(self.feed_forward_norm(x))))


class Highlighter(nn.Module):  # type: ignore[misc]
    """Bytes [batch, WINDOW] int64 to scores [batch, WINDOW, classes].

    A position starts from the embeddings of the NEIGHBOURS bytes around it, side by side: that spares the
    attention the work of putting names and keywords together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, HIDDEN // NEIGHBOURS)
        self.position = nn.Parameter(0.02 * torch.randn(WINDOW, HIDDEN))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.classes = nn.Linear(HIDDEN, len(CLASSES))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        half = NEIGHBOURS // 2
        padded = nn.functional.pad(self.embedding(text), (0, 0, half, half - 1))
        x = torch.cat([padded[:, i : i + WINDOW] for i in range(NEIGHBOURS)], -1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.classes(self.norm(x))


def prunable(model: nn.Module) -> list[torch.Tensor]:
    """The weights of the linear layers inside the transformer."""
    return [m.weight for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]


def smallest_kept(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """A mask that drops the ``sparsity`` share of smallest magnitudes."""
    count = round(sparsity * weight.numel())
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[weight.detach().abs().flatten().topk(count, largest=False).indices] = False
    return mask.view_as(weight)


def schedule(step: int) -> float:
    """Sparsity at ``step``: cubic from 0 to SPARSITY over the first 60 % of the pruned phase."""
    progress = min(1.0, step / (0.6 * PRUNED_STEPS))
    return SPARSITY * (1 - (1 - progress) ** 3)


def batches(text: np.ndarray, classes: np.ndarray, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = np.random.default_rng(seed)
    while True:
        rows = generator.integers(len(text), size=BATCH)
        yield torch.from_numpy(text[rows]).long(), torch.from_numpy(classes[rows]).long()


def train(
    model: nn.Module,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    rate: Callable[[float], float],
    prune: bool = False,
) -> None:
    """AdamW; ``rate`` maps progress 0..1 to a factor of the learning rate; ``prune`` follows the schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    weights = prunable(model) if prune else []
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step / steps)
        text, classes = next(data)
        loss = nn.functional.cross_entropy(model(text).flatten(0, 1), classes.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if prune and step % MASK_EVERY == 0:
            masks = [smallest_kept(weight, schedule(step)) for weight in weights]
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                weight.mul_(mask)
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


def accuracy(model: nn.Module, text: np.ndarray, classes: np.ndarray) -> float:
    """Share of bytes whose class is right."""
    with torch.no_grad():
        parts = [model(torch.from_numpy(part).long()).argmax(-1) for part in np.array_split(text, 16)]
    return float((torch.cat(parts).numpy() == classes).mean())


def main() -> None:
    """Train, measure both models, and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    start = time.monotonic()

    text, classes = windows(held_out=False)
    test_text, test_classes = windows(held_out=True)
    rows = np.sort(np.random.default_rng(0).permutation(len(test_text))[:HELD_OUT_WINDOWS])
    test_text, test_classes = test_text[rows], test_classes[rows]

    dense = Highlighter()
    train(dense, batches(text, classes, 1), DENSE_STEPS, lambda progress: min(1.0, 20 * progress))
    pruned = copy.deepcopy(dense)

    def decay(progress: float) -> float:
        return min(1.0, 20 * progress, 2 * (1 - progress))

    train(dense, batches(text, classes, 2), PRUNED_STEPS, decay)
    train(pruned, batches(text, classes, 2), PRUNED_STEPS, decay, prune=True)
    seconds = time.monotonic() - start

    weights = torch.cat([weight.flatten() for weight in prunable(pruned)])
    results: dict[str, Any] = {
        "task": "class of every byte of Python source",
        "dense_accuracy": accuracy(dense, test_text, test_classes),
        "pruned_accuracy": accuracy(pruned, test_text, test_classes),
        "most_frequent_class": float(np.bincount(test_classes.ravel()).max() / test_classes.size),
        "sparsity": float((weights == 0).float().mean()),
        "prunable_weights": weights.numel(),
        "training_bytes": (DENSE_STEPS + PRUNED_STEPS) * BATCH * WINDOW,
        "held_out_bytes": int(test_text.size),
        "training_seconds": round(seconds),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(results, indent=2))

    arguments.folder.mkdir(parents=True, exist_ok=True)
    example = torch.from_numpy(test_text[:2]).long()
    exported = export_torch(
        pruned,
        (example,),
        input_names=["text"],
        output_names=["scores"],
        dynamic_shapes={"text": {0: "batch"}},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(exported.model, path)
        packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    (arguments.folder / "model.onnx.xz").write_bytes(packed)
    np.savez_compressed(arguments.folder / "held_out.npz", text=test_text, classes=test_classes)
    (arguments.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
