"""Packed weights of MatMulNBits: as the runtime multiplies by them, written back bit by bit, or left alone."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sparse_onnx.errors import UsageError
from sparse_onnx.model.nbits import pack_bits, read_packed_blocks, unpack_bits
from sparse_onnx.model.weights import find_weights

RNG = np.random.default_rng(4)
N, ROWS = 6, 5


@given(st.sampled_from([2, 4, 8]), st.data())
def test_what_is_packed_is_unpacked(bits, data):
    shape = data.draw(npst.array_shapes(min_dims=1, max_dims=3, max_side=9))
    integers = data.draw(npst.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack_bits(integers, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, shape[-1]), integers)


def test_the_lowest_bits_come_first():
    np.testing.assert_array_equal(pack_bits(np.array([1, 2, 3], np.uint8), 4), [0x21, 0x03])
    np.testing.assert_array_equal(pack_bits(np.array([3, 0, 1, 2, 1], np.uint8), 2), [0b10010011, 1])


def tensors(K, bits, block_size, zero, dtype=np.float32):
    """Random bytes, padding and unused bits included."""
    blocks = -(-K // block_size)
    made = {
        "q": RNG.integers(0, 256, (N, blocks, block_size * bits // 8)).astype(np.uint8),
        "s": RNG.uniform(0.01, 0.1, N * blocks).astype(dtype),
    }
    if zero:
        made["z"] = RNG.integers(0, 256, N * -(-blocks * bits // 8)).astype(np.uint8)
    return made


def build(from_text, K, bits, block_size, own, attributes=None):
    kind = "float16" if own["s"].dtype == np.float16 else "float"
    given = attributes or f"K = {K}, N = {N}, bits = {bits}, block_size = {block_size}"
    return from_text(
        f"""<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
        g ({kind}[{ROWS}, {K}] X) => ({kind}[{ROWS}, {N}] Y) {{
        Y = com.microsoft.MatMulNBits<{given}>(X, q, s{", z" * ("z" in own)}) }}""",
        **own,
    )


def values(K, bits, block_size, own):
    """W [K, N] float64, element by element."""
    blocks, mask, W = -(-K // block_size), 2**bits - 1, np.zeros((K, N))
    for n in range(N):
        for k in range(K):
            block, place = divmod(k, block_size)
            q = int(own["q"][n, block, place * bits // 8]) >> (place * bits % 8) & mask
            zero = 2 ** (bits - 1)
            if "z" in own:
                row = own["z"].reshape(N, -1)[n]
                zero = int(row[block * bits // 8]) >> (block * bits % 8) & mask
            W[k, n] = (q - zero) * np.float64(own["s"][n * blocks + block])
    return W


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("K", "block_size"), [(64, 32), (80, 32), (48, 16), (128, 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights(from_text, run, bits, K, block_size, zero):
    own = tensors(K, bits, block_size, zero)
    model = build(from_text, K, bits, block_size, own)
    (weight,), declined = find_weights(model, encoded=True)
    assert not declined
    assert (weight.shape, weight.size, weight.encoding.bits) == ((K, N), K * N, bits)
    exact = values(K, bits, block_size, own)
    np.testing.assert_allclose(weight.matrix(), exact, rtol=1e-6)
    x = np.random.default_rng(1).standard_normal((ROWS, K)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"X": x})["Y"], x @ exact, atol=1e-4)
    np.testing.assert_array_equal(weight.stored(weight.matrix()), own["q"])

    keep = np.random.default_rng(2).random((K, N)) < 0.4
    stored = weight.stored(np.where(keep, weight.matrix(), np.float32(0)))
    assert (stored.dtype, stored.shape) == (np.uint8, own["q"].shape)
    weight.value.const_value = ir.tensor(stored, name="q")
    np.testing.assert_allclose(run(model, {"X": x})["Y"], x @ np.where(keep, exact, 0), atol=1e-4)
    (again,), _ = find_weights(model, encoded=True)
    np.testing.assert_array_equal(again.matrix() == 0, ~keep | (exact == 0))
    if (-K) % block_size:  # padding stays
        tail = K % block_size * bits // 8
        np.testing.assert_array_equal(stored[:, -1, tail:], own["q"][:, -1, tail:])


@pytest.mark.parametrize("zero", [False, True])
def test_two_bits(from_text, zero):
    own = tensors(80, 2, 32, zero)
    (weight,), _ = find_weights(build(from_text, 80, 2, 32, own), encoded=True)
    np.testing.assert_allclose(weight.matrix(), values(80, 2, 32, own), rtol=1e-6)
    np.testing.assert_array_equal(weight.stored(weight.matrix()), own["q"])


def test_half_precision_scales(from_text):
    own = tensors(64, 4, 32, True, np.float16)
    (weight,), _ = find_weights(build(from_text, 64, 4, 32, own), encoded=True)
    np.testing.assert_allclose(weight.matrix(), values(64, 4, 32, own), rtol=1e-6)


def test_zeros_without_zero_points_are_the_middle(from_text):
    own = tensors(32, 4, 32, False) | {"q": np.full((N, 1, 16), 0x88, np.uint8)}
    (weight,), _ = find_weights(build(from_text, 32, 4, 32, own), encoded=True)
    assert not weight.matrix().any()
    own["q"] = RNG.integers(0, 256, (N, 1, 16)).astype(np.uint8)
    (weight,), _ = find_weights(build(from_text, 32, 4, 32, own), encoded=True)
    np.testing.assert_array_equal(
        weight.stored(np.zeros((32, N), np.float32)), np.full((N, 1, 16), 0x88, np.uint8)
    )


def test_values_off_the_grid_name_the_weight(from_text):
    (weight,), _ = find_weights(build(from_text, 32, 4, 32, tensors(32, 4, 32, False)), encoded=True)
    with pytest.raises(UsageError, match=r"^q: 192 of 192 values are not on the grid of UINT4"):
        weight.stored(np.full((32, N), 1000, np.float32))


GOOD = {"K": 64, "N": N, "bits": 4, "block_size": 32}
HUGE = 2**62


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"K": 65}, "need UINT8 of (6, 3, 16)"),
        ({"N": 7}, "need UINT8 of (7, 2, 16)"),
        ({"K": HUGE}, "has UINT8 of shape (6, 2, 16)"),
        ({"N": HUGE, "K": HUGE, "block_size": HUGE}, "has UINT8 of shape (6, 2, 16)"),
        ({"K": 0}, "has K = 0 and N = 6"),
        ({"N": -6}, "has K = 64 and N = -6"),
        ({"block_size": 0}, "has a block_size of 0"),
        ({"block_size": -32}, "has a block_size of -32"),
        ({"block_size": 24}, "has a block_size of 24"),
        ({"block_size": HUGE}, "has UINT8 of shape (6, 2, 16)"),
        ({"bits": 8}, "need UINT8 of (6, 2, 32)"),
        ({"bits": 3}, "has 3 bits"),
        ({"bits": HUGE}, f"has {HUGE} bits"),
    ],
)
def test_hostile_attributes_are_left_alone(from_text, attributes, reason):
    given_ = ", ".join(f"{name} = {value}" for name, value in (GOOD | attributes).items())
    model = build(from_text, 64, 4, 32, tensors(64, 4, 32, False), given_)
    weights, ((name, why),) = find_weights(model, encoded=True)
    assert (weights, name) == ([], "q")
    assert reason in why


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("s", np.ones(11, np.float32), "has scales FLOAT of shape (11,)"),
        ("s", np.ones(12, np.float64), "has scales DOUBLE"),
        ("s", np.ones((2, N), np.float32), "has scales FLOAT of shape (2, 6)"),
        ("z", np.ones(5, np.uint8), "has zero points UINT8 of shape (5,)"),
        ("z", np.ones(12, np.float32), "has zero points FLOAT"),
        ("q", np.ones((N, 2, 16), np.int8), "has INT8"),
        ("q", np.ones((N, 32), np.uint8), "has UINT8 of shape (6, 32)"),
    ],
)
def test_hostile_tensors_are_left_alone(from_text, name, array, reason):
    model = build(from_text, 64, 4, 32, tensors(64, 4, 32, True))
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    weights, ((place, why),) = find_weights(model, encoded=True)
    assert (weights, place) == ([], "q")
    assert reason in why


def test_inputs_in_another_order_are_left_alone(from_text):
    own = tensors(64, 4, 32, False) | {"g": np.zeros(64, np.int32)}
    model = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[{ROWS}, 64] X) => (float[{ROWS}, {N}] Y) {{
        Y = com.microsoft.MatMulNBits<K = 64, N = {N}, bits = 4, block_size = 32>(X, q, s, , g) }}""",
        **own,
    )
    assert find_weights(model, encoded=True) == (
        [],
        [("q", "has its inputs in another order, given by g_idx")],
    )


@given(
    st.integers(-3, 300),
    st.integers(-3, 300),
    st.integers(-3, 70),
    st.integers(-3, 300),
    npst.arrays(np.uint8, npst.array_shapes(min_dims=0, max_dims=4, max_side=6)),
    npst.arrays(np.float32, npst.array_shapes(min_dims=0, max_dims=2, max_side=9)),
)
def test_any_sizes_are_read_or_refused(K, N, bits, block_size, packed, scale):
    """Nothing that a file claims makes the reader fail, and what it takes can be decoded."""
    value = ir.Value(name="s", const_value=ir.tensor(scale))
    ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 17}, name="g")
    node = ir.Node(
        "com.microsoft",
        "MatMulNBits",
        [None, None, value],
        attributes={
            name: ir.AttrInt64(name, number)
            for name, number in {"K": K, "N": N, "bits": bits, "block_size": block_size}.items()
        },
        num_outputs=1,
    )
    read = read_packed_blocks(node, ir.tensor(packed))
    if not isinstance(read, str):
        assert read.decode(packed).shape == (N, K)
