"""Print the benchmark tables, all of them or some sections.

``python -m sparse_onnx.tools.benchmarks.tables [--section bert]... [--threads 1,2] [--json FILE]``. Sections:

``bert``
    BERT-base, pruned, against dense ONNX Runtime, its dynamic int8, DeepSparse and OpenVINO.
``shapes``
    One linear layer, sparse against dense, at many shapes, and the points that stand out.
``few-rows``
    Large layers on one to eight rows, weights from memory: speed by the bytes that are read.
``recurrent``
    LSTM and GRU, sparse against those of ONNX Runtime.
``kernels``
    The kernels alone against the limits of the processor.
``convs``
    ResNet-50 and MobileNetV2, pruned, against dense ONNX Runtime and DeepSparse.

Engines that are compared run in turn, each in its own process, one run a round; sessions of ONNX Runtime have
``session.force_spinning_stop`` set, so that idle threads of one do not take a core from the next (see
:mod:`sparse_onnx.tools.benchmarks.engines`). Every ratio is a median over rounds. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from sparse_onnx.errors import SparseOnnxError
from sparse_onnx.report.environment import environment
from sparse_onnx.sparse_ops import info
from sparse_onnx.tools.benchmarks.kernel_speed import kernels
from sparse_onnx.tools.benchmarks.recurrent_layers import recurrent
from sparse_onnx.tools.benchmarks.section import Settings, Table
from sparse_onnx.tools.benchmarks.single_layers import few_rows, shapes
from sparse_onnx.tools.benchmarks.whole_models import bert, convs
from sparse_onnx.tools.console import progress, quiet_option

__all__ = ["SECTIONS", "command"]

SECTIONS: dict[str, Callable[[Settings], Iterator[Table]]] = {
    "bert": bert,
    "shapes": shapes,
    "few-rows": few_rows,
    "recurrent": recurrent,
    "kernels": kernels,
    "convs": convs,
}

_PYTHON = click.Path(exists=True, dir_okay=False, path_type=Path)


def _thread_counts(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{text!r}: write positive numbers with commas, e.g. 1,2")
    return tuple(dict.fromkeys(map(int, words)))


@click.command()
@click.option(
    "--section",
    "sections",
    multiple=True,
    type=click.Choice(list(SECTIONS)),
    help="Repeatable.  [default: all]",
)
@click.option("--threads", default="1,2", show_default=True, callback=_thread_counts, help="Thread counts.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write this.")
@click.option("--quick", is_flag=True, help="Few small points and rounds: whether all runs, not how fast.")
@click.option("--deepsparse", type=_PYTHON, help="A Python interpreter that has DeepSparse.")
@click.option("--openvino", type=_PYTHON, help="A Python interpreter that has OpenVINO.")
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/benchmark-models"),
    show_default=True,
    help="Where whole models are, or are written to.",
)
@quiet_option
def command(
    sections: tuple[str, ...],
    threads: tuple[int, ...],
    json_file: Path | None,
    quick: bool,
    deepsparse: Path | None,
    openvino: Path | None,
    models: Path,
    quiet: bool,
) -> None:
    """Print the benchmark tables."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        facts = environment(threads=max(threads), seed=0, isa=info().isa)
        document: dict[str, Any] = {"environment": facts, "quick": quick, "sections": {}}
        click.echo(f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}")
        for name in sections or SECTIONS:
            found = document["sections"][name] = []
            texts = []
            with progress(quiet) as say:
                settings = Settings(threads, quick, deepsparse, openvino, models, say)
                for one in SECTIONS[name](settings):
                    found.append(one.document())
                    texts.append(one.text())
                    if json_file is not None:  # at every table: a long run that breaks off leaves what it has
                        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            for text in texts:
                click.echo(f"\n{text}")
    except SparseOnnxError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"Error: {error.filename or 'a file'}: {error.strerror}", err=True)
        sys.exit(6)


if __name__ == "__main__":
    command()
