"""Linears that share their input: the contract, and the operators with the library and on their function bodies."""

import dataclasses
import re

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, concatenate
from sparse_onnx.sparse_ops.ops import sparse_matmul as sm
from sparse_onnx.sparse_ops.ops import sparse_matmul_split as split

K, BLOCK = 70, 16
# Output channels of the linears: whole blocks, but for the last one of a split; and others.
SIZES = {
    "SparseMatMulSplit2": (32, 45),
    "SparseMatMulSplit3": (16, 48, 21),
    "SparseMatMulSiluGate": (48, 48),
    "SparseMatMulGeluTanhGate": (48, 48),
}
ODD_SIZES = {
    "SparseMatMulSplit2": [(15, 33), (1, 1), (312, 383)],
    "SparseMatMulSplit3": [(17, 31, 15), (49, 49, 49), (1, 16, 2)],
    "SparseMatMulSiluGate": [(15, 15), (33, 33), (1, 1)],
    "SparseMatMulGeluTanhGate": [(17, 17), (383, 383)],
}
every_op_type = pytest.mark.parametrize("op_type", split.OP_TYPES)
with_and_without = pytest.mark.parametrize("library", [True, False])


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def compare(got, expected):
    assert [array.shape for array in got] == [array.shape for array in expected]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-4)


def at_block(weight, width=1):
    """Packed with blocks of BLOCK, also where there are fewer outputs."""
    n = weight.shape[1]
    wide = np.concatenate([weight, np.zeros((K, max(0, BLOCK - n)), np.float32)], axis=1)
    return dataclasses.replace(CHUNKED_CSC.pack(wide, chunk=32, block=BLOCK, width=width), N=n)


