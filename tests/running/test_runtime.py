"""Running models whole and in segments."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.errors import DataError, HostError, ModelFileError, RunError, UsageError, VerificationError
from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.running import runtime
from sparse_onnx.running.runtime import (
    LEVELS,
    at_best_level,
    of_our_making,
    open_runner,
    open_session,
    session_budget,
)
from sparse_onnx.running.workbench import Workbench

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8)).astype(np.float32)


def weights(*names, shape=(8, 8)):
    return {name: RNG.standard_normal(shape).astype(np.float32) for name in names}


def model(signature, body, functions="", domains="", **arrays):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20{domains}]> g {signature} {{ {body} }} {functions}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def run(source, feeds, folder, *, budget, library=False):
    """The outputs, and whether one session held the whole model."""
    with open_runner(source, Workbench(1, folder, budget), library=library) as runner:
        return runner.run(feeds), runner.whole


def segments_of(source, folder, budget):
    return runtime._split(source, folder, budget, False)


def check_split(source, feeds, folder, *, budget=300, whole=False):
    """The split run equals the whole one, with the same names in the same order."""
    expected, one = run(source, feeds, folder, budget=1 << 30)
    assert one
    got, split = run(source, feeds, folder, budget=budget)
    assert split == whole
    assert list(got) == list(expected) == [value.name for value in source.graph.outputs]
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, strict=True)


CHAIN = (
    "(float[n, 8] X) => (float[n, 8] Y)",
    "a = MatMul(X, A) b = Relu(a) c = MatMul(b, B) Y = MatMul(c, C)",
)


def test_chain(tmp_path):
    source = model(*CHAIN, **weights("A", "B", "C"))
    assert len(segments_of(source, tmp_path, 300)) == 3
    assert len(segments_of(source, tmp_path, 512)) == 2
    check_split(source, {"X": X}, tmp_path)
    check_split(source, {"X": X}, tmp_path, budget=512)


def test_integers_count_as_the_floats_that_they_become_and_stay_with_who_reads_them(tmp_path):
    source = model(
        "(float[n, 8] X) => (float[n, 8] Y)",
        "A = Cast<to = 1>(a) B = Cast<to = 1>(b) bt = Transpose(B) c = MatMul(X, A) Y = MatMul(c, bt)",
        a=RNG.integers(-9, 9, (8, 8), np.int8),
        b=RNG.integers(-9, 9, (8, 8), np.int8),
    )
    for node in source.graph:  # as a pass that writes such nodes leaves them
        if node.op_type != "MatMul":
            node.outputs[0].shape = ir.Shape([8, 8])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert [segment.inputs for segment in segments_of(source, tmp_path, 700)] == [("X",), ("c",)]
    feeds = {"X": np.rint(X)}  # so that sums are exact, in whatever order
    check_split(source, feeds, tmp_path, budget=700)
    check_split(source, feeds, tmp_path, budget=2000, whole=True)


def test_budget_of_nothing_gives_every_weight_a_segment(tmp_path):
    check_split(model(*CHAIN, **weights("A", "B", "C")), {"X": X}, tmp_path, budget=0)


def test_one_node_above_the_budget_is_run_all_the_same(tmp_path):
    source = model("(float[n, 8] X) => (float[n, 8] Y)", "Y = MatMul(X, A)", **weights("A"))
    check_split(source, {"X": X}, tmp_path, budget=10, whole=True)


def test_model_is_left_as_it_was(tmp_path):
    source = model(*CHAIN, **weights("A", "B", "C"))
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    run(source, {"X": X}, tmp_path, budget=300)
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_also_intermediate(tmp_path):
    source = model(
        "(float[n, 8] X) => (float[n, 8] c, float[n, 8] a, float[n, 8] Y)",
        "a = MatMul(X, A) b = Relu(a) c = MatMul(b, B) d = MatMul(c, C) Y = Add(d, a)",
        **weights("A", "B", "C"),
    )
    check_split(source, {"X": X}, tmp_path)


def test_value_that_is_needed_much_later(tmp_path):
    source = model(
        "(float[n, 8] X) => (float[n, 8] Y)",
        "a = MatMul(X, A) b = MatMul(a, B) c = MatMul(b, C) d = MatMul(c, A) e = Add(d, a) Y = Add(e, X)",
        **weights("A", "B", "C"),
    )
    check_split(source, {"X": X}, tmp_path)


def test_inputs_used_late_or_never(tmp_path):
    source = model(
        "(float[n, 8] X, float[n, 8] late, float[n, 8] never) => (float[n, 8] Y)",
        "a = MatMul(X, A) b = MatMul(a, B) Y = Add(b, late)",
        **weights("A", "B"),
    )
    check_split(source, {"X": X, "late": X + 1, "never": X + 2}, tmp_path)


def test_output_that_is_an_input(tmp_path):
    source = model(
        "(float[n, 8] X, float[n, 8] Z) => (float[n, 8] Y, float[n, 8] Z)",
        "a = MatMul(X, A) Y = MatMul(a, B)",
        **weights("A", "B"),
    )
    got, whole = run(source, {"X": X, "Z": X + 1}, tmp_path, budget=300)
    assert not whole
    np.testing.assert_array_equal(got["Z"], X + 1)


def test_output_that_is_an_initializer(tmp_path):
    arrays = weights("A", "B")
    source = model(
        "(float[n, 8] X) => (float[n, 8] Y, float[8, 8] B)", "a = MatMul(X, A) Y = MatMul(a, B)", **arrays
    )
    check_split(source, {"X": X}, tmp_path)
    single = model("(float[n, 8] X) => (float[n, 8] Y, float[8, 8] B)", "Y = MatMul(X, B)", B=arrays["B"])
    check_split(single, {"X": X}, tmp_path, budget=10)


def test_shared_weight_is_in_every_segment_that_needs_it(tmp_path):
    body = "a = MatMul(X, A) b = MatMul(a, A) c = Relu(b) Y = MatMul(c, A)"
    check_split(
        model("(float[n, 8] X) => (float[n, 8] Y)", body, **weights("A")), {"X": X}, tmp_path, budget=200
    )


def test_values_without_a_declared_type(tmp_path):
    """Types of values inside the model need not be written in the file: integers, bools and scalars pass too."""
    source = model(
        "(float[n, 8] X) => (float[n, 8] Y)",
        """a = MatMul(X, A) i = ArgMax<axis = 1, keepdims = 0>(a) m = Greater(a, X) s = Size(a)
        b = MatMul(a, B) z = Sub(b, b) w = Where(m, b, z) t = Cast<to = 1>(s) f = Cast<to = 1>(i)
        u = Unsqueeze(f, one) v = Add(w, u) Y = Div(v, t)""",
        **weights("A", "B"),
        one=np.array([1], np.int64),
    )
    check_split(source, {"X": X}, tmp_path)


IF = """c = ReduceSum<keepdims = 0>(X) t = Greater(c, zero)
a = MatMul(X, A)
b = MatMul(a, B)
Y = If (t) <
    then_branch = yes () => (float[n, 8] p) { q = MatMul(a, C) p = Add(q, X) },
    else_branch = no () => (float[n, 8] r) { r = Sub(b, a) }
