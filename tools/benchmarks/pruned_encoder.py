"""How much of a sentence encoder survives one-shot pruning: methods against each other on held-out passages.

    python -m sparse_onnx.tools.benchmarks.pruned_encoder [--method auto ...] [--sparsity 0.5 0.7 0.8 2:4] [--json FILE]

The pretrained encoder of :mod:`.sentence_encoder` (36 linears), calibrated on the first 192 shuffled passages of the
help topics of Python; embeddings (mean over tokens, normalised) of passages 400 to 655 against the dense model's:
1 - mean cosine, its 5th percentile, and recall@10, the overlap of the ten nearest other passages. A method may be
followed by options: ``alps,calibration=asymmetric,bias_correction=true``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import yaml

from sparse_onnx.data.inputs import input_specs
from sparse_onnx.data.samples import Samples
from sparse_onnx.exporter import export_huggingface
from sparse_onnx.passes.base import CalibrationData, Pass, PassContext, Pipeline
from sparse_onnx.passes.clean.cleanup import CLEAN_PASSES
from sparse_onnx.passes.registry import pass_by_name
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.tools.benchmarks.sentence_encoder import encoder_folder, passages, tokens
from sparse_onnx.tools.console import table

__all__ = ["Quality", "embeddings", "pass_from", "quality"]

_CALIBRATION, _HELD = slice(0, 192), slice(400, 656)
_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Quality:
    """``one_minus_cosine`` and ``cosine_p5`` over passages, ``recall10`` in [0, 1]."""

    one_minus_cosine: float
    cosine_p5: float
    recall10: float


def quality(dense: np.ndarray, pruned: np.ndarray) -> Quality:
    """Of embeddings [passages, d], both normalised."""
    cosine = (dense * pruned).sum(axis=1)
    near = [_nearest(embedded) for embedded in (dense, pruned)]
    recall = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(*near, strict=True)])
    return Quality(float(1 - cosine.mean()), float(np.quantile(cosine, 0.05)), float(recall))


def _nearest(embedded: np.ndarray, count: int = 10) -> np.ndarray:
    similarity = embedded @ embedded.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def embeddings(model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], threads: int) -> np.ndarray:
    """Mean over the tokens that are no padding of the first output, normalised: [passages, d], float64."""
    parts = []
    with (
        tempfile.TemporaryDirectory() as work,
        open_runner(model, Workbench(threads, Path(work)), library=False) as runner,
    ):
        for batch in feeds:
            hidden = next(iter(runner.run(dict(batch)).values())).astype(np.float64)
            mask = batch["attention_mask"][:, :, None]
            parts.append((hidden * mask).sum(axis=1) / mask.sum(axis=1))
    embedded = np.concatenate(parts)
    return np.asarray(embedded / np.linalg.norm(embedded, axis=1, keepdims=True))


def _batches(texts: Sequence[str], names: set[str]) -> list[dict[str, np.ndarray]]:
    batches = []
    for start in range(0, len(texts), _BATCH):
        feeds = {k: v for k, v in tokens(list(texts[start : start + _BATCH])).items() if k in names}
        batches.append(feeds)
    return batches


def pass_from(text: str, sparsity: str, **options: Any) -> Pass:
    """The pass of a method with options, as the command line has them; ``options`` come on top."""
    method, *given = text.split(",")
    for part in given:
        options |= yaml.safe_load(part.replace("=", ": ", 1))
    options |= {"mask_structure": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)}
    return pass_by_name(f"prune.{method}")(**options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", default=["magnitude", "wanda", "sparsegpt", "alps", "auto"])
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "0.7", "0.8", "2:4"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held", type=int, nargs=2, default=[_HELD.start, _HELD.stop])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    exported = export_huggingface(encoder_folder()).model
    Pipeline(CLEAN_PASSES)(exported)
    names = {spec.name for spec in input_specs(exported)}
    texts = passages()
    samples = Samples.of(_batches(texts[_CALIBRATION], names), "passages")
    held = _batches(texts[slice(*arguments.held)], names)
    dense = embeddings(exported, held, arguments.threads)
    results: dict[str, dict[str, dict[str, float]]] = {}
    rows = [["method", "zeros", "1 - cosine", "5th percentile", "recall@10", "seconds"]]
    for method in arguments.method:
        for sparsity in arguments.sparsity:
            model = exported.clone()
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as work:
                context = PassContext(calibration=CalibrationData(samples, Path(work)))
                Pipeline((pass_from(method, sparsity, ignore=("re:.*pooler.*",)),))(model, context)
            seconds = time.perf_counter() - start
            found = quality(dense, embeddings(model, held, arguments.threads))
            results.setdefault(method, {})[sparsity] = {**dataclasses.asdict(found), "seconds": seconds}
            cells = [f"{value:.4f}" for value in dataclasses.astuple(found)]
            rows.append([method, sparsity, *cells, f"{seconds:.0f}"])
            print(table(rows[-1:], rows[0]), flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1))
    print(table(rows[1:], rows[0]))


if __name__ == "__main__":
    main()