@pytest.fixture
def weights(sparse):
    """``weights(op_type, width=1, sizes=None)``: the linears' dense weights [K, Ni]."""

    def weights(op_type, width=1, sizes=None):
        return [
            np.repeat(sparse(K, -(-n // width), 0.3, seed), width, axis=1)[:, :n]
            for seed, n in enumerate(sizes or SIZES[op_type])
        ]

    return weights


@pytest.fixture
def layer(weights, layer_model):
    """``layer(op_type, width=1, sizes=None)``: packed weight, bias, attribute ``split`` and the model; more goes to
    ``layer_model``."""

    def layer(op_type, width=1, sizes=None, attributes=None, **more):
        sizes = sizes or SIZES[op_type]
        parts = [at_block(w, width) for w in weights(op_type, width, sizes)]
        packed = concatenate(parts)
        bias = np.linspace(-2, 2, packed.N, dtype=np.float32)
        own = () if op_type in split.GATES.values() else sizes
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


every_odd_size = pytest.mark.parametrize(
    ("op_type", "sizes"), [(op_type, sizes) for op_type, cases in ODD_SIZES.items() for sizes in cases]
)


@with_and_without
@pytest.mark.parametrize("width", [1, 4, 8])
@every_odd_size
def test_linears_of_any_width(op_type, sizes, width, library, layer, weights, open_session):
    """Not whole blocks: what lies between the linears is no part of the weight."""
    packed, bias, own, model = layer(op_type, width, sizes)
    assert packed.format == CHUNKED_CSC.variants[1]
    np.testing.assert_array_equal(packed.unpack(), np.concatenate(weights(op_type, width, sizes), axis=1))
    x = inputs(37, K)
    expected = split.reference(op_type, x, packed, bias, own)
    for threads in (1, 2):
        compare(open_session(model, library=library, threads=threads).run(None, {"X": x}), expected)
    shapes = [output.shape for output in open_session(model, library=library).get_outputs()]
    assert shapes == [["tokens", n] for n in own or sizes[:1]]


@pytest.mark.parametrize("opset", [13, 18, 21, 23])
@pytest.mark.parametrize("op_type", split.OP_TYPES)
def test_bodies_of_any_width_fold(op_type, opset, layer, open_session, tmp_path):
    packed, bias, own, model = layer(op_type, sizes=ODD_SIZES[op_type][0], opset=opset)
    x = inputs(9, K)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    got = open_session(model, library=False, options=options).run(None, {"X": x})
    compare(got, split.reference(op_type, x, packed, bias, own))
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not {"ScatterElements", "CumSum", "Split", "Slice", "Reshape", "Concat", op_type} & left


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "neon"])
def test_any_width_on_every_instruction_set(isa, layer, tmp_path, run_forced):
    for op_type, cases in ODD_SIZES.items():
        packed, bias, own, model = layer(op_type, sizes=cases[-1])
        x = inputs(37, K)
        compare(run_forced(model, {"X": x}, isa), split.reference(op_type, x, packed, bias, own))


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
        part = CHUNKED_CSC.pack(weight, chunk=32, block=BLOCK)
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
    stored = np.split(packed.unpack()[5] != 0, np.cumsum(SIZES[op_type])[:-1])
    reached = stored if own else [stored[0] | stored[1]]
    for mine, columns in zip(got, reached, strict=True):
        np.testing.assert_array_equal(np.isnan(mine[1]), columns)


def test_a_weight_with_padding_is_not_read_as_one_without(layer, open_session, node_name):
    """Neither the other way round: a format that a library does not know is refused."""
    for sizes, wrong in (
        ((32, 45), CHUNKED_CSC.variants[1]),
        ((31, 45), CHUNKED_CSC.name),
        ((31, 45), "chunked_csc_newer"),
    ):
        packed, bias, own, model = layer(
            "SparseMatMulSplit2", sizes=sizes, attributes={"format": wrong}, with_body=False
        )
        if wrong == CHUNKED_CSC.variants[1]:  # whole blocks are the same in both
            x = inputs(5, K)
            compare(
                open_session(model).run(None, {"X": x}),
                split.reference("SparseMatMulSplit2", x, packed, bias, own),
            )
            continue
        with pytest.raises(Exception, match=rf"node '{node_name}' \(SparseMatMulSplit2\)"):
            open_session(model)
    _, _, _, model = layer("SparseMatMulSplit2", attributes={"format": "bitmap"}, with_body=False)
    with pytest.raises(Exception, match="'bitmap'; this library reads chunked_csc and chunked_csc_parts"):
        open_session(model)
    single = layer("SparseMatMulSplit2", sizes=(31, 45))[0]
    with pytest.raises(FormatError, match="are not the sizes of linears"):
        dataclasses.replace(single, split=(31, 46)).validate()


WRONG_PARTS = {
    "another sum": [31, 44],
    "zero": [0, 76],
    "zero at the end": [76, 0],
    "negative": [-16, 92],
    "larger than N": [96, -20],
    "huge": [2**63 - 16, 45],
    "too few": [76],
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_wrong_parts_are_refused_by_name(case, layer, open_session, node_name):
    _, _, _, model = layer(
        "SparseMatMulSplit2", sizes=(31, 45), attributes={"split": WRONG_PARTS[case]}, with_body=False
    )
    message = rf"node '{node_name}' \(SparseMatMulSplit2\): .*expected (sizes that add up to N = 76|2 sizes)"
    with pytest.raises(Exception, match=message):
        open_session(model)


@pytest.mark.parametrize("sizes", [[16, 60], [60, 16], [30, 46]])
def test_other_parts_do_not_reach_behind_the_arrays(sizes, layer, open_session, node_name):
    """They add up, but mean another number of blocks, or the same in another place."""
    packed, _, _, model = layer(
        "SparseMatMulSplit2", sizes=(31, 45), attributes={"split": sizes}, with_body=False
    )
    if sum(-(-n // BLOCK) for n in sizes) == packed.blocks:
        assert [y.shape[1] for y in open_session(model).run(None, {"X": inputs(3, K)})] == sizes
    else:
        with pytest.raises(Exception, match=rf"node '{node_name}' .*counts has"):
            open_session(model)


@pytest.mark.parametrize("name", ["values", "offsets", "counts", "rows", "bias"])
def test_short_arrays_with_padding_are_refused(name, layer, open_session, node_name):
    packed, bias, _, _ = layer("SparseMatMulSplit2", sizes=(31, 45))
    short = {**packed.arrays(), "bias": bias}[name][:-1]
    _, _, _, model = layer("SparseMatMulSplit2", sizes=(31, 45), arrays={name: short}, with_body=False)
    with pytest.raises(Exception, match=rf"node '{node_name}' .*{name} has"):
        open_session(model)


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
        rf"node '{node_name}' \(SparseMatMulSplit2\): attribute split is {re.escape(str(wrong))}, expected 2"
    )
    if len(wrong) == 2:
        message += " sizes that add up to N = 77, all but the last multiples of block 16"
    with pytest.raises(Exception, match=message):
        open_session(model)


@pytest.mark.parametrize("value", [None, 32, "16", [1] * 17])
def test_split_of_another_kind_is_refused(value, layer, open_session):
    _, _, _, model = layer("SparseMatMulSplit2", attributes={"split": value}, with_body=False)
    with pytest.raises(Exception, match=r"split|attribute"):
        open_session(model)


def test_gate_without_whole_blocks_is_refused(sparse, layer_model, open_session, node_name):
    for n in (BLOCK, 3 * BLOCK, 2 * BLOCK + 2):
        packed = CHUNKED_CSC.pack(sparse(K, n, 0.3), chunk=32, block=BLOCK)
        model = layer_model(packed, np.zeros(n, np.float32), "SparseMatMulSiluGate", with_body=False)
        message = rf"node '{node_name}' .*attribute N is {n}, expected 2 sizes that add up to N = {n}, all but the last"
        with pytest.raises(Exception, match=message):
            open_session(model)


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("sizes", [(16, 16), (32, 16, 48), (16, 21), (16, 16, 16, 16)])
def test_concatenated_weights_are_the_weights_side_by_side(sizes, width, sparse):
    dense = [
        np.repeat(sparse(K, -(-n // width), 0.3, n + seed), width, axis=1)[:, :n]
        for seed, n in enumerate(sizes)
    ]
    packed = concatenate([CHUNKED_CSC.pack(w, chunk=32, block=BLOCK, width=width) for w in dense])
    sparse_ops.check(packed)
    whole = CHUNKED_CSC.pack(np.concatenate(dense, axis=1), chunk=32, block=BLOCK, width=width)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(packed.arrays()[name], array)
    assert packed.attributes() == whole.attributes()


def test_concatenate_refuses_weights_that_do_not_fit(sparse):
    def part(k=K, n=32, **options):
        return CHUNKED_CSC.pack(sparse(k, n, 0.3), **{"chunk": 32, "block": BLOCK, "width": 1, **options})

    for other in (part(k=71), part(chunk=16), part(block=8), part(width=4)):
        with pytest.raises(ValueError, match="equal K, chunk, block and width"):
            concatenate([part(), other])


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("sizes", [(15, 17), (383, 312, 1), (16, 31, 33)])
def test_concatenated_weights_of_any_width(sizes, width, sparse):
    dense = [
        np.repeat(sparse(K, -(-n // width), 0.3, n + seed), width, axis=1)[:, :n]
        for seed, n in enumerate(sizes)
    ]
    packed = concatenate([at_block(w, width) for w in dense])
    assert packed.attributes()["format"] == CHUNKED_CSC.variants[1]
    sparse_ops.check(packed)
    packed.validate()
    np.testing.assert_array_equal(packed.unpack(), np.concatenate(dense, axis=1))
