"""Merging linears of few bits that share their input: the same answers, one operator, and what must not fire."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.level_weights import level_weight
from sparse_onnx.model.metadata_keys import LOWERED_KEY
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.sparse_integers import LowerPositions, LowerSparseIntegers
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.weight import QuantizeWeights

K = 192
X = np.random.default_rng(5).standard_normal((2, 3, K)).astype(np.float32)
KINDS = {
    "Int4": (LowerSparseIntegers, {}),
    "Int4WithZeros": (LowerSparseIntegers, {"symmetric": False}),
    "Int8": (LowerSparseIntegers, {"bits": 8}),
    "Int4Of16": (LowerPositions, {}),
    "Int4Of16WithZeros": (LowerPositions, {"symmetric": False}),
}
every_kind = pytest.mark.parametrize("word", KINDS)
QKV = "q = MatMul(X, Wq) Q = Add(q, bq) k = MatMul(X, Wk) K_ = Add(k, bk) V = MatMul(X, Wv)"
GATES = {
    "SiluGate": "s = Sigmoid(g) a = Mul(g, s)",
    "GeluTanhGate": 'a = Gelu<approximate = "tanh">(g)',
}


@pytest.fixture
def model(from_text):
    """``model(body, outputs, word)``: every W* [K, outputs] of a graph over X [2, 3, K] pruned, rounded and lowered."""

    def model(body, outputs, word="Int4", opset=21, sizes=None, structure="4:16", group_size=64, lower=True):
        sizes = sizes or dict.fromkeys(("Wq", "Wk", "Wv", "Wg", "Wu"), 48)
        rng = np.random.default_rng(1)
        arrays = {name: rng.standard_normal((K, n)).astype(np.float32) / 8 for name, n in sizes.items()}
        arrays |= {
            f"b{name[1]}": rng.standard_normal(n).astype(np.float32)
            for name, n in sizes.items()
            if f"b{name[1]})" in body
        }
        results = ", ".join(f"float[2, 3, {n}] {y}" for y, n in outputs.items())
        text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
            g (float[2, 3, {K}] X) => ({results}) {{ {body} }}"""
        found = from_text(text, **{name: array for name, array in arrays.items() if name in body})
        lowering, options = KINDS[word]
        Magnitude(mask_structure=structure)(found)
        QuantizeWeights(**{"method": "rtn", "bits": 4, "group_size": group_size, **options})(found)
        if lower:
            lowering()(found)
        return found

    return model


@pytest.fixture
def check(check_joined):
    def check(model, expected):
        return check_joined(MergeLinears(), model, expected, {"X": X}, exact=True)

    return check


