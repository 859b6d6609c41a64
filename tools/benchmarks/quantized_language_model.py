"""What few bits and zeros do to a pretrained language model: perplexity on text that it was not calibrated on.

    python -m sparse_onnx.tools.benchmarks.quantized_language_model MODEL.onnx --tokenizer FOLDER [--rows ROW ...]
        [--calibrate topics] [--judge topics reference quotations] [--blocks 32] [--length 256] [--held 8]
        [--held-length 512] [--json FILE]

MODEL.onnx is a decoder as `sparse-onnx export FOLDER --task text-generation-with-past` (or `text-generation`) writes
it, FOLDER the Hugging Face folder that it was made of. All linears but the head change. The text is that of
:mod:`.texts`: a kind's passages in a fixed order, cut into blocks of tokens; the first ``--blocks`` calibrate, the last
``--held`` judge, so they never share a token.

A ROW is ZEROS/WEIGHTS. ZEROS is a share or N:M for ``prune.auto``, or METHOD@ZEROS for another method of pruning with
its options; WEIGHTS is a method of ``quant.weight`` with its options, or ``dynamic`` or ``static`` for those passes.
Either may be empty: ``/auto,bits=4,group_size=128``, ``sparsegpt,calibration=sequential@0.5/``, ``0.5/auto,bits=4``.
``sparsegpt-joint,bits=4@0.5/`` finds zeros and integers in one sweep, as SparseGPT does. Weights are judged as floats,
on the points of their grids with float16 scales.

For every row and kind of text: perplexity, the increase of its logarithm against the dense model, in nats, with the
standard error over the blocks, and the seconds that it took. With ``--json`` a run goes on where an earlier one
stopped: rows that the file has are not run again.
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

from sparse_onnx.data.inputs import Feeds, InputSpec, input_specs
from sparse_onnx.data.samples import Samples
from sparse_onnx.data.text import complete
from sparse_onnx.model import model_io
from sparse_onnx.passes.base import CalibrationData, Pass, PassContext, Pipeline
from sparse_onnx.passes.calibration import Options
from sparse_onnx.passes.presets import CLEAN_PASSES
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.tools.benchmarks.pruned_language_model import cross_entropy
from sparse_onnx.tools.benchmarks.rows import passes_from
from sparse_onnx.tools.benchmarks.texts import KINDS, passages
from sparse_onnx.tools.console import table

__all__ = ["ROWS", "Trial", "blocks_of", "feeds_of"]

_PASSAGES = 1000
_BATCH = 2

_GRIDS = (
    "bits=4,group_size=128,symmetric=false",
    "bits=3,group_size=64,symmetric=false",
    "bits=8,group_size=0",
    "bits=4,group_size=64,symmetric=false",
    "bits=4,group_size=0,symmetric=false",
    "bits=3,group_size=128,symmetric=false",
)
_FIRST = _GRIDS[0]

ROWS = (
    *(f"/{method},{grid}" for grid in _GRIDS for method in ("auto", "gptq", "hqq", "rtn")),
    "/dynamic",
    "0.3/",
    "0.5/",
    "2:4/",
    "sparsegpt,calibration=sequential@0.5/",
    f"0.5/auto,{_FIRST}",
    f"sparsegpt-joint,calibration=sequential,{_FIRST}@0.5/",
    f"magnitude@0.5/rtn,{_FIRST}",
)
"""What is tried where nothing is asked for."""


def blocks_of(tokens: np.ndarray, length: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last blocks of ``length`` of ``tokens``: [first, length] and [last, length].

    SystemExit where these would overlap.
    """
    count = len(tokens) // length
    if count < first + last:
        raise SystemExit(f"{len(tokens)} tokens are {count} blocks of {length}, not {first} + {last}")
    blocks = tokens[: count * length].reshape(count, length)
    return blocks[:first], blocks[count - last :]


def feeds_of(blocks: np.ndarray, specs: Sequence[InputSpec]) -> list[Feeds]:
    """Batches of what a model with the inputs ``specs`` reads of ``blocks`` [n, S] of tokens; caches are empty."""
    found = []
    for start in range(0, len(blocks), _BATCH):
        ids = blocks[start : start + _BATCH].astype(np.int64)
        given: dict[str, np.ndarray] = {"input_ids": ids}
        if any(spec.name == "attention_mask" for spec in specs):
            given["attention_mask"] = np.ones_like(ids)
        found.append(complete(given, specs, "the benchmark"))
    return found


