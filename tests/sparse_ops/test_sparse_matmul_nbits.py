"""Products with weights of few bits without their zeros, with the library and on the function bodies."""

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.ops import sparse_matmul_nbits as smn
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

K, N = 150, 37
NODE = "decoder/layer.3/query"
every_op = pytest.mark.parametrize("op_type", smn.OP_TYPES)
both_ways = pytest.mark.parametrize("library", [True, False])


def activations(*shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def weight(packed_levels):
    def weight(op_type, k=K, n=N, **options):
        return packed_levels(k, n, smn.OP_TYPES[op_type], **options)[0]

    return weight


def model(
    op_type, packed, *, x=("tokens", K), opset=17, arrays=None, attributes=None, exact=False, body=True
):
    """One node; ``arrays`` and ``attributes`` replace packed ones."""
    name = op_type + smn.EXACT * exact
    stored = {**packed.arrays(), **(arrays or {})}
    node = onnx.helper.make_node(
        name, ["X", *stored], ["Y"], NODE, domain=DOMAIN, **{**packed.attributes(), **(attributes or {})}
    )
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info("X", float32, x)],
        [onnx.helper.make_tensor_value_info("Y", float32, None)],
        [onnx.numpy_helper.from_array(array, key) for key, array in stored.items()],
    )
    made = smn.exact_body(op_type, opset) if exact else smn.function_body(op_type, opset)
    return onnx.helper.make_model(
        graph,
        ir_version=9 if opset < 21 else 10,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[made] if body else [],
    )


def assert_near(got, want, packed, x):
    """Up to the rounding of float32 sums."""
    assert got.shape == want.shape
    size = np.abs(x).max(initial=0) * np.abs(packed.unpack()).sum(0).max()
    assert np.abs(got - want).max(initial=0) <= 1e-6 * size


@every_op
@both_ways
@pytest.mark.parametrize("shape", [(K,), (1, K), (7, K), (9, K), (0, K), (2, 5, K), (2, 0, K), (2, 3, 4, K)])
def test_computes_the_reference(op_type, library, shape, open_session, weight):
    x, packed = activations(*shape), weight(op_type)
    got = open_session(model(op_type, packed, x=[None] * (x.ndim - 1) + [K]), library=library).run(
        None, {"X": x}
    )[0]
    assert_near(got, smn.reference(x, packed), packed, x)


@every_op
@pytest.mark.parametrize("opset", range(13, 27))
def test_body_of_every_opset(op_type, opset, open_session, weight):
    x, packed = activations(2, K), weight(op_type)
    got = open_session(model(op_type, packed, opset=opset), library=False).run(None, {"X": x})[0]
    assert_near(got, smn.reference(x, packed), packed, x)


@every_op
@both_ways
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 5), (64, 16), (65, 17), (128, 48), (131, 3)])
def test_every_group_and_odd_sizes(op_type, library, group, k, n, open_session, weight):
    if group not in smn.OP_TYPES[op_type].groups:
        group = 64
    x, packed = activations(3, k), weight(op_type, k, n, group=group)
    got = open_session(model(op_type, packed, x=(3, k)), library=library).run(None, {"X": x})[0]
    assert_near(got, smn.reference(x, packed), packed, x)


@pytest.mark.parametrize("kept", range(1, 16))
@both_ways
def test_every_number_of_16(kept, library, open_session, weight):
    x, packed = activations(5, K), weight("SparseMatMulInt4Of16", kept=kept)
    got = open_session(model("SparseMatMulInt4Of16", packed), library=library).run(None, {"X": x})[0]
    assert_near(got, smn.reference(x, packed), packed, x)


@both_ways
@pytest.mark.parametrize("op_type", ["SparseMatMulInt4", "SparseMatMulInt4WithZeros", "SparseMatMulInt8"])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_every_share_of_zeros(op_type, library, density, open_session, weight):
    x, packed = activations(2, K), weight(op_type, density=density)
    got = open_session(model(op_type, packed), library=library).run(None, {"X": x})[0]
    assert_near(got, smn.reference(x, packed), packed, x)


@every_op
@both_ways
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_in_every_output_of_their_token_and_in_no_other(
    op_type, library, special, open_session, weight
):
    x, packed = activations(3, K), weight(op_type)
    x[1, 70] = special
    got = open_session(model(op_type, packed), library=library).run(None, {"X": x})[0]
    assert np.isnan(got[1]).all()
    assert_near(got[::2], smn.reference(x[::2], packed), packed, x[::2])


