"""What the weights of LSTM and GRU multiply, against float64 NumPy: inputs at every step, and the states before it."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import CalibrationData, PassContext
from sparse_onnx.passes.calibration.rows import Recurrence
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot_methods import SparseGPT, Wanda
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC
from sparse_onnx.sparse_ops.ops import sparse_recurrent

S, B, K, H, OUT = 7, 8, 10, 12, 6
GATES = {"LSTM": 4, "GRU": 3}


def normal(*shape, seed, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def tensors(cell, directions):
    N = GATES[cell] * H
    return {
        "W": normal(directions, N, K, seed=1, scale=0.5),
        "R": normal(directions, N, H, seed=2, scale=0.3),
        "P": normal(directions * H, OUT, seed=3, scale=0.3),
        "flat": np.array([0, 0, -1]),
    }


def build(from_text, cell, direction, *, node="Y = {cell}(X, W, R)", inputs="", **stored):
    """Batch first outside, as data is; the states of all steps go through a linear."""
    directions = sparse_recurrent.DIRECTIONS[direction]
    call = f'{cell}<hidden_size = {H}, direction = "{direction}">'
    head = '<ir_version: 9, opset_import: ["" : 17]>'
    return from_text(
        f"""{head} g (float[B, S, {K}] x{inputs}) => (float[B, S, {OUT}] out) {{
        X = Transpose<perm = [1, 0, 2]>(x)
        {node.format(cell=call)}
        t = Transpose<perm = [2, 0, 1, 3]>(Y) f = Reshape(t, flat) out = MatMul(f, P) }}""",
        **{**tensors(cell, directions), **stored},
    )


def states(cell, direction, x, lengths=None, initial=None):
    """All states [S, D, B, H] of a model of :func:`build`, in float64."""
    directions = sparse_recurrent.DIRECTIONS[direction]
    stored = tensors(cell, directions)
    W, R = (CHUNKED_CSC.pack(stored[name].reshape(-1, stored[name].shape[-1]).T.copy()) for name in "WR")
    zeros = np.zeros(W.N, np.float32)
    h0 = np.zeros((directions, x.shape[1], H), np.float32) if initial is None else initial
    return sparse_recurrent.reference(
        f"Sparse{cell}LengthsState",
        x,
        W,
        zeros,
        R,
        zeros,
        direction=direction,
        sequence_lens=np.full(x.shape[1], len(x)) if lengths is None else lengths,
        initial_h=h0,
        initial_c=np.zeros_like(h0) if cell == "LSTM" else None,
    )[0]


def rows_before(y, lengths, initial, backwards):
    """One by one: the state [H] before each step of each sequence, y [S, B, H]."""
    rows = []
    for b, length in enumerate(lengths):
        times = range(length)[::-1] if backwards else range(length)
        before = initial[b]
        for time in times:
            rows.append(before)
            before = y[time, b]
    return np.asarray(rows, np.float64)


@pytest.mark.parametrize("direction", sparse_recurrent.DIRECTIONS)
@pytest.mark.parametrize("cell", GATES)
def test_grams_of_inputs_and_states(cell, direction, from_text, calibrator, assert_moments):
    x = normal(B, S, K, seed=4)
    found = calibrator(build(from_text, cell, direction), {"x": x}, batch=3).oneshot()
    (of_input,) = found["W"]
    assert_moments(of_input, x.reshape(-1, K).astype(np.float64))
    y = states(cell, direction, x.transpose(1, 0, 2))
    of_states = found["R"]
    assert len(of_states) == y.shape[1]
    for d, moments in enumerate(of_states):
        backwards = direction == "reverse" or d == 1
        rows = rows_before(y[:, d], [S] * B, np.zeros((B, H)), backwards)
        assert_moments(moments, rows, 1e-4)


@pytest.mark.parametrize("direction", sparse_recurrent.DIRECTIONS)
def test_padding_is_left_out_and_the_initial_state_counts(direction, from_text, calibrator, assert_moments):
    directions = sparse_recurrent.DIRECTIONS[direction]
    x, lengths = normal(B, S, K, seed=4), np.array([7, 1, 0, 3, 7, 2, 5, 6], np.int32)
    first = normal(1, H, seed=5)  # every sequence begins with it
    node = """batch = Shape<start = 1, end = 2>(X) size = Concat<axis = 0>(directions, batch, hidden)
        h0 = Expand(first, size) Y = {cell}(X, W, R, , lens, h0)"""
    model = build(
        from_text, "GRU", direction, node=node, inputs=", int32[B] lens",
        first=first, directions=np.array([directions]), hidden=np.array([H]),
    )  # fmt: skip
    found = calibrator(model, {"x": x, "lens": lengths}, batch=4).oneshot()
    (of_input,) = found["W"]
    assert_moments(
        of_input, np.concatenate([one[:n] for one, n in zip(x, lengths, strict=True)]).astype(float)
    )
    initial = np.broadcast_to(first, (directions, B, H))
    y = states("GRU", direction, x.transpose(1, 0, 2), lengths, initial)
    for d, moments in enumerate(found["R"]):
        rows = rows_before(y[:, d], lengths, initial[d], direction == "reverse" or d == 1)
        assert_moments(moments, rows, 1e-4)


def test_constant_lengths_and_state(from_text, calibrator, assert_moments):
    x, lengths = normal(B, S, K, seed=4), np.array([7, 1, 0, 3], np.int32)
    initial = normal(1, 4, H, seed=5)
    node = "Y = {cell}(X, W, R, , lens, h0)"
    model = build(from_text, "GRU", "forward", node=node, lens=lengths, h0=initial)
    (found,) = calibrator(model, {"x": x}, batch=4).oneshot()["R"]
    halves = [states("GRU", "forward", part.transpose(1, 0, 2), lengths, initial) for part in np.split(x, 2)]
    assert_moments(
        found, np.concatenate([rows_before(y[:, 0], lengths, initial[0], False) for y in halves]), 1e-4
    )


def test_states_that_are_no_output_yet(from_text, calibrator, assert_moments):
    model = build(from_text, "GRU", "forward", node=", Z = {cell}(X, W, R) one = Constant<value = int64[1] {{0}}>() "
                  "Y = Unsqueeze(Z, one)")  # fmt: skip
    x = normal(B, S, K, seed=4)
    (found,) = calibrator(model, {"x": x}, batch=4).oneshot()["R"]
    y = states("GRU", "forward", x.transpose(1, 0, 2))
    assert_moments(found, rows_before(y[:, 0], [S] * B, np.zeros((B, H)), False), 1e-4)


def test_a_mask_of_padding_counts_for_every_step():
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    (rows,) = Recurrence(False, False).rows(x, {}, mask)
    np.testing.assert_array_equal(rows, [x[0, 0], x[0, 1], x[1, 0]])
    (rows,) = Recurrence(False, False).rows(x, {}, mask[:, :2])  # of something else
    assert len(rows) == 6


@pytest.mark.parametrize("steps", [0, 1])
def test_short_sequences(steps):
    y = np.ones((steps, 2, 3, 4), np.float32)
    for rows in Recurrence(True, False).rows(y, {}):
        np.testing.assert_array_equal(rows, np.zeros((3 * steps, 4)))


def skewed(seed, count=6):
    """Inputs of very different scales."""
    scales = np.logspace(0.5, -1.5, K)
    return [{"x": (normal(B, S, K, seed=seed + i) * scales).astype(np.float32)} for i in range(count)]


def error(run, from_text, model, cell, direction):
    (feeds,) = skewed(50, 1)
    want = run(build(from_text, cell, direction), feeds)["out"]
    return np.linalg.norm(run(model, feeds)["out"] - want) / np.linalg.norm(want)


@pytest.mark.parametrize("calibration", ["oneshot", "sequential", "asymmetric"])
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
@pytest.mark.parametrize("cell", GATES)
def test_better_than_magnitude(cell, method, calibration, from_text, run, tmp_path):
    direction = "bidirectional"
    context = PassContext(calibration=CalibrationData(Samples.of(skewed(10), "test"), tmp_path))
    model = build(from_text, cell, direction)
    result = method(sparsity=0.6, calibration=calibration)(model, context)
    assert {layer.name for layer in result.layers} == {"W", "R", "P"}
    assert not result.declined
    if method is SparseGPT:  # Wanda keeps of the Gram what it needs
        assert all(layer.error is not None for layer in result.layers)
    for weight in find_weights(model)[0]:
        assert np.mean(weight.matrix() == 0) == pytest.approx(0.6, abs=0.02)
    plain = build(from_text, cell, direction)
    Magnitude(sparsity=0.6)(plain)
    assert error(run, from_text, model, cell, direction) < 0.8 * error(run, from_text, plain, cell, direction)


def test_model_stays_what_it_was_where_nothing_is_pruned(from_text, calibrator):
    model = build(from_text, "LSTM", "forward")
    before = ir.to_proto(model).SerializeToString()
    calibrator(model, {"x": normal(B, S, K, seed=4)}).oneshot()
    assert ir.to_proto(model).SerializeToString() == before
