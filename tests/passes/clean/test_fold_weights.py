"""clean.fold-weights: what is folded, what stays and why."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import PassContext, Pipeline
from sparse_onnx.passes.clean.fold_weights import FoldWeights
from sparse_onnx.passes.presets import CLEAN_PASSES

RNG = np.random.default_rng(3)
W = RNG.standard_normal((6, 4)).astype(np.float32)
WT = np.ascontiguousarray(W.T)
MASK = (RNG.random((6, 4)) < 0.5).astype(np.float32)
X = RNG.standard_normal((3, 6)).astype(np.float32)
BIAS = RNG.standard_normal(4).astype(np.float32)
PRUNED = W * MASK


def build(from_text, body, opset=17, outputs="float[B, 4] Y", inputs="float[B, 6] X", **tensors):
    head = f'<ir_version: 9, opset_import: ["" : {opset}]>'
    return from_text(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}", **tensors)


def shape(*sizes):
    return np.array(sizes, np.int64)


FOLDS = {
    "transpose": ("T = Transpose<perm = [1, 0]>(w) Y = MatMul(X, T)", {"w": WT}, W, "w"),
    "transpose, default order": ("T = Transpose(w) Y = MatMul(X, T)", {"w": WT}, W, "w"),
    "transpose before transB": ("T = Transpose(w) Y = Gemm<transB = 1>(X, T)", {"w": W}, WT, "w"),
    "identity": ("T = Identity(w) Y = MatMul(X, T)", {"w": W}, W, "w"),
    "mask first": ("T = Mul(m, w) Y = MatMul(X, T)", {"m": MASK, "w": W}, PRUNED, "w"),
    "mask second": ("T = Mul(w, m) Y = MatMul(X, T)", {"m": MASK, "w": W}, PRUNED, "w"),
    "names of torch": (
        "T = Mul(fc_mask, fc_orig) Y = Gemm(X, T)",
        {"fc_mask": MASK, "fc_orig": W},
        PRUNED,
        "fc",
    ),
    "boolean mask": (
        "F = Cast<to = 1>(m) T = Mul(F, w) Y = MatMul(X, T)",
        {"m": MASK.astype(bool), "w": W},
        PRUNED,
        "w",
    ),
    "byte mask": (
        "F = Cast<to = 1>(m) T = Mul(F, w) Y = MatMul(X, T)",
        {"m": MASK.astype(np.uint8), "w": W},
        PRUNED,
        "w",
    ),
    "mask and transpose": (
        "M = Mul(m, w) T = Transpose(M) Y = MatMul(X, T)",
        {"m": np.ascontiguousarray(MASK.T), "w": WT},
        PRUNED,
        "w",
    ),
    "half precision": (
        "T = Cast<to = 1>(w) Y = MatMul(X, T)",
        {"w": W.astype(np.float16)},
        W.astype(np.float16),
        "w",
    ),
    "scale of each output": ("T = Mul(w, s) Y = MatMul(X, T)", {"w": W, "s": BIAS}, W * BIAS, "w"),
    "reshape": ("T = Reshape(w, s) Y = MatMul(X, T)", {"w": W.reshape(-1), "s": shape(6, -1)}, W, "w"),
    "reshape with a copied size": (
        "T = Reshape(w, s) Y = MatMul(X, T)",
        {"w": W.reshape(6, 2, 2), "s": shape(0, 4)},
        W,
        "w",
    ),
    "squeeze": ("T = Squeeze(w, a) Y = MatMul(X, T)", {"w": W[None], "a": shape(0)}, W, "w"),
    "squeeze all": ("T = Squeeze(w) Y = MatMul(X, T)", {"w": W[None, :, None]}, W, "w"),
    "unsqueeze": (
        "T = Unsqueeze(w, a) S = Squeeze(T, a) Y = MatMul(X, S)",
        {"w": W, "a": shape(-1)},
        W,
        "w",
    ),
    "two users": ("T = Transpose(w) A = MatMul(X, T) B = MatMul(X, T) Y = Add(A, B)", {"w": WT}, W, "w"),
    "computed twice": (
        "S = Transpose(w) T = Transpose(w) A = MatMul(X, S) B = MatMul(X, T) Y = Add(A, B)",
        {"w": WT},
        W,
        "w",
    ),
    "used elsewhere after the fold": (
        "T = Transpose(w) A = MatMul(X, T) R = ReduceMax<keepdims = 0>(T) Y = Add(A, R)",
        {"w": WT},
        W,
        "w",
    ),
}


def test_the_mask_of_a_convolution_is_folded(from_text, run):
    filters, mask = WT[..., None, None].copy(), np.ascontiguousarray(MASK.T[..., None, None])
    model = build(
        from_text,
        "T = Mul(conv_mask, conv_orig) B = Identity(b) Y = Conv<kernel_shape = [1, 1]>(X, T, B)",
        inputs="float[N, 6, H, W] X",
        outputs="float[N, 4, H, W] Y",
        conv_mask=mask,
        conv_orig=filters,
        b=BIAS,
    )
    x = np.random.default_rng(1).standard_normal((2, 6, 3, 3)).astype(np.float32)
    before = run(model, {"X": x})["Y"]
    assert FoldWeights()(model).statistics == {"weights": 1, "biases": 1}
    np.testing.assert_array_equal(model.graph.initializers["conv"].const_value.numpy(), filters * mask)
    np.testing.assert_array_equal(run(model, {"X": x})["Y"], before)


@pytest.mark.parametrize(("body", "tensors", "expected", "name"), FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("opset", [13, 17])
def test_a_computed_weight_becomes_an_initializer(from_text, run, body, tensors, expected, name, opset):
    model = build(from_text, body, opset, **tensors)
    before = run(model, {"X": X})["Y"]
    result = FoldWeights()(model)
    assert result.modified
    assert result.statistics == {"weights": 1, "biases": 0}
    assert not result.declined
    weight = model.graph.initializers[name]
    assert weight.const_value.name == name
    np.testing.assert_array_equal(weight.const_value.numpy(), expected)
    assert not {"Transpose", "Mul", "Cast", "Reshape", "Squeeze"} & {node.op_type for node in model.graph}
    assert all(value.uses() for value in model.graph.initializers.values())
    assert [found.name for found in find_weights(model)[0]] in ([name], [])
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)
    assert not FoldWeights()(model).modified


@pytest.mark.parametrize(
    ("body", "tensors"),
    [
        ("T = Identity(b) Y = Gemm(X, w, T)", {"b": BIAS}),
        ("T = Cast<to = 1>(b) Y = Gemm(X, w, T)", {"b": BIAS.astype(np.float16)}),
        ("T = Identity(b) A = MatMul(X, w) Y = Add(A, T)", {"b": BIAS}),
        ("T = Identity(b) A = MatMul(X, w) Y = Add(T, A)", {"b": BIAS}),
        ("T = Mul(b, m) A = MatMul(X, w) Y = Add(T, A)", {"b": BIAS, "m": MASK[0]}),
    ],
)
def test_a_computed_bias_becomes_an_initializer(from_text, run, body, tensors):
    model = build(from_text, body, w=W, **tensors)
    before = run(model, {"X": X})["Y"]
    result = FoldWeights()(model)
    assert result.statistics == {"weights": 0, "biases": 1}
    assert sorted(model.graph.initializers) == ["b", "w"]
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)


def test_constant_nodes_become_initializers(from_text, run):
    body = """C = Constant<value = float[6, 1] {1, 2, 3, 4, 5, 6}>()
              P = Constant<value = float[1] {0.5}>() T = Mul(C, P) Y = MatMul(X, T)"""
    model = build(from_text, body, outputs="float[B, 1] Y")
    result = FoldWeights()(model)
    assert result.statistics["weights"] == 1
    assert [node.op_type for node in model.graph] == ["MatMul"]
    np.testing.assert_array_equal(
        model.graph.initializers["C"].const_value.numpy()[:, 0], np.arange(1, 7) / 2
    )
    np.testing.assert_allclose(run(model, {"X": X})["Y"][:, 0], X @ np.arange(1, 7) / 2, rtol=1e-5)


def test_a_constant_right_at_the_linear(from_text):
    model = build(
        from_text,
        "C = Constant<value = float[6, 1] {1, 2, 3, 4, 5, 6}>() Y = MatMul(X, C)",
        outputs="float[B, 1] Y",
    )
    assert FoldWeights()(model).modified
    assert [weight.name for weight in find_weights(model)[0]] == ["C"]


STAYS = {
    "nothing to fold": ("Y = MatMul(X, w)", {"w": W}, None),
    "a computed left operand": (
        "T = Transpose(w) A = MatMul(T, X) Y = Transpose(A)",
        {"w": np.eye(3, dtype=np.float32)},
        None,
    ),
    "attention": (
        "T = Transpose(X) A = MatMul(X, T) Y = MatMul(A, v)",
        {"v": np.ones((3, 4), np.float32)},
        None,
    ),
    "tied to an embedding": (
        "T = Transpose(w) A = MatMul(X, T) E = Gather(w, i) R = ReduceMax<keepdims = 0>(E) Y = Add(A, R)",
        {"w": WT, "i": shape(0)},
        "w is also used by Gather: folding would store it twice",
    ),
    "seen both ways": (
        "T = Transpose(w) A = MatMul(X, T) Y = MatMul(A, w)",
        {"w": RNG.standard_normal((6, 6)).astype(np.float32)},
        "w is also used by MatMul",
    ),
    "two masks": (
        "S = Mul(w, m) T = Mul(w, n) A = MatMul(X, S) B = MatMul(X, T) Y = Add(A, B)",
        {"w": W, "m": MASK, "n": 1 - MASK},
        "w is also used by Mul",
    ),
    "an intermediate result is needed": (
        "M = Mul(w, m) T = Identity(M) A = MatMul(X, T) R = ReduceMax<keepdims = 0>(M) Y = Add(A, R)",
        {"w": W, "m": MASK},
        "w is also used by ReduceMax",
    ),
    "quantized": (
        "T = DequantizeLinear(w, s) Y = MatMul(X, T)",
        {"w": (W * 10).astype(np.int8), "s": np.float32(0.1)},
        "quantized: the weight stays as it is stored",
    ),
    "quantized and transposed": (
        "Q = DequantizeLinear(w, s) T = Transpose(Q) Y = MatMul(X, T)",
        {"w": (WT * 10).astype(np.int8), "s": np.float32(0.1)},
        "quantized",
    ),
    "quantized by hand": (
        "F = Cast<to = 1>(w) T = Mul(F, s) Y = MatMul(X, T)",
        {"w": (W * 10).astype(np.int8), "s": np.float32(0.1)},
        "stored as INT8 and cast to FLOAT: a quantized weight stays as stored",
    ),
    "rounded in every run": (
        "Q = QuantizeLinear(w, s, z) T = DequantizeLinear(Q, s, z) Y = MatMul(X, T)",
        {"w": W, "s": np.float32(0.1), "z": np.int8(0)},
        "quantized: the weight stays as it is stored",
    ),
    "a palette": (
        "T = Gather(p, w) Y = MatMul(X, T)",
        {"w": (W > 0).astype(np.int64), "p": BIAS},
        "a codebook: the weight stays as it is stored",
    ),
    "a palette of bytes, transposed": (
        "I = Cast<to = 6>(w) G = Gather(p, I) T = Transpose(G) Y = MatMul(X, T)",
        {"w": (WT > 0).astype(np.uint8), "p": BIAS},
        "a codebook",
    ),
    "another operator": (
        "T = Tanh(w) Y = MatMul(X, T)",
        {"w": W},
        "computed by Tanh from constants, which is not folded",
    ),
    "another operator before a folded one": (
        "S = Tanh(w) T = Identity(S) Y = MatMul(X, T)",
        {"w": W},
        "by Tanh",
    ),
    "an outer product": (
        "T = Mul(u, v) Y = MatMul(X, T)",
        {"u": W[:, :1], "v": W[:1]},
        "an outer product, which would grow when folded",
    ),
    "a part of a weight": (
        "T = Slice(w, zero, four, one) S = Slice(w, four, eight, one) A = MatMul(X, T) B = MatMul(X, S) Y = Add(A, B)",
        {"w": np.tile(W, 2), "zero": shape(0), "four": shape(4), "eight": shape(8), "one": shape(1)},
        "w is also used by Slice: folding would store it twice",
    ),
    "a part, backwards": (
        "T = Slice(w, end, start, one, back) Y = MatMul(X, T)",
        {"w": W, "end": shape(-1), "start": shape(-5), "one": shape(1), "back": shape(-1)},
        "a Slice that goes backwards",
    ),
    "joined with one that is used elsewhere": (
        "T = Concat<axis = 1>(u, w) A = MatMul(X, T) B = MatMul(X, u) Y = Concat<axis = 1>(A, B)",
        {"u": W[:, :1], "w": W[:, 1:]},
        "u is also used by MatMul: folding would store it twice",
    ),
    "joined with itself": ("T = Concat<axis = 1>(w, w) Y = MatMul(X, T)", {"w": W}, "would grow when folded"),
    "too long a chain": (
        "a0 = Identity(w) "
        + " ".join(f"a{i + 1} = Identity(a{i})" for i in range(40))
        + " Y = MatMul(X, a40)",
        {"w": W},
        "computed by more than 32 nodes in a row",
    ),
}


@pytest.mark.parametrize(("body", "tensors", "reason"), STAYS.values(), ids=STAYS)
def test_what_stays_says_why(from_text, body, tensors, reason):
    model = build(from_text, body, outputs="float[B, N] Y", **tensors)
    before = ir.to_proto(model).SerializeToString()
    result = FoldWeights()(model)
    assert not result.modified
    assert ir.to_proto(model).SerializeToString() == before
    if reason is None:
        assert not result.declined
    else:
        assert result.declined
        assert all(reason in place.reason for place in result.declined)


def test_a_weight_that_a_caller_may_replace_stays(from_text):
    model = build(from_text, "T = Transpose(w) Y = MatMul(X, T)", inputs="float[B, 6] X, float[4, 6] w", w=WT)
    result = FoldWeights()(model)
    assert not result.modified
    (place,) = result.declined
    assert place.reason == "w is also a graph input, so a caller may replace it"


def test_an_output_of_the_graph_stays(from_text):
    outputs = "float[B, 4] Y, float[6, 4] T"
    result = FoldWeights()(build(from_text, "T = Transpose(w) Y = MatMul(X, T)", outputs=outputs, w=WT))
    assert not result.modified
    (place,) = result.declined
    assert place.reason == "w is also a graph output: folding would store it twice"


def test_a_name_that_is_taken_is_not_taken_again(from_text, run):
    model = build(
        from_text, "T = Mul(fc_mask, fc_orig) fc = MatMul(X, T) Y = Relu(fc)", fc_mask=MASK, fc_orig=W
    )
    before = run(model, {"X": X})["Y"]
    FoldWeights()(model)
    assert list(model.graph.initializers) == ["fc_orig"]
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)


def test_one_mask_for_two_weights(from_text, run):
    body = "S = Mul(u, m) T = Mul(w, m) A = MatMul(X, S) B = MatMul(X, T) Y = Add(A, B)"
    model = build(from_text, body, u=W + 1, w=W, m=MASK)
    before = run(model, {"X": X})["Y"]
    assert FoldWeights()(model).statistics["weights"] == 2
    assert sorted(model.graph.initializers) == ["u", "w"]
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)


def test_gates_that_an_exporter_has_put_in_order(from_text, run):
    """Two directions of a GRU, whose first two gates change places; the bias is computed, too."""
    hidden, inputs = 3, 6
    tensors = {
        name: RNG.standard_normal(size).astype(np.float32)
        for name, size in {
            "w": (9, inputs), "r": (9, hidden), "b": (18,), "w_back": (9, inputs), "r_back": (9, hidden),
        }.items()
    }  # fmt: skip
    bounds = {"s0": shape(0), "s3": shape(3), "s6": shape(6), "s9": shape(9), "front": shape(0)}

    def ordered(name):
        return f"""{name}_a = Slice({name}, s3, s6, front) {name}_b = Slice({name}, s0, s3, front)
            {name}_c = Slice({name}, s6, s9, front) {name}_d = Concat<axis = 0>({name}_a, {name}_b, {name}_c)
            {name}_e = Unsqueeze({name}_d, front)"""

    body = "\n".join(ordered(name) for name in ("w", "r", "w_back", "r_back"))
    body += f""" W = Concat<axis = 0>(w_e, w_back_e) R = Concat<axis = 0>(r_e, r_back_e)
        b_e = Unsqueeze(b, front) B = Concat<axis = 0>(b_e, b_e)
        Y = GRU<hidden_size = {hidden}, direction = "bidirectional">(X, W, R, B)"""
    model = build(
        from_text, body, inputs="float[S, B, 6] X", outputs="float[S, 2, B, 3] Y", **tensors, **bounds
    )
    x = np.random.default_rng(1).standard_normal((4, 2, 6)).astype(np.float32)
    before = run(model, {"X": x})["Y"]
    result = FoldWeights()(model)
    assert result.statistics == {"weights": 2, "biases": 1}
    assert [node.op_type for node in model.graph] == ["GRU"]
    assert [weight.name for weight in find_weights(model)[0]] == ["w", "r"]
    first = np.split(tensors["w"], 3)
    np.testing.assert_array_equal(
        model.graph.initializers["w"].const_value.numpy()[0], np.concatenate([first[1], first[0], first[2]])
    )
    np.testing.assert_array_equal(run(model, {"X": x})["Y"], before)


def test_inside_a_subgraph(from_text, run):
    text = """<ir_version: 9, opset_import: ["" : 17]>
    g (float[B, 6] X, bool c) => (float[B, 4] Y) {
        T = Transpose(w)
        Y = If(c) <then_branch = t () => (float[B, 4] P) { P = MatMul(X, T) },
                   else_branch = e () => (float[B, 4] Q) { M = Transpose(u) Q = MatMul(X, M) }>
    }"""
    model = from_text(text, w=WT, u=WT * 2)
    feeds = [{"X": X, "c": np.array(value)} for value in (True, False)]
    before = [run(model, feed)["Y"] for feed in feeds]
    assert FoldWeights()(model).statistics["weights"] == 2
    assert sorted(model.graph.initializers) == ["u", "w"]
    for feed, expected in zip(feeds, before, strict=True):
        np.testing.assert_array_equal(run(model, feed)["Y"], expected)


def test_a_loop_over_constants_is_no_constant(from_text):
    """Its body may read what it likes of the graph around it."""
    text = """<ir_version: 9, opset_import: ["" : 17]>
    g (float[6, 6] X) => (float[6, 4] Y) {
        n = Constant<value = int64 {2}>()
        c = Constant<value = bool {1}>()
        T = Loop(n, c, w) <body = b (int64 i, bool d, float[6, 4] s) => (bool e, float[6, 4] r)
                            { e = Identity(d) r = MatMul(X, s) }>
        Y = MatMul(X, T)
    }"""
    result = FoldWeights()(from_text(text, w=W))
    assert not result.modified
    assert not result.declined


@pytest.mark.parametrize(
    ("body", "rows"), [("T = Transpose(w) Y = MatMul(X, T)", 4), ("T = Identity(w) Y = MatMul(X, T)", 6)]
)
def test_the_new_weight_is_its_own_and_the_file_is_let_go(tmp_path, from_text, body, rows):
    source = build(from_text, body, w=WT if rows == 4 else W)
    ir.save(source, tmp_path / "model.onnx", external_data="data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    old = model.graph.initializers["w"].const_value
    stored = []

    def store(array, name):
        stored.append(array)
        return ir.tensor(array, name=name)

    FoldWeights()(model, PassContext(store=store))
    assert old.raw is None
    (array,) = stored
    assert array.flags.c_contiguous
    assert array.flags.owndata
    np.testing.assert_array_equal(array, W)


@pytest.mark.parametrize("stays", ["quantized by hand", "two masks", "tied to an embedding"])
def test_a_file_is_let_go_also_if_nothing_is_folded(tmp_path, from_text, stays):
    body, tensors, _ = STAYS[stays]
    source = build(from_text, body, outputs="float[B, N] Y", **tensors)
    ir.save(source, tmp_path / "model.onnx", external_data="data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    assert not FoldWeights()(model).modified
    assert all(value.const_value.raw is None for value in model.graph.initializers.values())


DECODED = {
    "integers": (
        "T = DequantizeLinear(w, s) Y = MatMul(X, T)",
        {"w": (W * 10).astype(np.int8), "s": BIAS[0]},
    ),
    "integers, transposed": (
        "D = DequantizeLinear<axis = 0>(w, s) T = Transpose(D) Y = MatMul(X, T)",
        {"w": (WT * 10).astype(np.int8), "s": BIAS},
    ),
    "blocks": (
        "D = DequantizeLinear<axis = 0, block_size = 4>(w, s) T = Reshape(D, t) Y = MatMul(X, T)",
        {"w": (W.reshape(-1) * 10).astype(np.int8), "s": W[:, 0], "t": shape(6, 4)},
    ),
    "half precision scales": (
        "D = DequantizeLinear(w, s) T = Cast<to = 1>(D) Y = Gemm(X, T)",
        {"w": (W * 10).astype(np.uint8), "s": np.float16(0.1)},
    ),
    "rounded in every run": (
        "Q = QuantizeLinear(w, s, z) T = DequantizeLinear(Q, s, z) Y = MatMul(X, T)",
        {"w": W, "s": np.float32(0.1), "z": np.int8(0)},
    ),
    "palette": ("T = Gather(p, w) Y = MatMul(X, T)", {"w": (W > 0).astype(np.int32), "p": BIAS}),
    "palette of bytes": (
        "I = Cast<to = 6>(w) G = Gather(p, I) T = Transpose(G) Y = MatMul(X, T)",
        {"w": (WT > 0).astype(np.uint8), "p": BIAS},
    ),
}


@pytest.mark.parametrize(("body", "tensors"), DECODED.values(), ids=DECODED)
def test_the_whole_clean_up_keeps_encodings(from_text, run, body, tensors):
    """Folded to floats they would take several times the bytes."""
    model = build(from_text, body, 21, **tensors)
    before = run(model, {"X": X})["Y"]
    (weight,), _ = find_weights(model, encoded=True)
    encoding, matrix = str(weight.encoding), weight.matrix()
    Pipeline(CLEAN_PASSES)(model)
    (weight,), _ = find_weights(model, encoded=True)
    assert weight.name == "w"
    assert str(weight.encoding) == encoding
    np.testing.assert_array_equal(weight.matrix(), matrix)
    assert weight.tensor.tobytes() == tensors["w"].tobytes()
    np.testing.assert_array_equal(run(model, {"X": X})["Y"], before)


@pytest.mark.parametrize("move", ["T = Gather(p, w)", "G = Gather(p, w) T = Transpose<perm = [0, 2, 1]>(G)"])
def test_the_whole_clean_up_keeps_palettes_of_recurrent_layers(from_text, run, move):
    """The other weight is computed of constants as well, but not decoded: it is folded as ever."""
    model = build(
        from_text,
        f"{move} R = Expand(r, t) Y = GRU<hidden_size = 2>(X, T, R)",
        inputs="float[3, 2, 6] X",
        outputs="float[3, 1, 2, 2] Y",
        w=RNG.integers(0, 4, (1, 6, 6)),
        p=BIAS,
        r=np.float32([0.5]),
        t=shape(1, 6, 2),
    )
    x = RNG.standard_normal((3, 2, 6)).astype(np.float32)
    before = run(model, {"X": x})["Y"]
    Pipeline(CLEAN_PASSES)(model)
    assert "Gather" in {node.op_type for node in model.graph}
    assert "Expand" not in {node.op_type for node in model.graph}
    assert [weight.name for weight in find_weights(model, encoded=True)[0]] == ["w", "R"]
    np.testing.assert_array_equal(run(model, {"X": x})["Y"], before)