@every_kind
@pytest.mark.parametrize("opset", [13, 21])
def test_query_key_and_value_are_one_operator(word, opset, model, check, answers):
    found = model(QKV, {"Q": 48, "K_": 16, "V": 32}, word, opset, {"Wq": 48, "Wk": 16, "Wv": 32})
    lowered = found.graph[0].metadata_props[LOWERED_KEY]
    before = answers(exact_twin(found), {"X": X}, library=True)
    result = check(found, [f"SparseMatMul{word}Split3"])
    assert result.statistics == {"gates": 0, "splits": 1}
    assert result.declined == ()
    (node,) = found.graph
    weight = level_weight(node)
    assert node.attributes.get_ints("split") == (48, 16, 32)
    assert weight.shape == (K, 96)
    assert weight.made_of == ("Wq", "Wk", "Wv")
    assert weight.name == "Wq+Wk+Wv"
    assert node.metadata_props[LOWERED_KEY] == lowered
    assert set(found.graph.initializers) == {value.name for value in node.inputs[1:]}
    assert len(found.functions) == 1
    for got, want in zip(answers(exact_twin(found), {"X": X}, library=True), before, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@every_kind
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("turned", [False, True])
def test_gate_and_up_projection_are_one_operator(word, gate, turned, model, check):
    product = "Mul(u, a)" if turned else "Mul(a, u)"
    body = f"u = MatMul(X, Wu) h = MatMul(X, Wg) g = Add(h, bg) {GATES[gate]} Y = {product}"
    found = model(body, {"Y": 48}, word)
    result = check(found, [f"SparseMatMul{word}{gate}"])
    assert result.statistics == {"gates": 1, "splits": 0}
    assert found.graph[0].attributes.get_int("N") == 96


def test_gates_come_before_splits(model, check):
    body = f"{QKV} u = MatMul(X, Wu) g = MatMul(X, Wg) {GATES['SiluGate']} Y = Mul(a, u)"
    outputs = dict.fromkeys(("Q", "K_", "V", "Y"), 48)
    check(model(body, outputs), ["SparseMatMulInt4Split3", "SparseMatMulInt4SiluGate"])


@pytest.mark.parametrize("word", ["Int4", "Int4Of16"])
def test_a_linear_without_whole_blocks_stays(word, model, check):
    sizes = {"Wq": 48, "Wk": 40, "Wv": 32}
    found = model(QKV, {"Q": 48, "K_": 40, "V": 32}, word, sizes=sizes)
    result = check(found, [f"SparseMatMul{word}Split2", f"SparseMatMul{word}"])
    assert [(one.place, one.reason) for one in result.declined] == [
        ("K_", "has 40 outputs, which are no whole blocks")
    ]


def test_a_gate_without_whole_blocks_stays(model, check_not_joined):
    body = f"u = MatMul(X, Wu) g = MatMul(X, Wg) {GATES['SiluGate']} Y = Mul(a, u)"
    found = model(body, {"Y": 40}, sizes={"Wu": 40, "Wg": 40})
    declined = check_not_joined(MergeLinears(), found)
    assert [reason.partition(" has ")[2] for _, reason in declined] == [
        "40 outputs, which are no whole blocks"
    ]


def test_weights_of_another_form_stay_apart(model, check_not_joined):
    """Positions, a bitmap, and floats."""
    found = model(QKV, {"Q": 48, "K_": 48, "V": 48}, lower=False)
    LowerSparseIntegers(layers=("Wq",))(found)
    LowerPositions(layers=("Wk",))(found)
    LowerSparseMatMul(layers=("Wv",))(found)
    reason = "is stored differently from the other linears of its input"
    assert check_not_joined(MergeLinears(), found) == [("Q", reason), ("K_", reason), ("V", reason)]


def test_a_gate_and_an_up_projection_with_other_zero_points_stay(model, check_not_joined):
    """Both are bitmaps of 4 bits."""
    body = f"u = MatMul(X, Wu) g = MatMul(X, Wg) {GATES['SiluGate']} Y = Mul(a, u)"
    plain, zeros = model(body, {"Y": 48}), model(body, {"Y": 48}, "Int4WithZeros")
    node = next(node for node in plain.graph if "Silu" in node.op_type)
    other = next(node for node in zeros.graph if "Silu" in node.op_type)
    assert node.op_type != other.op_type
    assert node.attributes.get_string("format") == other.attributes.get_string("format")
    assert not level_weight(node).joins(level_weight(other))


def test_an_activation_between_them_keeps_linears_apart(model, check_not_joined):
    body = "q = MatMul(X, Wq) Q = Relu(q) k = MatMul(X, Wk) K_ = Relu(k)"
    assert check_not_joined(MergeLinears(), model(body, {"Q": 48, "K_": 48})) == []


def test_a_gate_that_is_read_elsewhere_stays(model, check_not_joined):
    body = f"u = MatMul(X, Wu) g = MatMul(X, Wg) {GATES['SiluGate']} Y = Mul(a, u) Z = Neg(u)"
    ((_, reason),) = check_not_joined(MergeLinears(), model(body, {"Y": 48, "Z": 48}))
    assert "used elsewhere" in reason


@pytest.mark.parametrize("attribute", [ir.AttrString("format", "newer"), ir.AttrInt64("group", 0)], ids=str)
def test_a_weight_stored_in_an_unknown_way_stays(attribute, model, check_not_joined):
    found = model("Q = MatMul(X, Wq) K_ = MatMul(X, Wk)", {"Q": 48, "K_": 48})
    for node in found.graph:
        node.attributes.add(attribute)
    reason = "does not have its weight in the format bitmap4"
    assert check_not_joined(MergeLinears(), found) == [("Q", reason), ("K_", reason)]
