"""Merging products of bytes that share their input: the same answers, one operator, and what must not fire."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.errors import SparseOnnxError
from sparse_onnx.model.byte_weights import byte_weight
from sparse_onnx.model.metadata_keys import LOWERED_KEY
from sparse_onnx.model.work import Work
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.int8_matmul import LowerInt8MatMul, LowerSparseInt8MatMul
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.q_matmul import LowerQMatMul, LowerSparseQMatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.weight import QuantizeWeights

K = 192
X = np.random.default_rng(5).standard_normal((2, 3, K)).astype(np.float32)
LOWERINGS = {"Int8": LowerInt8MatMul, "SparseInt8": LowerSparseInt8MatMul}
GIVEN = {"Q": LowerQMatMul, "SparseQ": LowerSparseQMatMul}
every_kind = pytest.mark.parametrize("word", LOWERINGS)
every_given = pytest.mark.parametrize("word", GIVEN)
QKV = "q = MatMul(X, Wq) Q = Add(q, bq) k = MatMul(X, Wk) K_ = Add(k, bk) V = MatMul(X, Wv)"
GATES = {
    "SiluGate": "s = Sigmoid(g) a = Mul(g, s)",
    "GeluTanhGate": 'a = Gelu<approximate = "tanh">(g)',
}


@pytest.fixture
def model(from_text):
    """``model(body, outputs, word)``: every W* [K, outputs] of a graph over X [2, 3, K] pruned, rounded and lowered."""

    def model(body, outputs, word="SparseInt8", opset=21, sizes=None, lower=True):
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
        Magnitude(sparsity=0.5, mask_structure="block:1x4")(found)
        QuantizeWeights(method="rtn", bits=8, group_size=0)(found)
        if lower:
            LOWERINGS[word]()(found)
        return found

    return model


@pytest.fixture
def rounded_model(from_text):
    """``rounded_model(word, ..)``: linears of one X that is rounded in the graph, by steps of one size or, ``dynamic``,
    by what each run has, lowered."""

    def rounded_model(word, *, dynamic=False, names=("q", "k", "v")):
        rng = np.random.default_rng(3)
        arrays = {"zero": np.uint8(120), "step": np.float32(0.03), "nothing": np.zeros(48, np.int8)}
        step, linear = (
            "r = QuantizeLinear(X, step, zero) x = DequantizeLinear(r, step, zero)",
            "w@ = DequantizeLinear<axis = 1>(W@, s@) Y@ = MatMul(x, w@)",
        )
        if dynamic:
            step = "r, size, point = DynamicQuantizeLinear(X)"
            linear = """i@ = MatMulInteger(r, W@, point, nothing) f@ = Cast<to = 1>(i@)
                c@ = Mul(size, s@) Y@ = Mul(f@, c@)"""
        for name in names:
            integers = rng.integers(-60, 61, (K, 48)).astype(np.int8)
            integers[(rng.random((K // 4, 48)) < 0.5).repeat(4, axis=0)] = 0
            arrays |= {f"W{name}": integers, f"s{name}": rng.uniform(0.001, 0.01, 48).astype(np.float32)}
        text = " ".join([step, *(linear.replace("@", name) for name in names)])
        results = ", ".join(f"float[2, 3, 48] Y{name}" for name in names)
        found = from_text(
            f"""<ir_version: 10, opset_import: ["" : 21]>
            g (float[2, 3, {K}] X) => ({results}) {{ {text} }}""",
            **{name: array for name, array in arrays.items() if f"{name})" in text or f"{name}," in text},
        )
        GIVEN[word]()(found)
        return found

    return rounded_model


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
    products = sum(one.products for one in Work(found).count())
    before = answers(exact_twin(found), {"X": X}, library=True)
    result = check(found, [f"{word}MatMulSplit3"])
    assert result.statistics == {"gates": 0, "splits": 1}
    assert result.declined == ()
    (node,) = found.graph
    weight = byte_weight(node)
    assert node.attributes.get_ints("split") == (48, 16, 32)
    assert weight.shape == (K, 96)
    assert weight.sizes["block"] == 16
    assert weight.made_of == ("Wq", "Wk", "Wv")
    assert weight.name == "Wq+Wk+Wv"
    assert node.metadata_props[LOWERED_KEY] == lowered
    assert set(found.graph.initializers) == {value.name for value in node.inputs[1:]}
    assert len(found.functions) == 1
    assert sum(one.products for one in Work(found).count()) == products
    for got, want in zip(answers(exact_twin(found), {"X": X}, library=True), before, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@every_kind
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("turned", [False, True])
def test_gate_and_up_projection_are_one_operator(word, gate, turned, model, check):
    product = "Mul(u, a)" if turned else "Mul(a, u)"
    body = f"u = MatMul(X, Wu) h = MatMul(X, Wg) g = Add(h, bg) {GATES[gate]} Y = {product}"
    result = check(found := model(body, {"Y": 48}, word), [f"{word}MatMul{gate}"])
    assert result.statistics == {"gates": 1, "splits": 0}
    assert found.graph[0].attributes.get_int("N") == 96


@every_given
def test_linears_of_one_rounded_input_are_one_operator(word, rounded_model, check):
    found = rounded_model(word)
    check(found, [f"{word}MatMulSplit3"])
    node = found.graph[-1]
    assert [value.name for value in node.inputs[-2:]] == ["step", "zero"]
    assert node.attributes.get_float("h_scale") == 0.0
    assert node.attributes.get_ints("split") == (48, 48, 48)


@every_given
def test_linears_of_an_input_that_is_rounded_in_every_run_are_one_operator(word, rounded_model, check):
    check(rounded_model(word, dynamic=True), [f"{word}MatMulSplit3"])


def test_gates_come_before_splits(model, check):
    body = f"{QKV} u = MatMul(X, Wu) g = MatMul(X, Wg) {GATES['SiluGate']} Y = Mul(a, u)"
    outputs = dict.fromkeys(("Q", "K_", "V", "Y"), 48)
    check(model(body, outputs), ["SparseInt8MatMulSplit3", "SparseInt8MatMulSiluGate"])


@every_kind
def test_a_linear_without_whole_blocks_stays(word, model, check):
    sizes = {"Wq": 48, "Wk": 40, "Wv": 32}
    found = model(QKV, {"Q": 48, "K_": 40, "V": 32}, word, sizes=sizes)
    result = check(found, [f"{word}MatMulSplit2", f"{word}MatMul"])
    assert [(one.place, one.reason) for one in result.declined] == [
        ("K_", "has 40 outputs, which are no whole blocks")
    ]


def test_weights_of_another_form_stay_apart(model, check_not_joined):
    found = model("Q = MatMul(X, Wq) K_ = MatMul(X, Wk)", {"Q": 48, "K_": 48}, lower=False)
    LowerInt8MatMul(layers=("Wq",))(found)
    LowerSparseInt8MatMul(layers=("Wk",))(found)
    reason = "is stored differently from the other linears of its input"
    assert check_not_joined(MergeLinears(), found) == [("Q", reason), ("K_", reason)]


@every_given
@pytest.mark.parametrize("change", ["step", "grid", "type"])
def test_linears_with_other_scales_stay_apart(word, change, rounded_model, check_not_joined):
    found = rounded_model(word, names=("q", "k"))
    node = found.graph[-1]
    if change == "step":
        other = ir.Value(name="half", const_value=ir.tensor(np.float32(0.015), name="half"))
        found.graph.register_initializer(other)
        node.replace_input_with(len(node.inputs) - 2, other)
    elif change == "grid":
        for name, value in (("h_low", -7), ("h_high", 7)):
            node.attributes.add(ir.AttrInt64(name, value))
        node.attributes.add(ir.AttrFloat32("h_scale", 0.5))
    else:
        node.attributes.add(ir.AttrInt64("x_lowest", -128))
    reason = "is stored differently from the other linears of its input"
    assert check_not_joined(MergeLinears(), found) == [("Yq", reason), ("Yk", reason)]


def test_linears_of_other_inputs_stay_apart(model, check_not_joined):
    body = "r = Relu(X) Q = MatMul(r, Wq) K_ = MatMul(X, Wk)"
    assert check_not_joined(MergeLinears(), model(body, {"Q": 48, "K_": 48})) == []


def test_an_activation_between_them_keeps_linears_apart(model, check_not_joined):
    body = "q = MatMul(X, Wq) Q = Relu(q) k = MatMul(X, Wk) K_ = Relu(k)"
    assert check_not_joined(MergeLinears(), model(body, {"Q": 48, "K_": 48})) == []


def test_a_gate_that_is_read_elsewhere_stays(model, check_not_joined):
    body = f"u = MatMul(X, Wu) g = MatMul(X, Wg) {GATES['SiluGate']} Y = Mul(a, u) Z = Neg(u)"
    ((_, reason),) = check_not_joined(MergeLinears(), model(body, {"Y": 48, "Z": 48}))
    assert "used elsewhere" in reason


@every_kind
@pytest.mark.parametrize("attribute", [ir.AttrString("format", "newer"), ir.AttrInt64("chunk", 0)], ids=str)
def test_a_weight_stored_in_an_unknown_way_stays(attribute, word, model, check_not_joined):
    found = model("Q = MatMul(X, Wq) K_ = MatMul(X, Wk)", {"Q": 48, "K_": 48}, word)
    for node in found.graph:
        node.attributes.add(attribute)
    form = "int8_dense" if word == "Int8" else "int8_quads"
    reason = f"does not have its weight in the format {form}"
    assert check_not_joined(MergeLinears(), found) == [("Q", reason), ("K_", reason)]


@every_kind
def test_a_damaged_weight_is_an_error_with_what_is_wrong(word, model):
    found = model("Q = MatMul(X, Wq) K_ = MatMul(X, Wk)", {"Q": 48, "K_": 48}, word)
    values = byte_weight(found.graph[0]).parts[0]
    values.const_value = ir.tensor(values.const_value.numpy()[:-4], name=values.name)
    with pytest.raises(SparseOnnxError, match="values must have"):
        MergeLinears()(found)
