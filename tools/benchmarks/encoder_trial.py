"""What trials on the sentence encoder share: the model, passages to calibrate on, and others to judge by."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import input_specs
from sparse_onnx.data.samples import Samples
from sparse_onnx.exporter import export_huggingface
from sparse_onnx.passes.base import CalibrationData, Pass, PassContext, Pipeline
from sparse_onnx.passes.presets import CLEAN_PASSES
from sparse_onnx.tools.benchmarks.embedding_quality import Quality, embeddings, quality
from sparse_onnx.tools.benchmarks.sentence_encoder import encoder_folder, tokens
from sparse_onnx.tools.benchmarks.texts import KINDS, passages

__all__ = ["HEADER", "EncoderTrial", "add_trial_options"]

HEADER = ("judged on", "1 - cosine", "5th percentile", "recall@10", "seconds")

_CALIBRATION, _HELD = 192, slice(400, 656)
_BATCH = 4


def add_trial_options(parser: argparse.ArgumentParser, judge: Sequence[str]) -> None:
    """The options that :meth:`EncoderTrial.of` reads."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibrate", nargs="+", choices=KINDS, default=["topics"])
    parser.add_argument("--passages", type=int, default=_CALIBRATION)
    parser.add_argument("--judge", nargs="+", choices=KINDS, default=[*judge])
    parser.add_argument("--held", type=int, nargs=2, default=[_HELD.start, _HELD.stop])
    parser.add_argument("--json", type=Path)


@dataclasses.dataclass(frozen=True)
class EncoderTrial:
    """The dense ``model``, ``samples`` to calibrate on, and for every kind of text the batches ``held`` to judge by,
    with the ``dense`` model's embeddings of them."""

    model: ir.Model
    samples: Samples
    held: Mapping[str, Sequence[dict[str, np.ndarray]]]
    dense: Mapping[str, np.ndarray]
    threads: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> EncoderTrial:
        model = export_huggingface(encoder_folder()).model
        Pipeline(CLEAN_PASSES)(model)
        names = {spec.name for spec in input_specs(model)}
        share = arguments.passages // len(arguments.calibrate)
        given = [text for kind in arguments.calibrate for text in passages(kind)[:share]]
        held = {kind: _batches(passages(kind)[slice(*arguments.held)], names) for kind in arguments.judge}
        return cls(
            model,
            Samples.of(_batches(given, names), "passages"),
            held,
            {kind: embeddings(model, feeds, arguments.threads) for kind, feeds in held.items()},
            arguments.threads,
        )

    def after(self, passes: Sequence[Pass]) -> tuple[ir.Model, float]:
        """A copy of the model behind ``passes``, which aim at the model itself, and the seconds that they took."""
        model, start = self.model.clone(), time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            calibration = CalibrationData(self.samples, Path(work))
            Pipeline(tuple(passes))(model, PassContext(calibration=calibration, dense=self.model))
        return model, time.perf_counter() - start

    def judged(self, model: ir.Model) -> dict[str, Quality]:
        """The quality of ``model``'s embeddings on every kind of text."""
        return {
            kind: quality(self.dense[kind], embeddings(model, feeds, self.threads))
            for kind, feeds in self.held.items()
        }


def _batches(texts: Sequence[str], names: set[str]) -> list[dict[str, np.ndarray]]:
    batches = []
    for start in range(0, len(texts), _BATCH):
        feeds = {k: v for k, v in tokens(list(texts[start : start + _BATCH])).items() if k in names}
        batches.append(feeds)
    return batches
