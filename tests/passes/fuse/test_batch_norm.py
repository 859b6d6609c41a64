"""Folding batch normalization into convolutions: where it applies, and where it must not."""

import re

import numpy as np
import pytest

from sparse_onnx.passes.fuse.batch_norm import FuseBatchNorm, fold

RNG = np.random.default_rng(4)
X = RNG.standard_normal((2, 4, 6, 7)).astype(np.float32)
HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def tensors(n=8, dtype=np.float32):
    arrays = {
        "W": RNG.standard_normal((n, 4, 3, 3)),
        "b": RNG.standard_normal(n),
        "gamma": RNG.uniform(0.5, 2, n),
        "beta": RNG.standard_normal(n),
        "mean": RNG.standard_normal(n),
        "var": RNG.uniform(0.1, 3, n),
    }
    return {name: array.astype(dtype) for name, array in arrays.items()}


def build(from_text, body, x="float[B, 4, 6, 7] X", y="float[B, 8, 4, 5] Y", dtype=np.float32, **extra):
    words = re.findall(r"\w+", body)
    used = {name: array for name, array in tensors(dtype=dtype).items() if name in words}
    return from_text(f"{HEAD} g ({x}) => ({y}) {{ {body} }}", **used, **extra)


NORM = "BatchNormalization<epsilon = 0.01>(h, gamma, beta, mean, var)"
FOLDED = {
    "with bias": f"h = Conv(X, W, b) Y = {NORM}",
    "without bias": f"h = Conv(X, W) Y = {NORM}",
    "default epsilon": "h = Conv(X, W) Y = BatchNormalization(h, gamma, beta, mean, var)",
    "in front of an activation": f"h = Conv(X, W) n = {NORM} Y = Relu(n)",
    "read twice": f"h = Conv(X, W) n = {NORM} r = Relu(n) Y = Add(n, r)",
}


@pytest.mark.parametrize("case", FOLDED)
def test_folded(case, from_text, run):
    model = build(from_text, FOLDED[case])
    before = run(model, {"X": X})
    result = FuseBatchNorm()(model)
    assert result.statistics == {"folded": 1}
    assert "BatchNormalization" not in [node.op_type for node in model.graph]
    assert len(model.graph.initializers) == 2
    np.testing.assert_allclose(run(model, {"X": X})["Y"], before["Y"], rtol=1e-4, atol=1e-5)
    assert not FuseBatchNorm()(model).modified


@pytest.mark.parametrize("sizes", [(9,), (5, 4, 3)])
def test_any_number_of_axes(sizes, from_text, run):
    arrays = {**tensors(), "W": RNG.standard_normal((8, 4, *[2] * len(sizes))).astype(np.float32)}
    x, y = (
        ", ".join(map(str, [f"float[B, {c}", *axes])) for c, axes in ((4, sizes), (8, "UVW"[: len(sizes)]))
    )
    model = from_text(f"{HEAD} g ({x}] X) => ({y}] Y) {{ h = Conv(X, W, b) Y = {NORM} }}", **arrays)
    feeds = {"X": RNG.standard_normal((2, 4, *sizes)).astype(np.float32)}
    before = run(model, feeds)
    assert FuseBatchNorm()(model).statistics == {"folded": 1}
    np.testing.assert_allclose(run(model, feeds)["Y"], before["Y"], rtol=1e-4, atol=1e-5)


def test_double_stays_double(from_text):
    model = build(
        from_text, f"h = Conv(X, W) Y = {NORM}", "double[B, 4, 6, 7] X", "double[B, 8, 4, 5] Y", np.float64
    )
    FuseBatchNorm()(model)
    assert [value.const_value.numpy().dtype for value in model.graph.initializers.values()] == [
        np.float64
    ] * 2


def test_formula():
    t = tensors(3)
    filters, bias = fold(t["W"], t["b"], t["gamma"], t["beta"], t["mean"], t["var"], 0.1)
    scale = t["gamma"] / np.sqrt(t["var"] + 0.1)
    np.testing.assert_allclose(filters, t["W"] * scale[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(bias, (t["b"] - t["mean"]) * scale + t["beta"], rtol=1e-5, atol=1e-6)
    assert filters.dtype == bias.dtype == np.float32


LEFT = {
    "result read elsewhere": (f"h = Conv(X, W) n = {NORM} Y = Add(n, h)", "not all that reads"),
    "shared weight": (
        f"h = Conv(X, W) n = {NORM} k = Conv(X, W) Y = Add(n, k)", "weight W is used elsewhere"
    ),
    "computed weight": (f"V = Neg(W) h = Conv(X, V) Y = {NORM}", "not constant"),
    "computed scale": (
        "s = Neg(gamma) h = Conv(X, W) Y = BatchNormalization(h, s, beta, mean, var)", "not constant"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_alone_with_the_reason(case, from_text):
    body, reason = LEFT[case]
    result = FuseBatchNorm()(build(from_text, body))
    assert not result.modified
    assert [reason in declined.reason for declined in result.declined] == [True]


def test_result_that_is_a_graph_output_is_left_alone(from_text):
    body = f"h = Conv(X, W) Y = {NORM}"
    result = FuseBatchNorm()(build(from_text, body, y="float[B, 8, 4, 5] Y, float[B, 8, 4, 5] h"))
    assert not result.modified


def test_scale_that_a_caller_may_replace_is_left_alone(from_text):
    model = build(from_text, f"h = Conv(X, W) Y = {NORM}", x="float[B, 4, 6, 7] X, float[8] gamma")
    assert not FuseBatchNorm()(model).modified


def test_normalization_after_something_else_is_not_looked_at(from_text):
    body = "h = Relu(X) Y = BatchNormalization(h, gamma, beta, mean, var)"
    four = {name: array for name, array in tensors(4).items() if name not in ("W", "b")}
    model = from_text(f"{HEAD} g (float[B, 4, 6, 7] X) => (float[B, 4, 6, 7] Y) {{ {body} }}", **four)
    result = FuseBatchNorm()(model)
    assert (result.modified, result.declined) == (False, ())


def test_parameters_in_constant_nodes(from_text, run):
    """As exporters write those of few channels; the folded ones are initializers."""
    vector = lambda name: f"{name} = Constant<value = float[2] {{0.5, 1.5}}>() "  # noqa: E731
    body = "".join(map(vector, ("c", "g", "s", "m", "v")))
    body += "h = Conv(X, F, c) Y = BatchNormalization(h, g, s, m, v)"
    F = RNG.standard_normal((2, 4, 3, 3)).astype(np.float32)
    model = build(from_text, body, y="float[B, 2, 4, 5] Y", F=F)
    before = run(model, {"X": X})
    assert FuseBatchNorm()(model).statistics == {"folded": 1}
    assert [node.op_type for node in model.graph] == ["Conv"]
    np.testing.assert_allclose(run(model, {"X": X})["Y"], before["Y"], rtol=1e-4, atol=1e-5)


def test_a_weight_in_a_constant_node_stays(from_text):
    body = (
        "F = Constant<value = float[1, 1, 1, 1] {2.0}>() h = Conv(Z, F) Y = BatchNormalization(h, o, o, o, o)"
    )
    model = build(from_text, body, "float[B, 1, 4, 5] Z", "float[B, 1, 4, 5] Y", o=np.ones(1, np.float32))
    (declined,) = FuseBatchNorm()(model).declined
    assert declined.reason == "follows a convolution whose weight F is no initializer"
