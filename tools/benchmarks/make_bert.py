"""Write BERT-base files for benchmarks: random weights from seed 0, dense and magnitude-pruned.

``python -m sparse_onnx.tools.benchmarks.make_bert FOLDER --sparsity 0.5 --sparsity 0.9`` writes
``FOLDER/dense/model.onnx``, ``FOLDER/s50/model.onnx`` and so on. ``--legacy`` uses the TorchScript exporter
at opset 14 and IR version 8 instead, which older engines need; ``--fixed`` does, too, with all inputs [1, 128] and
with the attention and masks that transformers chooses, as most files in the world are made.

Speed does not depend on what the weights say, only on where the zeros are, so a random model is enough.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import click

__all__ = ["command"]

LEGACY_OPSET = 14
LEGACY_IR_VERSION = 8
FIXED_SHAPE = (1, 128)
DYNAMIC_AXES = {0: "batch", 1: "sequence"}


def build(attention: str = "eager") -> Any:
    """BERT-base with a head of two classes, random weights of seed 0, in evaluation mode."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    # "eager" is the only one that the legacy exporter can trace for sizes that may change.
    return BertForSequenceClassification(BertConfig(attn_implementation=attention)).eval()


def prune(module: Any, sparsity: float) -> Any:
    """A copy of ``module`` whose linear layers each lost the ``sparsity`` share of smallest weights."""
    import torch

    pruned = copy.deepcopy(module)
    with torch.no_grad():
        for layer in pruned.modules():
            if isinstance(layer, torch.nn.Linear):
                count = round(sparsity * layer.weight.numel())
                if count:
                    smallest = layer.weight.abs().flatten().topk(count, largest=False).indices
                    layer.weight.view(-1)[smallest] = 0
    return pruned


def example_inputs(module: Any, shape: tuple[int, int] = (2, 16)) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, module.config.vocab_size, shape, generator=generator)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }


def save_fixed(module: Any, path: Path) -> None:
    """As :func:`save_legacy`, for one batch of 128 tokens and nothing else."""
    save_legacy(module, path, FIXED_SHAPE)


def save_legacy(module: Any, path: Path, fixed: tuple[int, int] | None = None) -> None:
    """Write ``path`` with the TorchScript exporter, opset 14, IR version 8, weights inside the file; for any batch and
    length, or for ``fixed`` ones."""
    import onnx
    import torch

    inputs = example_inputs(module) if fixed is None else example_inputs(module, fixed)
    free = {**dict.fromkeys(inputs, DYNAMIC_AXES), "logits": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            kwargs=inputs,
            f=path,
            dynamo=False,
            opset_version=LEGACY_OPSET,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_axes=free if fixed is None else None,
        )
    model = onnx.load(path)
    model.ir_version = LEGACY_IR_VERSION
    onnx.save(model, path)


def save(module: Any, path: Path) -> None:
    """Write ``path`` and its data file with :func:`sparse_onnx.exporter.export_torch`."""
    from sparse_onnx.exporter import export_torch
    from sparse_onnx.model.model_io import save_model

    inputs = example_inputs(module)
    result = export_torch(
        module,
        inputs,
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(inputs, DYNAMIC_AXES),
    )
    save_model(result.model, path.parent)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--sparsity", multiple=True, type=click.FloatRange(0, 1, max_open=True), help="Repeatable.")
@click.option("--legacy", is_flag=True, help="TorchScript exporter, opset 14, IR version 8.")
@click.option(
    "--fixed", is_flag=True, help="The same for inputs [1, 128], with the attention that models get."
)
def command(folder: Path, sparsity: tuple[float, ...], legacy: bool, fixed: bool) -> None:
    """Write BERT-base into FOLDER, dense and at each --sparsity."""
    module = build("sdpa") if fixed else build()
    write = save_fixed if fixed else save_legacy if legacy else save
    for level in (0.0, *sparsity):
        path = folder / (f"s{round(100 * level)}" if level else "dense") / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(prune(module, level), path)
        click.echo(path, err=True)


if __name__ == "__main__":
    command()
