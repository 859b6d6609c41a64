"""The storage format: packing, validating, unpacking, and what each rule refuses."""

import dataclasses

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import FormatError, Outputs
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, PackedWeight
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

SPECIAL = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 1e-45, 3e38])
WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=SPECIAL)


@given(
    weight=WEIGHTS,
    chunk=st.integers(1, 255),
    groups=st.integers(1, 32),
    width=st.sampled_from([1, 4, 8, None]),
)
@settings(max_examples=300, deadline=None)
def test_round_trip_is_exact_and_the_library_agrees(weight, chunk, groups, width):
    packed = CHUNKED_CSC.pack(weight, chunk=chunk, block=groups * (width or 1), width=width)
    packed.validate()
    sparse_ops.check(packed)
    dense = packed.unpack()
    assert dense.dtype == np.float32
    # Bit for bit, but for the sign of zero.
    np.testing.assert_array_equal(
        (dense + np.float32(0)).view(np.int32), (weight + np.float32(0)).view(np.int32)
    )
    padding = packed.blocks * packed.block * packed.chunks
    assert packed.values.size <= packed.width * np.count_nonzero(weight) + padding
    segment = np.split(packed.counts, packed.chunks * packed.blocks)
    assert all((np.diff(group.astype(int)) <= 0).all() for group in segment)


