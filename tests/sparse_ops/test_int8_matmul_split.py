"""Linears of bytes that share their input: how their weights become one, and the operators ``Int8MatMul*`` and
``QMatMul*`` with several of them, with the library and on their function bodies."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings

from sparse_onnx.sparse_ops.domain import DOMAIN, EXACT_DOMAIN
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.formats.int8_quads import join, pack_dense, pack_quads, parts, read, whole_block
from sparse_onnx.sparse_ops.ops import int8_matmul, q_matmul, sparse_matmul, sparse_matmul_split
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

K, BLOCK = 70, 16
# Outputs of the linears: whole blocks, but for the last one of a split.
SIZES = {
    "SparseMatMulSplit2": (32, 45),
    "SparseMatMulSplit3": (16, 48, 21),
    "SparseMatMulSiluGate": (48, 48),
    "SparseMatMulGeluTanhGate": (48, 48),
}
GRIDS = {"plain": q_matmul.Grids(), "grid": q_matmul.Grids(0, 0.0625, -120, 135)}
X_SCALE, X_ZERO = np.float32(0.02), np.uint8(131)
both_ways = pytest.mark.parametrize("library", [True, False])
both_formats = pytest.mark.parametrize("pack", [pack_quads, pack_dense])
every_base = pytest.mark.parametrize("base", sparse_matmul_split.OP_TYPES)


def integers(n, K=K, kept=0.3, seed=0):
    rng = np.random.default_rng(seed)
    found = rng.integers(-128, 128, (K, n)).astype(np.int8)
    return np.where(rng.random((K, n)) < kept, found, np.int8(0))


def scales(n, seed=1):
    return np.random.default_rng(seed).uniform(0.001, 0.01, n).astype(np.float32)


def floats(*shape):
    return np.random.default_rng(2).normal(0.1, 1, shape).astype(np.float32)


def rounded(*shape):
    return np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def layer(layer_model):
    """``layer(base, pack, grids=None)``: weight, bias, the attribute ``split`` and the model; of ``QMatMul*`` with
    ``grids``, else of ``Int8MatMul*``."""

    def layer(base, pack, grids=None, sizes=None, attributes=None, **options):
        sizes = sizes or SIZES[base]
        n = sum(sizes)
        weight, bias = pack(integers(n), scales(n), block=BLOCK), np.linspace(-2, 2, n, dtype=np.float32)
        split = () if base in sparse_matmul_split.GATES.values() else sizes
        options["outputs"] = [f"Y{i}" for i in range(len(split))] or ["Y"]
        attributes = {**({"split": split} if split else {}), **(attributes or {})}
        if grids is None:
            op_type = int8_matmul.op_type_of(base, weight.dense)
        else:
            op_type = q_matmul.op_type_of(base, weight.dense)
            attributes |= grids.attributes()
            options["x_type"] = onnx.TensorProto.UINT8
            options["arrays"] = {"x_scale": np.array(X_SCALE), "x_zero_point": np.array(X_ZERO)}
        return weight, bias, split, layer_model(weight, bias, op_type, attributes=attributes, **options)

    return layer


def sums_of_floats(x, weight, bias):
    return int8_matmul.reference(x, weight, bias)


def sums_of_bytes(x, weight, bias, grids):
    return q_matmul.reference(x, np.array(X_SCALE), np.array(X_ZERO), weight, bias, grids)


def compare(found, wanted):
    assert [array.shape for array in found] == [array.shape for array in wanted]
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(initial=0))


@both_ways
@both_formats
@every_base
def test_sessions_compute_what_the_contract_says(base, pack, library, layer, open_session):
    weight, bias, split, proto = layer(base, pack, x_shape=None)
    for threads in (1, 2):
        session = open_session(proto, library=library, threads=threads)
        for shape in ((1, K), (2, 9, K), (150, K), (K,), (0, K)):
            x = floats(*shape)
            found = session.run(None, {"X": x})
            if not x.size:
                sizes = split or SIZES[base][:1]
                assert [y.shape for y in found] == [(*shape[:-1], n) for n in sizes]
                continue
            compare(found, sparse_matmul_split.divided(base, sums_of_floats(x, weight, bias), split))


@both_ways
@both_formats
@every_base
@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_of_bytes(base, grid, pack, library, layer, open_session):
    weight, bias, split, proto = layer(base, pack, GRIDS[grid], x_shape=None)
    session = open_session(proto, library=library)
    for shape in ((1, K), (2, 9, K), (150, K), (K,)):
        x = rounded(*shape)
        h = sums_of_bytes(x, weight, bias, GRIDS[grid])
        wanted = sparse_matmul_split.divided(base, h, split)
        if grid == "plain":
            compare(session.run(None, {"X": x}), wanted)
        else:  # a product may lie between two steps: one step more or less
            for got, want in zip(session.run(None, {"X": x}), wanted, strict=True):
                far = ~np.isclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
                assert far.mean() < 0.002


@both_formats
@every_base
@pytest.mark.parametrize("opset", [13, 18, 26])
def test_every_opset_gives_the_same(opset, base, pack, layer, open_session):
    weight, bias, split, proto = layer(base, pack, opset=opset)
    x = floats(6, K)
    found = open_session(proto, library=False).run(None, {"X": x})
    compare(found, sparse_matmul_split.divided(base, sums_of_floats(x, weight, bias), split))
    _, _, _, proto = layer(base, pack, GRIDS["plain"], opset=opset)
    x = rounded(6, K)
    wanted = sparse_matmul_split.divided(base, sums_of_bytes(x, weight, bias, GRIDS["plain"]), split)
    compare(open_session(proto, library=False).run(None, {"X": x}), wanted)


@both_formats
@every_base
def test_linears_are_bit_for_bit_what_they_are_alone(base, pack, layer, layer_model, open_session):
    weight, bias, split, proto = layer(base, pack)
    x, first, alone = floats(37, K), 0, []
    activations = {gate: sparse_matmul.OP_TYPES[name] for name, gate in sparse_matmul_split.GATES.items()}
    for index, n in enumerate(SIZES[base]):
        columns = slice(first, first + n)
        part = pack(weight.integers()[:, columns], weight.scales[columns])
        linear = activations.get(base, "SparseMatMul") if index == 0 else "SparseMatMul"
        single = layer_model(part, bias[columns], int8_matmul.op_type_of(linear, part.dense))
        alone += open_session(single).run(None, {"X": x})
        first += n
    wanted = alone if split else [alone[0] * alone[1]]
    for got, want in zip(open_session(proto).run(None, {"X": x}), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@both_formats
@every_base
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic"])
def test_every_instruction_set_gives_the_same(isa, base, pack, layer, run_forced):
    weight, bias, split, proto = layer(base, pack)
    x = floats(37, K)
    compare(
        run_forced(proto, {"X": x}, isa),
        sparse_matmul_split.divided(base, sums_of_floats(x, weight, bias), split),
    )


@both_formats
@every_base
def test_the_exact_body_rounds_nothing(base, pack, layer, open_session):
    weight, bias, split, proto = layer(base, pack)
    proto.graph.node[0].domain = EXACT_DOMAIN
    del proto.functions[:]
    proto.functions.append(int8_matmul.exact_body(proto.graph.node[0].op_type, 17))
    proto.opset_import.append(onnx.helper.make_opsetid(EXACT_DOMAIN, 1))
    x = floats(5, K)
    h = x.astype(np.float64) @ weight.unpack() + bias
    compare(open_session(proto).run(None, {"X": x}), sparse_matmul_split.divided(base, h, split))


@both_formats
@every_base
def test_the_node_is_ours_only_with_the_library(base, pack, layer, open_session, tmp_path):
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "kept.onnx")
        proto = layer(base, pack)[-1]
        open_session(proto, library=library, options=options)
        kept = [node.op_type for node in onnx.load(tmp_path / "kept.onnx").graph.node]
        if library:
            assert kept == [proto.graph.node[0].op_type]
        else:  # what makes the weight is folded
            assert kept.count("MatMulInteger") == 1
            assert not {"ScatterND", "CumSum", "Transpose"} & set(kept)


@both_formats
@every_base
@pytest.mark.parametrize("x", [["batch", "tokens", K], [4, K], [K]])
def test_output_shapes_are_inferred(x, base, pack, layer, open_session):
    for grids in (None, GRIDS["plain"]):
        _, _, split, proto = layer(base, pack, grids, x_shape=x, with_body=False)
        found = [output.shape for output in open_session(proto).get_outputs()]
        assert found == [[*x[:-1], n] for n in split or SIZES[base][:1]]


@both_formats
@pytest.mark.parametrize(
    ("base", "sizes", "split", "why"),
    [
        ("SparseMatMulSplit2", (48,), [24, 24], r"split is \[24, 24\], expected 2 sizes .* of block 16"),
        ("SparseMatMulSplit2", (48,), [32, 32], "that add up to N = 48"),
        ("SparseMatMulSplit2", (48,), [48, 0], "that add up to N = 48"),
        ("SparseMatMulSplit2", (48,), [-16, 64], "that add up to N = 48"),
        ("SparseMatMulSplit2", (48,), [16, 16, 16], "expected 2 sizes"),
        ("SparseMatMulSplit3", (48,), [2**62, 2**62, 48], "that add up to N = 48"),
        ("SparseMatMulSiluGate", (33,), None, "N is 33, expected 2 sizes"),
        ("SparseMatMulSiluGate", (48,), None, "multiples of block 16"),
        ("SparseMatMulGeluTanhGate", (1,), None, "N is 1, expected"),
    ],
)
def test_linears_that_do_not_fit_are_refused(base, sizes, split, why, pack, layer, open_session):
    attributes = {} if split is None else {"split": split}
    for grids in (None, GRIDS["plain"]):
        proto = layer(base, pack, grids, sizes, attributes, with_body=False)[-1]
        proto.graph.node[0].output[:] = [f"Y{i}" for i in range(3 if "3" in base else 2 if split else 1)]
        del proto.graph.output[:]
        proto.graph.output.append(onnx.helper.make_tensor_value_info(proto.graph.node[0].output[0], 1, None))
        with pytest.raises(Exception, match=why):
            open_session(proto)


def test_op_types_are_registered():
    floats = {*sparse_matmul.ACTIVATIONS, *sparse_matmul_split.OP_TYPES}
    for family in (int8_matmul, q_matmul):
        for dense in (True, False):
            assert {base for base, own in family.OP_TYPES.values() if own == dense} == floats
        for op_type, (base, dense) in family.OP_TYPES.items():
            assert family.op_type_of(base, dense) == op_type
            assert OP_TYPES[op_type].function_body(17).domain == DOMAIN


@both_formats
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    unit=st.sampled_from([16, 32, 48]),
    K=st.integers(1, 500),
    kept=st.sampled_from([0.0, 0.1, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_joined_weights_lie_side_by_side(pack, sizes, unit, K, kept):
    weights = [pack(integers(n * unit, K, kept, n), scales(n * unit, n)) for n in sizes]
    whole = join(weights)
    whole.validate()
    assert whole.dense == weights[0].dense
    assert whole.block == whole_block([weight.N for weight in weights])
    assert all(weight.N % whole.block == 0 for weight in weights)
    np.testing.assert_array_equal(whole.integers(), np.concatenate([w.integers() for w in weights], axis=1))
    np.testing.assert_array_equal(whole.unpack(), np.concatenate([w.unpack() for w in weights], axis=1))


@pytest.mark.parametrize(
    ("outputs", "block"),
    [((768, 768), 64), ((576, 192), 64), ((96, 48), 48), ((80,), 16), ((40,), 0), ((48, 8), 0), ((1,), 0)],
)
def test_blocks_are_those_of_every_linear(outputs, block):
    assert whole_block(outputs) == block


def test_weights_that_do_not_go_together_are_refused():
    first = pack_quads(integers(16), scales(16))
    for other in (
        pack_dense(integers(16), scales(16)),
        pack_quads(integers(16, K + 4), scales(16)),
        pack_quads(integers(24), scales(24)),
    ):
        with pytest.raises(ValueError, match="whole blocks"):
            join([first, other])
    damaged = dataclasses.replace(first, scales=first.scales[:-1])
    with pytest.raises(FormatError, match="scales must have"):
        join([damaged, first])


@both_formats
def test_a_weight_is_read_back(pack):
    weight = pack(integers(32), scales(32))
    sizes = {name: value for name, value in weight.attributes().items() if name != "format"}
    arrays = [*weight.arrays().values()]
    np.testing.assert_array_equal(read(weight.dense, sizes, arrays).unpack(), weight.unpack())
    for index, part in enumerate(parts(weight.dense)):
        for wrong in (arrays[index].astype(np.float64), arrays[index][None]):
            with pytest.raises(FormatError, match=f"{part.name} must be a vector"):
                read(weight.dense, sizes, [*arrays[:index], wrong, *arrays[index + 1 :]])
