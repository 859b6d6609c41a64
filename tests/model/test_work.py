"""What every operator does, counted by hand; and what no sparse kernel takes, with its reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.model.work import (
    OPERATORS,
    Work,
    left_alone,
    sparse_share,
    untouched,
)
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "my" : 1]>'


def model_of(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f"{HEADER} {text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    return ir.from_proto(proto)


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def small(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int8)


def counted(model: ir.Model, **shapes: tuple[int, ...]) -> list[int | None]:
    return [part.products for part in Work(model, shapes).count()]


CASES = {
    "MatMul": ("(float[2,3,8] x) => (float[2,3,5] y) { y = MatMul(x, w) }", {"w": floats(8, 5)}, 6 * 8 * 5),
    "left": ("(float[8,7] x) => (float[5,7] y) { y = MatMul(w, x) }", {"w": floats(5, 8)}, 7 * 8 * 5),
    "vector": ("(float[8] x) => (float[5] y) { y = MatMul(x, w) }", {"w": floats(8, 5)}, 8 * 5),
    "both computed": (
        "(float[4,3,8] x, float[4,8,6] z) => (float[4,3,6] y) { y = MatMul(x, z) }",
        {},
        4 * 3 * 8 * 6,
    ),
    "Gemm": (
        "(float[8,3] x) => (float[3,5] y) { y = Gemm<transA = 1, transB = 1>(x, w) }",
        {"w": floats(5, 8)},
        3 * 8 * 5,
    ),
    "MatMulInteger": (
        "(uint8[3,8] x) => (int32[3,5] y) { y = MatMulInteger(x, w) }",
        {"w": small(8, 5)},
        3 * 8 * 5,
    ),
    "Conv": (
        "(float[2,4,9,9] x) => (float[2,6,7,7] y) { y = Conv(x, w) }",
        {"w": floats(6, 4, 3, 3)},
        2 * 49 * 6 * 4 * 9,
    ),
    "grouped Conv, strided": (
        "(float[1,4,9,9] x) => (float[1,6,4,4] y) { y = Conv<group = 2, strides = [2, 2]>(x, w) }",
        {"w": floats(6, 2, 3, 3)},
        16 * 6 * 2 * 9,
    ),
    "Conv of rank 3": (
        "(float[1,4,9] x) => (float[1,6,7] y) { y = Conv(x, w) }",
        {"w": floats(6, 4, 3)},
        7 * 6 * 4 * 3,
    ),
    "ConvTranspose": (
        "(float[2,4,5,5] x) => (float[2,6,7,7] y) { y = ConvTranspose(x, w) }",
        {"w": floats(4, 6, 3, 3)},
        2 * 4 * 25 * 6 * 9,
    ),
    "LSTM, two directions": (
        '(float[7,2,3] x) => (float[7,2,2,4] y) { y = LSTM<hidden_size = 4, direction = "bidirectional">(x, w, r) }',
        {"w": floats(2, 16, 3), "r": floats(2, 16, 4)},
        14 * 2 * 16 * (3 + 4),
    ),
    "GRU": (
        "(float[7,2,3] x) => (float[7,1,2,4] y) { y = GRU<hidden_size = 4>(x, w, r) }",
        {"w": floats(1, 12, 3), "r": floats(1, 12, 4)},
        14 * 12 * (3 + 4),
    ),
    "Einsum": (
        '(float[2,3,8] x) => (float[2,5] y) { y = Einsum<equation = "bnk,ko->bo">(x, w) }',
        {"w": floats(8, 5)},
        2 * 3 * 8 * 5,
    ),
    "Einsum with others": (
        '(float[2,3,7,8] x) => (float[2,3,7,5] y) { y = Einsum<equation = "...nk,ko->...no">(x, w) }',
        {"w": floats(8, 5)},
        6 * 7 * 8 * 5,
    ),
    "Einsum of one": ('(float[2,3] x) => (float[3,2] y) { y = Einsum<equation = "ij->ji">(x) }', {}, 0),
    "FusedMatMul": (
        "(float[8,3] x) => (float[3,5] y) { y = com.microsoft.FusedMatMul<transA = 1>(x, w) }",
        {"w": floats(8, 5)},
        3 * 8 * 5,
    ),
    "MatMulNBits": (
        "(float[3,32] x) => (float[3,5] y) { y = com.microsoft.MatMulNBits<K = 32, N = 5, block_size = 32>(x, w, s) }",
        {"w": np.ones((5, 1, 16), np.uint8), "s": floats(5)},
        3 * 32 * 5,
    ),
    "elementwise": ("(float[3,8] x) => (float[3,8] y) { y = Mul(x, w) }", {"w": floats(3, 8)}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_products(case: str) -> None:
    text, weights, expected = CASES[case]
    model = model_of(f"g {text}", **weights)
    found = counted(model)
    if found and found[0] is None:  # where no shape can be inferred, a run has to tell
        inside = onnx.shape_inference.infer_shapes(ir.to_proto(model))
        shape = tuple(dim.dim_value for dim in inside.graph.output[0].type.tensor_type.shape.dim)
        assert Work(model).unknown() == {"y"}
        found = [part.products for part in Work(model).count({"y": shape})]
    assert sum(part or 0 for part in found) == expected
    assert None not in found


def test_attention_counts_queries_by_keys_and_by_values() -> None:
    text = """g (float[2,5,12] q, float[2,7,12] k, float[2,7,12] v) => (float[2,5,12] y)
    { y = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v) }"""
    work = Work(model_of(text), {"q": (2, 5, 12), "k": (2, 7, 12), "v": (2, 7, 12)})
    assert [part.products for part in work.count({"y": (2, 5, 12)})] == [2 * 5 * 7 * 12 * 2]


def test_symbols_take_the_sizes_of_the_inputs() -> None:
    model = model_of("g (float[n,8] x) => (float[n,5] y) { y = MatMul(x, w) }", w=floats(8, 5))
    assert counted(model, x=(11, 8)) == [11 * 8 * 5]
    assert counted(model) == [None]
    assert model.graph.inputs[0].shape == ir.Shape(["n", 8]), "the model is left as it was"


BODY = """g (float[3,8] x, bool c) => (float[3,8] y) {
    y = If (c) <then_branch = a () => (float[3,8] t) { t = MatMul(x, w) },
                else_branch = b () => (float[3,8] e) { m = MatMul(x, w) e = MatMul(m, v) }> }"""


def test_of_an_if_the_larger_branch_counts() -> None:
    model = model_of(BODY, w=floats(8, 8), v=floats(8, 8))
    work = Work(model).count()
    assert sorted(part.products or 0 for part in work) == [0, 3 * 64, 3 * 64]
    (row,) = untouched(work, (), {})
    assert (row.op_type, row.count, row.share) == ("MatMul", 3, 1.0)
    assert "body of If" in row.reason


@pytest.mark.parametrize(("trips", "expected"), [(np.array(5), 5 * 3 * 64), (None, None)])
def test_a_loop_counts_as_often_as_it_runs(trips: np.ndarray | None, expected: int | None) -> None:
    given = "" if trips is not None else "int64 n, "
    text = f"""g ({given}float[3,8] x, bool c) => (float[3,8] y) {{
    y = Loop (n, c, x) <body = b (int64 i, bool go, float[3,8] h) => (bool on, float[3,8] z)
    {{ on = Identity(go) z = MatMul(h, w) }}> }}"""
    weights = {"w": floats(8, 8)} | ({} if trips is None else {"n": trips})
    assert counted(model_of(text, **weights), x=(3, 8), c=()) == [expected]


def test_functions_count_at_every_call() -> None:
    proto = onnx.parser.parse_model(
        f"{HEADER} g (float[3,8] x) => (float[3,8] y) {{ h = my.twice(x, w) y = my.twice(h, w) }}"
        '<domain: "my", opset_import: ["" : 17]> twice (x, w) => (z) { t = MatMul(x, w) z = MatMul(t, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(floats(8, 8), "w"))
    model = ir.from_proto(proto)
    work = Work(model).count()
    assert [part.products for part in work] == [3 * 64] * 4
    assert {part.reason.split(":")[0] for part in work} == {"lies in the function my"}
    assert len(model.functions) == 1, "the model is left as it was"


def test_functions_that_call_themselves_are_no_error() -> None:
    proto = onnx.parser.parse_model(
        f"{HEADER} g (float[3,8] x) => (float[3,8] y) {{ h = my.again(x) y = MatMul(h, w) }}"
        '<domain: "my", opset_import: ["my" : 1]> again (x) => (z) { z = my.again(x) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(floats(8, 8), "w"))
    assert Work(ir.from_proto(proto), {"x": (3, 8)}).count({"h": (3, 8), "y": (3, 8)})[0].products == 3 * 64


def test_what_a_file_claims_of_shapes_in_between_does_not_count() -> None:
    """It may hold for other inputs than those that are given."""
    model = model_of(BODY.replace("float[3,8]", "float[n,8]"), w=floats(8, 8), v=floats(8, 8))
    made = [value for graph in model.graphs() for node in graph for value in node.outputs]
    for value in made:
        value.shape = ir.Shape([99, 8])
    products = [part.products for part in Work(model, {"x": (3, 8), "c": ()}).count()]
    assert sorted(part or 0 for part in products) == [0, 3 * 64, 3 * 64]
    assert all(value.shape == ir.Shape([99, 8]) for value in made)


@pytest.mark.parametrize("dim", [-1, None, "?"])
def test_sizes_that_say_nothing_are_not_counted(dim: int | str | None) -> None:
    model = model_of("g (float[n,8] x) => (float[n,5] y) { y = MatMul(x, w) }", w=floats(8, 5))
    model.graph.inputs[0].shape = ir.Shape([dim, 8])
    assert counted(model) == [None]
    assert counted(model, x=(3, 8)) == [3 * 8 * 5]


def test_shapes_are_followed_through_what_computes_them() -> None:
    text = """g (float[2,3,8] x) => (float[6,5] y) { s = Shape(x) k = Slice(s, two, three)
    t = Concat<axis = 0>(six, k) r = Reshape(x, t) y = MatMul(r, w) }"""
    sizes = {"two": np.array([2]), "three": np.array([3]), "six": np.array([6])}
    work = Work(model_of(text, w=floats(8, 5), **sizes))
    assert work.unknown() == set()
    assert [part.products for part in work.count()] == [6 * 8 * 5]


@pytest.mark.parametrize("equation", ["ij...,->", "ijk,k", "", "ij,jk,kl->il", "->"])
def test_equations_that_do_not_fit_are_not_counted(equation: str) -> None:
    model = model_of(
        f'g (float[3,8] x) => (float[3,3] y) {{ y = Einsum<equation = "{equation}">(x, w) }}', w=floats(8, 3)
    )
    assert all(part.products is None for part in Work(model).count())


def test_shares_are_of_all_work() -> None:
    text = "g (float[4,8] x) => (float[4,5] y) { h = MatMul(x, w) j = MatMul(v, h) y = MatMul(j, u) }"
    model = model_of(text, w=floats(8, 5), v=floats(4, 4), u=floats(5, 5))
    work = Work(model).count()
    total = 4 * 8 * 5 + 4 * 4 * 5 + 4 * 5 * 5
    assert sum(part.products or 0 for part in work) == total
    assert sparse_share(work, {"w"}) == pytest.approx(160 / total)
    assert sparse_share(work, {"w", "u"}) == pytest.approx(260 / total)
    assert sparse_share((), {"w"}) == 0
    rows = untouched(work, {"w"}, {"u": "for this reason"})
    assert [(row.share, row.reason) for row in rows] == [
        (pytest.approx(100 / total), "for this reason"),
        (pytest.approx(80 / total), "the constant is the left operand of MatMul"),
    ]


DECLINED = {
    "MatMulInteger": (
        "(uint8[3,8] x) => (int32[3,5] y) { y = MatMulInteger(x, w) }",
        small(8, 5),
        "MatMulInteger (INT8)",
    ),
    "ConvInteger": (
        "(uint8[1,4,9,9] x) => (int32[1,6,7,7] y) { y = ConvInteger(x, w) }",
        small(6, 4, 3, 3),
        "ConvInteger",
    ),
    "QLinearMatMul": (
        "(uint8[3,8] x, float s, uint8 z) => (uint8[3,5] y) { y = QLinearMatMul(x, s, z, w, s, z, s, z) }",
        small(8, 5),
        "QLinearMatMul",
    ),
    "LSTM": (
        "(float[7,2,3] x) => (float[7,1,2,4] y) { y = LSTM<hidden_size = 4>(x, w, w) }",
        floats(1, 16, 3),
        "LSTM",
    ),
    "RNN": (
        "(float[7,2,3] x) => (float[7,1,2,4] y) { y = RNN<hidden_size = 4>(x, w, w) }",
        floats(1, 4, 3),
        "RNN",
    ),
    "ConvTranspose": (
        "(float[1,4,5,5] x) => (float[1,6,7,7] y) { y = ConvTranspose(x, w) }",
        floats(4, 6, 3, 3),
        "ConvTranspose",
    ),
    "Einsum": (
        '(float[3,8] x) => (float[3,5] y) { y = Einsum<equation = "nk,ko->no">(x, w) }',
        floats(8, 5),
        "Einsum",
    ),
    "left": ("(float[8,7] x) => (float[5,7] y) { y = MatMul(w, x) }", floats(5, 8), "left operand of MatMul"),
    "Gemm left": (
        "(float[8,7] x) => (float[5,7] y) { y = Gemm(w, x) }",
        floats(5, 8),
        "left operand of Gemm",
    ),
    "half": (
        "(float16[3,8] x) => (float16[3,5] y) { y = MatMul(x, w) }",
        floats(8, 5).astype(np.float16),
        "FLOAT16",
    ),
    "rank 5": ("(float[1,2,5,5,5] x) => (float[1,4,3,3,3] y) { y = Conv(x, w) }", floats(4, 2, 3, 3, 3), ""),
    "FusedMatMul": (
        "(float[3,8] x) => (float[3,5] y) { y = com.microsoft.FusedMatMul(x, w) }",
        floats(8, 5),
        "FusedMatMul",
    ),
    "FusedConv": (
        "(float[1,4,9,9] x) => (float[1,6,7,7] y) { y = com.microsoft.FusedConv(x, w) }",
        floats(6, 4, 3, 3),
        "FusedConv",
    ),
    "Attention": (
        "(float[1,3,8] x) => (float[1,3,8] y) { y = com.microsoft.Attention<num_heads = 2>(x, w) }",
        floats(8, 24),
        "Attention",
    ),
    "unknown": ("(float[3,8] x) => (float[3,5] y) { y = my.Dense(x, w) }", floats(8, 5), "my::Dense"),
    "quantized": (
        "(float[3,8] x, float s) => (float[3,5] y) { d = DequantizeLinear(w, s) y = MatMul(x, d) }",
        small(8, 5),
        "computed in every run, by DequantizeLinear",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_no_kernel_takes_is_listed_with_its_reason(case: str) -> None:
    text, weight, words = DECLINED[case]
    candidates, declined = find_candidates(model_of(f"g {text}", w=weight))
    assert not candidates
    (place,) = declined
    assert place.place == "w"
    assert words in place.reason


@pytest.mark.parametrize(
    "text",
    [
        "(float[3,8] x) => (float[3,8] y) { y = MatMul(x, w) }",  # a candidate
        "(int64[3] i) => (float[3,8] y) { y = Gather(w, i) }",
        "(float[8,8] x) => (float[8,8] y) { y = Add(x, w) }",
        '(float[3,8] x, float[8,8] w) => (float[3,8] y) { y = Einsum<equation = "nk,ko->no">(x, w) }',
    ],
)
def test_nothing_else_is_listed(text: str) -> None:
    weights = {} if "] w" in text else {"w": floats(8, 8)}
    assert find_candidates(model_of(f"g {text}", **weights))[1] == []


def test_what_is_known_already_is_not_said_twice() -> None:
    model = model_of("g (float[8,7] x) => (float[5,7] y) { y = MatMul(w, x) }", w=floats(5, 8))
    assert [place for place, _ in left_alone(model, ())] == ["w"]
    assert left_alone(model, {"w"}) == []


def test_operators_exist() -> None:
    """A typing error in the table would count nothing."""
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert {name for domain, name in OPERATORS if domain == ""} <= known
    assert {name for domain, name in OPERATORS if domain == DOMAIN} <= set(OP_TYPES)
    assert {domain for domain, _ in OPERATORS} == {"", "com.microsoft", DOMAIN}
