"""Decoders with a cache compile and verify with nothing said about shapes, as exporters write them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.data.inputs import input_specs
from sparse_onnx.errors import UsageError
from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.input_choice import choose_inputs
from sparse_onnx.running.runtime import open_session, run_session

VOCABULARY, WIDTH, HEADS, PAIRS, SIZE, LONGEST = 50, 64, 4, 2, 16, 256


class Graph:
    """Nodes and initializers under construction."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

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
    path: Path, *, cache_dims: tuple[str | int | None, str | int | None] = (PAIRS, SIZE), packed: bool = True
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
    cache_dims: tuple[str | int | None, str | int | None] = (HEADS, SIZE),
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


KINDS = {
    "builder": lambda path: builder_decoder(path),
    "builder, cache named": lambda path: builder_decoder(path, cache_dims=("kv_heads", "kv_cache_dim")),
    "builder, cache unnamed": lambda path: builder_decoder(path, cache_dims=(None, "?")),
    "builder, apart": lambda path: builder_decoder(path, cache_dims=("kv_heads", "head_size"), packed=False),
    "optimum": lambda path: optimum_decoder(path),
    "optimum, cache named": lambda path: optimum_decoder(path, cache_dims=("num_heads", "kv_cache_dim")),
    "optimum, one more": lambda path: optimum_decoder(path, mask_length="past_sequence_length + 1"),
    "optimum, total": lambda path: optimum_decoder(path, mask_length="total_sequence_length"),
}


def feeds(heads, batch, past, new):
    rng = np.random.default_rng(past)
    cache = (batch, heads, past, SIZE)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (batch, new)),
        "attention_mask": np.ones((batch, past + new), np.int64),
        "past_key_values.0.key": rng.standard_normal(cache).astype(np.float32),
        "past_key_values.0.value": rng.standard_normal(cache).astype(np.float32),
    }


def merged_decoder(path: Path) -> Path:
    """As Optimum merges two decoders, with a flag for the branch: without a cache the past is not read."""
    optimum_decoder(path)
    proto = onnx.load(path)
    ends = [node for node in proto.graph.node if node.op_type == "Concat"]
    for end in ends:
        past, new = end.input
        then = helper.make_node("Concat", [past, new], [f"{end.output[0]}.with"], axis=2)
        other = helper.make_node("Identity", [new], [f"{end.output[0]}.without"])
        branches = [
            helper.make_graph(
                [node], "b", [], [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)]
            )
            for node in (then, other)
        ]
        choice = helper.make_node("If", ["use_cache_branch"], list(end.output), name=end.name)
        for name, graph in zip(("then_branch", "else_branch"), branches, strict=True):
            choice.attribute.append(helper.make_attribute(name, graph))
        proto.graph.node.insert(list(proto.graph.node).index(end), choice)
        proto.graph.node.remove(end)
    proto.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    onnx.save(proto, path)
    return path


def test_a_merged_decoder(tmp_path):
    path = merged_decoder(tmp_path / "merged.onnx")
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1)
    assert result.report["input_shapes"]["attention_mask"] == [1, 128]
    assert result.report["input_shapes"]["use_cache_branch"] == [1]
    for flag, given in ((False, feeds(HEADS, 2, 0, 5)), (True, feeds(HEADS, 2, 4, 2))):
        out = tmp_path / f"fixed {flag}"
        sparse_onnx.optimize(path, out, benchmark=False, threads=1, fixed_inputs={"use_cache_branch": flag})
        written = out / "model.onnx"
        assert not [node for node in load_model(written).graph if node.op_type == "If"]
        expected = run_session(
            open_session(path, threads=1, library=False), {**given, "use_cache_branch": np.array([flag])}
        )
        got = run_session(open_session(written, threads=1, library=True), given)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=1e-4 * np.abs(value).max())


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_compile_with_nothing_said(tmp_path, kind):
    path = KINDS[kind](tmp_path / "decoder.onnx")
    said = []
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1, progress=said.append)
    heads = PAIRS if kind.startswith("builder") else HEADS
    assert result.report["input_shapes"] == {
        "input_ids": [1, 128],
        "attention_mask": [1, 128],
        "past_key_values.0.key": [1, heads, 0, SIZE],
        "past_key_values.0.value": [1, heads, 0, SIZE],
    }
    assert any(row["decision"] == "sparse" for row in result.report["layers"])
    assert any("note: the target is a prefill: 128 tokens, nothing in the cache" in line for line in said)
    assert any("note: dimension past_sequence_length is taken as 0" in line for line in said)
    written = tmp_path / "out" / "model.onnx"
    for batch, past, new in ((2, 0, 5), (2, 7, 1), (1, 4, 3)):
        given = feeds(heads, batch, past, new)
        expected = run_session(open_session(path, threads=1, library=False), given)
        for library in (True, False):
            got = run_session(open_session(written, threads=1, library=library), given)
            for name, value in expected.items():
                np.testing.assert_allclose(got[name], value, atol=1e-4 * np.abs(value).max())
    verified = sparse_onnx.verify(path, written, threads=1)
    assert verified.passed
    assert len(verified.inputs) == 4  # prefill and decode, and both at other sizes, which agree, too
    assert not verified.skipped


