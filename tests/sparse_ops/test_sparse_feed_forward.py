"""Two linears in a row: the contract, and the operators with the library and on their function bodies."""

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, concatenate
from sparse_onnx.sparse_ops.ops import sparse_feed_forward as ff
from sparse_onnx.sparse_ops.ops import sparse_matmul as sm
from sparse_onnx.sparse_ops.ops import sparse_matmul_split as split
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

K, HIDDEN, N = 70, 48, 33
every_op_type = pytest.mark.parametrize("op_type", ff.OP_TYPES)
with_and_without = pytest.mark.parametrize("library", [True, False])


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def gated(op_type):
    return ff.OP_TYPES[op_type] in split.GATES.values()


def compare(got, expected):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5e-4)


@pytest.fixture
def weights(sparse):
    """``weights(op_type, width=1, down_width=1, hidden=HIDDEN, block=16)``: both packed, and a bias for each."""

    def packed(k, n, width, seed, **stored):
        dense = np.repeat(sparse(k, -(-n // width), 0.3, seed), width, axis=1)[:, :n]
        return CHUNKED_CSC.pack(dense, width=width, **stored)

    def weights(op_type, width=1, down_width=1, hidden=HIDDEN, block=16):
        n = 2 * hidden if gated(op_type) else hidden
        halves = [packed(K, hidden, width, seed, chunk=32, block=block) for seed in (0, 2)]
        first = concatenate(halves) if gated(op_type) else halves[0]
        down = packed(hidden, N, down_width, 1, chunk=20, block=8)
        return first, np.linspace(-2, 2, n, dtype=np.float32), down, np.linspace(3, 4, N, dtype=np.float32)

    return weights


@pytest.fixture
def pair_model(layer_model):
    """``pair_model(op_type, weights, arrays=None, attributes=None)``: one node; more goes to ``layer_model``."""

    def pair_model(op_type, weights, arrays=None, attributes=None, **more):
        first, bias, down, down_bias = weights
        stored = {ff.PREFIX + name: array for name, array in {**down.arrays(), "bias": down_bias}.items()}
        sizes = {ff.PREFIX + name: size for name, size in down.attributes().items() if name != "format"}
        sizes[f"{ff.PREFIX}mask_structure"] = "unstructured"
        return layer_model(
            first,
            bias,
            op_type,
            arrays={**stored, **(arrays or {})},
            attributes={**sizes, **(attributes or {})},
            **more,
        )

    return pair_model


@with_and_without
@pytest.mark.parametrize("widths", [(1, 1), (4, 4), (8, 8), (1, 4), (8, 1)])
@every_op_type
def test_library_and_body_compute_the_reference(op_type, widths, library, weights, pair_model, open_session):
    both = weights(op_type, *widths)
    model = pair_model(op_type, both)
    x = inputs(150, K)
    for threads in (1, 2):
        (got,) = open_session(model, library=library, threads=threads).run(None, {"X": x})
        compare(got, ff.reference(op_type, x, *both))


@with_and_without
@every_op_type
def test_the_same_as_one_operator_behind_the_other(
    op_type, library, weights, pair_model, layer_model, open_session
):
    """On the body to the last bit: it is one behind the other."""
    both = weights(op_type)
    first, bias, down, down_bias = both
    x = inputs(33, K)
    (got,) = open_session(pair_model(op_type, both), library=library).run(None, {"X": x})
    single = open_session(layer_model(first, bias, ff.OP_TYPES[op_type]), library=library)
    (between,) = single.run(None, {"X": x})
    (expected,) = open_session(layer_model(down, down_bias), library=library).run(None, {"X": between})
    if library:
        compare(got, expected)
    else:
        np.testing.assert_array_equal(got, expected)


@with_and_without
@every_op_type
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (3, 5, K), (2, 0, K)])
def test_any_rank_and_empty_batches(shape, op_type, library, weights, pair_model, open_session):
    both = weights(op_type)
    model = pair_model(op_type, both, x_shape=[*(f"d{i}" for i in range(len(shape) - 1)), None])
    x = inputs(*shape)
    (got,) = open_session(model, library=library).run(None, {"X": x})
    compare(got, ff.reference(op_type, x, *both))


@with_and_without
@pytest.mark.parametrize("hidden", [1, 45, 130, 383])
@every_op_type
def test_sizes_that_are_multiples_of_nothing(op_type, hidden, library, weights, pair_model, open_session):
    both = weights(op_type, hidden=hidden)
    x = inputs(21, K)
    (got,) = open_session(pair_model(op_type, both), library=library).run(None, {"X": x})
    compare(got, ff.reference(op_type, x, *both))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "neon"])
def test_any_width_on_every_instruction_set(isa, weights, pair_model, run_forced):
    for op_type in ("SparseFeedForwardGelu", "SparseFeedForwardSiluGate"):
        both = weights(op_type, hidden=45)
        x = inputs(37, K)
        (got,) = run_forced(pair_model(op_type, both), {"X": x}, isa)
        compare(got, ff.reference(op_type, x, *both))


