"""Write decoders with random weights in the layout of onnxruntime-genai's model builder, as complete GenAI folders.

``python -m sparse_onnx.tools.benchmarks.make_decoder FOLDER --like llama-1b --bits 4`` writes ``FOLDER/model.onnx`` and
``FOLDER/genai_config.json``: RMS normalizations with their residual, ``GroupQueryAttention`` with the rotary tables
inside and a cache, a gated MLP; linears in float32 or as ``MatMulNBits`` in blocks of 32 with scales of both signs.
There is no tokenizer. Speed does not depend on what the weights say, only on where the zeros are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.model.nbits import pack_bits

__all__ = ["SHAPES", "Shape", "command", "write_decoder"]

_BLOCK, _OPSET, _IR_VERSION, _LONGEST = 32, 21, 10, 2048


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: ``heads`` for queries, ``pairs`` for keys and values, all of ``head_size``."""

    layers: int
    hidden: int
    heads: int
    pairs: int
    head_size: int
    mlp: int
    vocabulary: int


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(2, 64, 4, 2, 16, 128, 96),
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152),
    "qwen2.5-0.5b": Shape(24, 896, 14, 2, 64, 4864, 151936),
    "llama-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256),
    "llama-8b, 4 layers": Shape(4, 4096, 32, 8, 128, 14336, 128256),
}


