"""How much of a sentence encoder survives one-shot pruning: methods against each other on held-out passages.

    python -m sparse_onnx.tools.benchmarks.pruned_encoder [--method auto ...] [--sparsity 0.5 0.7 0.8 2:4] [--json FILE]
        [--calibrate topics ...] [--judge topics quotations glosses]

The pretrained encoder of :mod:`.sentence_encoder` (36 linears), calibrated on the first 192 shuffled passages of the
help topics of Python; embeddings (mean over tokens, normalised) of passages 400 to 655 against the dense model's:
1 - mean cosine, its 5th percentile, and recall@10, the overlap of the ten nearest other passages. A method may be
followed by options: ``alps,calibration=asymmetric,bias_correction=true``. ``--calibrate`` and ``--judge`` take other
kinds of text: the 192 passages are shared evenly among those to calibrate on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sparse_onnx.data.inputs import input_specs
from sparse_onnx.data.samples import Samples
from sparse_onnx.exporter import export_huggingface
from sparse_onnx.passes.base import CalibrationData, Pass, PassContext, Pipeline
from sparse_onnx.passes.presets import CLEAN_PASSES
from sparse_onnx.passes.registry import pass_by_name
from sparse_onnx.tools.benchmarks.embedding_quality import embeddings, quality
from sparse_onnx.tools.benchmarks.sentence_encoder import encoder_folder, tokens
from sparse_onnx.tools.benchmarks.texts import KINDS, passages
from sparse_onnx.tools.console import table

__all__ = ["pass_from"]

_CALIBRATION, _HELD = 192, slice(400, 656)
_BATCH = 4


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
    parser.add_argument("--calibrate", nargs="+", choices=KINDS, default=["topics"])
    parser.add_argument("--judge", nargs="+", choices=KINDS, default=["topics"])
    parser.add_argument("--held", type=int, nargs=2, default=[_HELD.start, _HELD.stop])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    exported = export_huggingface(encoder_folder()).model
    Pipeline(CLEAN_PASSES)(exported)
    names = {spec.name for spec in input_specs(exported)}
    share = _CALIBRATION // len(arguments.calibrate)
    given = [text for kind in arguments.calibrate for text in passages(kind)[:share]]
    samples = Samples.of(_batches(given, names), "passages")
    held = {kind: _batches(passages(kind)[slice(*arguments.held)], names) for kind in arguments.judge}
    dense = {kind: embeddings(exported, feeds, arguments.threads) for kind, feeds in held.items()}
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    rows = [["method", "zeros", "judged on", "1 - cosine", "5th percentile", "recall@10", "seconds"]]
    for method in arguments.method:
        for sparsity in arguments.sparsity:
            model = exported.clone()
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as work:
                context = PassContext(calibration=CalibrationData(samples, Path(work)))
                Pipeline((pass_from(method, sparsity, ignore=("re:.*pooler.*",)),))(model, context)
            seconds = time.perf_counter() - start
            for kind, feeds in held.items():
                found = quality(dense[kind], embeddings(model, feeds, arguments.threads))
                of_method = results.setdefault(method, {}).setdefault(sparsity, {})
                of_method[kind] = {**dataclasses.asdict(found), "seconds": seconds}
                cells = [f"{value:.4f}" for value in dataclasses.astuple(found)]
                rows.append([method, sparsity, kind, *cells, f"{seconds:.0f}"])
                print(table(rows[-1:], rows[0]), flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1))
    print(table(rows[1:], rows[0]))


if __name__ == "__main__":
    main()
