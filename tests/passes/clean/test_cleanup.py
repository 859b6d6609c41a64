"""The clean-up passes, each with as much that must stay as must go."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.clean.cleanup import Constants, Duplicates, Identities, Unused
from sparse_onnx.passes.presets import CLEAN_PASSES

X = np.random.default_rng(5).standard_normal((2, 3)).astype(np.float32)
FUNCTION = """
<domain: "local", opset_import: ["" : 17]> twice (a) => (b) { c = Identity(a) d = Neg(a) b = Add(c, a) }
"""


def build(from_text, body, *, outputs="float[B, 3] Y", inputs="float[B, 3] X", functions="", **tensors):
    head = '<ir_version: 9, opset_import: ["" : 17, "local" : 1]>'
    return from_text(f"{head} g ({inputs}) => ({outputs}) {{ {body} }} {functions}", **tensors)


def nodes(model):
    return [node.op_type for node in model.graph]


def check_same(model, step, run, feeds=None, *, modified):
    """Run ``step``; outputs and ``modified`` must be as expected, and the second run must change nothing."""
    feeds = feeds or {"X": X}
    before = run(model, feeds)
    result = step(model)
    assert result.modified == modified
    after = run(model, feeds)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert not step(model).modified
    return result


def count(n):
    return ", ".join(map(str, range(n)))


# -- constants ---------------------------------------------------------------------------------------


def test_large_constants_become_initializers(from_text, run):
    model = build(
        from_text,
        f"C = Constant<value = float[6, 3] {{{count(18)}}}>() A = MatMul(C, T) Y = MatMul(X, A)",
        T=np.eye(3, dtype=np.float32)[:, :3],
        outputs="float[B, 3] Y",
        inputs="float[B, 6] X",
    )
    result = check_same(model, Constants(), run, {"X": np.ones((2, 6), np.float32)}, modified=True)
    assert result.statistics == {"nodes": 1}
    assert sorted(model.graph.initializers) == ["C", "T"]


@pytest.mark.parametrize(
    "body",
    [
        "C = Constant<value = float[3] {1, 2, 3}>() Y = Add(X, C)",  # small
        "C = Constant<value_float = 2.0>() Y = Add(X, C)",
        "Y = Relu(X)",
    ],
)
def test_small_constants_stay(from_text, run, body):
    check_same(build(from_text, body), Constants(), run, modified=False)


def test_a_constant_that_is_an_output_stays(from_text, run):
    body = f"C = Constant<value = float[20] {{{count(20)}}}>() Y = Relu(X)"
    check_same(build(from_text, body, outputs="float[B, 3] Y, float[20] C"), Constants(), run, modified=False)


# -- identities --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("I = Identity(X) Y = Relu(I)", ["Relu"]),
        ("H = Neg(X) I = Identity(H) J = Identity(I) Y = Relu(J)", ["Neg", "Relu"]),
        ("I = Identity(w) Y = Mul(X, I)", ["Mul"]),
        ("I = Identity(X) J = Identity(I) Y = Identity(J)", ["Identity"]),
    ],
)
def test_identities_go(from_text, run, body, left):
    tensors = {"w": np.float32(2)} if "w" in body else {}
    model = build(from_text, body, **tensors)
    check_same(model, Identities(), run, modified=True)
    assert nodes(model) == left


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("Y = Identity(X)", "float[B, 3] Y"),
        ("H = Neg(X) Y = Identity(H) Z = Identity(H)", "float[B, 3] Y, float[B, 3] Z"),
        ("H = Neg(X) Y = Identity(H)", "float[B, 3] Y, float[B, 3] H"),
        ("Y = Relu(X)", "float[B, 3] Y"),
    ],
)
def test_identities_that_name_an_output_stay(from_text, run, body, outputs):
    check_same(build(from_text, body, outputs=outputs), Identities(), run, modified=False)


IF = """H = Neg(X) Y = If(c) <
    then_branch = t () => (float[B, 3] P) { P = Identity(H) },
    else_branch = e () => (float[B, 3] Q) { I = Identity(H) Q = Relu(I) }>"""


@pytest.mark.parametrize("condition", [True, False])
def test_a_branch_that_returns_a_value_from_outside_keeps_its_identity(from_text, run, condition):
    model = build(from_text, IF, inputs="float[B, 3] X, bool c")
    check_same(model, Identities(), run, {"X": X, "c": np.array(condition)}, modified=True)
    branches = [[node.op_type for node in graph] for graph in model.graph.subgraphs()]
    assert sorted(branches) == [["Identity"], ["Relu"]]


def test_identities_in_functions_go(from_text, run):
    model = build(from_text, "Y = local.twice(X)", functions=FUNCTION)
    check_same(model, Identities(), run, modified=True)
    assert [node.op_type for function in model.functions.values() for node in function] == ["Neg", "Add"]


# -- duplicates --------------------------------------------------------------------------------------

BIG = np.arange(300, dtype=np.float32).reshape(100, 3)


def variant(array, index, value):
    array = array.copy()
    array.flat[index] = value
    return array


@pytest.mark.parametrize(
    "array", [np.float32(3), np.zeros(3, np.float32), np.array([np.nan, -0.0, 1], np.float32)]
)
def test_equal_initializers_are_merged(from_text, run, array):
    model = build(from_text, "A = Add(X, u) B = Add(A, v) Y = Add(B, w)", u=array, v=array, w=array + 1)
    result = check_same(model, Duplicates(), run, modified=True)
    assert list(model.graph.initializers) == ["u", "w"]
    assert result.statistics == {"tensors": 1, "bytes": array.nbytes}


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.bool_, ml_dtypes.int4]
)
def test_equal_initializers_of_any_dtype(from_text, dtype):
    array = np.array([0, 1, 1, 0]).astype(dtype)
    model = build(
        from_text, "A = Shape(u) B = Shape(v) Y = Add(A, B)", outputs="int64[1] Y", u=array, v=array.copy()
    )
    assert Duplicates()(model).modified
    assert list(model.graph.initializers) == ["u"]


@pytest.mark.parametrize(
    ("u", "v"),
    [
        (np.float32(0.0), np.float32(-0.0)),
        (np.zeros(3, np.float32), np.zeros((1, 3), np.float32)),
        (BIG, variant(BIG, 150, -1)),  # equal at both ends
        (BIG, variant(BIG, 0, -1)),
        (BIG, variant(BIG, -1, -1)),
    ],
)
def test_initializers_that_differ_stay(from_text, run, u, v):
    model = build(
        from_text,
        "A = Add(X, u) Y = Add(A, v)",
        inputs="float[100, 3] X",
        outputs="float[100, 3] Y",
        u=u,
        v=v,
    )
    check_same(model, Duplicates(), run, {"X": BIG}, modified=False)


def test_equal_bytes_of_another_dtype_stay(from_text):
    zero = np.zeros(3, np.float32)
    model = build(
        from_text,
        "A = Shape(u) B = Shape(v) Y = Add(A, B)",
        outputs="int64[1] Y",
        u=zero,
        v=zero.view(np.int32),
    )
    assert not Duplicates()(model).modified


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [("float[B, 3] X, float[3] v", "float[B, 3] Y"), ("float[B, 3] X", "float[B, 3] Y, float[3] v")],
)
def test_initializers_that_the_caller_sees_stay(from_text, run, inputs, outputs):
    one = np.ones(3, np.float32)
    model = build(from_text, "A = Add(X, u) Y = Add(A, v)", inputs=inputs, outputs=outputs, u=one, v=one)
    check_same(model, Duplicates(), run, modified=False)


def test_strings_stay(from_text):
    model = from_text("""<ir_version: 9, opset_import: ["" : 17]>
        g () => (int64[1] Y) <string[2] u = {"a", "b"}, string[2] v = {"a", "b"}>
        { A = Shape(u) B = Shape(v) Y = Add(A, B) }""")
    assert not Duplicates()(model).modified


def test_files_are_mapped_one_at_a_time(tmp_path, from_text, monkeypatch):
    tensors = dict.fromkeys("uvw", BIG)
    source = build(
        from_text, "A = Add(X, u) B = Add(A, v) Y = Add(B, w)", inputs="float[100, 3] X", **tensors
    )
    ir.save(source, tmp_path / "model.onnx", external_data="data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    old = [value.const_value for value in model.graph.initializers.values()]
    mapped = []
    numpy = ir.ExternalTensor.numpy

    def spy(tensor):
        array = numpy(tensor)
        mapped.append(sum(other.raw is not None for other in old))
        return array

    monkeypatch.setattr(ir.ExternalTensor, "numpy", spy)
    assert Duplicates()(model).statistics["tensors"] == 2
    assert set(mapped) == {1}
    assert all(tensor.raw is None for tensor in old)


# -- unused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "tensors", "removed"),
    [
        ("A = Neg(X) B = Relu(A) Y = Relu(X)", {}, {"nodes": 2, "initializers": 0, "functions": 0}),
        ("Y = Relu(X)", {"w": X}, {"nodes": 0, "initializers": 1, "functions": 0}),
        ("A = Add(X, w) Y = Relu(X)", {"w": np.float32(1)}, {"nodes": 1, "initializers": 1, "functions": 0}),
        (
            "A, B = TopK(X, k) Y = Relu(X)",
            {"k": np.array([1])},
            {"nodes": 1, "initializers": 1, "functions": 0},
        ),
    ],
)
def test_what_no_output_needs_goes(from_text, run, body, tensors, removed):
    model = build(from_text, body, **tensors)
    assert check_same(model, Unused(), run, modified=True).statistics == removed


@pytest.mark.parametrize(
    ("body", "tensors"),
    [
        ("Y = Relu(X)", {}),
        ("Y = Add(X, w)", {"w": np.float32(1)}),
        ("A, B = TopK(X, k) C = Cast<to = 1>(B) Y = Add(X, C)", {"k": np.array([3])}),
        ("Y, M = Dropout(X, r, t)", {"r": np.float32(0.5), "t": np.array(False)}),
    ],
)
def test_what_an_output_needs_stays(from_text, run, body, tensors):
    check_same(build(from_text, body, **tensors), Unused(), run, modified=False)


def test_an_unused_input_of_the_graph_stays(from_text, run):
    model = build(from_text, "Y = Relu(X)", inputs="float[B, 3] X, float[3] w", w=np.ones(3, np.float32))
    check_same(model, Unused(), run, modified=False)
    assert [value.name for value in model.graph.inputs] == ["X", "w"]


@pytest.mark.parametrize("condition", [True, False])
def test_in_subgraphs(from_text, run, condition):
    """H is read only by a dead node of a branch, D only by a dead If."""
    body = """H = Neg(X) D = Abs(X) Y = If(c) <
        then_branch = t () => (float[B, 3] P) { Z = Relu(H) P = Relu(X) },
        else_branch = e () => (float[B, 3] Q) { Q = Neg(X) }>
        U = If(c) <then_branch = v () => (float[B, 3] R) { R = Relu(D) },
                   else_branch = w () => (float[B, 3] S) { S = Neg(D) }>"""
    model = build(from_text, body, inputs="float[B, 3] X, bool c")
    feeds = {"X": X, "c": np.array(condition)}
    result = check_same(model, Unused(), run, feeds, modified=True)
    assert result.statistics["nodes"] == 4
    assert nodes(model) == ["If"]


def test_functions_that_nothing_calls_go(from_text, run):
    model = build(from_text, "A = local.twice(X) Y = Relu(X)", functions=FUNCTION)
    assert check_same(model, Unused(), run, modified=True).statistics == {
        "nodes": 2,
        "initializers": 0,
        "functions": 1,
    }
    assert not model.functions


def test_functions_that_something_calls_stay(from_text, run):
    model = build(from_text, "Y = local.twice(X)", functions=FUNCTION)
    assert check_same(model, Unused(), run, modified=True).statistics == {
        "nodes": 1,
        "initializers": 0,
        "functions": 0,
    }
    assert len(model.functions) == 1


# -- all together ------------------------------------------------------------------------------------


def test_a_pruned_torch_layer_becomes_one_gemm(from_text, run):
    body = """M = Mul(fc_mask, fc_orig) I = Identity(X) T = Transpose<perm = [1, 0]>(M)
              A = MatMul(I, T) Z = Identity(z) B = Add(A, Z) Y = Add(B, z2)"""
    rng = np.random.default_rng(0)
    zero = np.zeros(3, np.float32)
    weight, mask = rng.standard_normal((3, 3)).astype(np.float32), np.eye(3, dtype=np.float32)
    model = build(from_text, body, fc_mask=mask, fc_orig=weight, z=zero, z2=zero)
    check_same(model, Pipeline(CLEAN_PASSES), run, modified=True)
    assert nodes(model) == ["MatMul", "Add", "Add"]
    assert sorted(model.graph.initializers) == ["fc", "z"]