class _Graph:
    """Nodes and initializers under construction."""

    def __init__(self, seed: int, bits: int, zeros: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.bits, self.zeros = bits, zeros
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, array: np.ndarray, name: str) -> str:
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, name: str, *inputs: str, outputs: tuple[str, ...] = (), **more: Any) -> str:
        made = outputs or (f"{name}/output_0",)
        self.nodes.append(helper.make_node(op, inputs, made, name=name, **more))
        return made[0]

    def weight(self, inputs: int, outputs: int) -> np.ndarray:
        """[inputs, outputs] float32, the given share of them zeros."""
        W: np.ndarray = (self.rng.standard_normal((inputs, outputs)) / inputs**0.5).astype(np.float32)
        W[self.rng.random(W.shape) < self.zeros] = 0
        return W

    def linear(self, x: str, inputs: int, outputs: int, name: str, result: str = "") -> str:
        W, made = self.weight(inputs, outputs), (result,) if result else ()
        path = f"/{name.replace('.', '/')}/MatMul"
        if self.bits == 32:
            weight = self.constant(W, f"{name}.MatMul.weight")
            return self.node("MatMul", path, x, weight, outputs=made)
        blocks = -(-inputs // _BLOCK)
        whole = np.zeros((outputs, blocks * _BLOCK), np.float32)
        whole[:, :inputs] = W.T
        cut = whole.reshape(outputs, blocks, _BLOCK)
        middle = 1 << self.bits - 1
        largest = np.take_along_axis(cut, abs(cut).argmax(axis=2)[..., None], axis=2)
        scale = np.where(largest == 0, np.float32(1), -largest / middle)  # of the other sign
        integers = (np.clip(np.round(cut / scale), -middle, middle - 1) + middle).astype(np.uint8)
        stored = (
            self.constant(pack_bits(integers, self.bits), f"{name}.MatMul.weight_Q{self.bits}"),
            self.constant(scale.reshape(-1).astype(np.float32), f"{name}.MatMul.weight_scales"),
        )
        sizes = {"K": inputs, "N": outputs, "bits": self.bits, "block_size": _BLOCK, "accuracy_level": 4}
        return self.node(
            "MatMulNBits", f"{path}_Q{self.bits}", x, *stored, outputs=made, domain="com.microsoft", **sizes
        )


def write_decoder(
    folder: Path, shape: Shape, *, bits: int = 32, packed: bool = True, zeros: float = 0.0, seed: int = 0
) -> Path:
    """Write a GenAI folder; returns its ``model.onnx``.

    Args:
        folder: Where to; made if it is not there.
        shape: The sizes.
        bits: Of the weights: 32 for floats, 4 or 8 for ``MatMulNBits``.
        packed: Whether query, key and value are one product.
        zeros: The share of zeros in the weights of linears.
        seed: Of the weights.
    """
    g = _Graph(seed, bits, zeros)
    total = g.node(
        "ReduceSum", "/mask/ReduceSum", "attention_mask", g.constant(np.array([1]), "one"), keepdims=1
    )
    less = g.node("Sub", "/mask/Sub", total, "one")
    lengths = g.node("Cast", "/mask/Cast", less, to=TensorProto.INT32)
    size = g.node("Shape", "/mask/Shape", "attention_mask")
    columns = g.node("Gather", "/mask/Gather", size, g.constant(np.array(1), "axis"), axis=0)
    longest = g.node("Cast", "/mask/Cast_1", columns, to=TensorProto.INT32)
    table = g.constant(
        g.rng.standard_normal((shape.vocabulary, shape.hidden)).astype(np.float32),
        "model.embed_tokens.weight",
    )
    residual = g.node("Gather", "/model/embed_tokens/Gather", table, "input_ids")
    half = shape.head_size // 2
    angles = np.outer(np.arange(_LONGEST), 1 / 10000 ** (np.arange(half) / half))
    turns = [
        g.constant(turn(angles).astype(np.float32), f"{turn.__name__}_cache") for turn in (np.cos, np.sin)
    ]
    for layer in range(shape.layers):
        residual = _block(g, shape, layer, residual, [lengths, longest, *turns], packed=packed)
    norm = g.constant(np.ones(shape.hidden, np.float32), "model.norm.weight")
    last = g.node("SimplifiedLayerNormalization", "/model/norm", residual, norm, axis=-1, epsilon=1e-5)
    g.linear(last, shape.hidden, shape.vocabulary, "lm_head", "logits")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.onnx"
    data = "model.onnx.data"
    (folder / data).unlink(missing_ok=True)
    onnx.save(_model(g, shape), file, save_as_external_data=True, location=data)
    (folder / "genai_config.json").write_text(json.dumps(_config(shape), indent=4), encoding="utf-8")
    return file


def _block(g: _Graph, shape: Shape, layer: int, x: str, constants: list[str], *, packed: bool) -> str:
    """The residual behind one layer."""
    stem, module = f"/model/layers.{layer}", f"model.layers.{layer}"
    wide, narrow = shape.heads * shape.head_size, shape.pairs * shape.head_size
    gain = g.constant(np.ones(shape.hidden, np.float32), f"{module}.input_layernorm.weight")
    h = g.node("SimplifiedLayerNormalization", f"{stem}/norm", x, gain, axis=-1, epsilon=1e-5)
    if packed:
        qkv = [g.linear(h, shape.hidden, wide + 2 * narrow, f"{module}.attn.qkv_proj"), "", ""]
    else:
        parts = (("q", wide), ("k", narrow), ("v", narrow))
        qkv = [g.linear(h, shape.hidden, width, f"{module}.attn.{part}_proj") for part, width in parts]
    cache = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    attended = g.node(
        "GroupQueryAttention",
        f"{stem}/attn/GroupQueryAttention",
        *(*qkv, *cache, *constants),
        outputs=(f"{stem}/attn/output_0", *(f"present.{layer}.{part}" for part in ("key", "value"))),
        domain="com.microsoft",
        num_heads=shape.heads,
        kv_num_heads=shape.pairs,
        do_rotary=1,
        scale=shape.head_size**-0.5,
    )
    out = g.linear(attended, wide, shape.hidden, f"{module}.attn.o_proj")
    gain = g.constant(np.ones(shape.hidden, np.float32), f"{module}.post_attention_layernorm.weight")
    skip = (f"{stem}/skip/output_0", "", "", f"{stem}/skip/output_3")
    h = g.node(
        "SkipSimplifiedLayerNormalization",
        *(f"{stem}/skip", x, out, gain),
        outputs=skip,
        domain="com.microsoft",
        epsilon=1e-5,
    )
    gate, up = (g.linear(h, shape.hidden, shape.mlp, f"{module}.mlp.{part}_proj") for part in ("gate", "up"))
    swish = g.node("Mul", f"{stem}/mlp/swish", gate, g.node("Sigmoid", f"{stem}/mlp/Sigmoid", gate))
    inner = g.node("Mul", f"{stem}/mlp/Mul", swish, up)
    down = g.linear(inner, shape.mlp, shape.hidden, f"{module}.mlp.down_proj")
    return g.node("Add", f"{stem}/Add", skip[3], down)


def _model(g: _Graph, shape: Shape) -> onnx.ModelProto:
    def cache(prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                f"{prefix}.{layer}.{part}",
                TensorProto.FLOAT,
                ["batch_size", shape.pairs, length, shape.head_size],
            )
            for layer in range(shape.layers)
            for part in ("key", "value")
        ]

    sizes = {"input_ids": "sequence_length", "attention_mask": "total_sequence_length"}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", size])
        for name, size in sizes.items()
    ]
    logits = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch_size", "sequence_length", shape.vocabulary]
    )
    graph = helper.make_graph(
        g.nodes,
        "decoder",
        [*inputs, *cache("past_key_values", "past_sequence_length")],
        [logits, *cache("present", "total_sequence_length")],
        g.constants,
    )
    imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        graph, opset_imports=imports, ir_version=_IR_VERSION, producer_name="make_decoder"
    )


def _config(shape: Shape) -> dict[str, object]:
    """What onnxruntime-genai reads."""
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    made = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "vocab_size": shape.vocabulary,
            "context_length": _LONGEST,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": "model.onnx",
                "head_size": shape.head_size,
                "hidden_size": shape.hidden,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.pairs,
                "num_hidden_layers": shape.layers,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
                "outputs": {"logits": "logits", **made},
            },
        },
        "search": {"do_sample": False, "max_length": _LONGEST, "past_present_share_buffer": False},
    }


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--like", type=click.Choice(tuple(SHAPES)), required=True, help="Whose sizes.")
@click.option("--bits", type=click.Choice(["32", "8", "4"]), default="32", show_default=True)
@click.option("--apart", is_flag=True, help="Query, key and value as products of their own.")
@click.option("--zeros", type=click.FloatRange(0, 1), default=0.0, show_default=True)
def command(folder: Path, like: str, bits: str, apart: bool, zeros: float) -> None:
    """Write a decoder into FOLDER."""
    click.echo(write_decoder(folder, SHAPES[like], bits=int(bits), packed=not apart, zeros=zeros), err=True)


if __name__ == "__main__":
    command()
