"""How well a language model still predicts after one-shot pruning: perplexity on files that it was not trained on.

    python -m sparse_onnx.tools.benchmarks.pruned_language_model FOLDER [--train-minutes 12] [--method auto ...]
        [--sparsity 0.5 0.6 0.7] [--windows 512] [--json FILE]

The model is :mod:`.small_language_model`, trained into FOLDER if it is not there, in 12 minutes on one free core. All
28 linears of its layers are pruned, calibrated on windows of 128 tokens drawn from its training text; embeddings and
head stay. A method may be followed by options of its pass: ``alps,calibration=asymmetric``, ``wanda,allocation=owl``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.data.samples import Samples
from sparse_onnx.model import model_io
from sparse_onnx.passes.base import CalibrationData, PassContext, Pipeline
from sparse_onnx.passes.calibration import Options
from sparse_onnx.passes.presets import CLEAN_PASSES
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.tools.benchmarks.rows import pruning_from
from sparse_onnx.tools.console import table

__all__ = ["calibration_samples", "cross_entropy", "perplexity_ratio", "window_losses"]

_BATCH = 16


def cross_entropy(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log of the probability of ``tokens`` [...] under ``logits`` [..., vocabulary]: float64 [...], in nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    taken = np.take_along_axis(shifted, tokens[..., None].astype(np.int64), axis=-1)[..., 0]
    return np.asarray(np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64)) - taken)


def window_losses(model: ir.Model, windows: np.ndarray, threads: int) -> np.ndarray:
    """Mean cross entropy of each window's tokens, but the first, given those before it: float64 [windows], in nats.

    ``windows`` [windows, S + 1] holds tokens; ``model`` takes ``input_ids`` [B, S] and gives logits first.
    """
    losses = []
    with (
        tempfile.TemporaryDirectory() as work,
        open_runner(model, Workbench(threads, Path(work)), library=False) as runner,
    ):
        for feeds, following in _batches(windows):
            losses.append(cross_entropy(runner.run(feeds)[runner.outputs[0]], following).mean(axis=-1))
    return np.concatenate(losses)


def perplexity_ratio(losses: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """exp of the mean difference of two models' losses on the same windows, and its standard error: of the ratio of
    their perplexities. Windows differ far more among each other than two models on one of them."""
    difference = losses - reference
    ratio = float(np.exp(difference.mean()))
    return ratio, ratio * float(difference.std(ddof=1)) / len(difference) ** 0.5


def calibration_samples(windows: np.ndarray, count: int, seed: int = 0) -> Samples:
    """``count`` of the ``windows``, drawn without replacement."""
    drawn = np.random.default_rng(seed).permutation(len(windows))[:count]
    return Samples.of([feeds for feeds, _ in _batches(windows[drawn])], "training text")


def _batches(windows: np.ndarray) -> Iterator[tuple[Feeds, np.ndarray]]:
    """What the model reads, and the tokens that follow."""
    for start in range(0, len(windows), _BATCH):
        part = windows[start : start + _BATCH].astype(np.int64)
        yield {"input_ids": part[:, :-1]}, part[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train-minutes", type=float, default=12, help="of one core")
    parser.add_argument("--method", nargs="+", default=["magnitude", "wanda", "sparsegpt", "alps", "auto"])
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "0.6", "0.7"])
    parser.add_argument("--windows", type=int, default=512, help="windows to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from sparse_onnx.tools.benchmarks.small_language_model import language_model  # torch is only for training

    folder = language_model(arguments.folder, arguments.train_minutes)
    trained = model_io.load_model(folder / "model.onnx")
    Pipeline(CLEAN_PASSES)(trained)
    samples = calibration_samples(np.load(folder / "train.npy"), arguments.windows)
    held_out = np.load(folder / "held_out.npy")
    dense = window_losses(trained, held_out, arguments.threads)
    results: dict[str, Any] = {"dense": float(np.exp(dense.mean()))}
    rows = [
        ["method", "zeros", "perplexity", "of dense", "seconds"],
        ["dense", "", f"{results['dense']:.3f}", "1", ""],
    ]
    for method in arguments.method:
        for sparsity in arguments.sparsity:
            model = trained.clone()
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as work:
                data = CalibrationData(samples, Path(work), Options(threads=arguments.threads))
                Pipeline((pruning_from(method, sparsity),))(model, PassContext(calibration=data))
            seconds = time.perf_counter() - start
            losses = window_losses(model, held_out, arguments.threads)
            found = float(np.exp(losses.mean()))
            ratio, error = perplexity_ratio(losses, dense)
            results.setdefault(method, {})[sparsity] = {
                "perplexity": found,
                "ratio": ratio,
                "standard_error": error,
                "seconds": seconds,
            }
            rows.append([method, sparsity, f"{found:.3f}", f"{ratio:.4f} ±{error:.4f}", f"{seconds:.0f}"])
            print("  ".join(rows[-1]), flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(rows[1:], rows[0]))


if __name__ == "__main__":
    main()
