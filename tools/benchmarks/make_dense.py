"""Write networks with random weights as ONNX files for ``analyze_prediction``: a vision transformer and an MLP.

``python -m sparse_onnx.tools.benchmarks.make_dense FOLDER --network vit`` writes ``FOLDER/dense/model.onnx``. Speed
does not depend on what the weights say, so a random model is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["NETWORKS", "build", "command"]

NETWORKS = ("vit", "mlp")
_IMAGE, _WIDTH = (3, 224, 224), 1024


def build(network: str) -> tuple[Any, str, tuple[int, ...]]:
    """A module with weights of seed 0 in evaluation mode, the name of its input, and the shape of one sample.

    ``vit`` has 6 blocks of width 384 and 196 patches, ``mlp`` 4 layers of width 1024.
    """
    import torch

    torch.manual_seed(0)
    if network == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=1536,
            num_labels=1000,
        )
        return ViTForImageClassification(config).eval(), "pixel_values", _IMAGE
    layers: list[Any] = []
    for _ in range(4):
        layers += [torch.nn.Linear(_WIDTH, _WIDTH), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(_WIDTH, 10)).eval(), "input", (_WIDTH,)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--network", type=click.Choice(NETWORKS), required=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples in one run.")
def command(folder: Path, network: str, batch: int) -> None:
    """Write a network into FOLDER/dense, for a fixed number of samples."""
    import torch

    from sparse_onnx.exporter import export_torch
    from sparse_onnx.model.model_io import save_model

    module, name, shape = build(network)
    result = export_torch(module, {name: torch.randn(batch, *shape)}, output_names=["logits"])
    (folder / "dense").mkdir(parents=True, exist_ok=True)
    click.echo(save_model(result.model, folder / "dense"), err=True)


if __name__ == "__main__":
    command()
