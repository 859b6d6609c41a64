"""clean.gemm-rows: a Gemm on flattened tokens becomes a product of the tokens as they are."""

import numpy as np
import pytest

from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.clean.cleanup import Unused
from sparse_onnx.passes.clean.gemm_rows import GemmRows
from sparse_onnx.passes.presets import CLEAN_PASSES

NUMBERS = {
    "c0": np.array([0]),
    "c1": np.array([1]),
    "c8": np.array([8]),
    "c12": np.array([12]),
    "rows": np.array([-1, 12]),
}
SIZES = "s = Shape(X) b = Gather(s, c0) l = Gather(s, c1)"


def build(from_text, body, *, outputs, inputs="float[B, S, 12] X", **tensors):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in {**NUMBERS, **tensors}.items() if name in words}
    return from_text(
        f'<ir_version: 9, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}', **used
    )


def x(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def op_types(model):
    return [node.op_type for node in model.graph]


SOME = [{"X": x(b, s, 12)} for b, s in ((2, 3), (1, 7), (4, 1))]
W, BIAS = x(12, 8, seed=1), x(8, seed=2)
GEMM = "r = Reshape(X, rows) g = Gemm(r, W, bias)"
BACK = f"{SIZES} t = Concat<axis = 0>(b, l, c8) Y = Reshape(g, t)"


def linear(from_text, body, **options):
    return build(from_text, body, outputs="float[B, S, 8] Y", W=W, bias=BIAS, **options)


def check_close(model, run, feeds):
    before = [run(model, feed)["Y"] for feed in feeds]
    result = GemmRows()(model)
    Unused()(model)
    for feed, expected in zip(feeds, before, strict=True):
        np.testing.assert_allclose(run(model, feed)["Y"], expected, rtol=1e-5, atol=1e-5)
    assert not GemmRows()(model).modified
    return result.statistics["linears"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_gemm_between_reshapes(from_text, run, bias):
    body = f"{GEMM} {BACK}" if bias else f"{GEMM} {BACK}".replace(", bias", "")
    model = linear(from_text, body)
    assert check_close(model, run, SOME) == 1
    assert op_types(model) == (["MatMul", "Add"] if bias else ["MatMul"])
    assert model.graph.node(0).inputs[0].name == "X"


def test_of_fixed_sizes(from_text, run):
    body = f"{GEMM} Y = Reshape(g, fixed8)"
    model = build(
        from_text, body, inputs="float[2, 3, 12] X", outputs="float[2, 3, 8] Y", W=W, bias=BIAS,
        fixed8=np.array([2, 3, 8]),
    )  # fmt: skip
    assert check_close(model, run, [{"X": x(2, 3, 12)}]) == 1
    assert op_types(model) == ["MatMul", "Add"]
    assert list(model.graph.initializers) == ["W", "bias"]


@pytest.mark.parametrize(
    "body",
    [
        f"{GEMM} {BACK}".replace("Gemm(", "Gemm<alpha = 2.0>("),
        f"{GEMM} {BACK}".replace("Gemm(", "Gemm<beta = 2.0>("),
        f"{GEMM} {SIZES} t = Concat<axis = 0>(l, b, c8) Y = Reshape(g, t)",  # other tokens
        f"{GEMM} {BACK} n = Neg(g) t2 = Concat<axis = 0>(b, l, c8) Z = Reshape(n, t2)",
        "r = Reshape(X, rows) g = Gemm(r, W, full) " + BACK,
    ],
)
def test_gemms_that_stay(from_text, body):
    full = np.ones((1, 8), np.float32)
    outputs = "float[N, M, 8] Y" + (", float[N, M, 8] Z" if "Z =" in body else "")
    model = build(from_text, body, outputs=outputs, W=W, bias=BIAS, full=full)
    assert not GemmRows()(model).modified


def test_the_rows_are_read_elsewhere(from_text, run):
    model = build(
        from_text, f"{GEMM} {BACK}", outputs="float[B, S, 8] Y, float[N, 12] r", W=W, bias=BIAS
    )  # fmt: skip
    assert check_close(model, run, SOME) == 1
    assert op_types(model) == ["Reshape", "MatMul", "Add"]


def test_conv1d_of_gpt2(from_text, run):
    """Two of them with an activation: reshaping forth and back in between goes as well."""
    body = f"""{GEMM} {BACK.replace("Y =", "h =")} a = Relu(h) r2 = Reshape(a, rows8) g2 = Gemm(r2, V)
               t2 = Concat<axis = 0>(b, l, c12) Y = Reshape(g2, t2)"""
    model = build(
        from_text, body, outputs="float[B, S, 12] Y", W=W, bias=BIAS, V=x(8, 12), rows8=np.array([-1, 8])
    )
    before = [run(model, feed)["Y"] for feed in SOME]
    Pipeline(CLEAN_PASSES)(model)
    assert op_types(model) == ["MatMul", "Add", "Relu", "MatMul"]
    for feed, expected in zip(SOME, before, strict=True):
        np.testing.assert_allclose(run(model, feed)["Y"], expected, rtol=1e-5, atol=1e-5)
