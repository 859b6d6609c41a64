"""``sparse-onnx bench``: model files timed side by side, and sparse layers against dense ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.compilation.groups import Calibration, Target
from sparse_onnx.errors import UsageError
from sparse_onnx.tools.console import format_option, progress, quiet_option, show, table
from sparse_onnx.tools.model_argument import model_file
from sparse_onnx.tools.options import option
from sparse_onnx.units import format_ms, format_share

if TYPE_CHECKING:
    import onnx_ir as ir

    from sparse_onnx.data.inputs import Feeds
    from sparse_onnx.running.input_choice import Choice
    from sparse_onnx.running.workbench import Workbench
    from sparse_onnx.timing.layers import LayerTiming

__all__ = ["command"]

_SECONDS = 60.0


@dataclass(frozen=True)
class _Entry:
    """One model of the benchmark, whether the kernel library is registered for it, and what it is run with: ``feeds``
    of every target, by their ``choices``."""

    label: str
    path: Path
    model: ir.Model
    library: bool
    feeds: tuple[Feeds, ...]
    choices: tuple[Choice, ...]


@click.command(short_help="Time models side by side, and sparse layers against dense ones.")
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@option(Target, "shapes", "NAME:DIM,DIM,.. to time with; repeatable.", kind="shape")
@option(Target, "input_values")
@option(Target, "threads", "Threads to time with.  [default: all cores]")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help=f"Runs of each model at most; past {_SECONDS:.0f} s at least five.",
)
@click.option("--compare", type=click.Choice(["dense"]), help="Time each model without the library, too.")
@click.option("--layers", is_flag=True, help="Time every sparse layer alone, against its dense form.")
@option(Calibration, "seed", "Of the generated inputs.", default=0)
@format_option
@quiet_option
def command(
    models: tuple[Path, ...],
    input_shapes: Mapping[str, tuple[int, ...]] | None,
    input_values: Mapping[str, Any] | None,
    threads: int | None,
    rounds: int,
    compare: str | None,
    layers: bool,
    seed: int,
    output_format: str,
    quiet: bool,
) -> int:
    """Time MODELS (.onnx files, or output folders of `sparse-onnx optimize`), one run of each in turn.

    Every ratio is that of the first row to the row itself, round by round: its median, and in brackets its
    95 % confidence interval. Decoders with a cache are timed twice, unless shapes are given: taking in a prompt, which
    is what the first token waits for, and one more token behind it.
    """
    from sparse_onnx.report.environment import environment
    from sparse_onnx.running.host import available_cores
    from sparse_onnx.running.input_choice import explaining_guesses
    from sparse_onnx.running.workbench import Workbench

    count = threads or available_cores()
    with progress(quiet) as say:
        entries = _entries(models, input_shapes or {}, input_values or {}, compare == "dense", seed, say)
        with (
            tempfile.TemporaryDirectory(prefix="sparse-onnx-") as scratch,
            explaining_guesses([choice for entry in entries for choice in entry.choices]),
        ):
            bench = Workbench(count, Path(scratch), progress=say)
            rows, done = _time(entries, bench, rounds)
            timings = _time_layers(entries, bench) if layers else {}
    document = {
        "environment": environment(threads=count, seed=seed, isa=_isa(entries)),
        "rounds": done,
        "models": rows,
        "layers": {label: [_layer(timing) for timing in found] for label, found in timings.items()},
    }
    tables = [_table(rows)]
    for label, found in timings.items():
        tables.append(f"{label}\n{_layer_table(found)}" if found else f"{label}: no sparse layer")
    if not quiet:
        threads_used = f"{count} thread{'s' if count > 1 else ''}"
        run_with = "; then ".join(map(_describe, entries[0].feeds))
        click.echo(f"{done} rounds, {threads_used}, {run_with}", err=True)
        if not all(row["whole"] for row in rows):
            parts = "Models above the memory budget ran in parts: their times are sums, without ratios."
            click.echo(parts, err=True)
    return show("\n\n".join(tables), document, output_format)


def _entries(
    paths: Sequence[Path],
    given: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Any],
    with_dense: bool,
    seed: int,
    say: Callable[[str], None],
) -> list[_Entry]:
    from sparse_onnx.data import inputs
    from sparse_onnx.model import model_io
    from sparse_onnx.model.probe import uses_library
    from sparse_onnx.running.fix_inputs import fixed_values
    from sparse_onnx.running.input_choice import choose_inputs
    from sparse_onnx.running.request import Request
    from sparse_onnx.running.requests import choose_targets

    loaded = [(str(path), model_file(path), model_io.load_model(model_file(path))) for path in paths]
    plain = [inputs.input_specs(model) for _, _, model in loaded]
    known = {spec.name: spec.describe() for group in plain for spec in group}
    for flag, asked in (("--input-shape", given), ("--input", values)):
        if strange := [name for name in asked if name not in known]:
            raise UsageError(f"{flag} names {strange[0]!r}; the inputs are {'; '.join(known.values())}")
    constants: dict[str, Any] = {}
    for label, _, model in loaded:
        for name, value in fixed_values(model).items():
            if constants.setdefault(name, value) != value and name not in values:
                raise UsageError(
                    f"{label} has {name} fixed to {value}, another model to {constants[name]}: time them apart"
                )
    shared = {name: tuple(shape) for name, shape in given.items()}
    step: dict[str, tuple[int, ...]] = {}
    entries: list[_Entry] = []
    for (label, path, model), group in zip(loaded, plain, strict=True):
        names = {spec.name for spec in group}
        steering = {name: value for name, value in {**constants, **values}.items() if name in names}
        specs = inputs.input_specs(model, steering)
        asked = {s.name: shared[s.name] for s in specs if s.name in shared}
        fitting = {s.name for s in specs if s.name in given or s.takes(asked.get(s.name, ()))}
        known_shapes = {name: asked[name] for name in asked if name in fitting}
        if entries:
            choices: tuple[Choice, ...] = (choose_inputs(model, specs, known_shapes),)
            if step:
                own = {spec.name: step[spec.name] for spec in specs if spec.takes(step.get(spec.name, ()))}
                choices = (*choices, choose_inputs(model, specs, own))
        else:
            choices = choose_targets(model, specs, [known_shapes], None, Request()).choices
            step = choices[1].shapes if len(choices) > 1 else {}
        shared = choices[0].shapes | shared
        for line in dict.fromkeys(line for choice in choices for line in choice.notes("for another")):
            say(f"note: {label}: {line}")
        feeds = tuple(choice.feeds(seed) for choice in choices)
        library = uses_library(model)
        if with_dense and library:
            entries.append(_Entry(f"{label} (dense)", path, model, False, feeds, choices))
        elif with_dense:
            say(f"note: {label} has no operator of the library: it is dense already")
        entries.append(_Entry(label, path, model, library, feeds, choices))
    return entries


def _time(entries: Sequence[_Entry], bench: Workbench, rounds: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of the result, and how many rounds were run."""
    from sparse_onnx.model import model_io
    from sparse_onnx.running.requests import phase_of
    from sparse_onnx.running.runtime import open_runner
    from sparse_onnx.timing.rounds import interleave, ratio

    with ExitStack() as stack:
        runners = []
        for entry in entries:
            bench.progress(f"opening {entry.label}")
            opening = open_runner(
                entry.model,
                bench,
                entry.path,
                library=entry.library,
                timed=True,
            )
            runners.append(stack.enter_context(opening))
        bench.progress(f"timing {len(entries)} models")
        targets = range(len(entries[0].feeds))
        runs = [
            _run(runner.milliseconds, entry.feeds[target])
            for target in targets
            for runner, entry in zip(runners, entries, strict=True)
        ]
        times = interleave(runs, rounds=rounds, seconds=_SECONDS, progress=bench.progress)
    rows = []
    places = [(target, *pair) for target in targets for pair in zip(entries, runners, strict=True)]
    for (target, entry, runner), own in zip(places, times, strict=True):
        against = ratio(times[target * len(entries)], own)
        row = {
            "model": entry.label,
            "library": entry.library,
            "weight_bytes": model_io.weight_bytes(entry.model),
            "whole": runner.whole,
            "min_ms": min(own),
            "median_ms": against.second_ms,
            "speedup": against.median,
            "speedup_low": against.low,
            "speedup_high": against.high,
        }
        choice = entry.choices[target]
        if (phase := phase_of(choice.specs, choice.shapes)) is not None:
            row |= {
                "phase": phase.name,
                "tokens": phase.tokens,
                "tokens_per_second": phase.per_second(against.second_ms),
            }
        rows.append(row)
    return rows, len(times[0])


