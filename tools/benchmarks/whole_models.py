"""Sections ``bert`` and ``convs``: whole models against other engines."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sparse_onnx
from sparse_onnx.data import inputs
from sparse_onnx.model import model_io
from sparse_onnx.sparse_ops import library_path
from sparse_onnx.timing.rounds import ratio
from sparse_onnx.tools.benchmarks.engines import EngineSpec, Measurement, compare
from sparse_onnx.tools.benchmarks.section import Settings, Table, band, count, percent

__all__ = ["bert", "convs"]

_OURS = "sparse-onnx"
_COLUMNS = (
    "zeros",
    "threads",
    "engine",
    "min ms",
    "median ms",
    "times ours",
    "interval",
    "load s",
    "resident MB",
    "file MB",
)
_NOTES = (
    "times ours: the engine's time / that of sparse-onnx in the same round, median; above 1 sparse-onnx is faster",
    "resident: of the whole process after the first runs",
)


@dataclass(frozen=True)
class _Files:
    """The files of one model, below ``folder``; what is missing is made. ``module`` makes the dense torch module;
    ``prune`` and the rest are functions of its maker."""

    folder: Path
    module: Callable[[], Any]
    prune: Callable[[Any, float], Any]
    save: Callable[[Any, Path], None]
    save_legacy: Callable[[Any, Path], None]
    say: Callable[[str], None]

    @cached_property
    def _dense(self) -> Any:
        return self.module()

    def model(self, sparsity: float, *, legacy: bool = False) -> Path:
        """The file of the dense model (``sparsity`` 0) or of a pruned one."""
        folder = self.folder.with_name(f"{self.folder.name}_legacy") if legacy else self.folder
        save = self.save_legacy if legacy else self.save
        return self._made(
            folder / (f"s{100 * sparsity:.0f}" if sparsity else "dense"),
            lambda path: save(self.prune(self._dense, sparsity), path),
        )

    def int8(self) -> Path:
        """The dense model with weights quantized to int8, per channel, and dynamically quantized activations."""

        def quantize(path: Path) -> None:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # The legacy export: onnx's shape inference, which this begins with, refuses the newer one.
            source = self.model(0, legacy=True)
            quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8)

        return self._made(self.folder / "int8", quantize)

    def _made(self, folder: Path, make: Callable[[Path], None]) -> Path:
        if not (folder / "model.onnx").is_file():
            self.say(f"making {folder}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when complete, so that an interrupted run leaves no half a model behind.
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unfinished = Path(scratch) / "model"
                unfinished.mkdir()
                make(unfinished / "model.onnx")
                unfinished.rename(folder)
        return folder / "model.onnx"


def bert(settings: Settings) -> Iterator[Table]:
    """BERT-base, batch 1, 128 tokens."""
    from sparse_onnx.tools.benchmarks import make_bert as maker

    folder = settings.models / "bert"
    files = _Files(folder, maker.build, maker.prune, maker.save, maker.save_legacy, settings.say)
    levels = (0.9,) if settings.quick else (0.5, 0.7, 0.8, 0.9, 0.95)
    yield from _compare(settings, files, "BERT-base, 128 tokens", levels, batch=1, length=128, int8=True)


def convs(settings: Settings) -> Iterator[Table]:
    """ResNet-50 and MobileNetV2, batch 1 and 8, 224 x 224."""
    from sparse_onnx.tools.benchmarks import make_resnet as maker

    levels = (0.9,) if settings.quick else (0.8, 0.9, 0.95)
    for network in maker.NETWORKS:
        files = _Files(
            settings.models / network,
            lambda network=network: maker.build(network),  # type: ignore[misc]
            maker.prune,
            maker.save,
            maker.save_legacy,
            settings.say,
        )
        for batch in (1,) if settings.quick else (1, 8):
            yield from _compare(settings, files, network, levels, batch=batch, length=224)


def _compare(
    settings: Settings,
    files: _Files,
    name: str,
    levels: Sequence[float],
    *,
    batch: int,
    length: int,
    int8: bool = False,
) -> Iterator[Table]:
    """One table for all ``levels``, and one of our scaling from one thread count to the next."""
    rows: list[tuple[str | float | None, ...]] = []
    scaling: list[tuple[str | float | None, ...]] = []
    notes = list(_NOTES)
    for level in levels:
        with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as scratch:
            specs = []
            for threads in settings.threads:
                settings.say(f"{name}, batch {batch}: optimizing {percent(level)} for {count(threads)}")
                optimized, note = _optimize(files.model(level), Path(scratch), threads, batch, length)
                notes.append(f"{percent(level)}, {count(threads)}: {note}")
                specs += _engines(settings, files, optimized, level, threads, int8, batch)
            settings.say(f"{name}, batch {batch}, {percent(level)} zeros: timing {len(specs)} engines")
            measured = compare(specs, batch=batch, length=length, rounds=3 if settings.quick else 21)
            for threads in settings.threads:
                ours, *others = [one for one in measured if one.spec.threads == threads]
                rows += [_row(level, one, ours) for one in (ours, *others)]
        first, *more = [one for one in measured if one.spec.name == _OURS]
        for other in more:
            if first.ms and other.ms:
                gain = ratio(first.ms, other.ms)
                steps = f"{first.spec.threads} to {other.spec.threads}"
                scaling.append((percent(level), steps, gain.median, band(gain)))
        notes += [f"{one.spec.name} failed: {one.problem}" for one in measured if one.problem]
    title = f"{name}, batch {batch}"
    yield Table(title, _COLUMNS, tuple(rows), tuple(notes))
    if scaling:
        columns = ("zeros", "threads", "times faster", "interval")
        yield Table(f"{title}: sparse-onnx with more threads", columns, tuple(scaling))


def _optimize(source: Path, scratch: Path, threads: int, batch: int, length: int) -> tuple[Path, str]:
    """The optimized model's file, and how many of its layers are sparse."""
    specs = inputs.input_specs(model_io.load_model(source))
    shapes = {
        spec.name: tuple(
            dim if isinstance(dim, int) else batch if axis == 0 else length
            for axis, dim in enumerate(spec.shape or ())
        )
        for spec in specs
    }
    folder = scratch / f"threads{threads}"
    result = sparse_onnx.optimize(source, folder, input_shapes=shapes, threads=threads)
    layers = result.report["layers"]
    sparse = sum(layer["decision"] == "sparse" for layer in layers)
    return folder / "model.onnx", f"{sparse} of {len(layers)} layers are sparse"


