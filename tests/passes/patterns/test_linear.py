"""Which linears are recognised, with which bias and activation, and which are left alone, with which reason."""

import re

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.patterns.linear import match_linear

K, N = 6, 4


def build(body, *, opset=20, outputs="float[B, 4] Y", extra="", opsets=""):
    """A model whose weight is W [K, N] or Wt [N, K], bias b, full matrix C, from the nodes in ``body``."""
    text = f"""
        <ir_version: 9, opset_import: ["" : {opset}{opsets}]>
        g (float[B, {K}] X) => ({outputs})
        <float[{K}, {N}] W, float[{N}, {K}] Wt, float[{N}] b, float[1, {N}] b_row, float[1] b_one,
         float one = {{1}}, float half = {{0.5}}, float root = {{1.41421356}}, float inv_root = {{0.70710678}},
         float three = {{3}}, float cubic = {{0.044715}}, float tanh_scale = {{0.79788456}}, float two = {{2}},
         float slope = {{1.702}} {extra}>
        {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    given = {tensor.name for tensor in proto.graph.initializer}
    shapes = {"W": (K, N), "Wt": (N, K), "b": (N,), "b_row": (1, N), "b_one": (1,)}
    used = {name for node in proto.graph.node for name in node.input}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name in used and name not in given:
            array = rng.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name not in used]:
        proto.graph.initializer.remove(tensor)
    return ir.from_proto(proto)


def only_match(model):
    weights, declined = find_weights(model)
    assert len(weights) == 1, declined
    return match_linear(weights[0], weights[0].nodes[0], model.graph, Shapes(model))


GELU_ERF = {
    "(h·(1+erf))·½, Div": "s = Div(h, root) e = Erf(s) a = Add(e, one) m = Mul(h, a) Y = Mul(m, half)",
    "(h·(1+erf))·½, Mul": "s = Mul(h, inv_root) e = Erf(s) a = Add(one, e) m = Mul(a, h) Y = Mul(half, m)",
    "(½h)·(1+erf)": "s = Div(h, root) e = Erf(s) a = Add(e, one) g = Mul(half, h) Y = Mul(g, a)",
    "h·(½(1+erf))": "s = Div(h, root) e = Erf(s) a = Add(e, one) g = Mul(a, half) Y = Mul(h, g)",
}
GELU_TANH = {
    "Pow": "c = Pow(h, three) s = Mul(c, cubic) t = Add(h, s) u = Mul(t, tanh_scale) v = Tanh(u) "
    "a = Add(v, one) m = Mul(h, a) Y = Mul(m, half)",
    "Mul": "q = Mul(h, h) c = Mul(q, h) s = Mul(cubic, c) t = Add(s, h) u = Mul(tanh_scale, t) v = Tanh(u) "
    "a = Add(one, v) g = Mul(h, half) Y = Mul(g, a)",
}


@pytest.mark.parametrize(
    ("body", "bias", "activation", "nodes"),
    [
        ("Y = MatMul(X, W)", None, "none", 1),
        ("h = MatMul(X, W) Y = Add(h, b)", "b", "none", 2),
        ("h = MatMul(X, W) Y = Add(b, h)", "b", "none", 2),
        ("h = MatMul(X, W) Y = Add(h, b_row)", "b_row", "none", 2),
        ("Y = Gemm(X, W, b)", "b", "none", 1),
        ("Y = Gemm<transB = 1>(X, Wt, b)", "b", "none", 1),
        ("Y = Gemm<transB = 1>(X, Wt)", None, "none", 1),
        ("h = Gemm(X, W, b_row) Y = Relu(h)", "b_row", "relu", 2),
        ("h = MatMul(X, W) i = Add(h, b) Y = Relu(i)", "b", "relu", 3),
        ("h = MatMul(X, W) Y = Gelu(h)", None, "gelu", 2),
        ('h = MatMul(X, W) Y = Gelu<approximate = "tanh">(h)', None, "gelu_tanh", 2),
        ("h = MatMul(X, W) s = Sigmoid(h) Y = Mul(h, s)", None, "silu", 3),
        ("h = MatMul(X, W) s = Sigmoid(h) Y = Mul(s, h)", None, "silu", 3),
        ("h = MatMul(X, W) t = Mul(h, slope) s = Sigmoid(t) Y = Mul(h, s)", None, "quick_gelu", 4),
        ("h = MatMul(X, W) t = Mul(slope, h) s = Sigmoid(t) Y = Mul(s, h)", None, "quick_gelu", 4),
        *(("h = MatMul(X, W) " + body, None, "gelu", 6) for body in GELU_ERF.values()),
        *(("h = MatMul(X, W) " + body, None, "gelu_tanh", len(body.split("= ")) ) for body in GELU_TANH.values()),
    ],
)  # fmt: skip
def test_fires(body, bias, activation, nodes):
    linear = only_match(build(body))
    assert not isinstance(linear, str), linear
    assert (linear.bias.name if linear.bias is not None else None) == bias
    assert linear.activation == activation
    assert len(linear.nodes) == len(set(linear.nodes)) == nodes
    assert linear.output.name == "Y"


HIGH = {
    "one": 1.0,
    "half": 0.5,
    "root": 2**0.5,
    "inv_root": 0.5**0.5,
    "three": 3,
    "cubic": 0.044715,
    "tanh_scale": (2 / np.pi) ** 0.5,
}


def with_constants(body, shape, *, nodes):
    """The model of ``body`` with every number of ``shape``, as an initializer or as a Constant node."""
    model = build("h = MatMul(X, W) " + body)
    for name, number in HIGH.items():
        if name not in model.graph.initializers:
            continue
        value = model.graph.initializers[name]
        tensor = ir.tensor(np.full(shape, number, np.float32), name=name)
        if nodes:
            node = ir.node("Constant", [], {"value": tensor})
            model.graph.insert_before(model.graph[0], node)
            value.replace_all_uses_with(node.outputs[0])
            del model.graph.initializers[name]
        else:
            value.const_value, value.shape = tensor, ir.Shape(shape)
    return model


@pytest.mark.parametrize("nodes", [False, True], ids=["initializers", "Constant nodes"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ("body", "activation"),
    [(body, "gelu") for body in GELU_ERF.values()] + [(body, "gelu_tanh") for body in GELU_TANH.values()],
)
def test_a_number_with_more_axes_than_the_value_it_meets_is_none(body, activation, shape, nodes):
    """X has two axes."""
    linear = only_match(with_constants(body, shape, nodes=nodes))
    assert linear.activation == (activation if len(shape) <= 2 else "none")


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (body, name)
        for body in (*GELU_ERF.values(), *GELU_TANH.values())
        for name in HIGH
        if re.search(rf"\b{name}\b", body)
    ],
)
def test_one_number_with_more_axes_is_enough(body, wrong):
    model = build("h = MatMul(X, W) " + body)
    value = model.graph.initializers[wrong]
    value.const_value = ir.tensor(np.full((1, 1, 1), HIGH[wrong], np.float32), name=wrong)
    value.shape = ir.Shape((1, 1, 1))
    assert only_match(model).activation == "none"


@pytest.mark.parametrize("body", [*GELU_ERF.values(), *GELU_TANH.values()])
def test_numbers_in_constant_nodes_go_with_the_linear(body, run):
    model = with_constants(body, (), nodes=True)
    x = np.random.default_rng(3).standard_normal((5, K)).astype(np.float32)
    before = run(model, {"X": x})["Y"]
    LowerSparseMatMul(min_sparsity=0)(model)
    assert [node.domain for node in model.graph] == ["sparse_onnx"]
    np.testing.assert_allclose(run(model, {"X": x})["Y"], before, rtol=1e-4, atol=1e-5)


def bias_model(x, shape):
    return ir.from_proto(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [
                    onnx.helper.make_node("MatMul", ["X", "W"], ["h"]),
                    onnx.helper.make_node("Add", ["h", "b"], ["i"]),
                    onnx.helper.make_node("Relu", ["i"], ["Y"]),
                ],
                "g",
                [onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, x)],
                [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)],
                [
                    onnx.numpy_helper.from_array(np.ones((K, N), np.float32), "W"),
                    onnx.numpy_helper.from_array(np.ones(shape, np.float32), "b"),
                ],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 17)],
            ir_version=9,
        )
    )


@pytest.mark.parametrize(
    ("x", "shape", "fires"),
    [
        ([K], (N,), True),
        ([K], (1, N), False),
        (["B", K], (1, N), True),
        (["B", K], (1, 1, N), False),
        (["B", "S", K], (1, 1, N), True),
        (["B", "S", K], (1, 1, 1, N), False),
        (None, (N,), True),  # whatever X is, the product has an axis
        (None, (1, N), False),
        (["B", "S", K], (2, 1, N), False),
        (["B", "S", K], (N, 1), False),
    ],
)
def test_a_bias_adds_no_axes(x, shape, fires):
    linear = only_match(bias_model(x, shape))
    assert (linear.bias is not None) is fires
    assert linear.activation == ("relu" if fires else "none")


def test_a_bias_that_is_a_constant_node(from_text, run):
    """It becomes an initializer, which is known wherever the operator stands."""
    rng = np.random.default_rng(0)
    W = np.where(rng.random((K, N)) < 0.6, 0, rng.standard_normal((K, N))).astype(np.float32)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 6] X) => (float[B, 4] Y) {
            h = MatMul(X, W) b = Constant<value = float[1, 4] {1.0, -2.0, 3.0, -4.0}>() i = Add(h, b) Y = Relu(i) }""",
        W=W,
    )
    x = rng.standard_normal((3, K)).astype(np.float32)
    before = run(model, {"X": x})["Y"]
    LowerSparseMatMul(min_sparsity=0.3)(model)
    assert [node.op_type for node in model.graph] == ["SparseMatMulRelu"]
    np.testing.assert_allclose(run(model, {"X": x})["Y"], before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("h = MatMul(X, W) r = Relu(X) p = MatMul(r, W2) Y = Add(h, p)", "float[B, 4] Y"),  # a residual
        ("h = MatMul(X, W) Y = Relu(h)", "float[B, 4] Y, float[B, 4] h"),  # h is a graph output
        ("h = MatMul(X, W) r = Relu(h) Y = Add(h, r)", "float[B, 4] Y"),  # h is read twice
        ("h = MatMul(X, W) Y = Add(h, h)", "float[B, 4] Y"),
        ("h = MatMul(X, W) s = Sigmoid(h) Y = Mul(s, s)", "float[B, 4] Y"),
        ("h = MatMul(X, W) s = Sigmoid(h) p = Mul(h, s) Y = Add(p, s)", "float[B, 4] Y"),
        ("h = MatMul(X, W) t = Mul(h, two) s = Sigmoid(t) Y = Mul(h, s)", "float[B, 4] Y"),
        ("h = MatMul(X, W) t = Mul(h, slope) s = Sigmoid(t) Y = Mul(t, s)", "float[B, 4] Y"),
        ("h = MatMul(X, W) t = Mul(h, slope) s = Sigmoid(t) p = Mul(h, s) Y = Add(p, t)", "float[B, 4] Y"),
        ("h = MatMul(X, W) s = Div(h, two) e = Erf(s) a = Add(e, one) m = Mul(h, a) Y = Mul(m, half)", "float[B, 4] Y"),
        ("h = MatMul(X, W) s = Div(h, root) e = Erf(s) a = Add(e, one) m = Mul(h, a) Y = Mul(m, two)", "float[B, 4] Y"),
        ("h = MatMul(X, W) s = Div(h, root) e = Erf(s) a = Add(e, one) m = Mul(h, a) q = Mul(m, half) Y = Add(q, h)",
         "float[B, 4] Y"),
    ],
)  # fmt: skip
def test_fuses_no_more_than_it_may(body, outputs):
    model = build(body, outputs=outputs, extra=f", float[{K}, {N}] W2 = {{{','.join(['1'] * K * N)}}}")
    weights, _ = find_weights(model)
    weight = next(weight for weight in weights if weight.name == "W")
    linear = match_linear(weight, weight.nodes[0], model.graph, Shapes(model))
    assert not isinstance(linear, str)
    assert linear.activation == "none"
    assert linear.bias is None
    assert linear.output.name == "h"