def _run(milliseconds: Callable[[Feeds], float], feeds: Feeds) -> Callable[[], float]:
    return lambda: milliseconds(feeds)


def _time_layers(entries: Sequence[_Entry], bench: Workbench) -> dict[str, list[LayerTiming]]:
    from sparse_onnx.timing.layers import time_sparse_layers

    return {
        entry.label: time_sparse_layers(
            entry.model,
            entry.feeds[0],
            bench,
        )
        for entry in entries
        if entry.library
    }


def _isa(entries: Sequence[_Entry]) -> str:
    from sparse_onnx import sparse_ops

    return sparse_ops.info().isa if any(entry.library for entry in entries) else "library not used"


def _describe(feeds: Feeds) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    timed = [[format_ms(row["min_ms"]), format_ms(row["median_ms"]), _interval(row)] for row in rows]
    if not any("phase" in row for row in rows):
        cells = [[row["model"], *times] for row, times in zip(rows, timed, strict=True)]
        return table(cells, ["model", "min", "median", "speedup (95 %)"])
    cells = [
        [row["model"], _phase(row), *times[:2], _tokens(row), times[2]]
        for row, times in zip(rows, timed, strict=True)
    ]
    return table(cells, ["model", "run", "min", "median", "tokens/s", "speedup (95 %)"])


