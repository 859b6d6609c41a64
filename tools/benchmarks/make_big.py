"""Make a model of any size, for tests of bounded memory: residual blocks of two linears with GELU in between.

    python -m sparse_onnx.tools.benchmarks.make_big FOLDER [--gigabytes 3] [--width 4096] [--sparsity 0]

Weights are random (seeded, standard deviation 1/sqrt(K)) and are made one at a time while the file is written, so
that the generator itself stays small. ``--sparsity`` gives every weight that share of zeros.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.model import model_io

__all__ = ["big_model"]


def _weight(name: str, shape: tuple[int, int], seed: int, sparsity: float) -> ir.Value:
    def make() -> ir.TensorProtocol:
        rng = np.random.default_rng(seed)
        array = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[0]))
        if sparsity:
            array[rng.random(shape, dtype=np.float32) < sparsity] = 0
        return ir.tensor(array, name=name)

    tensor = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(shape), name=name)
    return ir.Value(
        name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=tensor
    )


def big_model(gigabytes: float, width: int = 4096, sparsity: float = 0.0) -> ir.Model:
    """A model with ``gigabytes`` (10^9 bytes) of float32 weights, in blocks of two ``width`` x ``width`` matrices."""
    blocks = max(1, round(gigabytes * 1e9 / (2 * 4 * width * width)))
    x = ir.val("x", ir.DataType.FLOAT, ["batch", width])
    ones, zeros = (
        ir.val(name, const_value=ir.tensor(np.full(width, value, np.float32), name=name))
        for name, value in (("scale", 1), ("shift", 0))
    )
    nodes, initializers, h = [], [ones, zeros], x
    for block in range(blocks):
        up = _weight(f"block.{block}.up.weight", (width, width), 2 * block, sparsity)
        down = _weight(f"block.{block}.down.weight", (width, width), 2 * block + 1, sparsity)
        initializers += [up, down]
        names = [f"block.{block}.{part}" for part in ("norm", "up", "gelu", "down", "add")]
        steps = [
            ir.node("LayerNormalization", [h, ones, zeros], {"axis": -1}, name=names[0]),
        ]
        steps.append(ir.node("MatMul", [steps[-1].outputs[0], up], name=names[1]))
        steps.append(ir.node("Gelu", [steps[-1].outputs[0]], name=names[2]))
        steps.append(ir.node("MatMul", [steps[-1].outputs[0], down], name=names[3]))
        steps.append(ir.node("Add", [h, steps[-1].outputs[0]], name=names[4]))
        for step, name in zip(steps, names, strict=True):
            step.outputs[0].name = f"{name}.out"
            step.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes += steps
        h = steps[-1].outputs[0]
    h.shape = ir.Shape(["batch", width])
    graph = ir.Graph([x], [h], nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="big")
    return ir.Model(graph, ir_version=9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = big_model(arguments.gigabytes, arguments.width, arguments.sparsity)
    model_io.save_model(model, arguments.folder)
    print(f"{arguments.folder / 'model.onnx'}: {model_io.weight_bytes(model) / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
