"""Channels between convolutions."""

import numpy as np
import pytest

from sparse_onnx.passes.structured.channels import Channels

C, H, N = 4, 24, 6

BETWEEN = {
    "relu": "U = Relu(A)",
    "silu": "s = Sigmoid(A) U = Mul(A, s)",
    "clip": "U = Clip(A, low, high)",
    "prelu": "U = PRelu(A, slopes)",
    "max pool": "r = Relu(A) U = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)",
    "average pool": "r = Relu(A) U = AveragePool<kernel_shape = [2, 2]>(r)",
    "batch normalization": "n = BatchNormalization(A, gamma, beta, mean, variance) U = Relu(n)",
    "instance normalization": "n = InstanceNormalization(A, gamma, beta) U = Relu(n)",
    "depthwise": "r = Relu(A) d = Conv<group = 24, pads = [1, 1, 1, 1]>(r, wd, bd) U = Relu(d)",
    "squeeze and excitation": """r = Relu(A) g = GlobalAveragePool(r) e = Conv(g, we, be) f = Relu(e)
                                 k = Conv(f, wk) l = Sigmoid(k) U = Mul(r, l)""",
}
FIRST, LAST = "A = Conv<pads = [1, 1, 1, 1]>(X, w1, b1)", "Y = Conv<pads = [1, 1, 1, 1]>(U, w2, b2)"
CUT = {
    "w1": 0,
    "b1": 0,
    "slopes": 0,
    "gamma": 0,
    "beta": 0,
    "mean": 0,
    "variance": 0,
    "wd": 0,
    "bd": 0,
    "wk": 0,
}


def tensors(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    return {
        "w1": normal(H, C, 3, 3),
        "w2": normal(N, H, 3, 3),
        "wd": normal(H, 1, 3, 3),
        "we": normal(8, H, 1, 1),
        "wk": normal(H, 8, 1, 1),
        "b1": normal(H),
        "b2": normal(N),
        "bd": normal(H),
        "be": normal(8),
        "slopes": normal(H, 1, 1),
        "gamma": rng.uniform(0.5, 1.5, H).astype(np.float32),
        "beta": normal(H),
        "mean": normal(H),
        "variance": rng.uniform(0.5, 1.5, H).astype(np.float32),
        "low": np.array(0, np.float32),
        "high": np.array(1, np.float32),
    }


def used(body, given):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in given.items() if name in words}


@pytest.fixture
def build(from_text):
    def build(body, given=None, outputs=f"float[B, {N}, P, Q] Y", inputs=f"float[B, {C}, 8, 8] X"):
        text = f'<ir_version: 10, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
        return from_text(text, **used(body, tensors() if given is None else given))

    return build


def batches(count=4, seed=1):
    rng = np.random.default_rng(seed)
    return [{"X": rng.standard_normal((4, C, 8, 8)).astype(np.float32)} for _ in range(count)]


def array(model, name):
    return model.graph.initializers[name].const_value.numpy()


def channels_of(before, after):
    return [next(i for i, old in enumerate(before) if np.array_equal(old, new)) for new in after]


@pytest.mark.parametrize("between", BETWEEN)
def test_everything_that_may_lie_between(build, run, remove, between):
    body = f"{FIRST} {BETWEEN[between]} {LAST}"
    given = tensors()
    model = build(body)
    result = remove(Channels(sparsity=1 / 3, targets=("w2",)), model, batches())
    assert [item for item in result.declined if item.place == "w2"] == []
    assert array(model, "w1").shape == (16, C, 3, 3)
    assert array(model, "w2").shape == (N, 16, 3, 3)
    kept = channels_of(given["w1"], array(model, "w1"))
    small = {name: np.take(value, kept, CUT[name]) if name in CUT else value for name, value in given.items()}
    small |= {
        name: array(model, name) for name in ("w2", "b2", "we", "be") if name in model.graph.initializers
    }
    feeds = batches(1, seed=5)[0]
    expected = run(build(body.replace("group = 24", "group = 16"), small), feeds)["Y"]
    np.testing.assert_allclose(run(model, feeds)["Y"], expected, atol=1e-5)


def test_all_of_squeeze_and_excitation(build, run, remove):
    """Two places that read and write each other's layers, one without biases."""
    given = tensors() | {"we": np.random.default_rng(5).standard_normal((16, H, 1, 1)).astype(np.float32)}
    given["wk"] = np.random.default_rng(6).standard_normal((H, 16, 1, 1)).astype(np.float32)
    body = f"{FIRST} {BETWEEN['squeeze and excitation']} {LAST}".replace("Conv(g, we, be)", "Conv(g, we)")
    model = build(body, given)
    result = remove(Channels(sparsity=0.6), model, batches())
    assert result.statistics["places"] == 2
    assert [array(model, name).shape[:2] for name in ("w1", "w2", "we", "wk")] == [
        (8, C),
        (N, 8),
        (8, 8),
        (8, 8),
    ]
    assert array(model, "we.bias").shape == array(model, "wk.bias").shape == (8,)
    assert run(model, batches(1)[0])["Y"].shape == (4, N, 8, 8)


def test_a_convolution_in_one_dimension_without_biases(build, run, remove):
    rng = np.random.default_rng(2)
    given = {
        "w1": rng.standard_normal((H, C, 3)).astype(np.float32),
        "w2": rng.standard_normal((N, H, 3)).astype(np.float32),
    }
    model = build(
        "A = Conv(X, w1) U = Relu(A) Y = Conv(U, w2)",
        given,
        inputs=f"float[B, {C}, 30] X",
        outputs=f"float[B, {N}, P] Y",
    )
    data = [{"X": rng.standard_normal((4, C, 30)).astype(np.float32)} for _ in range(3)]
    remove(Channels(sparsity=1 / 3), model, data)
    assert array(model, "w2").shape == (N, 16, 3)
    assert run(model, data[0])["Y"].shape == (4, N, 26)