def _phase(row: Mapping[str, Any]) -> str:
    """What a decoder does in the runs of a row."""
    if "phase" not in row:
        return "-"
    return "decode" if row["phase"] == "decode" else f"prefill, {row['tokens']}"


def _tokens(row: Mapping[str, Any]) -> str:
    return f"{row['tokens_per_second']:.1f}" if "phase" in row else "-"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['speedup']:.2f}x ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})"


def _layer(timing: LayerTiming) -> dict[str, Any]:
    return {
        "name": timing.name,
        "module": timing.module,
        "op_type": timing.op_type,
        "x_shape": list(timing.x_shape),
        "weight_shapes": [list(shape) for shape in timing.weight_shapes],
        "rows": timing.rows,
        "sparsity": timing.sparsity,
        "kernel": timing.kernel,
        "dense_ms": timing.times.first_ms,
        "sparse_ms": timing.times.second_ms,
        "speedup": timing.times.median,
        "speedup_low": timing.times.low,
        "speedup_high": timing.times.high,
    }


def _layer_table(timings: Sequence[LayerTiming]) -> str:
    """Equal layers, which are timed once, share a row."""
    groups: dict[tuple[object, ...], list[LayerTiming]] = {}
    for timing in timings:
        key = (timing.op_type, timing.weight_shapes, timing.x_shape, timing.times)
        groups.setdefault(key, []).append(timing)
    cells = []
    for group in groups.values():
        first, row = group[0], _layer(group[0])
        shape = " + ".join(f"{first.rows} x {K} x {N}" for K, N in first.weight_shapes)
        times = [format_ms(row["dense_ms"]), format_ms(row["sparse_ms"]), _interval(row)]
        cells.append(
            [
                first.module or first.name,
                str(len(group)),
                shape,
                format_share(first.sparsity),
                first.kernel,
                *times,
            ]
        )
    total = [sum(getattr(timing.times, key) for timing in timings) for key in ("first_ms", "second_ms")]
    cells.append(
        ["all", str(len(timings)), "", "", "", *map(format_ms, total), f"{total[0] / total[1]:.2f}x"]
    )
    return table(
        cells,
        ["layer", "equal", "rows x K x N", "zeros", "kernel", "dense", "sparse", "speedup (95 %)"],
    )