@pytest.mark.parametrize(("height", "expected"), [(1, 1), (2, 1), (4, 4), (8, 8), (16, 8)])
def test_blocks_along_the_outputs_are_found(height, expected):
    rng = np.random.default_rng(0)
    kept = np.repeat(rng.random((60, 48 // height)) < 0.3, height, axis=1)
    packed = CHUNKED_CSC.pack(np.where(kept, rng.standard_normal((60, 48)), 0).astype(np.float32))
    assert packed.width == expected
    assert CHUNKED_CSC.pack(packed.unpack(), width=1).values.size == np.count_nonzero(kept)


def test_blocks_along_the_inputs_or_shifted_are_not_wide(sparse):
    rng = np.random.default_rng(0)
    kept = np.repeat(rng.random((15, 48)) < 0.3, 4, axis=0)
    weight = np.where(kept, rng.standard_normal((60, 48)), 0).astype(np.float32)
    assert CHUNKED_CSC.pack(weight).width == 1
    assert CHUNKED_CSC.pack(np.roll(np.where(kept[:48].T, 1, 0).astype(np.float32), 2, axis=1)).width == 1
    assert CHUNKED_CSC.pack(sparse(64, 64, 0.5)).width == 1


def test_negative_zero_is_not_stored():
    packed = CHUNKED_CSC.pack(np.array([[-0.0, 1.0]], np.float32), chunk=1, block=2)
    assert packed.values.tolist() == [0.0, 1.0]
    assert not np.signbit(packed.values).any()


@pytest.mark.parametrize(
    ("weight", "chunk", "block", "width"),
    [
        (np.zeros((4, 4), np.float64), 4, 4, 1),
        (np.zeros((4, 4), np.float16), 4, 4, 1),
        (np.zeros(4, np.float32), 4, 4, 1),
        (np.zeros((0, 4), np.float32), 4, 4, 1),
        (np.zeros((4, 0), np.float32), 4, 4, 1),
        (np.zeros((4, 4), np.float32), 0, 4, 1),
        (np.zeros((4, 4), np.float32), 256, 4, 1),
        (np.zeros((4, 4), np.float32), 4, 0, 1),
        (np.zeros((4, 4), np.float32), 4, 257, 1),
        (np.zeros((4, 4), np.float32), 4, 4, 2),
        (np.zeros((4, 4), np.float32), 4, 6, 4),
    ],
)
def test_pack_refuses(weight, chunk, block, width):
    with pytest.raises(ValueError, match=r"float32 matrix|chunk must lie|width must"):
        CHUNKED_CSC.pack(weight, chunk=chunk, block=block, width=width)


def with_item(array: np.ndarray, index: int, value: int) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


# What each case breaks, and a word that the messages of Python and of the library share.
BROKEN = {
    "chunk zero": (lambda p: {"chunk": 0}, "chunk"),
    "chunk too large": (lambda p: {"chunk": 256}, "chunk"),
    "block zero": (lambda p: {"block": 0}, "block"),
    "block too large": (lambda p: {"block": 257}, "block"),
    "width three": (lambda p: {"width": 3}, "width"),
    "width of another weight": (lambda p: {"width": 4}, "counts"),
    "K zero": (lambda p: {"K": 0}, "K"),
    "N negative": (lambda p: {"N": -5}, "N"),
    "K of another weight": (lambda p: {"K": p.K + p.chunk}, "counts"),
    "K too small": (lambda p: {"K": p.K - 1}, "offset"),
    "N of another weight": (lambda p: {"N": p.N + p.block}, "counts"),
    "counts short": (lambda p: {"counts": p.counts[:-1]}, "counts"),
    "counts empty": (lambda p: {"counts": p.counts[:0]}, "counts"),
    "rows long": (lambda p: {"rows": np.append(p.rows, np.uint8(0))}, "rows"),
    "values short": (lambda p: {"values": p.values[:-1]}, "values"),
    "offsets short": (lambda p: {"offsets": p.offsets[:-1]}, "offsets"),
    "count zero": (lambda p: {"counts": with_item(p.counts, 3, 0)}, "count"),
    "count past the chunk": (lambda p: {"counts": with_item(p.counts, 3, p.chunk + 1)}, "count"),
    "one more counted": (lambda p: {"counts": with_item(p.counts, -1, p.counts[-1] + 1)}, "values"),
    "row twice": (lambda p: {"rows": with_item(p.rows, 1, p.rows[0])}, "rows"),
    "row past the block": (lambda p: {"rows": with_item(p.rows, 1, p.block)}, "rows"),
    "offset twice": (lambda p: {"offsets": with_item(p.offsets, 1, p.offsets[0])}, "offsets"),
    "offset past the chunk": (
        lambda p: {"offsets": with_item(p.offsets, int(p.counts[0]) - 1, p.chunk)},
        "offset",
    ),
    "offset past K": (lambda p: {"offsets": with_item(p.offsets, -1, p.K % p.chunk)}, "offset"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_library_refuses(case, sparse):
    packed = CHUNKED_CSC.pack(sparse(50, 30, 0.6), chunk=16, block=8)
    change, word = BROKEN[case]
    with pytest.raises(FormatError, match=word):
        sparse_ops.check(dataclasses.replace(packed, **change(packed)))


@pytest.mark.parametrize(
    "case", [c for c in BROKEN if not c.startswith(("chunk", "block", "K zero", "N neg"))]
)
def test_validate_refuses(case, sparse):
    packed = CHUNKED_CSC.pack(sparse(50, 30, 0.6), chunk=16, block=8)
    change, word = BROKEN[case]
    with pytest.raises(FormatError, match=word):
        dataclasses.replace(packed, **change(packed)).validate()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_python_and_library_judge_every_byte_alike(data):
    """One byte of the stored tensors changed at random: both accept it or both refuse it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 20)))
    weight = np.where(rng.random((23, 11)) < 0.4, rng.random((23, 11), np.float32), np.float32(0))
    chunk, block = data.draw(st.sampled_from([1, 5, 8, 23])), data.draw(st.sampled_from([1, 4, 11]))
    packed = CHUNKED_CSC.pack(weight, chunk=chunk, block=block, width=4 if block == 4 else 1)
    name = data.draw(st.sampled_from(["offsets", "counts", "rows"]))
    array = getattr(packed, name)
    index, value = data.draw(st.integers(0, array.size - 1)), data.draw(st.integers(0, 255))
    changed = dataclasses.replace(packed, **{name: with_item(array, index, value)})

    def accepts(judge) -> bool:
        try:
            judge(changed)
        except FormatError:
            return False
        return True

    assert accepts(PackedWeight.validate) == accepts(sparse_ops.check)


@pytest.mark.parametrize("opset", [13, 17, 21, 26])
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_function_body_is_valid_onnx(op_type, opset):
    body = OP_TYPES[op_type].function_body(opset)
    assert (body.domain, body.name) == (DOMAIN, op_type)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 8
    context.opset_imports = {"": opset, DOMAIN: VERSION}
    onnx.checker.check_function(body, context)


def test_a_weight_takes_five_bytes_an_entry(sparse):
    weight = sparse(768, 768, 0.1)
    packed = CHUNKED_CSC.pack(weight)
    assert packed.nbytes == 5 * packed.values.size + 2 * packed.counts.size
    assert packed.nbytes < 0.15 * weight.nbytes
    assert isinstance(packed, PackedWeight)


@pytest.mark.parametrize(
    ("K", "N", "width"), [(768, 384, 1), (147, 1280, 1), (256, 1000, 8), (100, 90, 4), (60, 7, 1)]
)
@pytest.mark.parametrize("sparsity", [0.5, 0.76, 0.9, 0.95])
def test_the_size_is_known_without_packing(K, N, width, sparsity):
    rng = np.random.default_rng(0)
    groups = rng.random((K, -(-N // width))) < sparsity
    weight = np.where(np.repeat(groups, width, axis=1)[:, :N], 0, 1).astype(np.float32)
    packed = CHUNKED_CSC.pack(weight)
    assert packed.width == width
    assert CHUNKED_CSC.expected_nbytes(K, N, groups.mean(), together=width) == pytest.approx(
        packed.nbytes, rel=0.005
    )


def test_the_size_of_channels_in_groups():
    weight = np.where(np.random.default_rng(0).random((288, 96)) < 0.8, 0, 1).astype(np.float32)
    zeros = float((weight == 0).mean())
    assert CHUNKED_CSC.expected_nbytes(288, 96, zeros, Outputs(24, apart=True)) == pytest.approx(
        CHUNKED_CSC.pack(weight, block=24).nbytes, rel=0.005
    )