@every_op
@both_ways
def test_a_token_of_zeros_gives_zeros(op_type, library, open_session, weight):
    packed = weight(op_type)
    got = open_session(model(op_type, packed), library=library).run(
        None, {"X": np.zeros((2, K), np.float32)}
    )[0]
    assert not got.any()


@every_op
def test_the_exact_body_rounds_nothing(op_type, open_session, weight):
    x, packed = activations(4, K), weight(op_type)
    got = open_session(model(op_type, packed, exact=True), library=True).run(None, {"X": x})[0]
    assert_near(got, x.astype(np.float64) @ packed.unpack(), packed, x)
    rounded = np.abs(smn.reference(x, packed) - x.astype(np.float64) @ packed.unpack()).max()
    assert rounded > 100 * np.abs(got - x.astype(np.float64) @ packed.unpack()).max()


@every_op
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_gives_the_same_answer(op_type, isa, run_forced, open_session, weight):
    x, packed = activations(9, K), weight(op_type)
    (got,) = run_forced(model(op_type, packed), {"X": x}, isa)
    assert_near(got, smn.reference(x, packed), packed, x)
    usual = open_session(model(op_type, packed), library=True).run(None, {"X": x})[0]
    assert_near(got, usual, packed, x)


@every_op
def test_the_body_is_folded_when_the_model_is_loaded(op_type, tmp_path, weight):
    """Nothing of the decoder is left: one product with a constant."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    packed = weight(op_type)
    onnxruntime.InferenceSession(
        model(op_type, packed).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    folded = onnx.load(tmp_path / "folded.onnx")
    left = {node.op_type for node in folded.graph.node}
    assert "MatMul" in left
    assert not left & {"BitShift", "CumSum", "Gather", "ScatterElements", "Transpose", "Range", "Greater"}
    assert sum(onnx.numpy_helper.to_array(tensor).size == K * N for tensor in folded.graph.initializer) == 1


def test_op_types_are_registered():
    for op_type, layout in smn.OP_TYPES.items():
        assert OP_TYPES[op_type].stored is None
        assert smn.op_type_of(layout) == op_type
        assert [*OP_TYPES[op_type].function_body(17).input] == ["X", *layout.parts]


def damaged(op_type, packed):
    infinite = packed.scales.copy()
    infinite[5] = np.inf
    yield {"arrays": {"values": packed.values[:-1]}}, "values has"
    yield {"arrays": {"scales": packed.scales[1:]}}, "scales has"
    yield {"arrays": {"scales": infinite}}, "a scale is"
    yield {"arrays": {"values": packed.values.astype(np.int8)}}, ""
    yield {"arrays": {"values": packed.values[None]}}, ""
    yield {"attributes": {"format": "bitmap5"}}, "bitmap5"
    yield {"attributes": {"group": 48}}, "attribute group is 48"
    yield {"attributes": {"K": 2**40}}, "too many elements"
    yield {"attributes": {"N": 0}}, "attribute N is 0"
    if smn.OP_TYPES[op_type].zeros:
        yield {"arrays": {"zeros": packed.zeros | np.uint8(16)}}, "more than 15"
        yield {"arrays": {"zeros": packed.zeros[1:]}}, "zeros has"
    if smn.OP_TYPES[op_type].masks:
        yield {"arrays": {"masks": packed.masks ^ np.uint8(1)}}, "values has"
    else:
        yield {"attributes": {"kept": 4}}, "values has"


@every_op
def test_a_damaged_weight_is_refused_with_what_is_wrong(op_type, open_session, weight):
    packed = weight(op_type)
    for options, why in damaged(op_type, packed):
        with pytest.raises(Exception, match=why or "."):
            open_session(model(op_type, packed, body=False, **options), library=True)


@every_op
def test_a_wrong_shape_of_x_is_refused(op_type, open_session, weight):
    session = open_session(model(op_type, weight(op_type), x=[None, None]), library=True)
    with pytest.raises(Exception, match=rf"{K + 1}\], expected \[..., {K}\]"):
        session.run(None, {"X": activations(2, K + 1)})


@every_op
@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_and_threads(op_type, threads, open_session, weight):
    x, packed = activations(70, 512), weight(op_type, 512, 1000)
    session = open_session(model(op_type, packed, x=("tokens", 512)), library=True, threads=threads)
    for _ in range(3):
        got = session.run(None, {"X": x})[0]
        assert_near(got, smn.reference(x, packed), packed, x)