GATES = {
    "silu": "s = Sigmoid(h) {} = Mul(h, s)",
    "quick_gelu": "t = Mul(h, slope) s = Sigmoid(t) {} = Mul(h, s)",
    "gelu": "s = Div(h, root) e = Erf(s) a = Add(e, one) m = Mul(h, a) {} = Mul(m, half)",
    "gelu_tanh": "c = Pow(h, three) s = Mul(c, cubic) t = Add(h, s) u = Mul(t, tanh_scale) v = Tanh(u) a = Add(v, one) "
    "m = Mul(h, a) {} = Mul(m, half)",
}


@pytest.mark.parametrize("gate", GATES)
def test_an_activation_in_a_body_stays_there(gate):
    """Its nodes run or do not; the linear always does."""
    inner = GATES[gate].format("y")
    body = f"""h = MatMul(X, W) c = ReduceMax<keepdims = 0>(X) p = Cast<to = 9>(c)
        Y = If(p) <then_branch = yes () => (float[B, 4] y) {{ {inner} }}, else_branch = no () => (float[B, 4] z)
        {{ z = Identity(filled) }}>"""
    filled = f", float[1, 4] filled = {{{','.join(['1'] * N)}}}"
    names = "one half root three cubic tanh_scale slope"
    numbers = "".join(f", float {name} = {{{HIGH.get(name, 1.702)}}}" for name in names.split())
    text = f"""<ir_version: 9, opset_import: ["" : 17]> g (float[B, {K}] X) => (float[B, 4] Y)
        <float[{K}, {N}] W = {{{",".join(["1"] * K * N)}}} {filled} {numbers}> {{ {body} }}"""
    linear = only_match(ir.from_proto(onnx.parser.parse_model(text)))
    assert (linear.activation, linear.output.name) == ("none", "h")