def test_the_last_layer_is_the_least_squares_fit(build, run, remove):
    """Where there is no padding and no window, the rows are the pixels."""
    body = "A = Conv(X, w1, b1) U = Relu(A) Y = Conv(U, w2, b2)"
    given = tensors() | {"w2": np.random.default_rng(4).standard_normal((N, H, 1, 1)).astype(np.float32)}
    model, data = build(body, given), batches(6)
    expected = np.concatenate([run(model, feeds)["Y"].transpose(0, 2, 3, 1).reshape(-1, N) for feeds in data])
    hidden = build(
        body.replace("U =", "Z =").replace("Conv(U", "Conv(Z"),
        given,
        outputs=f"float[B, {H}, 6, 6] Z, float[B, {N}, 6, 6] Y",
    )
    U = np.concatenate([run(hidden, feeds)["Z"].transpose(0, 2, 3, 1).reshape(-1, H) for feeds in data])
    remove(Channels(sparsity=1 / 3, dampening_frac=0.0), model, data)
    kept = channels_of(given["w1"], array(model, "w1"))
    best = np.linalg.lstsq(np.hstack([U[:, kept], np.ones((len(U), 1))]), expected, rcond=None)[0]
    np.testing.assert_allclose(array(model, "w2")[:, :, 0, 0].T, best[:-1], atol=1e-3)
    np.testing.assert_allclose(array(model, "b2"), best[-1], atol=1e-3)


def test_doubled_and_dead_channels_go_without_a_trace(build, run, remove):
    given = tensors()
    given["w1"][8:12], given["b1"][8:12] = given["w1"][4:8], given["b1"][4:8]
    given["w1"][20:24], given["b1"][20:24] = 0, -1
    model = build(f"{FIRST} U = Relu(A) {LAST}", given)
    feeds = batches(1, seed=5)[0]
    expected = run(model, feeds)["Y"]
    remove(Channels(sparsity=1 / 3, dampening_frac=1e-8), model, batches(12))
    assert array(model, "w1").shape[0] == 16
    np.testing.assert_allclose(run(model, feeds)["Y"], expected, atol=1e-5)


@pytest.mark.parametrize("correct", [True, False])
def test_a_convolution_without_bias_gets_one_for_the_mean(build, run, remove, correct):
    body = "A = Conv(X, w1, b1) U = Sigmoid(A) Y = Conv(U, w2)"
    model, data = build(body), batches()
    expected = [run(model, feeds)["Y"] for feeds in data]
    remove(Channels(sparsity=1 / 3, bias_correction=correct), model, data)
    (last,) = [node for node in model.graph if [value.name for value in node.inputs[1:2]] == ["w2"]]
    assert (len(last.inputs) == 3) == correct
    shift = np.mean(
        [run(model, feeds)["Y"] - y for feeds, y in zip(data, expected, strict=True)], axis=(0, 1, 3, 4)
    )
    assert (np.abs(shift).max() < 1e-5) == correct


LEFT = {
    "residual": (
        "A = Conv(X, w1) P = Conv<pads = [1, 1, 1, 1]>(A, wr) R = Add(P, A) U = Relu(R) Y = Conv(U, w2)",
        "w2",
        "binds the units to those of another path, such as a residual",
    ),
    "concat": (
        "A = Conv(X, w1) U = Relu(A) K = Concat<axis = 1>(U, U) Y = Conv(K, wc)",
        "wc",
        "binds the units to others",
    ),
    "groups": (
        "A = Conv(X, w1) U = Relu(A) Y = Conv<group = 2>(U, wg) Z = Conv(U, w2)",
        "w2",
        "2 groups for 6 channels",
    ),
    "flattened": ("A = Conv(X, w1) U = Relu(A) Y = Conv(U, w2) Z = Flatten(U)", "w2", "may mix them"),
    "softmax over channels": (
        "A = Conv(X, w1) U = Softmax<axis = 1>(A) Y = Conv(U, w2) V = Conv(A, w2b)",
        "w2b",
        "mixes the units",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_lose_channels_is_left_and_named(build, remove, case):
    body, place, reason = LEFT[case]
    rng = np.random.default_rng(3)
    given = tensors() | {
        "wr": rng.standard_normal((H, H, 3, 3)).astype(np.float32),
        "wc": rng.standard_normal((N, 2 * H, 1, 1)).astype(np.float32),
        "wg": rng.standard_normal((N, H // 2, 1, 1)).astype(np.float32),
        "w2b": rng.standard_normal((N, H, 1, 1)).astype(np.float32),
    }
    rest = {
        "groups": f", float[B, {N}, I, J] Z",
        "flattened": ", float[B, L] Z",
        "softmax over channels": f", float[B, {N}, I, J] V",
    }
    model = build(body, given, outputs=f"float[B, {N}, P, Q] Y{rest.get(case, '')}")
    result = remove(Channels(sparsity=1 / 3), model, batches(1))
    assert not result.modified
    assert reason in {item.place: item.reason for item in result.declined}[place]


def test_linears_are_none_of_its_business(build):
    model = build(
        "F = Flatten(X) Y = MatMul(F, w)", {"w": np.ones((C * 64, N), np.float32)}, outputs=f"float[B, {N}] Y"
    )
    result = Channels(sparsity=0.5)(model)
    assert not result.modified
    assert result.declined == ()
