"""Linears of few bits in ONNX Runtime's operators on integers: the same weights, activations rounded; what is left."""

import re

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model import model_io
from sparse_onnx.model.integer_grid import IntegerGrid, read_grid
from sparse_onnx.model.nbits import read_packed_blocks
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.dynamic_int8 import LowerDynamicInt8
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.running.runtime import open_session

RNG = np.random.default_rng(2)
K, N = 96, 40
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
BODIES = {
    "MatMul": "Y = MatMul(X, W)",
    "with bias and gelu": "h = MatMul(X, W) b = Add(h, bias) Y = Gelu(b)",
    "Gemm": "r = Reshape(X, rows) g = Gemm(r, W, bias) Y = Reshape(g, back)",
    "Gemm, transposed": "r = Reshape(X, rows) g = Gemm<transB = 1>(r, T, bias) Y = Reshape(g, back)",
}
TENSORS = {
    "W": RNG.standard_normal((K, N)).astype(np.float32),
    "bias": RNG.standard_normal(N).astype(np.float32),
    "rows": np.array([10, K], np.int64),
    "back": np.array([2, 5, N], np.int64),
}


@pytest.fixture
def model(from_text):
    def model(body="MatMul", opset=21, **options):
        tensors = {**TENSORS, "T": np.ascontiguousarray(TENSORS["W"].T)}
        text = BODIES[body]
        named = {name: array for name, array in tensors.items() if re.search(rf"\b{name}\b", text)}
        found = from_text(
            f"""<ir_version: 10, opset_import: ["" : {opset}]>
            g (float[2, 5, {K}] X) => (float[2, 5, {N}] Y) {{ {text} }}""",
            **named,
        )
        if options:
            QuantizeWeights(**{"method": "rtn", "group_size": 0, **options})(found)
        return found

    return model


def outputs(model, tmp_path):
    path = model_io.save_model(model, tmp_path, name="model")
    return open_session(path, threads=1, library=False).run(None, {"X": X})[0]


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


GRIDS = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "symmetric": False},
    {"bits": 4, "group_size": 48},
    {"bits": 4, "group_size": 0, "symmetric": False},
    {"bits": 4, "group_size": 64},
    {"bits": 8, "group_size": 0},
    {"bits": 8, "group_size": 16, "symmetric": False},
    {"bits": 7, "group_size": 0},
]


@pytest.mark.parametrize("storage", ["unpack", "dequantize"])
@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_nbits_multiplies_by_the_same_weight(model, tmp_path, body, options, storage):
    before = model(body, storage=storage, **options)
    (weight,) = find_weights(before, encoded=True)[0]
    matrix = np.array(weight.matrix())
    expected = outputs(densified(before), tmp_path)
    lowered = before.clone()
    assert LowerMatMulNBits()(lowered).modified
    assert "MatMulNBits" in [node.op_type for node in lowered.graph]
    assert not {"Unpack4", "Unpack8", "DequantizeLinear"} & {node.op_type for node in lowered.graph}
    assert not lowered.functions
    (node,) = (node for node in lowered.graph if node.op_type == "MatMulNBits")
    packed = node.inputs[1].const_value
    stored = read_packed_blocks(node, packed)
    np.testing.assert_array_equal(stored.decode(packed.numpy()), matrix.T)
    assert distance(outputs(exact_twin(lowered), tmp_path), expected) < 1e-6
    assert 0 < distance(outputs(lowered, tmp_path), expected) < 0.02


def densified(model):
    """The same with the weight as floats."""
    twin = model.clone()
    for weight in find_weights(twin, encoded=True)[0]:
        value = ir.Value(
            name="dense", const_value=ir.tensor(np.ascontiguousarray(weight.matrix()), name="dense")
        )
        twin.graph.register_initializer(value)
        for node in weight.nodes:
            node.replace_input_with(1, value)
            if node.op_type == "Gemm":
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
    return twin