def test_one_shape_gives_the_others(tmp_path):
    model = load_model(optimum_decoder(tmp_path / "decoder.onnx"))
    choice = choose_inputs(
        model, input_specs(model), {"past_key_values.0.key": (3, HEADS, 9, SIZE), "input_ids": (3, 2)}
    )
    assert choice.shapes["attention_mask"] == (3, 11)
    assert choice.notes("for another") == []
    assert choice.guesses() == ""


def steered(path, **inputs):
    """A decoder step whose lengths are inputs: names and ranks of integers by name."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "sequence_length"])
    past = helper.make_tensor_value_info(
        "past_key_values.0.key", TensorProto.FLOAT, ["b", 2, "past_sequence_length", 4]
    )
    others = [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in inputs.items()]
    nodes = [
        helper.make_node("Identity", [value.name], [f"{value.name}.out"]) for value in (ids, past, *others)
    ]
    outputs = [helper.make_tensor_value_info(f"{v.name}.out", v.type.tensor_type.elem_type, None)
               for v in (ids, past, *others)]  # fmt: skip
    graph = helper.make_graph(nodes, "g", [ids, past, *others], outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return load_model(path)


@pytest.mark.parametrize("past", [0, 6])
def test_lengths_that_are_values_agree_with_the_shapes(tmp_path, past):
    integer, boolean = TensorProto.INT64, TensorProto.BOOL
    model = steered(
        tmp_path / "m.onnx",
        total_sequence_length=(integer, []),
        seqlens_k=(TensorProto.INT32, ["b"]),
        past_seq_len=(integer, [1]),
        position_ids=(integer, ["b", "sequence_length"]),
        cache_position=(integer, ["sequence_length"]),
        use_cache_branch=(boolean, [1]),
    )
    given = {"past_key_values.0.key": (2, 2, past, 4), "input_ids": (2, 3)}
    values = choose_inputs(model, input_specs(model), given).feeds(0)
    assert values["total_sequence_length"] == past + 3
    assert values["seqlens_k"].tolist() == [past + 2] * 2
    assert values["past_seq_len"].tolist() == [past]
    assert values["position_ids"].tolist() == [[past, past + 1, past + 2]] * 2
    assert values["cache_position"].tolist() == [past, past + 1, past + 2]
    assert values["use_cache_branch"].tolist() == [past > 0]


def test_a_guess_that_fails_is_told(tmp_path):
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[n, k] x, int64 level) => (float[n, m] y) <int64 low = {3}, int64[2] form = {-1, 5}> {
      c = Equal(level, low) d = Cast<to = 1>(c) z = Reshape(x, form) y = Mul(z, d)
    }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    with pytest.raises(
        UsageError, match=r"Guessed were n = 1, k = 128, level = 3: give .* --input-shape .* --input NAME"
    ):
        sparse_onnx.optimize(tmp_path / "m.onnx", tmp_path / "out", benchmark=False, threads=1)
    sparse_onnx.optimize(
        tmp_path / "m.onnx", tmp_path / "out", benchmark=False, threads=1, input_shapes={"x": (1, 10)}
    )
