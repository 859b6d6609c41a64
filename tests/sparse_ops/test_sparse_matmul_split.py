"""Linears that share their input: the contract, and the operators with the library and on their function bodies."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops import sparse_matmul as sm
from sparse_onnx.sparse_ops import sparse_matmul_split as split

K, BLOCK = 70, 16
# Output channels of the linears: whole blocks, but for the last one of a split.
SIZES = {
    "SparseMatMulSplit2": (32, 45),
    "SparseMatMulSplit3": (16, 48, 21),
    "SparseMatMulSiluGate": (48, 48),
    "SparseMatMulGeluTanhGate": (48, 48),
}
every_op_type = pytest.mark.parametrize("op_type", split.OP_TYPES)
with_and_without = pytest.mark.parametrize("library", [True, False])


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def compare(got, expected):
    assert [array.shape for array in got] == [array.shape for array in expected]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-4)


@pytest.fixture
def weights(sparse):
    """``weights(op_type, width=1)``: the linears' dense weights [K, Ni]."""

    def weights(op_type, width=1):
        return [
            np.repeat(sparse(K, -(-n // width), 0.3, seed), width, axis=1)[:, :n]
            for seed, n in enumerate(SIZES[op_type])
        ]

    return weights


@pytest.fixture
def layer(weights, layer_model):
    """``layer(op_type, width=1)``: packed weight, bias, attribute ``split`` and the model; more goes to
    ``layer_model``."""

    def layer(op_type, width=1, attributes=None, **more):
        parts = [sm.pack(w, chunk=32, block=BLOCK, width=width) for w in weights(op_type, width)]
        packed = split.concatenate(parts)
        bias = np.linspace(-2, 2, packed.N, dtype=np.float32)
        own = () if op_type in split.GATES.values() else SIZES[op_type]
        outputs = [f"Y{i}" for i in range(len(own))] or ["Y"]
        attributes = {**({"split": own} if own else {}), **(attributes or {})}
        model = layer_model(packed, bias, op_type, attributes=attributes, outputs=outputs, **more)
        return packed, bias, own, model

    return layer


@with_and_without
@pytest.mark.parametrize("width", [1, 4, 8])
@every_op_type
def test_library_and_body_compute_the_reference(op_type, width, library, layer, open_session):
    packed, bias, own, model = layer(op_type, width)
    x = inputs(150, K)
    expected = split.reference(op_type, x, packed, bias, own)
    for threads in (1, 2):
        compare(open_session(model, library=library, threads=threads).run(None, {"X": x}), expected)


@with_and_without
@every_op_type
def test_the_reference_is_what_the_linears_compute(
    op_type, library, layer, layer_model, weights, open_session
):
    """The same from ``SparseMatMul*`` for each linear alone, multiplied outside."""
    _, bias, own, model = layer(op_type)
    x = inputs(33, K)
    alone, first = [], 0
    activations = {gate: activation for activation, gate in split.GATES.items()}
    for index, weight in enumerate(weights(op_type)):
        activation = activations.get(op_type, "none") if index == 0 else "none"
        part = sm.pack(weight, chunk=32, block=BLOCK)
        single = layer_model(part, bias[first : first + part.N], sm.OP_TYPES[activation])
        alone += open_session(single, library=library).run(None, {"X": x})
        first += part.N
    expected = alone if own else [alone[0] * alone[1]]
    got = open_session(model, library=library).run(None, {"X": x})
    if library:
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    compare(got, expected)


@with_and_without
@every_op_type
@pytest.mark.parametrize("shape", [(K,), (0, K), (3, 5, K), (2, 0, K)])
def test_any_rank_and_empty_batches(shape, op_type, library, layer, open_session):
    packed, bias, own, model = layer(op_type, x_shape=[*(f"d{i}" for i in range(len(shape) - 1)), None])
    x = inputs(*shape)
    got = open_session(model, library=library).run(None, {"X": x})
    compare(got, split.reference(op_type, x, packed, bias, own))


@every_op_type
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_body_folds_to_the_linears(op_type, opset, layer, open_session, tmp_path):
    """Nothing of the decoder is left when the session runs, and the library's node stays with the library."""
    packed, bias, own, model = layer(op_type, opset=opset)
    x = inputs(9, K)
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        got = open_session(model, library=library, options=options).run(None, {"X": x})
        compare(got, split.reference(op_type, x, packed, bias, own))
        op_types = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        if library:
            assert op_types == [op_type]
        else:
            assert op_types.count("MatMul") + op_types.count("Gemm") == len(SIZES[op_type])
            assert not {"ScatterElements", "CumSum", "Split", "Slice", "Reshape", op_type} & set(op_types)


@every_op_type
def test_output_shapes_are_inferred(op_type, layer, open_session):
    _, _, own, model = layer(op_type, x_shape=["batch", "tokens", None])
    shapes = [output.shape for output in open_session(model).get_outputs()]
    assert shapes == [["batch", "tokens", n] for n in own or [48]]


def test_unused_outputs_are_no_problem(layer, open_session):
    packed, bias, own, model = layer("SparseMatMulSplit3")
    del model.graph.output[1:]
    x = inputs(20, K)
    for library in (True, False):
        got = open_session(model, library=library).run(None, {"X": x})
        compare(got, split.reference("SparseMatMulSplit3", x, packed, bias, own)[:1])


@every_op_type
def test_not_a_number_and_infinity_pass_through(op_type, layer, open_session):
    packed, bias, own, model = layer(op_type)
    x = inputs(3, K)
    x[1, 5] = np.nan
    got = open_session(model).run(None, {"X": x})
    touched = split.reference(op_type, x, packed, bias, own)
    for mine, theirs in zip(got, touched, strict=True):
        np.testing.assert_allclose(mine[[0, 2]], theirs[[0, 2]], rtol=1e-5, atol=2e-4)
    stored = np.split(sm.unpack(packed)[5] != 0, np.cumsum(SIZES[op_type])[:-1])
    reached = stored if own else [stored[0] | stored[1]]
    for mine, columns in zip(got, reached, strict=True):
        np.testing.assert_array_equal(np.isnan(mine[1]), columns)


WRONG_SPLITS = {
    "one too few": [32],
    "one too many": [32, 32, 13],
    "another sum": [32, 44],
    "no whole blocks": [37, 40],
    "zero": [0, 77],
    "zero at the end": [77, 0],
    "negative": [-16, 93],
    "larger than N": [96, -19],
    "huge": [2**63 - 16, 45],
}


@pytest.mark.parametrize("case", WRONG_SPLITS)
def test_wrong_split_is_refused_by_name(case, layer, open_session, node_name):
    wrong = WRONG_SPLITS[case]
    _, _, _, model = layer("SparseMatMulSplit2", attributes={"split": wrong}, with_body=False)
    message = (
        rf"node '{node_name}' \(SparseMatMulSplit2\): attribute split is {re.escape(str(wrong))}, "
        "expected 2 sizes that add up to N = 77, all but the last multiples of block 16"
    )
    with pytest.raises(Exception, match=message):
        open_session(model)


@pytest.mark.parametrize("value", [None, 32, "16", [1] * 17])
def test_split_of_another_kind_is_refused(value, layer, open_session):
    _, _, _, model = layer("SparseMatMulSplit2", attributes={"split": value}, with_body=False)
    with pytest.raises(Exception, match=r"split|attribute"):
        open_session(model)


def test_gate_without_whole_blocks_is_refused(sparse, layer_model, open_session, node_name):
    for n in (BLOCK, 3 * BLOCK, 2 * BLOCK + 2):
        packed = sm.pack(sparse(K, n, 0.3), chunk=32, block=BLOCK)
        model = layer_model(packed, np.zeros(n, np.float32), "SparseMatMulSiluGate", with_body=False)
        message = rf"node '{node_name}' .*attribute N is {n}, expected two halves of whole blocks of 16"
        with pytest.raises(Exception, match=message):
            open_session(model)


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("sizes", [(16, 16), (32, 16, 48), (16, 21), (16, 16, 16, 16)])
def test_concatenated_weights_are_the_weights_side_by_side(sizes, width, sparse):
    dense = [
        np.repeat(sparse(K, -(-n // width), 0.3, n + seed), width, axis=1)[:, :n]
        for seed, n in enumerate(sizes)
    ]
    packed = split.concatenate([sm.pack(w, chunk=32, block=BLOCK, width=width) for w in dense])
    sparse_ops.check(packed)
    whole = sm.pack(np.concatenate(dense, axis=1), chunk=32, block=BLOCK, width=width)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(packed.arrays()[name], array)
    assert packed.attributes() == whole.attributes()


def test_concatenate_refuses_weights_that_do_not_fit(sparse):
    def part(k=K, n=32, **options):
        return sm.pack(sparse(k, n, 0.3), **{"chunk": 32, "block": BLOCK, "width": 1, **options})

    for other in (part(k=71), part(chunk=16), part(block=8), part(width=4)):
        with pytest.raises(ValueError, match="equal K, chunk, block and width"):
            split.concatenate([part(), other])
    with pytest.raises(ValueError, match=r"whole blocks of 16 outputs, not \[40, 32\]"):
        split.concatenate([part(n=40), part()])
