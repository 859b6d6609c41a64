"""Lowering to SparseLSTM and SparseGRU: right answers on plain ONNX Runtime, and what must not fire."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.sparse_recurrent import LowerSparseRecurrent
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.timing.choose import decide_by_table

S, B, K, H = 5, 3, 12, 16
GATES = {"LSTM": 4, "GRU": 3}
OUTPUTS = {"LSTM": ("Y", "Y_h", "Y_c"), "GRU": ("Y", "Y_h")}
every_cell = pytest.mark.parametrize("cell", GATES)

PLACES = {
    "recurrent": {
        "body": "Y, Yh, Yc = LSTM<hidden_size = 4>(T, w, r)",
        "tensors": {"w": (1, 16, 8), "r": (1, 16, 4)},
        "inputs": "float[5, B, 8] T",
        "outputs": "float[5, 1, B, 4] Y",
        "prunable": ("w", "r"),
    }
}
"""Models for the suite that all passes have in common."""


def normal(*shape, seed=0, sparsity=0.0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 0.4
    return np.where(rng.random(shape) < sparsity, 0, values).astype(np.float32)


def tensors(cell, directions=1, sparsity=0.8):
    N = GATES[cell] * H
    return {
        "W": normal(directions, N, K, seed=1, sparsity=sparsity),
        "R": normal(directions, N, H, seed=2, sparsity=sparsity),
        "B": normal(directions, 2 * N, seed=3),
    }


def build(from_text, cell, body, *, directions=1, inputs="", outputs=None, **stored):
    y = ", ".join(
        f"float[{'S, ' if name == 'Y' else ''}D, B, {H}] {name}" for name in outputs or OUTPUTS[cell]
    )
    return from_text(
        f'<ir_version: 9, opset_import: ["" : 17]> g (float[S, B, {K}] X{inputs}) => ({y}) {{ {body} }}',
        **{**tensors(cell, directions), **stored},
    )


def op_types(model):
    return [node.op_type for node in model.graph]


STATE = {"LSTM": "h0, c0", "GRU": "h0"}
STATE_INPUTS = {
    "LSTM": f", float[D, B, {H}] h0, float[D, B, {H}] c0",
    "GRU": f", float[D, B, {H}] h0",
}


def feeds(model, directions):
    given = {
        "X": normal(S, B, K, seed=4),
        "lens": np.array([S, 2, 1], np.int32),
        "h0": normal(directions, B, H, seed=5),
        "c0": normal(directions, B, H, seed=6),
    }
    return {value.name: given[value.name] for value in model.graph.inputs}


FIRES = {
    "plain": ("X, W, R", "", ""),
    "bias": ("X, W, R, B", "", ""),
    "lengths": ("X, W, R, B, lens", ", int32[B] lens", "Lengths"),
    "state": ("X, W, R, B, , {state}", "{state_inputs}", "State"),
    "lengths and state": ("X, W, R, , lens, {state}", ", int32[B] lens{state_inputs}", "LengthsState"),
}


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("case", FIRES)
@every_cell
def test_answers_stay(cell, case, direction, from_text, run):
    arguments, inputs, name = FIRES[case]
    directions = 2 if direction == "bidirectional" else 1
    arguments = arguments.format(state=STATE[cell])
    inputs = inputs.format(state_inputs=STATE_INPUTS[cell])
    body = f'{", ".join(OUTPUTS[cell])} = {cell}<hidden_size = {H}, direction = "{direction}">({arguments})'
    model = build(from_text, cell, body, directions=directions, inputs=inputs)
    given = feeds(model, directions)
    before = run(model, given)
    result = LowerSparseRecurrent()(model)
    assert result.modified
    assert not result.declined
    assert op_types(model) == [f"Sparse{cell}{name}"]
    assert not {"W", "R"} & set(model.graph.initializers)
    after = run(model, given)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-6)
    assert not LowerSparseRecurrent()(model).modified


@pytest.mark.parametrize(
    ("outputs", "made"),
    [
        (["Y"], "Y"),
        (["Y_h"], ", Y_h"),
        (["Y_c"], ", , Y_c"),
        (["Y", "Y_c"], "Y, , Y_c"),
        (["Y_h"], "unused, Y_h"),
    ],
)
def test_any_outputs(outputs, made, from_text, run):
    model = build(from_text, "LSTM", f"{made} = LSTM<hidden_size = {H}>(X, W, R, B)", outputs=outputs)
    given = feeds(model, 1)
    before = run(model, given)
    assert LowerSparseRecurrent()(model).modified
    after = run(model, given)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reset", [0, 1])
def test_linear_before_reset(reset, from_text, run):
    body = f"Y, Y_h = GRU<hidden_size = {H}, linear_before_reset = {reset}>(X, W, R, B)"
    model = build(from_text, "GRU", body)
    before = run(model, feeds(model, 1))
    assert LowerSparseRecurrent()(model).modified
    assert model.graph[0].attributes.get_int("linear_before_reset") == reset
    after = run(model, feeds(model, 1))
    np.testing.assert_allclose(after["Y"], before["Y"], rtol=1e-5, atol=1e-6)


def test_constant_state_and_lengths(from_text, run):
    state = {
        "h0": normal(1, B, H, seed=7),
        "c0": normal(1, B, H, seed=8),
        "lens": np.array([1, S, 3], np.int32),
    }
    body = f"Y, Y_h, Y_c = LSTM<hidden_size = {H}>(X, W, R, B, lens, h0, c0)"
    model = build(from_text, "LSTM", body, **state)
    (candidate,), _ = LowerSparseRecurrent.find_candidates(model)
    assert [value.name for value in candidate.layers[0].inputs] == ["X"]
    before = run(model, feeds(model, 1))
    assert LowerSparseRecurrent()(model).modified
    after = run(model, feeds(model, 1))
    for key, value in before.items():
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-6)


def test_constants_in_nodes(from_text, run):
    """A bias or a state in a Constant node is as good as one in an initializer."""
    body = f"Y, Y_h, Y_c = LSTM<hidden_size = {H}>(X, W, R, B, lens, h0, c0)"
    tensors = {
        "h0": normal(1, B, H, seed=7),
        "c0": normal(1, B, H, seed=8),
        "lens": np.array([1, S, 3], np.int32),
    }
    model = build(from_text, "LSTM", body, **tensors)
    for name in ("B", *tensors):
        value = model.graph.initializers.pop(name)
        node = ir.node("Constant", [], {"value": value.const_value})
        model.graph.insert_before(model.graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
        value.name, node.outputs[0].name = None, name
    (candidate,), _ = LowerSparseRecurrent.find_candidates(model)
    assert [value.name for value in candidate.layers[0].inputs] == ["X"]
    before = run(model, feeds(model, 1))
    assert LowerSparseRecurrent()(model).modified
    after = run(model, feeds(model, 1))
    for key, value in before.items():
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-6)


def test_two_in_a_row(from_text, run):
    second = {f"{name}2": array for name, array in tensors("LSTM").items()} | {
        "W2": normal(1, 4 * H, H, sparsity=0.8)
    }
    body = f"""A = LSTM<hidden_size = {H}>(X, W, R, B)
        P = Squeeze(A, one)
        Y, Y_h, Y_c = LSTM<hidden_size = {H}>(P, W2, R2, B2)"""
    model = build(from_text, "LSTM", body, one=np.array([1]), **second)
    before = run(model, feeds(model, 1))
    assert LowerSparseRecurrent()(model).statistics["weights"] == 2
    assert op_types(model) == ["SparseLSTM", "Squeeze", "SparseLSTM"]
    after = run(model, feeds(model, 1))
    np.testing.assert_allclose(after["Y"], before["Y"], rtol=1e-5, atol=1e-6)


def test_a_name_that_is_taken(from_text, run):
    body = f"A, Y_h, Y_c = LSTM<hidden_size = {H}>(X, W, R, B) Y = Add(A, wrong)"
    model = build(from_text, "LSTM", body.replace("wrong", '"W.bias"'), **{"W.bias": normal(H, seed=9)})
    before = run(model, feeds(model, 1))
    assert LowerSparseRecurrent()(model).modified
    np.testing.assert_allclose(run(model, feeds(model, 1))["Y"], before["Y"], rtol=1e-5, atol=1e-6)


LSTM = "Y, Y_h, Y_c = LSTM"
STAYS = {
    "peepholes": (f"{LSTM}<hidden_size = {H}>(X, W, R, B, , , , P)", {"P": normal(1, 3 * H)}, "peepholes"),
    "clip": (f"{LSTM}<hidden_size = {H}, clip = 3.0>(X, W, R, B)", {}, "clip"),
    "coupled": (
        f"{LSTM}<hidden_size = {H}, input_forget = 1>(X, W, R, B)",
        {},
        "coupled input and forget gates",
    ),
    "activations": (
        f'{LSTM}<hidden_size = {H}, activations = ["Sigmoid", "Tanh", "Relu"]>(X, W, R, B)',
        {},
        "activations other than Sigmoid, Tanh, Tanh",
    ),
    "one state": (
        f"{LSTM}<hidden_size = {H}>(X, W, R, B, , h0)",
        {"h0": normal(1, B, H)},
        "only one of its initial states",
    ),
    "computed B": (f"b = Neg(B) {LSTM}<hidden_size = {H}>(X, W, R, b)", {}, "whose B is no constant"),
    "computed R": (f"r = Neg(R) {LSTM}<hidden_size = {H}>(X, W, r, B)", {}, "the other weight of its node"),
    "computed W": (f"w = Neg(W) {LSTM}<hidden_size = {H}>(X, w, R, B)", {}, "the other weight of its node"),
    "shared": (
        f"Z = LSTM<hidden_size = {H}>(X, W, R) z = Neg(Z) {LSTM}<hidden_size = {H}>(X, W, R, B)",
        {},
        "shared by an LSTM or GRU and others",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_must_not_fire(case, from_text):
    body, stored, reason = STAYS[case]
    model = build(from_text, "LSTM", body, **stored)
    before = op_types(model)
    result = LowerSparseRecurrent(min_sparsity=0)(model)
    assert not result.modified
    assert op_types(model) == before
    assert reason in " ".join(declined.reason for declined in result.declined)


def test_default_activations_may_be_named(from_text):
    given = '"Sigmoid", "Tanh", "Tanh"'
    body = f'{LSTM}<hidden_size = {H}, direction = "bidirectional", activations = [{given}, {given}]>(X, W, R, B)'
    assert LowerSparseRecurrent()(build(from_text, "LSTM", body, directions=2)).modified


def test_batch_first_stays(from_text):
    model = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (float[B, S, {K}] X) => (float[B, S, D, {H}] Y)
        {{ Y = LSTM<hidden_size = {H}, layout = 1>(X, W, R, B) }}""",
        **tensors("LSTM"),
    )
    result = LowerSparseRecurrent()(model)
    assert not result.modified
    assert {declined.reason for declined in result.declined} == {"is an LSTM with layout 1"}


