"""Two products of bytes in a row as one operator: right nodes and answers, and what must not fire."""

import re

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.metadata_keys import LOWERED_KEY
from sparse_onnx.model.work import Work
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.int8_matmul import LowerInt8MatMul, LowerSparseInt8MatMul
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.q_matmul import LowerQMatMul
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.weight import QuantizeWeights

K, HIDDEN = 40, 64
X = np.random.default_rng(5).standard_normal((2, 3, K)).astype(np.float32)
LOWERINGS = {"Int8": LowerInt8MatMul, "SparseInt8": LowerSparseInt8MatMul}
every_kind = pytest.mark.parametrize("word", LOWERINGS)
UP, DOWN = "u = MatMul(X, U) h = Add(u, bu)", "d = MatMul(a, D) Y = Add(d, bd)"
GATE = "g = MatMul(X, G) s = Sigmoid(g) w = Mul(g, s)"
PAIRS = {
    "": "a = Add(u, bu)",
    "Relu": "a = Relu(h)",
    "Gelu": "a = Gelu(h)",
    "GeluTanh": 'a = Gelu<approximate = "tanh">(h)',
    "Silu": "t = Sigmoid(h) a = Mul(h, t)",
    "QuickGelu": "m = Mul(h, slope) t = Sigmoid(m) a = Mul(h, t)",
    "SiluGate": f"{GATE} a = Mul(w, h)",
    "GeluTanhGate": 'g = MatMul(X, G) w = Gelu<approximate = "tanh">(g) a = Mul(h, w)',
}


@pytest.fixture
def model(from_text):
    """``model(body, outputs, word)``: all linears of a graph over X [2, 3, K] in 8 bits, lowered and merged."""

    def model(body, outputs, word="SparseInt8", opset=20, *, hidden=HIDDEN, lower=True):
        rng = np.random.default_rng(1)
        shapes = {"U": (K, hidden), "G": (K, hidden), "D": (hidden, K), "E": (K, K), "bu": hidden, "bd": K}
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        arrays["slope"] = np.float32(1.702)
        named = set(re.findall(r"\w+", body))
        results = ", ".join(f"float[2, 3, {n}] {y}" for y, n in outputs.items())
        found = from_text(
            f"""<ir_version: 8, opset_import: ["" : {opset}]>
            g (float[2, 3, {K}] X) => ({results}) {{ {body} }}""",
            **{name: array for name, array in arrays.items() if name in named},
        )
        Magnitude(sparsity=0.5, mask_structure="block:1x4")(found)
        QuantizeWeights(method="rtn", bits=8, group_size=0)(found)
        if lower:
            LOWERINGS[word]()(found)
            MergeLinears()(found)
        return found

    return model


@pytest.fixture
def check_fused(check_joined):
    def check_fused(model, expected_ops):
        return check_joined(FuseFeedForward(), model, expected_ops, {"X": X}, exact=True)

    return check_fused


@every_kind
@pytest.mark.parametrize("what", PAIRS)
def test_two_linears_are_one_operator(what, word, model, check_fused, answers):
    found = model(f"{'u = MatMul(X, U)' if what == '' else UP} {PAIRS[what]} {DOWN}", {"Y": K}, word)
    stored = {name: value.const_value for name, value in found.graph.initializers.items()}
    lowered = found.graph[0].metadata_props[LOWERED_KEY]
    before = answers(exact_twin(found), {"X": X}, library=True)[0]
    result = check_fused(found, [f"{word}FeedForward{what}"])
    assert (result.statistics, result.declined) == ({"pairs": 1}, ())
    (node,) = found.graph
    assert [key[:2] for key in found.functions] == [("sparse_onnx", node.op_type)]
    sizes = [node.attributes.get_int(name) for name in ("K", "N", "down_K", "down_N")]
    assert sizes == [K, 2 * HIDDEN if what.endswith("Gate") else HIDDEN, HIDDEN, K]
    assert "down_format" not in node.attributes
    assert node.metadata_props[LOWERED_KEY] == lowered
    assert {name: value.const_value for name, value in found.graph.initializers.items()} == stored
    work = Work(found).count()
    assert [one.weight for one in work] == [node.inputs[1].name, "D.values"]
    assert [one.products for one in work] == [6 * K * sizes[1], 6 * HIDDEN * K]
    np.testing.assert_allclose(
        answers(exact_twin(found), {"X": X}, library=True)[0], before, rtol=1e-4, atol=1e-4
    )


