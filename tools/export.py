"""``sparse-onnx export``: a Hugging Face folder or a torch module to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.compilation.groups import Calibration
from sparse_onnx.progress import Progress
from sparse_onnx.tools.console import format_option, progress, quiet_option, show
from sparse_onnx.tools.options import option, options

if TYPE_CHECKING:
    from sparse_onnx.data.inputs import InputSpec
    from sparse_onnx.data.samples import Samples
    from sparse_onnx.exporter import ExportResult

__all__ = ["command"]

_OPTIONS = {"dynamic_shapes", "input_names", "output_names"}


@click.command(short_help="Export a Hugging Face folder or a torch module to ONNX.")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--task", help="What a Hugging Face model is for.  [default: what its config.json says]")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set, 18 to 23.")
@click.option(
    "--gradients",
    type=click.Path(path_type=Path),
    help="Write the loss gradients of the weights to this .npz as well, for prune.gradient; it may lie in the folder.",
)
@option(
    Calibration,
    "data",
    "Real inputs for the gradients: an .npz (with labels, if there are any), a folder of .npz, module:function, or a "
    "text file (with --tokenizer).",
)
@options(Calibration, "tokenizer", "num_calibration_samples")
@click.option("--overwrite", is_flag=True, help="Replace the output folder, and the file of gradients.")
@quiet_option
@format_option
def command(
    source: str,
    output: Path,
    task: str | None,
    opset: int,
    gradients: Path | None,
    calibration_data: str | tuple[str, ...] | None,
    tokenizer: Path | None,
    num_calibration_samples: int | None,
    overwrite: bool,
    quiet: bool,
    output_format: str,
) -> int:
    """Export SOURCE to model.onnx in the folder given with -o, and compare it with torch.

    SOURCE is a Hugging Face model folder, or MODULE:FUNCTION, importable from here, where FUNCTION() returns
    (module, example_inputs) or (module, example_inputs, options) with options of export_torch, such as
    {"dynamic_shapes": {"x": {0: "batch"}}}.
    """
    data = _one_source(calibration_data)
    _check_gradient_options(gradients, data, tokenizer, num_calibration_samples)
    with ExitStack() as stack:
        say = stack.enter_context(progress(quiet))
        say("loading torch")
        from sparse_onnx.data.gradient_file import write_gradients
        from sparse_onnx.exporter.gradients import loss_gradients
        from sparse_onnx.model.model_io import OutputFolder, save_model

        sources = [source] if Path(source).exists() else []
        folder = stack.enter_context(OutputFolder(output, overwrite=overwrite, sources=sources))
        target = None if gradients is None else _gradient_target(gradients, output, folder, overwrite)
        result, module = _export(source, task, opset, say, names_kept=gradients is not None)
        say("writing")
        save_model(result.model, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        summary = _summary(result, output, size)
        if target is not None and data is not None:
            samples = _samples(result, data, tokenizer, num_calibration_samples)
            steps = Progress(say, "gradients of batches", len(samples))
            found = loss_gradients(
                module,
                samples,
                model=result.model,
                task=task,
                progress=lambda _line: steps.step(),
            )
            write_gradients(target, found)
            summary["gradients"] = {"file": str(gradients), "weights": len(found)}
    return show(_text(summary), summary, output_format)


def _one_source(data: str | tuple[str, ...] | None) -> str | None:
    from sparse_onnx.errors import UsageError

    if isinstance(data, tuple):
        raise UsageError(
            f"--calibration-data: gradients are of one source, not of {len(data)}: give one file"
        )
    return data


def _check_gradient_options(gradients: Path | None, data: str | None, *others: object) -> None:
    from sparse_onnx.errors import UsageError

    if gradients is None and (data is not None or any(option is not None for option in others)):
        raise UsageError("calibration data is for --gradients only: give the file to write, or leave it out")
    if gradients is not None and data is None:
        raise UsageError("--gradients needs --calibration-data with real inputs")
    if gradients is not None and gradients.suffix != ".npz":
        raise UsageError(f"--gradients {gradients}: the name must end in .npz")
    if gradients is not None and data is not None and gradients.absolute() == Path(data).absolute():
        raise UsageError(f"--gradients {gradients} is the calibration data; choose another file to write")


def _gradient_target(gradients: Path, output: Path, folder: Path, overwrite: bool) -> Path:
    """Where to write; a file in the output folder appears together with it, from the temporary ``folder``."""
    from sparse_onnx.errors import UsageError

    if gradients.absolute().parent == output.absolute():
        return folder / gradients.name
    if not gradients.absolute().parent.is_dir():
        raise UsageError(f"--gradients {gradients}: {gradients.parent} is no folder; create it first")
    if gradients.exists() and not overwrite:
        raise UsageError(f"{gradients} exists; choose another file, or replace it with --overwrite")
    return gradients


def _samples(result: ExportResult, data: str, tokenizer: Path | None, limit: int | None) -> Samples:
    """One sample in a batch: the gradients of several would be averaged before they are squared."""
    from sparse_onnx.data.inputs import input_specs
    from sparse_onnx.data.samples import open_samples

    specs = (*input_specs(result.model), *_label_specs(data))
    return open_samples(data, specs, limit=limit, batch=1, tokenizer=tokenizer)


def _label_specs(data: str) -> list[InputSpec]:
    """Labels that an .npz holds beside the inputs of the model."""
    import numpy as np

    from sparse_onnx.data.inputs import InputSpec
    from sparse_onnx.exporter.gradients import LABELS

    if not Path(data).is_file() or Path(data).suffix != ".npz":
        return []
    try:
        with np.load(data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in LABELS if name in file.files}
    except Exception:  # whatever is wrong with the file: reading the samples says it
        return []
    return [InputSpec(name, array.dtype, (None,) * array.ndim, None) for name, array in arrays.items()]


def _export(
    source: str, task: str | None, opset: int, say: Callable[[str], None], *, names_kept: bool
) -> tuple[ExportResult, Any]:
    """The model, and the module or folder that it is from; with ``names_kept``, inputs are called as in forward()."""
    from sparse_onnx.errors import UsageError
    from sparse_onnx.exporter import export_huggingface, export_torch

    if Path(source).exists() or ":" not in source:
        return export_huggingface(source, task=task, opset=opset, progress=say), source
    if task is not None:
        raise UsageError("--task is for Hugging Face folders; a function says itself what to export")
    module, inputs, options = _call(source)
    if unknown := options.keys() - _OPTIONS:
        raise UsageError(
            f"{source} returns the options {sorted(unknown)}; known: {', '.join(sorted(_OPTIONS))}"
        )
    if names_kept and options.get("input_names"):
        raise UsageError(f"{source} renames inputs; --gradients needs the names of the module's forward()")
    return export_torch(module, inputs, opset=opset, progress=say, **options), module


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
    if "gradients" in summary:
        lines.append("gradients {file}, {weights} weights".format_map(summary["gradients"]))
    return "\n".join(lines)