def test_few_zeros_stay(from_text):
    """All weights of a node count together."""
    stored = {"W": normal(1, 4 * H, K, sparsity=0.5), "R": normal(1, 4 * H, H, sparsity=0.5)}
    model = build(from_text, "LSTM", f"{LSTM}<hidden_size = {H}>(X, W, R, B)", **stored)
    (declined,) = LowerSparseRecurrent()(model).declined
    assert declined.place == "W"
    assert "zeros, fewer than 60.0%" in declined.reason


@every_cell
def test_both_weights_are_pruned(cell, from_text, run):
    body = f'{", ".join(OUTPUTS[cell])} = {cell}<hidden_size = {H}, direction = "bidirectional">(X, W, R, B)'
    model = build(from_text, cell, body, directions=2, **tensors(cell, 2, sparsity=0))
    N = 2 * GATES[cell] * H
    assert {weight.name: weight.shape for weight in find_weights(model)[0]} == {"W": (K, N), "R": (H, N)}
    for weight in find_weights(model)[0]:
        stored = weight.tensor.numpy()
        np.testing.assert_array_equal(weight.stored(weight.matrix()), stored)
        np.testing.assert_array_equal(weight.matrix()[:, GATES[cell] * H], stored[1, 0])
    result = Magnitude(sparsity=0.75)(model)
    assert {layer.name: layer.zeros_after / layer.size for layer in result.layers} == {"W": 0.75, "R": 0.75}
    (candidate,), declined = find_candidates(model)
    assert not declined
    assert candidate.sparsity == 0.75
    assert candidate.shape == (K + H, N)
    (decision,) = decide_by_table([candidate])
    assert decision.form == "sparse"
    before = run(model, feeds(model, 2))
    assert LowerSparseRecurrent()(model).modified
    after = run(model, feeds(model, 2))
    np.testing.assert_allclose(after["Y"], before["Y"], rtol=1e-5, atol=1e-6)


def test_weights_that_a_caller_may_replace_stay(from_text):
    model = build(from_text, "LSTM", f"{LSTM}<hidden_size = {H}>(X, W, R, B)")
    model.graph.inputs.append(model.graph.initializers["R"])
    result = LowerSparseRecurrent()(model)
    assert not result.modified
    reasons = {declined.place: declined.reason for declined in result.declined}
    assert reasons["R"] == "is also a graph input, so a caller may replace it"
    assert reasons["W"] == "the other weight of its node is no constant of its own"
