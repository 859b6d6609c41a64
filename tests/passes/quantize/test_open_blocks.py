"""quant.open-blocks: weights of MatMulNBits become weights like all others, with the same numbers."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.model.encodings import Dense, Packed
from sparse_onnx.model.integer_grid import IntegerGrid, read_grid
from sparse_onnx.model.nbits import pack_bits
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits
from sparse_onnx.passes.quantize.open_blocks import OpenBlocks

RNG = np.random.default_rng(5)
HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def stored(K, N, bits=4, block=32, *, signs=True, zero_points=False):
    """Packed integers, scales of both signs, zero points of their own or none; and what they are, float64 [K, N]."""
    blocks, most = -(-K // block), 2**bits - 1
    q = RNG.integers(0, most + 1, (N, blocks, block)).astype(np.uint8)
    scale = RNG.uniform(0.01, 0.02, (N, blocks)).astype(np.float16).astype(np.float32)
    if signs:
        scale *= RNG.choice([-1, 1], scale.shape).astype(np.float32)
    zero = RNG.integers(0, most + 1, (N, blocks)).astype(np.uint8)
    tensors = {"q": pack_bits(q, bits), "s": scale.reshape(-1)}
    if zero_points:
        tensors["z"] = pack_bits(zero, bits).reshape(-1)
    else:
        zero = np.full((N, blocks), 2 ** (bits - 1), np.uint8)
    values = (q.astype(np.float64) - zero[..., None]) * scale[..., None]
    return tensors, values.reshape(N, -1)[:, :K].T


def build(from_text, tensors, K, N, bits=4, block=32, *, more="", tail="", kind="float", outputs=""):
    attributes = f"K = {K}, N = {N}, bits = {bits}, block_size = {block}{more}"
    z = ", z" if "z" in tensors else (", " if tail else "")
    return from_text(
        f"""{HEAD} g ({kind}[B, {K}] X) => ({kind}[B, {N}] Y{outputs}) {{
        Y = com.microsoft.MatMulNBits<{attributes}>(X, q, s{z}{tail}) }}""",
        **tensors,
    )


def x(rows, K):
    return {"X": RNG.standard_normal((rows, K)).astype(np.float32)}


def op_types(model):
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 128), (8, 32), (4, 512)])
def test_the_numbers_stay(from_text, run, bits, block, signs, zero_points):
    K, N = 70, 24
    tensors, W = stored(K, N, bits, block, signs=signs, zero_points=zero_points)
    model = build(from_text, tensors, K, N, bits, block)
    feeds = x(3, K)
    result = OpenBlocks()(model)
    assert result.statistics == {"weights": 1, "floats": 0}
    assert op_types(model) == [f"Unpack{bits}" + "WithZeros" * (signs or zero_points), "MatMul"]
    (weight,), _ = find_weights(model, encoded=True)
    assert weight.name == "q"
    assert isinstance(weight.encoding, Packed)
    np.testing.assert_allclose(weight.matrix(), W, rtol=1e-6)
    grid = read_grid(weight)
    assert isinstance(grid, IntegerGrid)
    assert grid.scale.min() > 0
    np.testing.assert_allclose(run(model, feeds)["Y"], feeds["X"].astype(np.float64) @ W, atol=1e-4)
    assert set(model.graph.initializers) == {"q", "q.scale", *["q.zero_point"] * (signs or zero_points)}
    assert not OpenBlocks()(model).modified


def test_of_more_than_256_inputs_a_group_is_256(from_text, run):
    K, N = 600, 8
    tensors, W = stored(K, N, block=512)
    model = build(from_text, tensors, K, N, block=512)
    OpenBlocks()(model)
    (weight,), _ = find_weights(model, encoded=True)
    assert weight.encoding.group_size == 256
    np.testing.assert_allclose(weight.matrix(), W, rtol=1e-6)


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1.0003, ir.DataType.FLOAT16), (1e-6, ir.DataType.FLOAT), (1e7, ir.DataType.FLOAT)]
)
def test_scales_become_halves_where_these_are_near(from_text, factor, dtype):
    tensors, W = stored(64, 8)
    tensors["s"] *= np.float32(factor)
    model = build(from_text, tensors, 64, 8)
    OpenBlocks()(model)
    (weight,), _ = find_weights(model, encoded=True)
    assert weight.encoding.scale.dtype == dtype
    np.testing.assert_allclose(weight.matrix(), W * factor, rtol=2.0**-11)


def test_a_block_of_scale_zero_is_zero(from_text, run):
    tensors, W = stored(64, 8)
    tensors["s"][3] = 0
    W.T.reshape(8, 2, 32)[1, 1] = 0
    model = build(from_text, tensors, 64, 8)
    feeds = x(2, 64)
    OpenBlocks()(model)
    np.testing.assert_allclose(run(model, feeds)["Y"], feeds["X"].astype(np.float64) @ W, atol=1e-4)


def test_a_bias_is_added(from_text, run):
    tensors, W = stored(64, 16)
    tensors["c"] = RNG.standard_normal(16).astype(np.float32)
    model = build(from_text, tensors, 64, 16, tail=", , c")
    feeds = x(2, 64)
    OpenBlocks()(model)
    assert op_types(model)[-2:] == ["MatMul", "Add"]
    assert model.graph.outputs[0].name == "Y"
    np.testing.assert_allclose(run(model, feeds)["Y"], feeds["X"] @ W + tensors["c"], atol=1e-4)


def test_what_is_to_have_other_bits_becomes_floats(from_text, run):
    tensors, W = stored(64, 16)
    feeds = x(2, 64)
    for bits, floats in ((8, 1), (4, 0)):
        model = build(from_text, tensors, 64, 16)
        assert OpenBlocks(bits)(model).statistics == {"weights": 1, "floats": floats}
        (weight,), _ = find_weights(model, encoded=True)
        assert isinstance(weight.encoding, Dense) == bool(floats)
        np.testing.assert_allclose(run(model, feeds)["Y"], feeds["X"] @ W, atol=1e-4)
    with pytest.raises(UsageError, match="bits"):
        OpenBlocks(9)


def test_a_weight_of_several_products(from_text, run):
    tensors, W = stored(32, 32)
    attributes = "K = 32, N = 32, bits = 4, block_size = 32"
    model = from_text(
        f"""{HEAD} g (float[B, 32] X) => (float[B, 32] Y) {{
        A = com.microsoft.MatMulNBits<{attributes}>(X, q, s)
        Y = com.microsoft.MatMulNBits<{attributes}>(A, q, s) }}""",
        **tensors,
    )
    OpenBlocks()(model)
    assert op_types(model).count("MatMul") == 2
    feeds = x(2, 32)
    np.testing.assert_allclose(run(model, feeds)["Y"], feeds["X"] @ W @ W, rtol=1e-4, atol=1e-4)


def test_back_as_it_was(from_text, run):
    """Lowered again, the operator multiplies by the same numbers."""
    tensors, W = stored(64, 16)
    model = build(from_text, tensors, 64, 16)
    feeds = x(4, 64)
    OpenBlocks()(model)
    (candidate,), _ = find_candidates(model)
    assert "int4-nbits" in [form.name for form in candidate.forms]
    LowerMatMulNBits()(model)
    assert op_types(model) == ["MatMulNBits"]
    expected = feeds["X"].astype(np.float64) @ W
    assert (
        abs(run(model, feeds)["Y"] - expected).max() < 0.03 * abs(expected).max()
    )  # of activations in 8 bits


def tied(from_text):
    tensors, _ = stored(32, 16)
    return from_text(
        f"""{HEAD} g (float[B, 32] X, int64[B] I) => (float[B, 16] Y, uint8[B, 16] E) {{
        Y = com.microsoft.MatMulNBits<K = 32, N = 16, bits = 4, block_size = 32>(X, q, s)
        r = Reshape(q, to) E = Gather(r, I) }}""",
        **tensors,
        to=np.array([16, 16]),
    )


def two_bits(from_text):
    tensors, _ = stored(32, 16, bits=2)
    return build(from_text, tensors, 32, 16, bits=2)


def not_finite(from_text):
    tensors, _ = stored(32, 16)
    tensors["s"][4] = np.inf
    return build(from_text, tensors, 32, 16)


def other_order(from_text):
    tensors, _ = stored(32, 16)
    tensors["g"] = np.zeros(32, np.int32)
    return build(from_text, tensors, 32, 16, tail=", g")


def floats(from_text):
    return from_text(
        f"{HEAD} g (float[B, 8] X) => (float[B, 4] Y) {{ Y = MatMul(X, w) }}", w=np.ones((8, 4), np.float32)
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [(tied, None), (two_bits, "has 2 bits"), (not_finite, "NaN or Inf"), (other_order, None), (floats, None)],
)  # fmt: skip
def test_what_stays(from_text, make, reason):
    model = make(from_text)
    before = op_types(model)
    result = OpenBlocks()(model)
    assert not result.modified
    assert op_types(model) == before
    assert [place.place for place in result.declined] == ["q"] * (reason is not None)
    assert all(reason in place.reason for place in result.declined)


def test_of_halves(from_text):
    tensors, W = stored(32, 16)
    tensors["s"] = tensors["s"].astype(np.float16)
    model = build(from_text, tensors, 32, 16, kind="float16")
    OpenBlocks()(model)
    (weight,), _ = find_weights(model, encoded=True)
    assert weight.dtype == ir.DataType.FLOAT16
    np.testing.assert_allclose(
        weight.matrix().astype(np.float32), W.astype(ml_dtypes.bfloat16).astype(float), rtol=2e-2, atol=1e-3
    )
