"""How much of a sentence encoder survives weights of few bits, alone and with zeros, beside ONNX Runtime's quantizers.

    python -m sparse_onnx.tools.benchmarks.quantized_encoder [--ours /auto,bits=4,group_size=32 0.5/auto,bits=8 ...]
        [--peers ...] [--calibrate topics ...] [--judge topics quotations glosses] [--passages 192] [--json FILE]

Set-up and columns are those of :mod:`.pruned_encoder`, on three kinds of text. One of ``--ours`` is ZEROS/WEIGHTS:
a share of zeros or N:M for ``prune.auto``, and a method of ``quant.weight`` with its options; either may be empty.
Only the 36 linears change; tables of embeddings stay as they are. ``--peers`` are ONNX Runtime's own: its dynamic and
static int8 round activations, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.model import model_io
from sparse_onnx.passes.base import Pass
from sparse_onnx.tools.benchmarks.encoder_trial import HEADER, EncoderTrial, add_trial_options
from sparse_onnx.tools.benchmarks.rows import passes_from
from sparse_onnx.tools.console import table

__all__ = ["PEERS"]

_IGNORED = ("re:.*pooler.*",)

_OURS = (
    "/rtn,bits=4,group_size=32,symmetric=false",
    "/hqq,bits=4,group_size=32,symmetric=false",
    "/gptq,bits=4,group_size=32,symmetric=false",
    "/auto,bits=8,group_size=0",
    "/auto,bits=4,group_size=32,symmetric=false",
    "/auto,bits=4,group_size=128,symmetric=false",
    "/auto,bits=3,group_size=64,symmetric=false",
    "0.5/",
    "0.5/auto,bits=8,group_size=0",
    "0.5/auto,bits=4,group_size=128,symmetric=false",
    "8:16/auto,bits=4,group_size=128,symmetric=false",
)

Peer = Callable[[Path, Path, Sequence[Mapping[str, np.ndarray]]], None]
"""Writes to its second argument what it makes of the model file that the first one is, by these batches."""


def _dynamic(source: Path, result: Path, _batches: Sequence[Mapping[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    linears = ["MatMul", "Gemm"]
    quantize_dynamic(
        source, result, op_types_to_quantize=linears, per_channel=True, weight_type=QuantType.QUInt8
    )


def _static(source: Path, result: Path, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self._left, None)

    quantize_static(source, result, Reader(), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)


def _nbits(block_size: int, symmetric: bool, hqq: bool = False) -> Peer:
    def quantize(source: Path, result: Path, _batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = nbits.HQQWeightOnlyQuantConfig(block_size=block_size, bits=4) if hqq else None
        quantizer = nbits.MatMulNBitsQuantizer(
            str(source), 4, block_size, symmetric, accuracy_level=1, algo_config=config
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(result))

    return quantize


PEERS: Mapping[str, Peer] = {
    "dynamic int8": _dynamic,
    "static int8": _static,
    "RTN 4 bits g32": _nbits(32, symmetric=True),
    "RTN 4 bits g32 asymmetric": _nbits(32, symmetric=False),
    "HQQ 4 bits g32": _nbits(32, symmetric=False, hqq=True),
    "RTN 4 bits g128 asymmetric": _nbits(128, symmetric=False),
}
"""ONNX Runtime's quantizers, in floats where only weights are quantized."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", nargs="*", default=_OURS)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=tuple(PEERS))
    add_trial_options(parser, judge=("topics", "quotations", "glosses"))
    arguments = parser.parse_args()
    ours = {text: passes_from(text, _IGNORED) for text in arguments.ours}
    trial = EncoderTrial.of(arguments)
    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    header = ["", *HEADER]
    for name, model, seconds in _all(trial, ours, arguments.peers):
        for kind, found in trial.judged(model).items():
            results.setdefault(name, {})[kind] = {**dataclasses.asdict(found), "seconds": seconds}
            cells = [f"{value:.4f}" for value in dataclasses.astuple(found)]
            rows.append([name, kind, *cells, f"{seconds:.0f}"])
            print(table(rows[-1:], header), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1))
    print(table(rows, header))


def _all(
    trial: EncoderTrial, ours: Mapping[str, Sequence[Pass]], peers: Sequence[str]
) -> Iterator[tuple[str, ir.Model, float]]:
    """Name, model and seconds of everything that is to be judged."""
    with tempfile.TemporaryDirectory() as work:
        if peers:
            source = model_io.save_model(trial.model, Path(work) / "dense")
        for index, name in enumerate(peers):
            result, start = Path(work) / f"peer{index}.onnx", time.perf_counter()
            PEERS[name](source, result, [*trial.samples])
            seconds = time.perf_counter() - start
            yield f"ONNX Runtime: {name}", model_io.load_model(result), seconds
    for text, passes in ours.items():
        yield text, *trial.after(passes)


if __name__ == "__main__":
    main()