@every_kind
@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize("hidden", [HIDDEN, 1, 65])
def test_every_opset_and_width(hidden, opset, word, model, check_fused):
    body = f"{UP} a = Relu(h) {DOWN}"
    check_fused(model(body, {"Y": K}, word, opset, hidden=hidden), [f"{word}FeedForwardRelu"])


def test_of_three_in_a_row_the_first_two_are_one(model, check_fused):
    found = model(f"{UP} a = Relu(h) {DOWN} Z = MatMul(Y, E)", {"Z": K})
    check_fused(found, ["SparseInt8FeedForwardRelu", "SparseInt8MatMul"])


NOT_FUSED = {
    "an activation behind": f"{UP} a = Relu(h) {DOWN} Z = Relu(Y)",
    "a sum between": f"{UP} r = Relu(h) a = Add(r, r) {DOWN} Z = Identity(Y)",
    "a linear alone": "Y = MatMul(X, E) Z = Relu(Y)",
}


@pytest.mark.parametrize("body", NOT_FUSED.values(), ids=NOT_FUSED)
def test_what_is_no_pair_stays(body, model, check_not_joined):
    assert check_not_joined(FuseFeedForward(), model(body, {"Z": K})) == []


def test_a_result_that_others_read_stays(model, check_not_joined):
    found = model(f"{UP} a = Relu(h) {DOWN} Z = Neg(a)", {"Y": K, "Z": HIDDEN})
    ((_, reason),) = check_not_joined(FuseFeedForward(), found)
    assert "is used by more than" in reason


def test_linears_that_are_stored_differently_stay_apart(model, check_not_joined):
    found = model(f"{UP} a = Relu(h) {DOWN}", {"Y": K}, lower=False)
    LowerInt8MatMul(layers=("U",))(found)
    LowerSparseInt8MatMul(layers=("D",))(found)
    ((_, reason),) = check_not_joined(FuseFeedForward(), found)
    assert "its weight is stored as int8_dense, and that of" in reason
    assert reason.endswith("as int8_quads")


def test_bytes_and_floats_stay_apart(model, check_not_joined):
    found = model(f"{UP} a = Relu(h) {DOWN}", {"Y": K}, lower=False)
    LowerInt8MatMul(layers=("U",))(found)
    LowerSparseMatMul(layers=("D",), min_sparsity=0)(found)
    ((_, reason),) = check_not_joined(FuseFeedForward(), found)
    assert "its weight is stored as int8_dense, and that of" in reason


def test_an_unknown_format_stays_apart(model, check_not_joined):
    found = model(f"{UP} a = Relu(h) {DOWN}", {"Y": K})
    found.graph[1].attributes.add(ir.AttrString("format", "newer"))
    ((_, reason),) = check_not_joined(FuseFeedForward(), found)
    assert reason.endswith("as newer")


def test_linears_whose_input_the_graph_rounds_stay(from_text, check_not_joined):
    """There the graph says what every step is."""
    rng = np.random.default_rng(0)
    rounded = "q{1} = QuantizeLinear({0}, step, zero) x{1} = DequantizeLinear(q{1}, step, zero)"
    linear = "w{0} = DequantizeLinear<axis = 1>(W{0}, s) {1} = MatMul(x{0}, w{0})"
    body = " ".join(
        [rounded.format("X", 0), linear.format(0, "h"), rounded.format("h", 1), linear.format(1, "Y")]
    )
    found = from_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 3, {K}] X) => (float[2, 3, {K}] Y) {{ {body} }}""",
        W0=rng.integers(-60, 61, (K, K)).astype(np.int8),
        W1=rng.integers(-60, 61, (K, K)).astype(np.int8),
        s=rng.uniform(0.001, 0.01, K).astype(np.float32),
        step=np.float32(0.03),
        zero=np.uint8(120),
    )
    assert LowerQMatMul()(found).modified
    assert check_not_joined(FuseFeedForward(), found) == []
