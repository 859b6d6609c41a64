"""Linears of int8 with tokens that are rounded one by one: how they are stored, and inside ONNX Runtime, with the
library and on the function bodies."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings

from sparse_onnx.sparse_ops.domain import DOMAIN, EXACT_DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.formats.int8_quads import (
    MAX_INPUTS,
    expected_nbytes,
    pack_dense,
    pack_quads,
)
from sparse_onnx.sparse_ops.ops import int8_matmul
from sparse_onnx.sparse_ops.ops.sparse_matmul import OP_TYPES as ACTIVATIONS

K, N = 77, 45
both_ways = pytest.mark.parametrize("library", [True, False])
both_formats = pytest.mark.parametrize("pack", [pack_quads, pack_dense])


def integers(K=K, N=N, kept=0.3, seed=0, most=128):
    rng = np.random.default_rng(seed)
    found = rng.integers(-most, min(most, 127) + 1, (K, N)).astype(np.int8)
    return np.where(rng.random((K, N)) < kept, found, np.int8(0))


def scales(N=N, seed=1):
    return np.random.default_rng(seed).uniform(0.001, 0.01, N).astype(np.float32)


def tokens(*shape, seed=2):
    return np.random.default_rng(seed).normal(0.3, 1, shape).astype(np.float32)


BIAS = tokens(N, seed=3)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=3e-6 * np.abs(expected).max(initial=0))


@both_formats
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    kept=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    chunk=st.sampled_from([None, 1, 3, 255]),
    block=st.sampled_from([None, 4, 20, 256]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_packed_is_unpacked_exactly(pack, shape, kept, chunk, block):
    V, s = integers(*shape, kept), scales(shape[1])
    weight = pack(V, s, chunk=chunk, block=block)
    weight.validate()
    np.testing.assert_array_equal(weight.integers(), V)
    np.testing.assert_array_equal(weight.unpack(), V * s)
    assert weight.attributes()["format"] == ("int8_dense" if weight.dense else "int8_quads")
    assert weight.nbytes == sum(array.nbytes for array in weight.arrays().values())


def test_only_quads_with_an_integer_are_stored():
    V = np.zeros((8, 3), np.int8)
    V[5, 1] = 7
    weight = pack_quads(V, scales(3))
    assert weight.values.reshape(-1, 4).any(axis=1).sum() == 1
    assert weight.values.size == 4 * 3  # two segments without any keep one quad each
    assert pack_dense(V, scales(3)).values.size == 8 * 4


@pytest.mark.parametrize("kept", [0.1, 0.5])
def test_the_size_is_known_without_packing(kept):
    quads = np.random.default_rng(0).random((192, 384)) < kept
    V = np.repeat(quads, 4, axis=0).astype(np.int8)
    found = pack_quads(V, scales(384)).nbytes
    assert expected_nbytes(V.shape, quads.mean()) == pytest.approx(found, rel=0.02)


@both_formats
@pytest.mark.parametrize(
    ("V", "s", "message"),
    [
        (integers().astype(np.int16), scales(), "not int16"),
        (integers()[0], scales(), "int8 matrix"),
        (integers()[:0], scales(), "non-empty"),
        (integers(), scales(N + 1), "scales must be"),
        (integers(), scales().astype(np.float64), "scales must be"),
        (np.ones((MAX_INPUTS + 1, 1), np.int8), scales(1), f"at most {MAX_INPUTS} inputs"),
    ],
)
def test_what_cannot_be_packed_is_refused(pack, V, s, message):
    with pytest.raises(ValueError, match=message):
        pack(V, s)


def spoilt(weight, name, change):
    values, *places, scales = (
        (change(array) if key == name else array) for key, array in weight.arrays().items()
    )
    return dataclasses.replace(weight, values=values, places=tuple(places) or None, scales=scales)


def edited(index, value):
    def edit(array):
        found = array.copy()
        found[index] = value
        return found

    return edit


SPOILT = [
    (pack_quads, "values", lambda a: a[:-4], "values must have"),
    (pack_quads, "values", lambda a: a[:-1], "values must have"),
    (pack_quads, "offsets", lambda a: a[:-1], "elements"),
    (pack_quads, "counts", edited(0, 0), "count"),
    (pack_quads, "rows", edited(0, 255), "rows"),
    (pack_quads, "offsets", edited(-1, 200), "offset"),
    (pack_quads, "scales", lambda a: a[:-1], "scales must have"),
    (pack_dense, "values", lambda a: a[:-4], "values must have"),
    (pack_dense, "scales", lambda a: a[:-1], "scales must have"),
]


@pytest.mark.parametrize(("pack", "name", "change", "message"), SPOILT)
def test_damaged_arrays_are_refused(pack, name, change, message, layer_model, open_session):
    weight = spoilt(pack(integers(), scales()), name, change)
    with pytest.raises(FormatError, match=message):
        weight.integers()
    op_type = int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    with pytest.raises(Exception, match=rf"\({op_type}\): .*{name[:-1]}"):
        open_session(layer_model(weight, BIAS, op_type, with_body=False))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kernel_and_reader_accept_the_same_bytes(data, layer_model, open_session):
    """A file may say anything: both refuse it, or both know the same weight."""
    pack = data.draw(st.sampled_from([pack_quads, pack_dense]))
    shape = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 40)))
    block = data.draw(st.sampled_from([None, 4, 20]))
    weight = pack(
        integers(*shape), scales(shape[1]), chunk=data.draw(st.sampled_from([None, 1, 7])), block=block
    )
    for _ in range(data.draw(st.integers(0, 2))):
        size = data.draw(st.sampled_from(["K", "N", "chunk", "block", ""]))
        if size:
            step = data.draw(st.sampled_from([-4, -1, 1, 4, 256, 2**31, -(2**40)]))
            weight = dataclasses.replace(weight, **{size: getattr(weight, size) + step})
            continue
        name = data.draw(st.sampled_from([*weight.arrays()]))
        length = weight.arrays()[name].size
        if name == "scales" or length == 0 or data.draw(st.integers(0, 2)) == 0:
            end = data.draw(st.integers(0, length))
            weight = spoilt(weight, name, lambda array, end=end: array[:end])
        else:
            index, byte = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 255))
            weight = spoilt(
                weight, name, lambda array, i=index, b=byte: edited(i, np.uint8(b).astype(array.dtype))(array)
            )
    try:
        weight.validate()
        known = True
    except FormatError:
        known = False
    bias = np.ones(min(max(weight.N, 0), 1000), np.float32)
    op_type = int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    proto = layer_model(weight, bias, op_type, x_shape=["tokens", max(weight.K, 1)])
    del proto.functions[:]
    if known:
        x = tokens(3, weight.K)
        got = open_session(proto, library=True).run(None, {"X": x})[0]
        assert_close(got, int8_matmul.reference(x, weight, bias))
    else:
        with pytest.raises(Exception, match="Int8MatMul"):
            open_session(proto, library=True)


@both_formats
@pytest.mark.parametrize(
    "sizes",
    [
        {"K": 0},
        {"K": MAX_INPUTS + 1},
        {"N": N + 1},
        {"chunk": 0},
        {"chunk": 256},
        {"block": 257},
        {"K": K + 8},
    ],
)
def test_wrong_sizes_are_refused(pack, sizes, layer_model, open_session):
    weight = dataclasses.replace(pack(integers(), scales(), chunk=10, block=12), **sizes)
    with pytest.raises(FormatError):
        weight.validate()
    op_type = int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    proto = layer_model(weight, BIAS, op_type, x_shape=None, with_body=False)
    with pytest.raises(Exception, match=rf"\({op_type}\): "):
        open_session(proto)


@both_formats
def test_another_format_is_refused_by_the_kernel(pack, layer_model, open_session):
    weight = pack(integers(), scales())
    op_type = int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    proto = layer_model(weight, BIAS, op_type, attributes={"format": "newer"}, with_body=False)
    with pytest.raises(Exception, match="attribute format is 'newer'"):
        open_session(proto)


@both_ways
@both_formats
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sessions_compute_what_the_contract_says(activation, pack, library, layer_model, open_session):
    weight = pack(integers(), scales())
    op_type = int8_matmul.op_type_of(ACTIVATIONS[activation], weight.dense)
    session = open_session(layer_model(weight, BIAS, op_type, x_shape=None), library=library)
    for shape in ((1, K), (2, 9, K), (130, K), (K,), (0, K)):
        x = tokens(*shape)
        (y,) = session.run(None, {"X": x})
        assert y.shape == (*shape[:-1], N)
        if x.size:
            assert_close(y, int8_matmul.reference(x, weight, BIAS, activation))


@both_ways
@both_formats
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_every_opset_gives_the_same(opset, pack, library, layer_model, open_session):
    weight = pack(integers(), scales())
    op_type = int8_matmul.op_type_of(ACTIVATIONS["gelu"], weight.dense)
    session = open_session(layer_model(weight, BIAS, op_type, opset=opset), library=library)
    x = tokens(6, K)
    assert_close(session.run(None, {"X": x})[0], int8_matmul.reference(x, weight, BIAS, "gelu"))


@both_ways
@both_formats
def test_sums_are_exact_where_pairs_of_products_saturate(pack, library, layer_model, open_session):
    """Bytes of 255 times integers of 127: two products are more than 16 bits hold, sums more than a float does."""
    V = np.full((4096, 8), 127, np.int8)
    V[:, 1] = -128
    V[::2, 2] = -127
    V[0, 3] = 126
    weight = pack(V, np.ones(8, np.float32))
    session = open_session(
        layer_model(
            weight, np.zeros(8, np.float32), int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
        ),
        library=library,
    )
    x = np.full((2, 4096), 255, np.float32)
    x[1] *= -1
    expected = x.astype(np.float64) @ V
    found = session.run(None, {"X": x})[0]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@both_ways
@both_formats
def test_not_a_number_and_infinity_stay_in_their_token(pack, library, layer_model, open_session):
    weight = pack(integers(), scales())
    x = tokens(7, K)
    expected = int8_matmul.reference(x, weight, BIAS)
    x[1, 5], x[2, 0], x[4, -1] = np.nan, np.inf, -np.inf
    x[5] = 0
    session = open_session(
        layer_model(weight, BIAS, int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)), library=library
    )
    found = session.run(None, {"X": x})[0]
    assert np.isnan(found[[1, 2, 4]]).all()
    np.testing.assert_array_equal(found[5], BIAS)
    assert_close(found[[0, 3, 6]], expected[[0, 3, 6]])


@both_formats
def test_threads_give_the_same_bytes(pack, layer_model, open_session):
    weight = pack(integers(300, 260), scales(260))
    proto = layer_model(weight, tokens(260), int8_matmul.op_type_of(ACTIVATIONS["silu"], weight.dense))
    x = tokens(300, 300)
    one, two, four = (open_session(proto, threads=n).run(None, {"X": x})[0] for n in (1, 2, 4))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, four)


@both_formats
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic"])
def test_every_instruction_set_gives_the_same_sums(isa, pack, layer_model, open_session, run_forced):
    """With integers of all 8 bits: without bias, one sum is one float."""
    weight, x = pack(integers(512, 64, 0.6), np.ones(64, np.float32)), tokens(37, 512)
    proto = layer_model(
        weight, np.zeros(64, np.float32), int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    )
    (found,) = run_forced(proto, {"X": x}, isa)
    np.testing.assert_array_equal(found, open_session(proto).run(None, {"X": x})[0])


@both_formats
def test_a_token_is_rounded_alone(pack, layer_model, open_session):
    """A loud token takes nothing from the others, and many rows give what each gives."""
    weight = pack(integers(), scales())
    session = open_session(
        layer_model(weight, BIAS, int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense), x_shape=None)
    )
    x = tokens(130, K)
    before = session.run(None, {"X": x})[0]
    x[3] *= 1000
    after = session.run(None, {"X": x})[0]
    others = np.arange(130) != 3
    np.testing.assert_array_equal(after[others], before[others])
    for row in (0, 64, 129):
        np.testing.assert_array_equal(session.run(None, {"X": x[row]})[0], after[row])


@both_formats
def test_the_node_is_ours_only_with_the_library(pack, layer_model, open_session, tmp_path):
    weight = pack(integers(), scales())
    op_type = int8_matmul.op_type_of(ACTIVATIONS["relu"], weight.dense)
    kept = {}
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{library}.onnx")
        open_session(layer_model(weight, BIAS, op_type), library=library, options=options)
        nodes = onnx.load(tmp_path / f"{library}.onnx").graph.node
        kept[library] = [node.op_type for node in nodes]
        if not library:  # what makes the weight is folded
            assert not {"ScatterND", "CumSum", "Transpose"} & set(kept[library])
    assert kept[True] == [op_type]
    assert "MatMulInteger" in kept[False]


@both_formats
@pytest.mark.parametrize("x", [["batch", "tokens", K], [4, K], [K]])
def test_output_shapes_are_inferred(x, pack, layer_model, open_session):
    weight = pack(integers(), scales())
    session = open_session(
        layer_model(weight, BIAS, int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense), x_shape=x)
    )
    assert session.get_outputs()[0].shape == [*x[:-1], N]


@both_formats
@pytest.mark.parametrize("shape", [(3, K - 1), (3, 0), ()])
def test_wrong_shapes_are_refused_by_name(shape, pack, layer_model, open_session):
    weight = pack(integers(), scales())
    op_type = int8_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    session = open_session(layer_model(weight, BIAS, op_type, x_shape=None, with_body=False))
    with pytest.raises(Exception, match=rf"\({op_type}\): input X has shape .*, expected \[..., {K}\]"):
        session.run(None, {"X": tokens(*shape)})


@pytest.mark.parametrize("opset", [13, 18, 26])
@pytest.mark.parametrize("op_type", int8_matmul.OP_TYPES)
def test_bodies_are_well_formed(op_type, opset):
    for body in (int8_matmul.function_body(op_type, opset), int8_matmul.exact_body(op_type, opset)):
        assert body.domain in (DOMAIN, EXACT_DOMAIN)
        context = onnx.checker.C.CheckerContext()
        context.ir_version = 10
        context.opset_imports = {"": opset, DOMAIN: VERSION}
        onnx.checker.check_function(body, context)


def test_the_reference_follows_from_the_formulas():
    """One token by hand: steps of 2 / 255 from -0.5 to 1.5, so that zero is 64 of them (63.75)."""
    weight = pack_dense(np.array([[2], [-3]], np.int8), np.array([0.5], np.float32))
    x = np.array([[1.5, -0.5]], np.float32)
    rounded = np.array([191, -64]) * (2 / 255)
    expected = (rounded @ np.array([2, -3])) * 0.5 + 1
    np.testing.assert_allclose(int8_matmul.reference(x, weight, np.ones(1)), [[expected]], rtol=1e-6)
