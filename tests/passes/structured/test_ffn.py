"""Hidden neurons between two linears: every way that activations are written, and every reason to leave them."""

import math

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.structured.ffn import Ffn

D, H = 12, 32

ACTIVATIONS = {
    "none": "U = Identity(A)",
    "relu": "U = Relu(A)",
    "gelu node": "U = Gelu(A)",
    "gelu tanh node": 'U = Gelu<approximate = "tanh">(A)',
    "gelu erf": "s = Div(A, root2) e = Erf(s) f = Add(e, one) g = Mul(A, f) U = Mul(g, half)",
    "gelu erf, half first": "s = Div(A, root2) e = Erf(s) f = Add(e, one) g = Mul(A, half) U = Mul(g, f)",
    "gelu tanh": """c = Pow(A, three) d = Mul(c, small) e = Add(A, d) f = Mul(e, slope) t = Tanh(f)
                    p = Add(t, one) h = Mul(A, half) U = Mul(h, p)""",
    "silu": "s = Sigmoid(A) U = Mul(A, s)",
    "hard swish": "U = HardSwish(A)",
    "clip": "U = Clip(A, half, three)",
    "prelu": "U = PRelu(A, slopes)",
    "scaled": "r = Relu(A) U = Mul(r, slopes)",
    "gated": "G = MatMul(X, w3) s = Sigmoid(A) t = Mul(A, s) U = Mul(t, G)",
    "gated with biases": "M3 = MatMul(X, w3) G = Add(M3, b1) s = Sigmoid(A) t = Mul(A, s) U = Mul(t, G)",
}
FIRST = {
    "matmul": "M = MatMul(X, w1) A = Add(M, b1)",
    "matmul, bias first": "M = MatMul(X, w1) A = Add(b1, M)",
    "gemm": "A = Gemm(X, w1, b1)",
    "gemm transposed": "A = Gemm<transB = 1>(X, w1t, b1)",
    "no bias": "A = MatMul(X, w1)",
}
LAST = {
    "matmul": "V = MatMul(U, w2) Y = Add(V, b2)",
    "gemm": "Y = Gemm(U, w2, b2)",
    "gemm transposed": "Y = Gemm<transB = 1>(U, w2t, b2)",
    "no bias": "Y = MatMul(U, w2)",
}
SCALARS = {
    "root2": math.sqrt(2),
    "one": 1.0,
    "half": 0.5,
    "three": 3.0,
    "small": 0.044715,
    "slope": math.sqrt(2 / math.pi),
}


def tensors(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)

    all_tensors = {"w1": normal(D, H), "w2": normal(H, D), "w3": normal(D, H)}
    all_tensors |= {"b1": normal(H), "b2": normal(D), "slopes": normal(H)}
    all_tensors |= {"w1t": all_tensors["w1"].T.copy(), "w2t": all_tensors["w2"].T.copy()}
    return all_tensors | {name: np.array(value, dtype) for name, value in SCALARS.items()}


def used(body, given):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in given.items() if name in words}