def _engines(
    settings: Settings, files: _Files, optimized: Path, level: float, threads: int, int8: bool, batch: int
) -> list[EngineSpec]:
    """Ours first. DeepSparse's models are exported with one input at a time, so it has no larger batches."""
    own, ort = Path(sys.executable), "onnxruntime"
    specs = [
        EngineSpec(_OURS, ort, own, optimized, threads, library_path()),
        EngineSpec("ONNX Runtime, dense", ort, own, files.model(0), threads),
    ]
    if int8:
        specs.append(EngineSpec("ONNX Runtime, int8 dynamic", ort, own, files.int8(), threads))
    if settings.deepsparse is not None and batch == 1:
        pruned = files.model(level, legacy=True)
        specs.append(EngineSpec("DeepSparse", "deepsparse", settings.deepsparse, pruned, threads))
    if settings.openvino is not None:
        specs.append(EngineSpec("OpenVINO, dense", "openvino", settings.openvino, files.model(0), threads))
    return specs


def _row(level: float, one: Measurement, ours: Measurement) -> tuple[str | float | None, ...]:
    head = (percent(level), one.spec.threads, one.spec.name)
    size = sum(path.stat().st_size for path in one.spec.model.parent.glob("model.onnx*")) / 1e6
    if not one.ms or one.load_s is None or one.rss_bytes is None:
        return (*head, None, None, None, "failed", None, None, size)
    against = ratio(one.ms, ours.ms) if ours.ms else None
    return (
        *head,
        min(one.ms),
        ratio(one.ms, one.ms).first_ms,
        against.median if against else None,
        band(against) if against else None,
        one.load_s,
        one.rss_bytes / 1e6,
        size,
    )
