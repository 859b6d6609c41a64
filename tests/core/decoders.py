"""Small decoders with caches, written as exporters write them, random weights with zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, WIDTH, HEADS, PAIRS, SIZE, LONGEST = 50, 64, 4, 2, 16, 256


class Graph:
    """Nodes and initializers under construction."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: object, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int, zeros: float = 0.85, name: str = "") -> str:
        W = self.rng.standard_normal(shape) / np.sqrt(shape[0])
        W[self.rng.random(shape) < zeros] = 0
        return self.constant(W.astype(np.float32), name)

    def node(self, op: str, inputs: list[str], outputs: list[str] | None = None, **attributes: object) -> str:
        outputs = outputs or [f"v{len(self.nodes)}"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"n{len(self.nodes)}", **attributes))
        return outputs[0]

    def save(self, path: Path, inputs: list, outputs: list, opset: int = 17) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            self.constants,
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
        return path


def builder_decoder(
    path: Path, *, cache_dims: tuple[str | int, str | int] = (PAIRS, SIZE), packed: bool = True
) -> Path:
    """As onnxruntime-genai's model builder writes it: GroupQueryAttention with packed queries, keys and values, rotary
    caches inside, lengths computed from the mask. ``cache_dims`` are heads and head size as the inputs say them."""
    g = Graph()
    mask, key, value = "attention_mask", "past_key_values.0.key", "past_key_values.0.value"
    one = g.constant(np.array([1]))
    total = g.node("ReduceSum", [mask, one], keepdims=1)
    lengths = g.node("Cast", [g.node("Sub", [total, one])], to=TensorProto.INT32)
    columns = g.node("Gather", [g.node("Shape", [mask]), g.constant(np.array(1))], axis=0)
    longest = g.node("Cast", [columns], to=TensorProto.INT32)
    h = g.node("Gather", [g.weight(VOCABULARY, WIDTH, zeros=0, name="embedding"), "input_ids"])
    norm = g.node(
        "SimplifiedLayerNormalization", [h, g.constant(np.ones(WIDTH, np.float32))], axis=-1, epsilon=1e-6
    )
    angles = np.outer(np.arange(LONGEST), 1 / 10000 ** (np.arange(SIZE // 2) / (SIZE // 2)))
    caches = [g.constant(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    if packed:
        qkv = [g.node("MatMul", [norm, g.weight(WIDTH, (HEADS + 2 * PAIRS) * SIZE)]), "", ""]
    else:
        qkv = [g.node("MatMul", [norm, g.weight(WIDTH, heads * SIZE)]) for heads in (HEADS, PAIRS, PAIRS)]
    attended = g.node(
        "GroupQueryAttention",
        [*qkv, key, value, lengths, longest, *caches],
        ["attended", "present.0.key", "present.0.value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=PAIRS,
        do_rotary=1,
        scale=SIZE**-0.5,
    )
    h = g.node("Add", [h, g.node("MatMul", [attended, g.weight(HEADS * SIZE, WIDTH)])])
    gate, up = (g.node("MatMul", [h, g.weight(WIDTH, 128)]) for _ in range(2))
    inner = g.node("Mul", [g.node("Mul", [gate, g.node("Sigmoid", [gate])]), up])
    h = g.node("Add", [h, g.node("MatMul", [inner, g.weight(128, WIDTH)])])
    g.node("MatMul", [h, g.weight(WIDTH, VOCABULARY, zeros=0)], ["logits"])
    past = ["batch_size", cache_dims[0], "past_sequence_length", cache_dims[1]]
    present = ["batch_size", cache_dims[0], "total_sequence_length", cache_dims[1]]
    return g.save(
        path,
        [
            ("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            (mask, TensorProto.INT64, ["batch_size", "total_sequence_length"]),
            (key, TensorProto.FLOAT, past),
            (value, TensorProto.FLOAT, past),
        ],
        [
            ("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY]),
            ("present.0.key", TensorProto.FLOAT, present),
            ("present.0.value", TensorProto.FLOAT, present),
        ],
        opset=21,
    )


def optimum_decoder(
    path: Path,
    *,
    mask_length: str = "past_sequence_length + sequence_length",
    cache_dims: tuple[str | int, str | int] = (HEADS, SIZE),
) -> Path:
    """As Optimum exports it, with the names of dimensions that it gives."""
    g = Graph()
    mask, key, value = "attention_mask", "past_key_values.0.key", "past_key_values.0.value"
    h = g.node("Gather", [g.weight(VOCABULARY, WIDTH, zeros=0, name="embedding"), "input_ids"])
    q, k, v = (g.node("MatMul", [h, g.weight(WIDTH, WIDTH)]) for _ in range(3))

    def split(x: str) -> str:
        return g.node(
            "Transpose",
            [g.node("Reshape", [x, g.constant(np.array([0, 0, HEADS, SIZE]))])],
            perm=[0, 2, 1, 3],
        )

    K = g.node("Concat", [key, split(k)], ["present.0.key"], axis=2)
    V = g.node("Concat", [value, split(v)], ["present.0.value"], axis=2)
    scores = g.node("MatMul", [split(q), g.node("Transpose", [K], perm=[0, 1, 3, 2])])
    scores = g.node("Mul", [scores, g.constant(np.float32(SIZE**-0.5))])
    keep = g.node("Cast", [g.node("Unsqueeze", [mask, g.constant(np.array([1, 2]))])], to=TensorProto.BOOL)
    shares = g.node("Softmax", [g.node("Where", [keep, scores, g.constant(np.float32(-3.4e38))])], axis=-1)
    y = g.node("Transpose", [g.node("MatMul", [shares, V])], perm=[0, 2, 1, 3])
    y = g.node("Reshape", [y, g.constant(np.array([0, 0, WIDTH]))])
    g.node("MatMul", [y, g.weight(WIDTH, VOCABULARY)], ["logits"])
    past = ["batch_size", cache_dims[0], "past_sequence_length", cache_dims[1]]
    return g.save(
        path,
        [
            ("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            (mask, TensorProto.INT64, ["batch_size", mask_length]),
            (key, TensorProto.FLOAT, past),
            (value, TensorProto.FLOAT, past),
        ],
        [
            ("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY]),
            ("present.0.key", TensorProto.FLOAT, None),
            ("present.0.value", TensorProto.FLOAT, None),
        ],
    )