@every_op_type
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_body_folds_to_the_linears(op_type, opset, weights, pair_model, open_session, tmp_path):
    """Nothing of the decoders is left when the session runs, and the library's node stays with the library."""
    both = weights(op_type)
    model = pair_model(op_type, both, opset=opset)
    x = inputs(9, K)
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        (got,) = open_session(model, library=library, options=options).run(None, {"X": x})
        compare(got, ff.reference(op_type, x, *both))
        op_types = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        if library:
            assert op_types == [op_type]
        else:
            products = 3 if gated(op_type) else 2
            linears = [name for name in op_types if name in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")]
            assert len(linears) == products
            assert not {"ScatterElements", "CumSum", "Split", "Slice", "Reshape", op_type} & set(op_types)


def test_the_second_decoder_is_the_first_with_other_names():
    assert CHUNKED_CSC.decoder(ff.PREFIX).count(ff.PREFIX) > 100
    assert CHUNKED_CSC.decoder(ff.PREFIX).replace(ff.PREFIX, "") == CHUNKED_CSC.decoder()
    body = OP_TYPES["SparseFeedForward"].function_body(17)
    made = [name for node in body.node for name in node.output]
    assert len(made) == len(set(made))
    own = {name for node in body.node for name in node.output if name.startswith(ff.PREFIX)}
    for node in body.node:
        if own.intersection(node.output):
            assert all(name.startswith(ff.PREFIX) for name in node.input)
            assert all(a.ref_attr_name.startswith(ff.PREFIX) for a in node.attribute if a.ref_attr_name)


@every_op_type
def test_output_shapes_are_inferred(op_type, weights, pair_model, open_session):
    model = pair_model(op_type, weights(op_type), x_shape=["batch", "tokens", None])
    (output,) = open_session(model).get_outputs()
    assert output.shape == ["batch", "tokens", N]


@every_op_type
def test_not_a_number_stays_in_its_token(op_type, weights, pair_model, open_session):
    both = weights(op_type)
    x = inputs(3, K)
    x[1, 5] = np.nan
    (got,) = open_session(pair_model(op_type, both)).run(None, {"X": x})
    compare(got[[0, 2]], ff.reference(op_type, x[[0, 2]], *both))
    assert np.isnan(got[1]).any()


HOSTILE_ATTRIBUTES = {
    "K too small": ({"down_K": 47}, r"weight down_\*: offsets of block"),
    "K too large": ({"down_K": 49}, "attribute down_K is 49, expected the 48 outputs of the first weight"),
    "no K": ({"down_K": None}, "attribute down_K is missing"),
    "N zero": ({"down_N": 0}, r"weight down_\*: attribute N is 0"),
    "chunk zero": ({"down_chunk": 0}, r"weight down_\*: attribute chunk is 0"),
    "another format": ({"format": "bitmap"}, "attribute format is 'bitmap'"),
}


@pytest.mark.parametrize("case", HOSTILE_ATTRIBUTES)
def test_hostile_attributes_are_refused_by_name(case, weights, pair_model, open_session, node_name):
    attributes, message = HOSTILE_ATTRIBUTES[case]
    op_type = "SparseFeedForwardGelu"
    model = pair_model(op_type, weights(op_type), attributes=attributes, with_body=False)
    with pytest.raises(Exception, match=rf"node '{node_name}' \({op_type}\): .*{message}"):
        open_session(model)


def test_weights_that_do_not_fit_are_refused(weights, pair_model, open_session, node_name):
    first, bias, _, _ = weights("SparseFeedForwardRelu")
    _, _, down, down_bias = weights("SparseFeedForwardRelu", hidden=40)
    model = pair_model("SparseFeedForwardRelu", (first, bias, down, down_bias), with_body=False)
    message = rf"node '{node_name}' .*attribute down_K is 40, expected the 48 outputs of the first weight"
    with pytest.raises(Exception, match=message):
        open_session(model)


@pytest.mark.parametrize("name", ["values", "offsets", "counts", "rows"])
def test_hostile_tensors_of_the_second_are_refused(name, weights, pair_model, open_session, node_name):
    both = weights("SparseFeedForward")
    arrays = {ff.PREFIX + name: both[2].arrays()[name][:-1]}
    model = pair_model("SparseFeedForward", both, arrays=arrays, with_body=False)
    with pytest.raises(Exception, match=rf"node '{node_name}' .*weight down_\*: .*{name} has"):
        open_session(model)


def test_every_linear_has_a_pair():
    assert set(ff.PAIRS) == {*sm.ACTIVATIONS, *split.GATES.values()}
    assert set(ff.OP_TYPES) == {
        "SparseFeedForward",
        *(f"SparseFeedForward{name}" for name in ("Relu", "Gelu", "GeluTanh", "Silu", "QuickGelu")),
        *(f"SparseFeedForward{name}Gate" for name in ("Silu", "GeluTanh")),
    }