>"""


@pytest.mark.parametrize("sign", [1, -1])
def test_subgraph_that_reads_outer_values(tmp_path, sign):
    source = model("(float[n, 8] X) => (float[n, 8] Y)", IF, **weights("A", "B", "C"), zero=np.float32(0))
    feeds = {"X": sign * np.abs(X)}
    check_split(source, feeds, tmp_path)
    taken = run(source, feeds, tmp_path, budget=1 << 30)[0]["Y"]
    other = run(source, {"X": -feeds["X"]}, tmp_path, budget=1 << 30)[0]["Y"]
    assert not np.allclose(taken, other), "both branches are taken in this test"


def test_subgraph_inside_a_subgraph(tmp_path):
    source = model(
        "(float[n, 8] X, bool c, bool d) => (float[n, 8] Y)",
        """a = MatMul(X, A)
        b = MatMul(a, B)
        Y = If (c) <
            then_branch = yes () => (float[n, 8] p) {
                p = If (d) <
                    then_branch = y2 () => (float[n, 8] q) { q = Add(a, b) },
                    else_branch = n2 () => (float[n, 8] r) { r = Sub(b, X) }
                >
            },
            else_branch = no () => (float[n, 8] s) { s = Relu(a) }
        >""",
        **weights("A", "B"),
    )
    for c in (True, False):
        for d in (True, False):
            check_split(source, {"X": X, "c": np.array(c), "d": np.array(d)}, tmp_path)


def test_loop_with_values_of_its_own(tmp_path):
    source = model(
        "(float[n, 8] X) => (float[n, 8] Y)",
        """a = MatMul(X, A)
        b = MatMul(a, B)
        l = Loop (count, go, b) <
            body = step (int64 i, bool before, float[n, 8] state) => (bool after, float[n, 8] next)
            { after = Identity(before) m = MatMul(state, A) k = Add(m, a) next = Tanh(k) }
        >
        Y = MatMul(l, B)""",
        **weights("A", "B"),
        count=np.array(3, np.int64),
        go=np.array(True),
    )
    check_split(source, {"X": X}, tmp_path)


def test_functions_go_with_every_segment(tmp_path):
    source = model(
        "(float[n, 8] X) => (float[n, 8] Y)",
        "a = MatMul(X, A) b = mine.Twice(a) c = MatMul(b, B) Y = mine.Twice(c)",
        '<opset_import: ["" : 20], domain: "mine"> Twice (x) => (y) { y = Add(x, x) }',
        ', "mine" : 1',
        **weights("A", "B"),
    )
    check_split(source, {"X": X}, tmp_path)


def test_constant_nodes(tmp_path):
    source = model(
        "(float[n, 8] X) => (float[n, 8] Y)",
        "k = Constant<value = float {2.0}>() a = MatMul(X, A) b = Mul(a, k) c = MatMul(b, B) Y = Mul(c, k)",
        **weights("A", "B"),
    )
    check_split(source, {"X": X}, tmp_path)


@pytest.mark.parametrize("library", [True, False])
def test_sparse_operators_in_segments(tmp_path, library):
    arrays = weights("A", "B", "C", shape=(64, 64))
    for array in arrays.values():
        array[np.random.default_rng(1).random(array.shape) < 0.8] = 0
    body = "a = MatMul(X, A) b = Relu(a) c = MatMul(b, B) Y = MatMul(c, C)"
    source = model("(float[n, 64] X) => (float[n, 64] Y)", body, **arrays)
    LowerSparseMatMul(min_sparsity=0.5)(source)
    feeds = {"X": RNG.standard_normal((5, 64)).astype(np.float32)}
    expected, whole = run(source, feeds, tmp_path, budget=1 << 30, library=library)
    assert whole
    got, whole = run(source, feeds, tmp_path, budget=5000, library=library)
    assert not whole
    np.testing.assert_allclose(got["Y"], expected["Y"], rtol=1e-5, atol=1e-4)


def test_without_the_library_a_compressed_weight_counts_as_dense(tmp_path):
    """A session unfolds it: a budget that holds the stored bytes only must split the model."""
    arrays = weights("A", "B", shape=(64, 64))
    for array in arrays.values():
        array[:, 1:] = 0
    source = model("(float[n, 64] X) => (float[n, 64] Y)", "a = MatMul(X, A) Y = MatMul(a, B)", **arrays)
    LowerSparseMatMul(min_sparsity=0.5)(source)
    budget = 2 * model_io.weight_bytes(source)
    assert budget < 2 * 64 * 64 * 4
    feeds = {"X": np.ones((2, 64), np.float32)}
    assert run(source, feeds, tmp_path, budget=budget, library=True)[1]
    assert not run(source, feeds, tmp_path, budget=budget, library=False)[1]


@pytest.mark.parametrize(("allowed", "whole"), [(1 << 30, True), (300, False)])
def test_without_a_budget_the_size_of_the_model_decides(tmp_path, monkeypatch, allowed, whole):
    source = model(*CHAIN, **weights("A", "B", "C"))
    asked = []
    monkeypatch.setattr(runtime, "session_budget", lambda nbytes: asked.append(nbytes) or allowed)
    with open_runner(source, Workbench(1, tmp_path), library=False) as runner:
        assert runner.whole == whole
    assert asked == [model_io.weight_bytes(source)]


def test_a_quiet_workbench_tells_nobody_and_is_the_same_otherwise(tmp_path):
    said = []
    loud = Workbench(2, tmp_path, 300, said.append)
    quiet = loud.quietly()
    quiet.progress("anything")
    loud.progress("once")
    assert said == ["once"]
    assert (quiet.threads, quiet.work, quiet.budget) == (2, tmp_path, 300)


def test_runner_can_run_twice_and_at_other_shapes(tmp_path):
    source = model(*CHAIN, **weights("A", "B", "C"))
    with (
        open_runner(source, Workbench(1, tmp_path, 1 << 30), library=False) as whole,
        open_runner(source, Workbench(1, tmp_path, 300), library=False) as split,
    ):
        for rows in (3, 1, 7):
            feeds = {"X": RNG.standard_normal((rows, 8)).astype(np.float32)}
            np.testing.assert_array_equal(split.run(feeds)["Y"], whole.run(feeds)["Y"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("features", "timed", "precise"), [
    (["avx2"], False, True), (["avx2"], True, False), (["avx2", "avx512_vnni"], False, False), (None, False, True),
])  # fmt: skip
def test_products_of_bytes_are_exact_but_where_time_counts(features, timed, precise, monkeypatch):
    """Where two products saturate, a timed session is as fast as ORT by itself; no other takes its sums for true."""
    monkeypatch.setattr(runtime, "cpu_features", lambda: features)
    options = runtime.session_options(threads=1, library=False, timed=timed)
    entry = "session.x64quantprecision"
    if precise:
        assert options.get_session_config_entry(entry) == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_session_config_entry(entry)


@pytest.mark.parametrize("budget", [1 << 30, 300])
def test_milliseconds_are_positive(tmp_path, budget):
    source = model(*CHAIN, **weights("A", "B", "C"))
    with open_runner(source, Workbench(1, tmp_path, budget), library=False) as runner:
        assert runner.milliseconds({"X": X}) > 0


def test_file_that_is_there_is_used(tmp_path):
    source = model(*CHAIN, **weights("A", "B", "C"))
    path = model_io.save_model(source, tmp_path / "given")
    work = tmp_path / "work"
    work.mkdir()
    with open_runner(source, Workbench(1, work, 1 << 30), path, library=False) as runner:
        assert list(work.glob("*/*")) == []
        assert runner.run({"X": X})["Y"].shape == (3, 8)


@pytest.mark.parametrize("budget", [1 << 30, 300])
def test_inputs_that_the_model_refuses(tmp_path, budget):
    source = model(*CHAIN, **weights("A", "B", "C"))
    with open_runner(source, Workbench(1, tmp_path, budget), library=False) as runner:
        with pytest.raises(RunError, match=r"cannot be run with inputs X float32\[3, 7\]"):
            runner.run({"X": X[:, :7].copy()})
        assert runner.run({"X": X})["Y"].shape == (3, 8)
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_removed_after_an_error(tmp_path):
    source = model(*CHAIN, **weights("A", "B", "C"))

    def fail():
        with open_runner(source, Workbench(1, tmp_path, 300), library=False) as runner:
            runner.run({"X": X})
            assert list(tmp_path.iterdir()) != []
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_model_that_the_runtime_refuses(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(
        onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 20, "nobody" : 1]> g (float[n] X) => (float[n] Y) { Y = nobody.Op(X) }'
        ).SerializeToString()
    )
    with pytest.raises(RunError, match=r"ONNX Runtime .* refuses .*bad\.onnx"):
        open_session(tmp_path / "bad.onnx", threads=1, library=False)


def test_budget_of_small_and_large_models():
    assert session_budget(0) == session_budget(10**9) == 3 << 29
    assert session_budget(32 << 30) == 2 << 30
    assert session_budget(1700 << 20) == 128 << 20


# Levels of optimization


def test_levels_are_tried_in_order():
    tried = []

    def attempt(level):
        tried.append(level)
        if level != "disabled":
            raise RunError(f"not with {level}")
        return 7

    said = []
    assert at_best_level(attempt, said.append) == ("disabled", 7)
    assert tried == list(LEVELS)
    assert "runs with none: not with all" in said[0]
    assert at_best_level(attempt, said.append, "disabled") == ("disabled", 7)
    assert len(said) == 1
    with pytest.raises(RunError, match=r"not with all\. With fewer"):
        at_best_level(lambda level: attempt("all" if level == "all" else "basic"), said.append)


@pytest.mark.parametrize("error", [DataError, UsageError, HostError])
def test_a_level_less_mends_nothing_but_what_the_runtime_refuses(error):
    tried = []

    def attempt(level):
        tried.append(level)
        raise error("this")

    with pytest.raises(error, match=r"^this$"):
        at_best_level(attempt, print)
    assert tried == ["all"]


# Whose mistake


def test_what_is_refused_of_our_making_is_our_mistake():
    message = "does not run, though the original does: bad weight"
    with pytest.raises(VerificationError, match=message) as found, of_our_making():
        raise RunError("bad weight")
    assert found.value.exit_code == 3


@pytest.mark.parametrize("kind", [DataError, UsageError, ModelFileError, HostError, ValueError])
def test_other_errors_stay_what_they_are(kind):
    with pytest.raises(kind), of_our_making():
        raise kind("this")