@pytest.mark.parametrize("storage", ["unpack", "dequantize"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("body", BODIES)
def test_dynamic_int8_multiplies_by_the_same_weight(model, tmp_path, body, bits, storage):
    before = model(body, bits=bits, storage=storage)
    expected = outputs(densified(before), tmp_path)
    lowered = before.clone()
    assert LowerDynamicInt8()(lowered).modified
    types = [node.op_type for node in lowered.graph]
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= {*types}
    assert not {"MatMul", "Gemm", "Unpack8", "DequantizeLinear"} & {*types}
    assert distance(outputs(exact_twin(lowered), tmp_path), expected) < 1e-6
    assert 0 < distance(outputs(lowered, tmp_path), expected) < 0.03


@pytest.mark.parametrize(
    ("lowering", "options", "reason"),
    [
        (LowerDynamicInt8, {"bits": 4}, "has 4 bits, not 8"),
        (LowerDynamicInt8, {"bits": 8, "group_size": 32}, "more than one scale"),
        (LowerDynamicInt8, {"bits": 8, "symmetric": False}, "zero points"),
        (LowerMatMulNBits, {"bits": 3}, "has 3 bits"),
        (LowerMatMulNBits, {"bits": 2}, "has 2 bits"),
        (LowerMatMulNBits, {"bits": 4, "group_size": 17}, "groups of 17"),
    ],
)
def test_what_the_operators_cannot_hold_is_left(model, lowering, options, reason):
    before = model(**options)
    text = ir.to_proto(before).SerializeToString()
    result = lowering()(before)
    assert not result.modified
    assert reason in result.declined[0].reason
    assert ir.to_proto(before).SerializeToString() == text


@pytest.mark.parametrize("lowering", [LowerDynamicInt8, LowerMatMulNBits])
def test_floats_are_no_candidates(model, lowering):
    assert lowering.find_candidates(model()) == ([], [])


def test_operators_that_the_model_has_already_are_left(model):
    lowered = model(bits=4, group_size=32)
    LowerMatMulNBits()(lowered)
    before = ir.to_proto(lowered).SerializeToString()
    assert not LowerMatMulNBits()(lowered).modified
    assert find_candidates(lowered)[0] == []
    assert ir.to_proto(lowered).SerializeToString() == before


def test_the_twin_of_a_model_without_such_layers_is_none(model):
    assert exact_twin(model(bits=4)) is None


def test_a_weight_of_few_bits_becomes_sparse_only_where_that_is_no_larger(model):
    """At 50 % zeros floats and positions take more than 8 bits a weight; at 95 % they take less."""
    for share, refused in ((0.5, True), (0.95, False)):
        pruned = model()
        Magnitude(sparsity=share)(pruned)
        QuantizeWeights(method="rtn", bits=8, group_size=0)(pruned)
        (candidate,) = find_candidates(pruned)[0]
        assert {form.name for form in candidate.forms} == {
            *("sparse", "int8-token", "int8-quads", "int8-bitmap", "int8-nbits", "int8-dynamic")
        }
        assert [form.name for form in candidate.allowed_forms()] == ["sparse"]
        (sparse,) = candidate.allowed_forms()
        assert bool(candidate.refusal(sparse)) == refused
        assert candidate.sparsity == pytest.approx(share, abs=0.01)


def test_a_sparse_weight_of_few_bits_computes_what_its_integers_say(model, tmp_path):
    before = model()
    Magnitude(sparsity=0.9)(before)
    QuantizeWeights(method="rtn", bits=8, group_size=32)(before)
    expected = outputs(densified(before), tmp_path)
    lowered = before.clone()
    assert LowerSparseMatMul()(lowered).modified
    assert [node.op_type for node in lowered.graph] == ["SparseMatMul"]
    assert [domain for domain, *_ in lowered.functions] == ["sparse_onnx"]
    path = model_io.save_model(lowered, tmp_path, name="sparse")
    found = open_session(path, threads=1, library=True).run(None, {"X": X})[0]
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("storage", ["unpack", "dequantize"])
def test_the_grid_of_a_weight_says_the_same_as_its_values(model, options, storage):
    (weight,) = find_weights(model("Gemm, transposed", storage=storage, **options), encoded=True)[0]
    grid = read_grid(weight)
    assert isinstance(grid, IntegerGrid)
    group = np.arange(K) // grid.group_size
    steps = grid.integers.astype(np.float64) - grid.zero_point[group]
    np.testing.assert_allclose(steps * grid.scale[group], weight.matrix(), rtol=1e-6)
