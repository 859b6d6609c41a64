"""Write a convolutional network with random weights as ONNX files, dense and pruned: the benchmarks' subject.

``python -m sparse_onnx.tools.benchmarks.make_resnet FOLDER --sparsity 0.8 --sparsity 0.9`` writes ResNet-50 as
``FOLDER/dense/model.onnx``, ``FOLDER/s80/model.onnx`` and so on; ``--network mobilenet-v2`` takes that one. Pruned are
the convolutions of the body: neither the first one, which reads three channels, nor depthwise ones. ``--legacy`` uses
the TorchScript exporter at opset 14 and IR version 8 instead, which older engines need. Speed does not depend on
what the weights say, only on where the zeros are, so a random model is enough.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click

from sparse_onnx.tools.benchmarks.make_bert import LEGACY_IR_VERSION, LEGACY_OPSET

__all__ = ["NETWORKS", "build", "command", "prune", "save", "save_legacy"]

NETWORKS = ("resnet-50", "mobilenet-v2")
IMAGE = (3, 224, 224)


def build(network: str) -> Any:
    """A module with weights of seed 0, in evaluation mode: pixel_values [batch, 3, 224, 224] to logits [batch, 1000].

    Batch normalization has the statistics of random images and random scales and shifts, so that activations
    keep their size through the network and nothing about it is trivial.
    """
    import torch
    from transformers import (
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    torch.manual_seed(0)
    if network == "resnet-50":
        module = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    else:
        # tf_padding would put a Pad before every convolution of stride 2.
        module = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000, tf_padding=False))
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            torch.nn.init.uniform_(norm.weight, 0.5, 1.0)
            torch.nn.init.normal_(norm.bias, std=0.2)
        module.train()(torch.randn(4, *IMAGE))
    return module.eval()


def prune(module: Any, sparsity: float) -> Any:
    """A copy of ``module`` whose convolutions each lost the ``sparsity`` share of smallest weights."""
    import torch

    pruned = copy.deepcopy(module)
    with torch.no_grad():
        for layer in pruned.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.groups == 1 and layer.in_channels > IMAGE[0]:
                count = round(sparsity * layer.weight.numel())
                if count:
                    smallest = layer.weight.abs().flatten().topk(count, largest=False).indices
                    layer.weight.view(-1)[smallest] = 0
    return pruned


def _example() -> Any:
    import torch

    return torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0))


def save_legacy(module: Any, path: Path) -> None:
    """Write ``path`` with the TorchScript exporter, opset 14, IR version 8, weights inside the file."""
    import warnings

    import onnx
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (_example(),),
            f=path,
            dynamo=False,
            opset_version=LEGACY_OPSET,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
        )
    model = onnx.load(path)
    model.ir_version = LEGACY_IR_VERSION
    onnx.save(model, path)


def save(module: Any, path: Path) -> None:
    """Write ``path`` and its data file with :func:`sparse_onnx.exporter.export_torch`."""
    from sparse_onnx.exporter import export_torch
    from sparse_onnx.model.model_io import save_model

    result = export_torch(
        module,
        {"pixel_values": _example()},
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
    )
    save_model(result.model, path.parent)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--network", type=click.Choice(NETWORKS), default=NETWORKS[0], show_default=True)
@click.option("--sparsity", multiple=True, type=click.FloatRange(0, 1, max_open=True), help="Repeatable.")
@click.option("--legacy", is_flag=True, help="TorchScript exporter, opset 14, IR version 8.")
def command(folder: Path, network: str, sparsity: tuple[float, ...], legacy: bool) -> None:
    """Write a network into FOLDER, dense and at each --sparsity."""
    module = build(network)
    for level in (0.0, *sparsity):
        path = folder / (f"s{round(100 * level)}" if level else "dense") / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        (save_legacy if legacy else save)(prune(module, level), path)
        click.echo(path, err=True)


if __name__ == "__main__":
    command()
