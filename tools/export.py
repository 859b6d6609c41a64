"""``sparse-onnx export``: a Hugging Face folder or a torch module to ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.tools.console import format_option

if TYPE_CHECKING:
    from sparse_onnx.exporter import ExportResult

__all__ = ["command"]

_OPTIONS = {"dynamic_shapes", "input_names", "output_names"}


@click.command(short_help="Export a Hugging Face folder or a torch module to ONNX.")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--task", help="What a Hugging Face model is for.  [default: what its config.json says]")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set, 18 to 23.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder.")
@format_option
def command(
    source: str, output: Path, task: str | None, opset: int, overwrite: bool, output_format: str
) -> None:
    """Export SOURCE to model.onnx in the folder given with -o, and compare it with torch.

    SOURCE is a Hugging Face model folder, or MODULE:FUNCTION, importable from here, where FUNCTION() returns
    (module, example_inputs) or (module, example_inputs, options) with options of export_torch, such as
    {"dynamic_shapes": {"x": {0: "batch"}}}.
    """
    from sparse_onnx.model_io import OutputFolder, save_model

    with OutputFolder(
        output, overwrite=overwrite, sources=[source] if Path(source).exists() else []
    ) as folder:
        result = _export(source, task, opset)
        save_model(result.model, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
    if output_format == "json":
        click.echo(json.dumps(_summary(result, output, size), indent=2))
    else:
        click.echo(_text(_summary(result, output, size)))


def _export(source: str, task: str | None, opset: int) -> ExportResult:
    from sparse_onnx.errors import UsageError
    from sparse_onnx.exporter import export_huggingface, export_torch

    if Path(source).exists() or ":" not in source:
        return export_huggingface(source, task=task, opset=opset)
    if task is not None:
        raise UsageError("--task is for Hugging Face folders; a function says itself what to export")
    module, inputs, options = _call(source)
    if unknown := options.keys() - _OPTIONS:
        raise UsageError(
            f"{source} returns the options {sorted(unknown)}; known: {', '.join(sorted(_OPTIONS))}"
        )
    return export_torch(module, inputs, opset=opset, **options)


def _call(source: str) -> tuple[Any, Any, dict[str, Any]]:
    """What the function ``module:function`` returns: a module, example inputs, options of export_torch()."""
    import importlib
    import sys

    from sparse_onnx.errors import UsageError

    module_name, _, function_name = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # a console script does not look there by itself
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the module raises
        raise UsageError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UsageError(f"{source} is no function")
    try:
        result = function()
    except Exception as error:  # whatever the function raises
        raise UsageError(f"{source} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise UsageError(
            f"{source} must return (module, example_inputs) or (module, example_inputs, options)"
        )
    module, inputs, *rest = result
    options = rest[0] if rest else {}
    if not isinstance(options, dict):
        raise UsageError(f"{source} returns {type(options).__name__} for its options, not a dict")
    return module, inputs, options


def _summary(result: ExportResult, output: Path, size: int) -> dict[str, Any]:
    graph = result.model.graph
    return {
        "folder": str(output),
        "bytes": size,
        "opset": result.model.opset_imports[""],
        "inputs": {value.name: [str(dim) for dim in value.shape or ()] for value in graph.inputs},
        "outputs": {value.name: [str(dim) for dim in value.shape or ()] for value in graph.outputs},
        "max_abs_difference": result.max_abs_difference,
        "compared_shapes": [{name: list(shape) for name, shape in run.items()} for run in result.shapes],
    }


def _text(summary: dict[str, Any]) -> str:
    from sparse_onnx.units import format_bytes

    lines = [
        f"written   {summary['folder']}/model.onnx ({format_bytes(summary['bytes'])}, opset {summary['opset']})"
    ]
    for key in ("inputs", "outputs"):
        lines += [f"{key[:-1]:9} {name} [{', '.join(dims)}]" for name, dims in summary[key].items()]
    runs = [
        dict.fromkeys("x".join(map(str, shape)) for shape in run.values())
        for run in summary["compared_shapes"]
    ]
    difference = f"largest difference from torch {summary['max_abs_difference']:.1e}"
    lines.append(f"checked   {difference}, at {', '.join(' '.join(run) for run in runs)}")
    return "\n".join(lines)