@pytest.mark.parametrize(
    ("gate", "operator"),
    [
        (gate, operator)
        for gate, body in GATES.items()
        for operator in ("Sigmoid", "Mul", "Div", "Erf", "Pow", "Tanh", "Add")
        if f"{operator}(" in body
    ],
)
def test_operators_of_another_domain_are_no_gate(gate, operator):
    inner = GATES[gate].format("Y").replace(f"{operator}(", f"com.example.{operator}(")
    model = build("h = MatMul(X, W) " + inner, opsets=', "com.example" : 1')
    assert only_match(model).activation == "none"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Y = Gemm<alpha = 2.0>(X, W, b)", "alpha"),
        ("Y = Gemm<beta = 0.5>(X, W, b)", "beta"),
        ("z = Relu(X) c = MatMul(z, W2) Y = Gemm(X, W, c)", "no constant bias"),
        ("Y = Gemm(X, W, b_one)", "no constant bias"),
        ("Y = MatMul(fixed, W)", "constant activation"),
    ],
)
def test_declines_with_reason(body, reason):
    ones = ",".join(["1"] * K * N)
    model = build(
        body, extra=f", float[{K}, {N}] W2 = {{{ones}}}, float[1, {K}] fixed = {{{','.join(['1'] * K)}}}"
    )
    weight = next(weight for weight in find_weights(model)[0] if weight.name == "W")
    result = match_linear(weight, weight.nodes[0], model.graph, Shapes(model))
    assert isinstance(result, str)
    assert reason in result


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Y = MatMul(W, X)", None),
        ("h = MatMul(X, W) i = Transpose(W) p = MatMul(h, i) Y = MatMul(p, W)", "Transpose"),
        ("h = MatMul(X, W) g = Gather(W, ids) Y = Add(h, g)", "Gather"),
        ("Y = Gemm<transA = 1>(X, W, b)", "transA"),
    ],
)
def test_find_weights_leaves_shared_and_odd_ones_alone(body, reason):
    model = build(body, extra=", int64 ids = {0}")
    weights, declined = find_weights(model)
    assert weights == []
    assert [why for place, why in declined if reason and reason in why] or reason is None


def test_overridable_weight_is_left_alone():
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[B, {K}] X, float[{K}, {N}] W) => (float[B, {N}] Y) {{ Y = MatMul(X, W) }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((K, N), np.float32), "W"))
    weights, declined = find_weights(ir.from_proto(proto))
    assert weights == []
    assert declined == [("W", "is also a graph input, so a caller may replace it")]


def test_gemm_weight_is_seen_as_k_by_n():
    weights, _ = find_weights(build("Y = Gemm<transB = 1>(X, Wt, b)"))
    assert weights[0].shape == (K, N)
    assert weights[0].matrix().shape == (K, N)
