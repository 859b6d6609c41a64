"""What is run before each step: every node once, nothing stale, and only what is read again is kept."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.passes.calibration.order import Order, Part
from sparse_onnx.passes.calibration.skeleton import extract

_PREFIX = '<ir_version: 9, opset_import: ["" : 17]> g '


def _order(model: ir.Model, *steps: str) -> Order:
    """``steps`` name the results of the layers that are solved, one step each, or several with a space between."""
    node = {value.name: node for node in model.graph for value in node.outputs}
    solved = {id(node[name]): index for index, names in enumerate(steps) for name in names.split()}
    return Order(model, solved)


def _names(model: ir.Model, part: Part) -> list[str]:
    """The results of the nodes that the session of a part runs."""
    if not part.outputs:
        return []
    return [node.outputs[0].name or "" for node in extract(model, part.inputs, part.outputs).graph]


def _square(*names: str) -> dict[str, np.ndarray]:
    return {name: np.eye(4, dtype=np.float32) for name in names}


def _dense_block(from_text) -> ir.Model:
    """Every layer reads the results of all earlier ones; no layer's input is the input of two."""
    return from_text(
        f"""{_PREFIX} (float[n, 4] X) => (float[n, 16] Y) {{
        x0 = Relu(X) a = MatMul(x0, A) c1 = Concat<axis = 1>(x0, a) x1 = Relu(c1) b = MatMul(x1, B)
        c2 = Concat<axis = 1>(x0, a, b) x2 = Relu(c2) c = MatMul(x2, C) Y = Concat<axis = 1>(x0, a, b, c) }}""",
        A=np.ones((4, 4), np.float32),
        B=np.ones((8, 4), np.float32),
        C=np.ones((12, 4), np.float32),
    )


@pytest.mark.parametrize("changing", [True, False])
def test_every_node_is_run_once_however_often_it_is_read(from_text, changing):
    model = _dense_block(from_text)
    parts = _order(model, "a", "b", "c").parts([{"x0"}, {"x1"}, {"x2"}], changing=changing)
    assert [_names(model, part) for part in parts] == [["x0"], ["a", "c1", "x1"], ["b", "c2", "x2"]]
    assert [sorted(part.kept) for part in parts] == [["x0"], ["a", "x1"], []]
    assert [sorted(part.needed) for part in parts] == [["x0"], ["a", "x0", "x1"], []]
    assert parts[2].inputs == ("a", "x0", "x1")
    assert [part.weight_bytes for part in parts] == [0, 64, 128]


def test_values_behind_unsolved_layers_are_run_again_unless_nothing_changes(from_text):
    model = from_text(
        f"""{_PREFIX} (float[n, 4] X) => (float[n, 4] Y) {{
        r = Relu(X) a = MatMul(r, W) s = Relu(a) b = MatMul(s, W) t = Relu(b) Y = MatMul(t, U) }}""",
        **_square("W", "U"),
    )
    schedule = _order(model, "a b", "Y")
    wanted = [{"r", "s"}, {"t"}]
    changing, fixed = (schedule.parts(wanted, changing=flag) for flag in (True, False))
    assert [_names(model, part) for part in changing] == [["r", "a", "s"], ["a", "s", "b", "t"]]
    assert [_names(model, part) for part in fixed] == [["r", "a", "s"], ["b", "t"]]
    assert changing[0].kept == {"r"}
    assert fixed[0].kept == {"s"}


def test_finality(from_text):
    model = from_text(
        f"""{_PREFIX} (float[n, 4] X) => (float[n, 4] Y)
        {{ k = Relu(W) a = MatMul(X, W) b = MatMul(a, U) Y = Add(b, k) }}""",
        **_square("W", "U"),
    )
    schedule = _order(model, "a", "b")
    value = {value.name: value for node in model.graph for value in node.outputs}
    assert schedule.is_final(model.graph.inputs[0], 0)
    assert [schedule.is_final(value["a"], step) for step in range(3)] == [False, True, True]
    assert [schedule.is_final(value["Y"], step) for step in range(3)] == [False, False, True]
    assert not schedule.is_final(value["k"], 2)  # depends on no data
    assert not schedule.is_final(model.graph.initializers["W"], 2)


def test_constants_are_not_kept(from_text):
    model = from_text(
        f"""{_PREFIX} (float[n, 4] X) => (float[n, 4] Y) {{
        k = Constant<value_float = 2.0>() k2 = Mul(k, k) a = Mul(X, k2)
        b = MatMul(a, W) c = Mul(b, k2) Y = MatMul(c, U) }}""",
        **_square("W", "U"),
    )
    parts = _order(model, "b", "Y").parts([{"a"}, {"c"}], changing=True)
    assert parts[0].kept == {"a"}
    assert _names(model, parts[1]) == ["k", "k2", "b", "c"]


@pytest.mark.parametrize("kind", ["sequence", "bfloat16"])
def test_what_is_no_array_of_numpy_is_computed_again(from_text, kind):
    first = "s = SequenceConstruct(X, X)" if kind == "sequence" else "s = Cast<to = 16>(X)"
    a, b = (
        ("a = ConcatFromSequence<axis = 0>(s)", "d = ConcatFromSequence<axis = 0>(s)")
        if kind == "sequence"
        else ("a = Cast<to = 1>(s)", "d = Cast<to = 1>(s)")
    )
    model = from_text(
        f"""{_PREFIX} (float[n, 4] X) => (float[m, 4] Y)
        {{ {first} {a} b = MatMul(a, W) {b} c = Add(b, d) Y = MatMul(c, U) }}""",
        **_square("W", "U"),
    )
    parts = _order(model, "b", "Y").parts([{"a"}, {"c"}], changing=True)
    assert parts[0].kept == {"a"}
    assert _names(model, parts[1]) == ["s", "b", "d", "c"]


def test_a_step_that_wants_nothing_runs_nothing(from_text):
    parts = _order(_dense_block(from_text), "a", "b").parts([set(), {"x1"}], changing=False)
    assert (parts[0].inputs, parts[0].outputs, parts[0].weight_bytes) == ((), (), 0)
    assert parts[1].inputs == ("X",)


def test_inputs_of_the_model_are_read_and_never_kept(from_text):
    model = from_text(
        f"{_PREFIX} (float[n, 4] X) => (float[n, 4] Y) {{ a = MatMul(X, W) b = Add(a, X) Y = MatMul(b, U) }}",
        **_square("W", "U"),
    )
    parts = _order(model, "a", "Y").parts([{"X"}, {"X", "b"}], changing=True)
    assert [part.inputs for part in parts] == [("X",), ("X",)]
    assert [part.outputs for part in parts] == [(), ("b",)]
    assert not parts[0].needed
