"""Which weights are found, which are left alone and why, and how they are selected."""

import numpy as np
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.model.weights import Selection, find_weights

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
W = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize(
    ("body", "transposed"),
    [
        ("Y = MatMul(X, W)", False),
        ("Y = Gemm(X, W)", False),
        ("Y = Gemm<transB = 1>(X, Wt)", True),
        ("A = MatMul(X, W) B = Gemm(X, W) Y = Add(A, B)", False),
    ],
)
def test_weights_of_linears_are_found(from_text, body, transposed):
    tensors = {"Wt": np.ascontiguousarray(W.T)} if transposed else {"W": W}
    model = from_text(f"{HEAD} g (float[2, 3] X) => (float[2, 4] Y) {{ {body} }}", **tensors)
    weights, declined = find_weights(model)
    assert not declined
    (weight,) = weights
    assert weight.shape == (3, 4)
    assert weight.transposed == transposed
    np.testing.assert_array_equal(weight.matrix(), W)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Y = Gemm<transA = 1>(X, W)", "Gemm with transA"),
        ("A = MatMul(X, W) B = Relu(W) Y = Add(A, B)", "also used by Relu"),
        ("A = MatMul(X, W) Y = MatMul(W, A)", "left operand"),
        ("A = MatMul(X, W) Y = Gemm<transB = 1>(A, W)", "transposed and not"),
        ("A = MatMul(X, W) Y = MatMul(A, I)", "dtype"),
    ],
)
def test_weights_that_must_stay_are_named(from_text, body, reason):
    square = np.eye(3, dtype=np.float32)
    tensors = {"W": square} | ({"I": np.eye(3, dtype=np.int32)} if "I" in body else {})
    if "I" in body:  # no float: MatMul needs one dtype, so all of it is int32
        tensors["W"] = square.astype(np.int32)
    kind = "int32" if "I" in body else "float"
    model = from_text(f"{HEAD} g ({kind}[3, 3] X) => ({kind}[3, 3] Y) {{ {body} }}", **tensors)
    weights, declined = find_weights(model)
    assert not weights
    assert all(reason in why for _, why in declined)
    assert len(declined) == len(tensors)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ("float[2, 3] X, float[3, 4] W", "float[2, 4] Y", "graph input"),
        ("float[2, 3] X", "float[2, 4] Y, float[3, 4] W", "graph output"),
    ],
)
def test_weights_at_the_border_of_the_graph_stay(from_text, inputs, outputs, reason):
    model = from_text(f"{HEAD} g ({inputs}) => ({outputs}) {{ Y = MatMul(X, W) }}", W=W)
    weights, declined = find_weights(model)
    assert not weights
    assert [(name, reason in why) for name, why in declined] == [("W", True)]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (3, 0)])
def test_no_matrix_is_no_weight(from_text, shape):
    result = (2,) if len(shape) == 1 else (*shape[:-2], 2, shape[-1])
    dims = ", ".join(map(str, result))
    model = from_text(
        f"{HEAD} g (float[2, 3] X) => (float[{dims}] Y) {{ Y = MatMul(X, W) }}", W=np.zeros(shape, np.float32)
    )
    weights, declined = find_weights(model)
    assert not weights
    assert len(declined) == 1


def two_linears(from_text):
    model = from_text(
        f"{HEAD} g (float[2, 3] X) => (float[2, 4] Y) {{ A = MatMul(X, U) Y = MatMul(A, W) }}",
        U=np.eye(3, dtype=np.float32),
        W=W,
    )
    for node, name in zip(model.graph, ["first", "second"], strict=True):
        node.name, node.metadata_props[MODULE_KEY] = f"node_{name}", f"encoder.{name}"
    return model


@pytest.mark.parametrize(
    ("targets", "ignore", "names"),
    [
        ((), (), ["U", "W"]),
        (("U",), (), ["U"]),
        (("node_second",), (), ["W"]),
        (("encoder.first",), (), ["U"]),
        (("re:encoder",), (), ["U", "W"]),
        (("re:.*second",), (), ["W"]),
        (("MatMul",), ("W",), ["U"]),
        ((), ("re:encoder",), []),
        ((), ("re:second",), ["U", "W"]),
        ((), ("nothing",), ["U", "W"]),
    ],
)
def test_selection_by_name_type_and_expression(from_text, targets, ignore, names):
    weights, _ = find_weights(two_linears(from_text))
    selection = Selection(targets, ignore)
    assert [weight.name for weight in weights if selection.reason_against(weight) is None] == names
    assert selection.unmatched(weights) == []


def test_targets_that_match_nothing_are_told(from_text):
    weights, _ = find_weights(two_linears(from_text))
    assert Selection(("U", "V", "re:x")).unmatched(weights) == ["V", "re:x"]


def test_a_broken_expression_is_refused():
    with pytest.raises(UsageError, match=r"'re:\(' is not a regular expression"):
        Selection(("re:(",))
