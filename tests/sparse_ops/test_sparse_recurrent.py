"""LSTM and GRU with sparse weights: the contract, and the operators with the library and on their function bodies."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, block_size
from sparse_onnx.sparse_ops.ops import sparse_recurrent as sr
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

S, B, K, H = 6, 3, 37, 24
NODE = "encoder/lstm"
CELLS = [("LSTM", 0), ("GRU", 0), ("GRU", 1)]
every_op_type = pytest.mark.parametrize("op_type", sr.OP_TYPES)
every_cell = pytest.mark.parametrize(("cell", "reset"), CELLS)
every_direction = pytest.mark.parametrize("direction", sr.DIRECTIONS)
with_and_without = pytest.mark.parametrize("library", [True, False])


def normal(*shape, seed=3, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def weights(op_type, sparse, *, inputs=K, hidden=H, directions=1, block=None, chunk=None):
    """Both packed weights and their biases."""
    N = directions * sr.CELLS[sr.OP_TYPES[op_type].cell] * hidden
    block = block or block_size(N, sr.recurrent_outputs(hidden))
    return (
        CHUNKED_CSC.pack(sparse(inputs, N, 0.3, 0) * np.float32(0.5), chunk=chunk),
        normal(N, seed=5, scale=0.3),
        CHUNKED_CSC.pack(sparse(hidden, N, 0.3, 1) * np.float32(0.5), block=block, chunk=chunk),
        normal(N, seed=6, scale=0.3),
    )


def feeds(op_type, *, steps=S, batch=B, inputs=K, hidden=H, directions=1, lengths=None):
    given = {
        "X": normal(steps, batch, inputs),
        "sequence_lens": np.resize(lengths if lengths is not None else [steps, 1, 0, 2], batch).astype(
            np.int32
        ),
        "initial_h": normal(directions, batch, hidden, seed=7, scale=0.5),
        "initial_c": normal(directions, batch, hidden, seed=8),
    }
    return {name: given[name] for name in ("X", *sr.OP_TYPES[op_type].operands)}


def model(
    op_type, both, direction, reset, *, opset=17, attributes=None, arrays=None, with_body=True, x_shape=None
):
    """One node whose inputs behind the weights are inputs of the graph. ``attributes`` and ``arrays`` replace its own
    (None: left out)."""
    signature = sr.OP_TYPES[op_type]
    packed, bias, recurrent, recurrent_bias = both
    stored = {**packed.arrays(), "bias": bias}
    stored |= {
        sr.PREFIX + name: array for name, array in {**recurrent.arrays(), "bias": recurrent_bias}.items()
    }
    stored |= arrays or {}
    wanted = {**packed.attributes(), "mask_structure": "unstructured", "direction": direction}
    wanted |= {sr.PREFIX + name: size for name, size in recurrent.attributes().items() if name != "format"}
    wanted[f"{sr.PREFIX}mask_structure"] = "unstructured"
    if signature.cell == "GRU":
        wanted["linear_before_reset"] = reset
    wanted |= attributes or {}
    node = onnx.helper.make_node(
        op_type, ["X", *stored, *signature.operands], signature.outputs, name=NODE, domain=DOMAIN
    )
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in wanted.items() if v is not None)
    types = {"sequence_lens": onnx.TensorProto.INT32}
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [
            onnx.helper.make_tensor_value_info("X", float32, x_shape),
            *(
                onnx.helper.make_tensor_value_info(name, types.get(name, float32), None)
                for name in signature.operands
            ),
        ],
        [onnx.helper.make_tensor_value_info(name, float32, None) for name in signature.outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return onnx.helper.make_model(
        graph,
        ir_version=9 if opset < 21 else 10,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[OP_TYPES[op_type].function_body(opset)] if with_body else [],
    )


def expected(op_type, given, both, direction, reset):
    more = {name: value for name, value in given.items() if name != "X"}
    return sr.reference(op_type, given["X"], *both, direction=direction, linear_before_reset=reset, **more)


def compare(got, want, tolerance=2e-6):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=tolerance)


def of_cell(cell):
    return [op_type for op_type, signature in sr.OP_TYPES.items() if signature.cell == cell]


@with_and_without
@every_direction
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@every_cell
def test_library_and_body_compute_the_reference(cell, reset, batch, direction, library, sparse, open_session):
    directions = sr.DIRECTIONS[direction]
    for op_type in of_cell(cell):
        both = weights(op_type, sparse, directions=directions)
        given = feeds(op_type, batch=batch, directions=directions)
        proto = model(op_type, both, direction, reset)
        for threads in (1, 2):
            got = open_session(proto, library=library, threads=threads).run(None, given)
            compare(got, expected(op_type, given, both, direction, reset))


@every_cell
@pytest.mark.parametrize(
    ("hidden", "block"),
    [(1, None), (3, None), (16, None), (37, None), (100, None), (130, 64), (37, 8), (96, 128)],
)
def test_sizes_that_are_multiples_of_nothing(hidden, block, cell, reset, sparse, open_session):
    """Where gates begin inside a block, too."""
    op_type = f"Sparse{cell}State"
    both = weights(op_type, sparse, hidden=hidden, directions=2, block=block, chunk=32)
    given = feeds(op_type, hidden=hidden, directions=2)
    proto = model(op_type, both, "bidirectional", reset)
    for library in (True, False):
        got = open_session(proto, library=library).run(None, given)
        compare(got, expected(op_type, given, both, "bidirectional", reset))


@every_op_type
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0), (1, 1)])
def test_empty_sequences_and_batches(shape, op_type, sparse, open_session):
    both = weights(op_type, sparse, directions=2)
    given = feeds(op_type, steps=shape[0], batch=shape[1], directions=2, lengths=[shape[0]])
    got = open_session(model(op_type, both, "bidirectional", 1)).run(None, given)
    compare(got, expected(op_type, given, both, "bidirectional", 1))


@pytest.mark.parametrize("op_type", ["SparseLSTMLengthsState", "SparseGRUState"])
@pytest.mark.parametrize("opset", range(13, 27))
def test_body_of_every_opset(op_type, opset, sparse, open_session):
    both = weights(op_type, sparse)
    given = feeds(op_type)
    got = open_session(model(op_type, both, "reverse", 1, opset=opset), library=False).run(None, given)
    compare(got, expected(op_type, given, both, "reverse", 1))


@every_op_type
@pytest.mark.parametrize("opset", [13, 21])
def test_body_folds_to_the_standard_operator(op_type, opset, sparse, open_session, tmp_path):
    both = weights(op_type, sparse, directions=2)
    proto = model(op_type, both, "bidirectional", 0, opset=opset)
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        open_session(proto, library=library, options=options)
        op_types = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert op_types == [op_type if library else sr.OP_TYPES[op_type].cell]


@every_op_type
def test_body_makes_every_value_once(op_type):
    made = [name for node in OP_TYPES[op_type].function_body(17).node for name in node.output]
    assert len(made) == len(set(made))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@every_cell
def test_every_instruction_set(isa, cell, reset, sparse, open_session, monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_FORCE_ISA", isa)
    op_type = f"Sparse{cell}LengthsState"
    both = weights(op_type, sparse, directions=2)
    try:
        session = open_session(model(op_type, both, "bidirectional", reset))
    except Exception as error:
        if "not supported" in str(error):
            pytest.skip(str(error))
        raise
    for batch in (1, 5, 20):
        given = feeds(op_type, batch=batch, directions=2)
        compare(session.run(None, given), expected(op_type, given, both, "bidirectional", reset))


@every_cell
@pytest.mark.parametrize("batch", [1, 8, 70])
def test_threads_give_the_same_bytes(batch, cell, reset, sparse, open_session):
    """Large enough for steps to be shared among threads."""
    op_type = f"Sparse{cell}"
    both = weights(op_type, sparse, hidden=256, inputs=16)
    given = feeds(op_type, steps=4, batch=batch, inputs=16, hidden=256)
    proto = model(op_type, both, "forward", reset)
    one, *others = (open_session(proto, threads=threads).run(None, given) for threads in (1, 2, 4))
    compare(one, expected(op_type, given, both, "forward", reset), 2e-5)
    for other, (first, second) in itertools.product(others, enumerate(one)):
        np.testing.assert_array_equal(other[first], second)


@every_op_type
def test_output_shapes_are_inferred(op_type, sparse, open_session):
    both = weights(op_type, sparse, directions=2)
    session = open_session(model(op_type, both, "bidirectional", 0, x_shape=["steps", "batch", K]))
    y, *states = (output.shape for output in session.get_outputs())
    assert y == ["steps", 2, "batch", H]
    assert all(state == [2, "batch", H] for state in states)


@every_cell
def test_not_a_number_stays_in_its_row_and_what_comes_later(cell, reset, sparse, open_session):
    op_type = f"Sparse{cell}"
    both = weights(op_type, sparse)
    given = feeds(op_type)
    clean = expected(op_type, given, both, "forward", reset)[0]
    given["X"][2, 1] = np.nan
    y, *_ = open_session(model(op_type, both, "forward", reset)).run(None, given)
    np.testing.assert_allclose(y[:, :, [0, 2]], clean[:, :, [0, 2]], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(y[:2], clean[:2], rtol=1e-5, atol=2e-6)
    assert np.isnan(y[2:, :, 1]).any(-1).all()


@every_cell
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e5])
def test_tiny_and_huge_activations(scale, cell, reset, sparse, open_session):
    op_type = f"Sparse{cell}"
    both = weights(op_type, sparse)
    given = {"X": scale * feeds(op_type)["X"]}
    got = open_session(model(op_type, both, "forward", reset)).run(None, given)
    with np.errstate(over="ignore"):
        compare(got, expected(op_type, given, both, "forward", reset), 1e-5)


HOSTILE = {
    "direction": ({"direction": "sideways"}, "attribute direction is 'sideways', expected forward"),
    "no direction": ({"direction": None}, "attribute direction is missing"),
    "two directions": (
        {"direction": "bidirectional"},
        "attributes N and recurrent_N are 96 and 96, expected",
    ),
    "reset": ({"linear_before_reset": 2}, "attribute linear_before_reset is 2, expected 0 or 1"),
    "no reset": ({"linear_before_reset": None}, "attribute linear_before_reset is missing"),
    "K of R": ({"recurrent_K": 23}, r"weight recurrent_\*: offsets of block"),
    "N": ({"N": 95}, "bias has 96 elements, expected 95"),
    "N of R": ({"recurrent_N": 0}, r"weight recurrent_\*: attribute N is 0"),
    "format": ({"format": "bitmap"}, "attribute format is 'bitmap'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_attributes_are_refused_by_name(case, sparse, open_session):
    attributes, message = HOSTILE[case]
    op_type = "SparseGRU" if "reset" in case else "SparseLSTM"
    proto = model(op_type, weights(op_type, sparse), "forward", 0, attributes=attributes, with_body=False)
    with pytest.raises(Exception, match=rf"node '{NODE}' \({op_type}\): .*{message}"):
        open_session(proto)


@pytest.mark.parametrize("name", ["values", "offsets", "counts", "rows"])
@pytest.mark.parametrize("prefix", ["", sr.PREFIX])
def test_hostile_tensors_are_refused(name, prefix, sparse, open_session):
    both = weights("SparseLSTM", sparse)
    arrays = {prefix + name: both[2 if prefix else 0].arrays()[name][:-1]}
    proto = model("SparseLSTM", both, "forward", 0, arrays=arrays, with_body=False)
    with pytest.raises(Exception, match=rf"node '{NODE}' .*{name} has"):
        open_session(proto)


def test_a_weight_of_another_cell_is_refused(sparse, open_session):
    proto = model("SparseLSTM", weights("SparseGRU", sparse), "forward", 0, with_body=False)
    with pytest.raises(Exception, match=rf"node '{NODE}' .*expected recurrent_K = {H} for each of 4 gates"):
        open_session(proto)


BAD_FEEDS = {
    "too long": (
        {"sequence_lens": np.array([S, S + 1, 0], np.int32)},
        "sequence_lens has 7 at place 1, expected 0..6",
    ),
    "negative": ({"sequence_lens": np.array([-1, 0, 0], np.int32)}, "sequence_lens has -1 at place 0"),
    "too few": ({"sequence_lens": np.array([S], np.int32)}, r"sequence_lens has shape \[1\], expected \[3\]"),
    "no batch": ({"X": normal(S, K)}, r"X has shape \[6, 37\], expected \[steps, batch, 37\]"),
    "width": ({"X": normal(S, B, K - 1)}, r"X has shape \[6, 3, 36\], expected"),
    "h": ({"initial_h": normal(1, B, H + 1)}, r"initial_h has shape \[1, 3, 25\], expected \[1, 3, 24\]"),
    "c": ({"initial_c": normal(2, B, H)}, r"initial_c has shape \[2, 3, 24\], expected"),
}


@pytest.mark.parametrize("case", BAD_FEEDS)
def test_inputs_that_do_not_fit_are_refused(case, sparse, open_session):
    wrong, message = BAD_FEEDS[case]
    op_type = "SparseLSTMLengthsState"
    session = open_session(model(op_type, weights(op_type, sparse), "forward", 0))
    with pytest.raises(Exception, match=rf"node '{NODE}' .*{message}"):
        session.run(None, feeds(op_type) | wrong)


@pytest.mark.parametrize(
    ("hidden", "N", "block"), [(256, 1024, 64), (48, 192, 48), (37, 148, 37), (134, 536, 64)]
)
def test_blocks_end_where_gates_do_if_they_can(hidden, N, block):
    assert block_size(N, sr.recurrent_outputs(hidden)) == block
