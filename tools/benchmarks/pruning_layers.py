"""Output error of the pruning methods on layers from files, against errors that others reached there.

``python -m sparse_onnx.tools.benchmarks.pruning_layers LAYERS [--peers FILE] [--method auto]... [--json FILE]``

LAYERS is a folder of ``<layer>.npz`` with the weight ``W`` [in, out], the Gram ``G`` [in, in] of the calibration
tokens' inputs, ``G_held`` that of held-out tokens, and ``tokens``, their number. The error is ‖X(W − W′)‖ / ‖XW‖ on
the held-out ones. The file of peers is JSON: layer, method, sparsity (or N:M), then ``held`` (the error) and ``s``
(its seconds). A method is compared with the peer of its own name, or with ``alps``. Budgets are per layer; Wanda's per
output channel.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from sparse_onnx.errors import SparseOnnxError, UsageError
from sparse_onnx.passes.solvers import SOLVERS, InputStatistics, relative_error
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.tools.benchmarks.section import Table

__all__ = ["command", "measure"]

_BUDGETS = ("0.5", "0.6", "0.7", "0.8", "2:4", "4:8")
_COLUMNS = ("layer", "method", "zeros", "calibration", "held out", "peer", "ratio", "s", "time ratio")


def measure(
    layers: Path, methods: tuple[str, ...], budgets: tuple[str, ...], peers: dict[str, Any], repeats: int = 1
) -> Iterator[tuple[str | float | None, ...]]:
    """One row of the table for each layer, method and budget; the shortest of ``repeats`` times counts."""
    files = sorted(layers.glob("*.npz"))
    if not files:
        raise UsageError(f"{layers} holds no .npz: give a folder with one file a layer")
    for file in files:
        with np.load(file) as arrays:
            if missing := {"W", "G", "G_held"} - set(arrays.files):
                raise UsageError(f"{file} has no {', '.join(sorted(missing))}")
            W, gram, held = arrays["W"], arrays["G"], arrays["G_held"]
            known = InputStatistics(gram, count=int(arrays["tokens"]) if "tokens" in arrays else 0)
        for method in methods:
            for budget in budgets:
                pruned, seconds = _solve(method, budget, W, known, repeats)
                of_layer = peers.get(file.stem, {})
                peer = of_layer.get(method, of_layer.get("alps", {})).get(budget)
                error = relative_error(W, pruned, held)
                yield (
                    file.stem,
                    method,
                    budget,
                    relative_error(W, pruned, gram),
                    error,
                    peer and peer["held"],
                    peer and error / peer["held"],
                    seconds,
                    peer and seconds / peer["s"],
                )


def _solve(
    method: str, budget: str, W: np.ndarray, known: InputStatistics, repeats: int
) -> tuple[np.ndarray, float]:
    structure = MaskStructure.parse(budget if ":" in budget else "unstructured")
    sparsity = None if ":" in budget else float(budget)
    solver, times, pruned = SOLVERS[method](), [], W
    for _ in range(repeats):
        start = time.perf_counter()
        pruned = solver.solve(W, known, structure, sparsity, "row" if method == "wanda" else "layer")
        times.append(time.perf_counter() - start)
    return pruned, min(times)


def _summary(rows: list[tuple[str | float | None, ...]], methods: tuple[str, ...]) -> Table:
    lines = []
    for method in methods:
        ratios = [(float(row[6]), f"{row[0]} {row[2]}") for row in rows if row[1] == method and row[6]]
        times = [float(row[8]) for row in rows if row[1] == method and row[8]]
        if ratios:
            worst, where = max(ratios)
            mean = statistics.fmean(ratio for ratio, _ in ratios)
            lines.append((method, _four(mean), _four(worst), where, statistics.fmean(times), max(times)))
    return Table(
        "Held-out error and time against the peer",
        ("method", "mean ratio", "worst ratio", "worst at", "mean time ratio", "worst time ratio"),
        tuple(lines),
    )


def _four(value: str | float | None) -> str | None:
    """Ratios near one, and errors, to four digits after the point."""
    return None if value is None else f"{float(value):.4f}"


@click.command()
@click.argument("layers", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--peers",
    "peers_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Their errors.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(SOLVERS)),
    default=("magnitude", "wanda", "sparsegpt", "admm", "alps", "auto"),
    show_default=True,
    help="Repeatable.",
)
@click.option("--budget", "budgets", multiple=True, default=_BUDGETS, show_default=True, help="Repeatable.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Shortest time counts.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write this.")
def command(
    layers: Path,
    peers_file: Path | None,
    methods: tuple[str, ...],
    budgets: tuple[str, ...],
    repeats: int,
    json_file: Path | None,
) -> None:
    """Prune the layers of the folder LAYERS by each method and print errors, ratios to a peer and seconds."""
    try:
        peers = json.loads(peers_file.read_text(encoding="utf-8")) if peers_file else {}
        rows = list(measure(layers, methods, budgets, peers, repeats))
    except SparseOnnxError as error:
        raise click.ClickException(str(error)) from error
    shown = tuple((*row[:3], *map(_four, row[3:7]), *row[7:]) for row in rows)
    tables = [Table("Pruned layers", _COLUMNS, shown)]
    if peers:
        tables.append(_summary(rows, methods))
    click.echo("\n\n".join(table.text() for table in tables))
    if json_file:
        documents = [Table("Pruned layers", _COLUMNS, tuple(rows)), *tables[1:]]
        text = json.dumps([table.document() for table in documents], indent=1)
        json_file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    command()