@dataclasses.dataclass(frozen=True)
class Trial:
    """The dense ``model``, ``samples`` to calibrate on, and for every kind of text the batches ``held`` to judge by."""

    model: ir.Model
    samples: Samples
    held: Mapping[str, Sequence[Feeds]]
    threads: int

    def after(self, passes: Sequence[Pass], work: Path) -> ir.Model:
        """A copy of the model behind ``passes``, which aim at the model itself."""
        model = self.model.clone()
        calibration = CalibrationData(self.samples, work, Options(threads=self.threads))
        Pipeline(tuple(passes))(model, PassContext(calibration=calibration, dense=self.model))
        return model

    def losses(self, model: ir.Model, work: Path) -> dict[str, np.ndarray]:
        """Mean cross entropy, in nats, of the tokens of each block but its first: float64 [blocks] by kind of text."""
        found = {}
        with open_runner(model, Workbench(self.threads, work), library=False) as runner:
            for kind, batches in self.held.items():
                parts = []
                for feeds in batches:
                    logits = runner.run(feeds)[runner.outputs[0]]
                    parts.append(cross_entropy(logits[:, :-1], feeds["input_ids"][:, 1:]).mean(axis=-1))
                found[kind] = np.concatenate(parts)
        return found


def _tokens(folder: Path, kind: str) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return np.array(tokenizer(" ".join(passages(kind)[:_PASSAGES]))["input_ids"])


def _trial(arguments: argparse.Namespace) -> Trial:
    model = model_io.load_model(arguments.model)
    Pipeline(CLEAN_PASSES)(model)
    specs = input_specs(model)
    text = {
        kind: _tokens(arguments.tokenizer, kind)
        for kind in dict.fromkeys((*arguments.calibrate, *arguments.judge))
    }
    # Blocks to judge by come from the end, those to calibrate on from the front of what is left.
    held = {
        kind: blocks_of(text[kind], arguments.held_length, 0, arguments.held)[1] for kind in arguments.judge
    }
    share = -(-arguments.blocks // len(arguments.calibrate))
    kept = arguments.held * arguments.held_length
    given = [
        blocks_of(text[kind][: len(text[kind]) - kept], arguments.length, share, 0)[0]
        for kind in arguments.calibrate
    ]
    return Trial(
        model,
        Samples.of(feeds_of(np.concatenate(given), specs), "blocks of text"),
        {kind: feeds_of(blocks, specs) for kind, blocks in held.items()},
        arguments.threads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--calibrate", nargs="+", choices=KINDS, default=["topics"])
    parser.add_argument("--judge", nargs="+", choices=KINDS, default=["topics", "reference", "quotations"])
    parser.add_argument("--blocks", type=int, default=32, help="to calibrate on, of all kinds together")
    parser.add_argument("--length", type=int, default=256, help="of these, in tokens")
    parser.add_argument("--held", type=int, default=8, help="blocks to judge by, of each kind")
    parser.add_argument("--held-length", type=int, default=512, help="of these, in tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = {
        "dense": (),
        **{text: passes_from(text, storage="float", scale_type="float16") for text in arguments.rows},
    }
    trial = _trial(arguments)
    results: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))
    header = ["", "judged on", "perplexity", "nats above dense", "seconds"]
    told: list[list[str]] = []
    for name, passes in rows.items():
        if name not in results:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                model = trial.after(passes, Path(folder))
                seconds = time.perf_counter() - start
                losses = trial.losses(model, Path(folder))
            results[name] = {"seconds": seconds, "losses": {kind: [*loss] for kind, loss in losses.items()}}
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
        lines = _told(name, results)
        told += lines
        print(table(lines, header), flush=True)
    print(table(told, header))


def _told(name: str, results: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for kind, found in results[name]["losses"].items():
        loss = np.array(found)
        more = loss - np.array(results["dense"]["losses"][kind])
        error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else float("nan")
        lines.append(
            [
                name,
                kind,
                f"{np.exp(loss.mean()):.3f}",
                f"{more.mean():.4f} ±{error:.4f}",
                f"{results[name]['seconds']:.0f}",
            ]
        )
    return lines


if __name__ == "__main__":
    main()