def batches(count=3, rows=100, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [{"X": rng.standard_normal((rows, D)).astype(dtype)} for _ in range(count)]


@pytest.fixture
def build(from_text):
    def build(body, given=None, inputs=f"float[B, {D}] X", outputs=f"float[B, {D}] Y", functions=""):
        head = '<ir_version: 10, opset_import: ["" : 22, "local" : 1]>'
        return from_text(
            f"{head} g ({inputs}) => ({outputs}) {{ {body} }} {functions}",
            **used(body, tensors() if given is None else given),
        )

    return build


def array(model, name):
    return model.graph.initializers[name].const_value.numpy()


def kept_of(before, after, axis):
    """Which slices along ``axis`` are left, from values that are all different."""
    before, after = np.moveaxis(before, axis, 0), np.moveaxis(after, axis, 0)
    return [next(i for i, old in enumerate(before) if np.array_equal(old, new)) for new in after]


def equals_reference(run, model, expected_body, build, kept, given):
    """The model computes what ``expected_body`` does with the neurons ``kept`` and its own last layer."""
    own = dict(given)
    for name, axis in {"w1": 1, "w3": 1, "w1t": 0, "b1": 0, "slopes": 0}.items():
        own[name] = np.take(given[name], kept, axis)
    for name in ("w2", "w2t", "b2"):
        if name in model.graph.initializers:
            own[name] = array(model, name)
    feeds = batches(1, 7, seed=9)[0]
    np.testing.assert_allclose(
        run(model, feeds)["Y"], run(build(expected_body, own), feeds)["Y"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(build, run, remove, activation):
    body = f"{FIRST['matmul']} {ACTIVATIONS[activation]} {LAST['matmul']}"
    model = build(body)
    result = remove(Ffn(sparsity=0.25), model, batches())
    assert result.modified
    assert result.declined == ()
    assert result.statistics["removed"] == 8
    assert array(model, "w1").shape == (D, 24)
    assert array(model, "w2").shape == (24, D)
    kept = kept_of(tensors()["w1"], array(model, "w1"), 1)
    equals_reference(run, model, body, build, kept, tensors())


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("last", LAST)
def test_every_form_of_linear(build, run, remove, first, last):
    body = f"{FIRST[first]} U = Relu(A) {LAST[last]}"
    model = build(body)
    result = remove(Ffn(sparsity=0.5), model, batches())
    name, axis = ("w1t", 0) if "w1t" in body else ("w1", 1)
    kept = kept_of(tensors()[name], array(model, name), axis)
    assert len(kept) == 16
    before = 16 * (D + D + ("b1" in body))
    assert result.statistics["elements_before"] - result.statistics["elements_after"] == before
    equals_reference(run, model, body, build, kept, tensors())


PACKED = {
    "split": "G, A = Split<axis = 1>(P, sizes) s = Sigmoid(G) t = Mul(G, s) U = Mul(t, A)",
    "equal split": "G, A = Split<axis = -1, num_outputs = 2>(P) s = Sigmoid(G) t = Mul(G, s) U = Mul(t, A)",
}


@pytest.mark.parametrize("packing", PACKED)
def test_gate_and_value_from_one_layer(build, run, remove, packing):
    given = tensors() | {"sizes": np.array([H, H])}
    given["wp"] = np.hstack([given["w3"], given["w1"]])
    model = build(f"P = MatMul(X, wp) {PACKED[packing]} {LAST['matmul']}", given)
    result = remove(Ffn(sparsity=0.25), model, batches())
    assert result.declined == ()
    gate, value = np.split(array(model, "wp"), 2, axis=1)
    kept = kept_of(given["w1"], value, 1)
    assert kept == kept_of(given["w3"], gate, 1)
    body = f"A = MatMul(X, w1) G = MatMul(X, w3) s = Sigmoid(G) t = Mul(G, s) U = Mul(t, A) {LAST['matmul']}"
    equals_reference(run, model, body, build, kept, given)


def test_the_last_layer_is_the_least_squares_fit(build, run, remove):
    body = f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}"
    model = build(body)
    data = batches()
    expected = [run(model, feeds)["Y"] for feeds in data]
    remove(Ffn(sparsity=0.25, dampening_frac=0.0), model, data)
    kept = kept_of(tensors()["w1"], array(model, "w1"), 1)
    X = np.concatenate([feeds["X"] for feeds in data]).astype(np.float64)
    U = np.maximum(X @ tensors()["w1"] + tensors()["b1"], 0)[:, kept]
    U = np.hstack([U, np.ones((len(U), 1))])
    best = np.linalg.lstsq(U, np.concatenate(expected), rcond=None)[0]
    np.testing.assert_allclose(array(model, "w2"), best[:-1], atol=2e-4)
    np.testing.assert_allclose(array(model, "b2"), best[-1], atol=2e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu erf", "gated with biases"])
def test_dead_and_doubled_neurons_go_without_a_trace(build, run, remove, activation):
    given = tensors()
    for name in ("w1", "w3"):
        given[name][:, 8:12] = given[name][:, 4:8]  # copies
        given[name][:, 20:24] = 0  # constant
    given["b1"][8:12], given["b1"][20:24] = given["b1"][4:8], -1
    model = build(f"{FIRST['matmul']} {ACTIVATIONS[activation]} {LAST['matmul']}", given)
    feeds = batches(1, 50, seed=7)[0]
    expected = run(model, feeds)["Y"]
    remove(Ffn(sparsity=0.25, dampening_frac=1e-7), model, batches())
    assert array(model, "w1").shape == (D, 24)
    np.testing.assert_allclose(run(model, feeds)["Y"], expected, atol=1e-5)


def test_without_bias_correction_the_bias_stays(build, remove):
    model = build(f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}")
    remove(Ffn(sparsity=0.25, bias_correction=False), model, batches())
    np.testing.assert_array_equal(array(model, "b2"), tensors()["b2"])


def test_it_beats_removing_the_smallest(build, run, remove):
    body = f"{FIRST['matmul']} U = Gelu(A) {LAST['matmul']}"
    model, feeds = build(body), batches(1, 200, seed=9)[0]
    expected = run(model, feeds)["Y"]
    given = tensors()
    kept = np.sort(np.argsort((given["w2"] ** 2).sum(axis=1))[8:])
    own = {**given, "w1": given["w1"][:, kept], "b1": given["b1"][kept], "w2": given["w2"][kept]}
    smallest = np.linalg.norm(run(build(body, own), feeds)["Y"] - expected)
    remove(Ffn(sparsity=0.25), model, batches(6))
    assert np.linalg.norm(run(model, feeds)["Y"] - expected) < 0.7 * smallest


def test_shapes_of_values_are_updated(build, remove):
    model = build(f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}")
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["B", D if node.outputs[0].name in "VY" else H])
    remove(Ffn(sparsity=0.25), model, batches())
    sizes = {node.outputs[0].name: node.outputs[0].shape[1] for node in model.graph}
    assert sizes == {"M": 24, "A": 24, "U": 24, "V": D, "Y": D}
    assert model.graph.initializers["w2"].shape == (24, D)


def test_constants_that_others_read_are_copied(build, run, remove):
    body = f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']} Z = Exp(b1)"
    model = build(body, outputs=f"float[B, {D}] Y, float[{H}] Z")
    remove(Ffn(sparsity=0.25), model, batches())
    found = run(model, batches(1)[0])
    np.testing.assert_allclose(found["Z"], np.exp(tensors()["b1"]), rtol=1e-6)
    assert array(model, "b1").shape == (H,)
    assert array(model, "b1.cut").shape == (24,)


def test_a_chain_of_layers(build, run, remove):
    """The weight in the middle loses rows and columns."""
    body = "A = MatMul(X, w1) U = Relu(A) C = MatMul(U, wm) E = Relu(C) Y = MatMul(E, w2)"
    middle = np.random.default_rng(3).standard_normal((H, H)).astype(np.float32)
    model = build(body, {**tensors(), "wm": middle})
    result = remove(Ffn(sparsity=0.25), model, batches())
    assert result.statistics["places"] == 2
    assert [array(model, name).shape for name in ("w1", "wm", "w2")] == [(D, 24), (24, 24), (24, D)]
    assert run(model, batches(1)[0])["Y"].shape == (100, D)


def test_two_layers_that_read_the_same_neurons(build, run, remove):
    body = "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) Z = MatMul(U, wz)"
    last = np.random.default_rng(3).standard_normal((H, 5)).astype(np.float32)
    model = build(body, {**tensors(), "wz": last}, outputs=f"float[B, {D}] Y, float[B, 5] Z")
    result = remove(Ffn(sparsity=0.25), model, batches())
    assert result.statistics["places"] == 1
    assert array(model, "w2").shape == (24, D)
    assert array(model, "wz").shape == (24, 5)
    assert set(run(model, batches(1)[0])) == {"Y", "Z"}


LEFT = {
    "residual": (
        "A = MatMul(X, w1) U = Relu(A) R = Add(U, S) Y = MatMul(R, w2)",
        {"inputs": f"float[B, {D}] X, float[B, {H}] S"},
        "w2",
        "binds the units to those of another path",
    ),
    "hidden value is an output": (
        "U = MatMul(X, w1) Y = MatMul(U, w2)",
        {"outputs": f"float[B, {D}] Y, float[B, {H}] U"},
        "w2",
        "an output of the model",
    ),
    "read by something that mixes": (
        "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) Z = Softmax(U)",
        {"outputs": f"float[B, {D}] Y, float[B, {H}] Z"},
        "w2",
        "mixes the units",
    ),
    "split through the neurons": (
        "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) P, Q = Split<axis = 1, num_outputs = 2>(U) Z = Add(P, Q)",
        {"outputs": f"float[B, {D}] Y, float[B, {H // 2}] Z"},
        "w2",
        "cuts through units",
    ),
    "in a loop": (
        """A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) n = Constant<value = int64 {2}>()
           c = Constant<value = bool {1}>()
           Z = Loop(n, c, X) <body = b (int64 i, bool d, float[B, 12] x) => (bool e, float[B, 12] z)
                { e = Identity(d) f = ReduceMean(U) z = Add(x, f) }>""",
        {"outputs": f"float[B, {D}] Y, float[B, {D}] Z"},
        "w2",
        "is read in the body of an If, Loop or Scan",
    ),
    "concat": (
        "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) Z = Concat<axis = 1>(U, X)",
        {"outputs": f"float[B, {D}] Y, float[B, {H + D}] Z"},
        "w2",
        "binds the units to others",
    ),
    "first weight is shared": (
        "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) N = Neg(X) Z = MatMul(N, w1)",
        {"outputs": f"float[B, {D}] Y, float[B, {H}] Z"},
        "w2",
        "w1 is shared by several layers",
    ),
    "last weight is shared": (
        "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) V = MatMul(S, w2)",
        {"inputs": f"float[B, {D}] X, float[B, {H}] S", "outputs": f"float[B, {D}] Y, float[B, {D}] V"},
        "w2",
        "w2 is shared by several layers",
    ),
    "first weight is given from outside": (
        "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2)",
        {"inputs": f"float[B, {D}] X, float[{D}, {H}] w1"},
        "w1",
        "is also a graph input",
    ),
    "size is used": (
        "A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) s = Shape(U) Z = Cast<to = 1>(s)",
        {"outputs": f"float[B, {D}] Y, float[2] Z"},
        "w2",
        "the shape of U is an output",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_lose_neurons_is_left_and_named(build, remove, case):
    body, options, place, reason = LEFT[case]
    model = build(body, **options)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    data = [
        {
            value.name: np.ones([9, value.shape[1]], np.float32)
            for value in model.graph.inputs
            if value.name in "XS"
        }
    ]
    result = remove(Ffn(sparsity=0.25), model, data)
    assert not result.modified
    assert reason in {item.place: item.reason for item in result.declined}[place]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_model_without_hidden_neurons_needs_no_data_and_is_not_changed(build):
    model = build(
        "N = LayerNormalization(X, b2) Y = MatMul(N, w)",
        {"b2": tensors()["b2"], "w": np.eye(D, dtype=np.float32)},
    )
    result = Ffn(sparsity=0.5)(model)
    assert not result.modified
    assert result.declined == ()


def test_the_shape_of_the_batch_may_be_asked(build, run, remove):
    body = """A = MatMul(X, w1) U = Relu(A) Y = MatMul(U, w2) s = Shape(U) i = Constant<value_int = 0>()
              b = Gather(s, i) Z = Cast<to = 1>(b)"""
    model = build(body, outputs=f"float[B, {D}] Y, float Z")
    assert remove(Ffn(sparsity=0.25), model, batches()).modified
    assert run(model, batches(1)[0])["Z"] == 100


def test_targets_and_ignore(build, remove):
    body = f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}"
    ignored = remove(Ffn(sparsity=0.25, ignore=("w1",)), build(body), batches())
    assert [item.reason for item in ignored.declined] == ["listed in ignore"]
    assert remove(Ffn(sparsity=0.25, targets=("w2",)), build(body), batches()).modified
    with pytest.raises(UsageError, match="'w9' matches no weight"):
        remove(Ffn(sparsity=0.25, targets=("w9",)), build(body), batches())


def test_too_few_neurons(build, remove):
    result = remove(Ffn(sparsity=0.1), build(f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}"), batches())
    assert not result.modified
    assert result.declined[0].reason == "of 32 neurons, none go at sparsity 0.1 and multiple_of 8"


def test_nan_is_named(build, remove):
    given = tensors()
    given["w1"][3, 3] = np.nan
    result = remove(
        Ffn(sparsity=0.25), build(f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}", given), batches()
    )
    assert [item.reason for item in result.declined] == ["holds NaN or Inf"]


def test_no_data(build):
    with pytest.raises(UsageError, match=r"prune\.ffn needs calibration data"):
        Ffn(sparsity=0.25)(build(f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "sparsity must be given"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        ({"sparsity": 0.5, "multiple_of": 0}, "multiple_of must be 1 or more"),
        ({"sparsity": 0.5, "dampening_frac": -1.0}, "dampening_frac must be 0 or more"),
        ({"sparsity": 0.5, "targets": ("re:(",)}, "is not a regular expression"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        Ffn(**options)


def test_two_runs_give_the_same_bytes(build, remove):
    body = f"{FIRST['matmul']} U = Gelu(A) {LAST['matmul']}"
    models = [build(body), build(body)]
    for model in models:
        remove(Ffn(sparsity=0.5), model, batches())
    one, two = (ir.to_proto(model).SerializeToString(deterministic=True) for model in models)
    assert one == two


def test_half_precision(build, run, remove):
    given = tensors(dtype=np.float16)
    model = build(
        f"{FIRST['matmul']} U = Relu(A) {LAST['matmul']}",
        given,
        inputs=f"float16[B, {D}] X",
        outputs=f"float16[B, {D}] Y",
    )
    remove(Ffn(sparsity=0.25), model, batches(dtype=np.float16))
    assert array(model, "w2").dtype == np.float16
    assert array(model, "w2").shape == (24, D)
    assert run(model, batches(1, dtype=np.float16)[0])["Y"].dtype == np.float16
