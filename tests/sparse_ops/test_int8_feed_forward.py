"""Two linears of bytes as one operator, with the library and on its function bodies: what both give alone."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN, EXACT_DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.int8_quads import pack_dense, pack_quads
from sparse_onnx.sparse_ops.ops import int8_feed_forward, int8_matmul, sparse_feed_forward, sparse_matmul
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES
from sparse_onnx.sparse_ops.ops.sparse_feed_forward import PREFIX

K, HIDDEN, N = 70, 96, 45
FIRSTS = tuple(sparse_feed_forward.PAIRS)
both_ways = pytest.mark.parametrize("library", [True, False])
both_formats = pytest.mark.parametrize("pack", [pack_quads, pack_dense])
every_first = pytest.mark.parametrize("first", FIRSTS)


def weight(pack, k, n, seed=0, most=128):
    rng = np.random.default_rng(seed)
    integers = rng.integers(-most, min(most, 127) + 1, (k, n)).astype(np.int8)
    integers[rng.random((k, n)) < 0.6] = 0
    return pack(integers, rng.uniform(0.001, 0.01, n).astype(np.float32), block=16)


def tokens(*shape):
    return np.random.default_rng(2).normal(0.1, 1, shape).astype(np.float32)


def is_gate(first):
    return "Gate" in first


def linears(first, pack):
    """Both weights and their biases."""
    up = weight(pack, K, HIDDEN)
    down = weight(pack, HIDDEN // 2 if is_gate(first) else HIDDEN, N, seed=1)
    return up, np.linspace(-2, 2, up.N, dtype=np.float32), down, np.linspace(1, -1, N, dtype=np.float32)


@pytest.fixture
def pair(layer_model):
    """``pair(first, pack)``: the model of both as one."""

    def pair(first, pack, arrays=None, attributes=None, both=None, **options):
        up, bias, down, down_bias = both or linears(first, pack)
        stored = {PREFIX + name: array for name, array in {**down.arrays(), "bias": down_bias}.items()}
        sizes = {PREFIX + name: size for name, size in down.attributes().items() if name != "format"}
        op_type = int8_matmul.op_type_of(sparse_feed_forward.PAIRS[first], up.dense)
        return layer_model(
            up,
            bias,
            op_type,
            arrays={**stored, **(arrays or {})},
            attributes={**sizes, **(attributes or {})},
            **options,
        )

    return pair


@pytest.fixture
def one_by_one(layer_model, open_session):
    """``one_by_one(first, pack, x)``: what the two operators give."""

    def one_by_one(first, pack, x, library=True):
        up, bias, down, down_bias = linears(first, pack)
        for packed, own_bias, base in ((up, bias, first), (down, down_bias, "SparseMatMul")):
            proto = layer_model(packed, own_bias, int8_matmul.op_type_of(base, packed.dense), x_shape=None)
            (x,) = open_session(proto, library=library).run(None, {"X": x})
        return x

    return one_by_one


@both_ways
@both_formats
@every_first
def test_it_is_bit_for_bit_what_the_two_give(first, pack, library, pair, one_by_one, open_session):
    for threads in (1, 2):
        session = open_session(pair(first, pack, x_shape=None), library=library, threads=threads)
        for shape in ((1, K), (2, 9, K), (150, K), (K,)):
            x = tokens(*shape)
            found = session.run(None, {"X": x})[0]
            wanted = one_by_one(first, pack, x, library)
            if library:
                np.testing.assert_array_equal(found, wanted)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert session.run(None, {"X": tokens(0, K)})[0].shape == (0, N)


@both_formats
@pytest.mark.parametrize("first", [first for first in FIRSTS if not is_gate(first)])
def test_it_computes_what_the_contract_says(first, pack, pair, open_session):
    """Where numbers lie between two steps, one sum may have one step more or less: not many do."""
    up, bias, down, down_bias = linears(first, pack)
    x = tokens(60, K)
    hidden = int8_matmul.reference(x, up, bias, sparse_matmul.ACTIVATIONS[first]).astype(np.float32)
    wanted = int8_matmul.reference(hidden, down, down_bias)
    found = open_session(pair(first, pack)).run(None, {"X": x})[0]
    step = np.ptp(hidden, axis=-1).max() / 255 * 128 * down.scales.max()
    assert np.abs(found - wanted).max() < 3 * step
    assert np.isclose(found, wanted, rtol=1e-5, atol=1e-5).mean() > 0.9


@both_formats
@every_first
@pytest.mark.parametrize("opset", [13, 18, 26])
def test_every_opset_gives_the_same(opset, first, pack, pair, one_by_one, open_session):
    x = tokens(6, K)
    proto = pair(first, pack, opset=opset)
    found = open_session(proto, library=False).run(None, {"X": x})[0]
    np.testing.assert_allclose(found, one_by_one(first, pack, x, library=False), rtol=1e-4, atol=1e-4)


@both_formats
@every_first
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic"])
def test_every_instruction_set_gives_the_same(isa, first, pack, pair, one_by_one, run_forced):
    x = tokens(37, K)
    (found,) = run_forced(pair(first, pack), {"X": x}, isa)
    wanted = one_by_one(first, pack, x)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.isclose(found, wanted, rtol=1e-4, atol=1e-4).mean() > 0.9


@both_formats
@every_first
def test_the_exact_body_rounds_nothing(first, pack, pair, open_session):
    up, bias, down, down_bias = linears(first, pack)
    proto = pair(first, pack)
    op_type = proto.graph.node[0].op_type
    proto.graph.node[0].domain = EXACT_DOMAIN
    del proto.functions[:]
    proto.functions.append(int8_feed_forward.exact_body(op_type, 17))
    proto.opset_import.append(onnx.helper.make_opsetid(EXACT_DOMAIN, VERSION))
    x = tokens(5, K)
    wanted = sparse_feed_forward.reference(sparse_feed_forward.PAIRS[first], x, up, bias, down, down_bias)
    found = open_session(proto).run(None, {"X": x})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@both_formats
@every_first
def test_the_node_is_ours_only_with_the_library(first, pack, pair, open_session, tmp_path):
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "kept.onnx")
        proto = pair(first, pack)
        open_session(proto, library=library, options=options)
        kept = [node.op_type for node in onnx.load(tmp_path / "kept.onnx").graph.node]
        if library:
            assert kept == [proto.graph.node[0].op_type]
        else:  # what makes the weights is folded
            assert kept.count("MatMulInteger") == 2
            assert not {"ScatterND", "CumSum", "Transpose"} & set(kept)


@both_formats
@every_first
@pytest.mark.parametrize("x", [["batch", "tokens", K], [4, K], [K]])
def test_output_shapes_are_inferred(x, first, pack, pair, open_session):
    session = open_session(pair(first, pack, x_shape=x, with_body=False))
    assert session.get_outputs()[0].shape == [*x[:-1], N]


@both_formats
def test_not_a_number_stays_in_its_token(pack, pair, one_by_one, open_session):
    x = tokens(7, K)
    wanted = one_by_one("SparseMatMulGelu", pack, x)
    x[1, 5], x[2, 0], x[4, -1] = np.nan, np.inf, -np.inf
    found = open_session(pair("SparseMatMulGelu", pack)).run(None, {"X": x})[0]
    assert np.isnan(found[[1, 2, 4]]).all()
    np.testing.assert_array_equal(found[[0, 3, 5, 6]], wanted[[0, 3, 5, 6]])


def damaged(first, pack):
    up, bias, down, down_bias = linears(first, pack)
    yield {"arrays": {"down_values": down.values[:-4]}}, r"weight down_\*: values has"
    yield {"arrays": {"down_scales": down.scales[:-1]}}, r"weight down_\*: scales has"
    yield {"arrays": {"down_bias": down_bias[:-1]}}, r"weight down_\*: bias has"
    yield {"arrays": {"down_bias": down_bias.astype(np.float64)}}, ""
    yield {"attributes": {"down_K": 2**40}}, r"weight down_\*: attribute K"
    yield {"attributes": {"down_N": -1}}, r"weight down_\*: "
    yield {"attributes": {"down_chunk": None}}, "attribute down_chunk is missing"
    yield {"attributes": {"format": "newer"}}, "attribute format is 'newer'"
    yield {"attributes": {"K": 0}}, "attribute K is 0"
    yield {"both": (up, bias, weight(pack, up.N + 4, N), down_bias)}, rf"expected the {down.K} outputs of the"
    short = dataclasses.replace(up, scales=up.scales[:-1])
    yield {"both": (short, bias, down, down_bias)}, ": scales has"


@both_formats
@pytest.mark.parametrize("first", ["SparseMatMulRelu", "SparseMatMulSiluGate"])
def test_what_does_not_fit_is_refused_by_name(first, pack, pair, open_session):
    for options, why in damaged(first, pack):
        with pytest.raises(Exception, match=why or "FeedForward"):
            open_session(pair(first, pack, x_shape=None, with_body=False, **options))


@both_formats
def test_halves_of_no_whole_blocks_are_refused(pack, pair, open_session):
    both = (weight(pack, K, 40), np.zeros(40, np.float32), weight(pack, 20, N), np.zeros(N, np.float32))
    with pytest.raises(Exception, match="N is 40, expected 2 sizes"):
        open_session(pair("SparseMatMulSiluGate", pack, both=both, with_body=False))


@pytest.mark.parametrize("opset", [13, 18, 26])
@pytest.mark.parametrize("op_type", int8_feed_forward.OP_TYPES)
def test_bodies_are_well_formed(op_type, opset):
    for make in (int8_feed_forward.function_body, int8_feed_forward.exact_body):
        context = onnx.checker.C.CheckerContext()
        context.ir_version = 10
        context.opset_imports = {"": opset, DOMAIN: VERSION}
        onnx.checker.check_function(make(op_type, opset), context)


def test_op_types_are_registered():
    assert len(int8_feed_forward.OP_TYPES) == 2 * len(FIRSTS)
    for op_type, (base, dense) in int8_feed_forward.OP_TYPES.items():
        assert base in sparse_feed_forward.OP_TYPES
        body = OP_TYPES[op_type].function_body(17)
        parts = 2 if dense else 5
        assert (body.domain, len(body.input), len(body.attribute)) == (DOMAIN, 3 + 2 * parts, 8)
