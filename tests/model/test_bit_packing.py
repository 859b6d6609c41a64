"""Integers of few bits in bytes: what is packed comes back, in NumPy and by the operators that models carry."""

import numpy as np
import onnx
import onnx.reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from sparse_onnx.model.bit_packing import (
    STORED_BITS,
    UNPACK_DOMAIN,
    pack,
    packed_shape,
    stored_bits,
    unpack,
    unpack_function,
    unpack_name,
)


def integers_of(seed, bits, rows, columns):
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)


@given(st.integers(0, 2**32), st.sampled_from(STORED_BITS), st.integers(1, 70), st.integers(1, 9))
def test_what_is_packed_comes_back(seed, bits, rows, columns):
    integers = integers_of(seed, bits, rows, columns)
    packed = pack(integers, bits)
    assert (packed.dtype, packed.shape) == (np.uint8, packed_shape(rows, columns, bits))
    assert 0 <= 8 * packed.nbytes - rows * columns * bits < 8 * columns * bits
    np.testing.assert_array_equal(unpack(packed, bits, rows), integers)


@pytest.mark.parametrize(
    ("bits", "integers", "expected"),
    [
        (8, [[7], [200]], [[[7], [200]]]),
        (4, [[1], [2], [3], [4]], [[[0x31], [0x42]]]),
        (4, [[1], [2], [3]], [[[0x31], [0x02]]]),
        (2, [[1], [2], [3], [0]], [[[0b00_11_10_01]]]),
        (3, [[0], [1], [2], [3], [4], [5], [6], [7]], [[[0b10_00_10_00]], [[0b11_01_11_01]], [[0b11110000]]]),
    ],
)
def test_bytes_of_an_example(bits, integers, expected):
    np.testing.assert_array_equal(pack(np.array(integers, np.uint8), bits), np.array(expected, np.uint8))


def test_five_bits_take_a_byte():
    assert [stored_bits(bits) for bits in range(2, 9)] == [2, 3, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", STORED_BITS)
@pytest.mark.parametrize(("K", "size"), [(64, 32), (50, 16), (19, 19)])
def test_the_operators_compute_what_the_table_says(bits, zeros, K, size, opset):
    """By ONNX's own reference, against float64."""
    rng = np.random.default_rng(K)
    N, groups = 5, -(-K // size)
    integers = integers_of(1, bits, groups * size, N)
    integers[K:] = 0
    scale = rng.uniform(0.01, 0.1, (groups, 1, N)).astype(np.float16)
    zero = integers_of(2, bits, groups, N)
    function = unpack_function(bits, zeros, opset)
    names = list(function.input)
    node = helper.make_node(
        unpack_name(bits, zeros),
        names,
        ["W"],
        domain=UNPACK_DOMAIN,
        rows=[groups * size],
        grid=[groups, size, -1],
        channels=[K],
        to=onnx.TensorProto.FLOAT,
    )
    given = {"packed": pack(integers, bits), "scale": scale, "zero_point": pack(zero, bits)}
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(given[name].dtype), None)
            for name in names
        ],
        [helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [K, N])],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(UNPACK_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function])
    (found,) = onnx.reference.ReferenceEvaluator(model).run(None, {name: given[name] for name in names})
    middle = zero.astype(np.float64)[np.arange(K) // size] if zeros else 2.0 ** (bits - 1)
    expected = (integers[:K] - middle) * scale[:, 0].astype(np.float64)[np.arange(K) // size]
    np.testing.assert_allclose(found, expected, rtol=1e-7)
