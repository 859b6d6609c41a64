"""``sparse-onnx analyze``: what zeros and few bits would be worth in a model, before anything is changed."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.compilation.groups import FLOAT32, INT4, INT8, Calibration, Goal, Prune, Quantize, Target
from sparse_onnx.options import require
from sparse_onnx.tools.console import format_option, other_work, progress, quiet_option, show, table
from sparse_onnx.tools.options import option, options
from sparse_onnx.units import format_bytes, format_ms, format_share

if TYPE_CHECKING:
    from sparse_onnx.analysis.analyze import Analysis
    from sparse_onnx.analysis.forecast import LayerForecast

__all__ = ["command", "summary"]

_BITS = {FLOAT32: (), INT8: (8,), INT4: (4,)}

_LAYERS, _REASONS, _WIDTH = 5, 2, 28


@click.command(short_help="Predict speed, size and error before anything is changed.")
@click.argument("model", type=click.Path(path_type=Path))
@option(Prune, "sparsity", "Share of zeros that the answer is for, in [0, 1).  [default: 0.7]")
@option(Prune, "mask_structure", "Its pattern: N:M, or block:RxC.", default="unstructured")
@option(
    Target,
    "precision",
    "Look at weights of 8 bits (int8), of 4 (int4), or of none (float32).  [default: both]",
)
@option(Quantize, "group_size")
@option(Prune, "targets")
@option(Prune, "ignore", "Layers to leave alone: as --targets; repeatable.")
@option(
    Calibration,
    "data",
    "Real inputs, for the error: an .npz, a folder of .npz, module:function, or text (with --tokenizer).",
)
@option(Calibration, "tokenizer")
@option(Calibration, "num_calibration_samples", default=64)
@option(Calibration, "batch_size", "Samples run together.", default=4)
@option(Target, "shapes", "NAME:DIM,DIM,.. to time for; repeatable.", kind="shape")
@options(Target, "input_values", "fixed_inputs")
@option(Target, "threads", "Threads to time for.  [default: all cores]")
@option(Goal, "min_speedup", default=1.02)
@click.option(
    "--anchors/--no-anchors",
    default=True,
    help="Time whole models as well, or layers only: faster, but rough.  [default: whole models]",
)
@click.option(
    "--save-table",
    type=click.Path(path_type=Path),
    help="Write the timings to this file, for `optimize --no-benchmark --timing-table` on another machine.",
)
@option(Calibration, "seed", "Of generated inputs.", default=0)
@format_option
@quiet_option
def command(
    model: Path,
    sparsity: float | None,
    mask_structure: str,
    precision: str | None,
    targets: tuple[str, ...] | None,
    ignore: tuple[str, ...] | None,
    input_shapes: Mapping[str, tuple[int, ...]] | None,
    save_table: Path | None,
    output_format: str,
    quiet: bool,
    **given: Any,
) -> int:
    """Tell how fast and small MODEL (an .onnx file or a Hugging Face folder) would become on this machine with zeros
    and bits that it does not have yet, and with --calibration-data how large the error would be. Nothing is changed."""
    from sparse_onnx.analysis.analyze import BITS, analyze
    from sparse_onnx.model.weights import DEFAULT_IGNORE
    from sparse_onnx.passes.solvers.masks import MaskStructure, resolve_sparsity
    from sparse_onnx.timing.curves import STRUCTURES
    from sparse_onnx.timing.table import write_table

    structure = MaskStructure.parse(mask_structure)
    share = 0.7 if sparsity is None and structure.kind != "n:m" else sparsity
    resolve_sparsity(share, structure)  # fails now rather than after a minute
    if precision is not None:
        require(precision in _BITS, "precision", precision, ", ".join(_BITS))
    with progress(quiet) as say:
        analysis = analyze(
            model,
            mask_structures=(*STRUCTURES, str(structure)),
            bits=BITS if precision is None else _BITS[precision],
            targets=targets or (),
            ignore=ignore or DEFAULT_IGNORE,
            input_shapes=input_shapes,
            progress=say,
            **given,
        )
    if save_table is not None:
        write_table(analysis.table(), save_table)
    document = {
        "answer": analysis.sentence(share, str(structure)),
        "bits_answers": analysis.bits_sentences(),
        **analysis.to_dict(),
    }
    return show(summary(analysis, share, str(structure)), document, output_format)


def summary(analysis: Analysis, sparsity: float | None, structure: str) -> str:
    """The answers, a table of patterns and bits, the layers with most of the time, and what stays as it is: some 25
    lines."""
    from sparse_onnx.analysis.analyze import DISTURBED

    answer = analysis.sentence(sparsity, structure)
    answers = [answer[0].upper() + answer[1:], *analysis.bits_sentences()]
    parts = ["\n".join(f"{line}." for line in answers), _patterns(analysis, sparsity), _layers(analysis)]
    rough = "" if analysis.quiet else f"{DISTURBED[0].upper()}{DISTURBED[1:]}."
    return "\n\n".join([*parts, *filter(None, [_reasons(analysis), rough])])


def _patterns(analysis: Analysis, asked: float | None) -> str:
    """Unstructured at several shares of zeros, N:M, blocks at the share that was asked for, and few bits."""
    from sparse_onnx.passes.lower.forms import FLOAT_BITS
    from sparse_onnx.timing.curves import UNSTRUCTURED

    forecast = analysis.forecast
    cases = [case for case in analysis.cases() if case[1] == UNSTRUCTURED or case[0] is None]
    blocks = [s for s in forecast.structures if s != UNSTRUCTURED and (None, s) not in cases]
    cases += [(0.7 if asked is None else asked, block) for block in blocks]
    rows = []
    shown = [(share, structure, FLOAT_BITS) for share, structure in cases]
    shown += [case for case in analysis.bits_cases() if not case[0]]  # the answers tell of both together
    for share, structure, bits in shown:
        found = analysis.predict(share, structure, bits)
        zeros = forecast.uniform(share, structure, bits)
        rows.append(
            [
                structure if bits == FLOAT_BITS else f"int{bits}",
                format_share(next(iter(zeros.values())).sparsity if zeros else share),
                format_ms(found.milliseconds),
                f"{found.speedup:.2f}x ({found.low:.2f}-{found.high:.2f})",
                f"{found.smaller:.2f}x ({format_bytes(found.nbytes)})",
                f"{len(found.forms)} of {len(forecast.layers)}",
                *([] if found.error is None else [f"{found.error:.2f}"]),
            ]
        )
    header = ["pattern", "zeros", "time", "faster", "smaller", "layers faster"]
    if len(rows[0]) > len(header):
        header.append("error")
    dense = f"dense: {format_ms(forecast.dense_ms)}, {format_bytes(forecast.dense_bytes)}"
    return f"{table([row for row in rows if len(row) == len(header)], header)}\n{dense}"


def _layers(analysis: Analysis) -> str:
    """The kinds of layers with most of the dense time, and from which share of zeros on they are faster."""
    forecast = analysis.forecast
    kinds: dict[int, list[LayerForecast]] = defaultdict(list)
    for layer in forecast.layers:
        kinds[layer.key].append(layer)

    def spent(layers: list[LayerForecast]) -> float:
        return sum(layer.dense_ms if layer.share is None else layer.share for layer in layers)

    shown = sorted(kinds.values(), key=spent, reverse=True)[:_LAYERS]
    structures = ("unstructured", "2:4", "block:4x1", "block:8x1")
    rows = []
    for layers in shown:
        first = layers[0]
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        rows.append(
            [
                f"{_short(first.module or first.name)}{more}",
                " x ".join(map(str, first.shape)),
                "-" if first.share is None else format_share(spent(layers)),
                format_bytes(sum(layer.nbytes for layer in layers)),
                *(_from(first.break_even(name, forecast.min_speedup)) for name in structures),
            ]
        )
    header = [
        "layers: faster from",
        "inputs x outputs",
        "of time",
        "bytes",
        *structures,
    ]
    text = table(rows, header)
    if analysis.profile is None or not analysis.profile.others:
        return text
    others = sorted(analysis.profile.others.items(), key=lambda item: -item[1])
    rest = [f"{name} {format_share(ms / analysis.profile.wall_ms)}" for name, ms in others[:4]]
    return f"{text}\nrest of the time: {', '.join(rest)}"


def _short(name: str) -> str:
    return name if len(name) <= _WIDTH else f"..{name[2 - _WIDTH :]}"


def _from(share: float | None) -> str:
    return "never" if share is None else f"{share:.0%}"


def _reasons(analysis: Analysis) -> str:
    reasons = Counter(reason for _, reason in analysis.declined)
    reasons.update(layer.reason for layer in analysis.forecast.layers if layer.reason)
    lines = [f"{count} cannot be touched: {reason}" for reason, count in reasons.most_common(_REASONS)]
    others = other_work([dataclasses.asdict(row) for row in analysis.untouched])
    quantized = analysis.quantized_text if analysis.forecast.layers else ""  # else the answer says it
    return "\n".join(filter(None, [others, *lines, quantized]))
