"""Operators apart or as one: what is timed, how often, and what is decided by it. Most times are made up here."""

import dataclasses
import itertools

import numpy as np
import pytest

from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.int8_matmul import LowerSparseInt8MatMul
from sparse_onnx.passes.lower.layers import lower_layers
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing import joined
from sparse_onnx.timing.choose import Bench
from sparse_onnx.timing.joined import JoinGuard
from sparse_onnx.timing.rounds import STARTS, Ratio

K, HIDDEN = 32, 64
ATTENTION = "Q = MatMul(X, A) R = MatMul(X, B)"
MLP = "u = MatMul(X, U) a = Relu(u) Y = MatMul(a, D)"
SMALL, LARGE = {"X": (1, 32)}, {"X": (64, 32)}


@pytest.fixture
def model(from_text):
    """``model(body, outputs)``: linears of a graph over X [rows, 32], in 8 bits and lowered."""

    def model(body, outputs, lowering=LowerSparseInt8MatMul):
        rng = np.random.default_rng(1)
        shapes = {"A": (K, 32), "B": (K, 32), "U": (K, HIDDEN), "D": (HIDDEN, K)}
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        arrays |= {"V": -arrays["U"], "E": -arrays["D"]}  # with zeros at the same places
        results = ", ".join(f"float[rows, {n}] {y}" for y, n in outputs.items())
        found = from_text(
            f"""<ir_version: 9, opset_import: ["" : 20]>
            g (float[rows, {K}] X) => ({results}) {{ {body} }}""",
            **{name: array for name, array in arrays.items() if f"{name})" in body},
        )
        Magnitude(sparsity=0.75, mask_structure="block:1x4")(found)
        if lowering is LowerSparseInt8MatMul:
            QuantizeWeights(method="rtn", bits=8, group_size=0)(found)
        if lowering is not None:
            assert lowering()(found).modified
        return found

    return model


@pytest.fixture
def guard(tmp_path):
    def guard(*targets, weights=None):
        return JoinGuard(Bench(Workbench(1, tmp_path)), targets or (SMALL,), weights)

    return guard


@pytest.fixture
def timed(monkeypatch):
    """Times by the shape of X: how many times faster one operator is. What was timed is noted."""
    found = {SMALL["X"]: 1.2, LARGE["X"]: 1.2}
    notes, spread = [], itertools.cycle([-0.05, 0.0, 0.05])

    def time_pair(models, libraries, feeds, **_options):
        assert [*libraries] == [True, True]
        ((_, x),) = feeds.items()
        notes.append((x.shape, *([node.op_type for node in part.graph] for part in models)))
        median = found[x.shape] + next(spread)
        return Ratio(median, 1.0, median, median, median)

    monkeypatch.setattr(joined, "time_pair", time_pair)
    return found, notes


def ops(model):
    return [node.op_type for node in model.graph]


def test_operators_are_timed_apart_and_as_one(model, guard, timed):
    _, notes = timed
    attention, mlp = model(ATTENTION, {"Q": 32, "R": 32}), model(MLP, {"Y": K})
    assert MergeLinears(guard())(attention).modified
    assert FuseFeedForward(guard())(mlp).modified
    assert {(shape, *apart, *one) for shape, apart, one in notes} == {
        ((1, 32), "SparseInt8MatMul", "SparseInt8MatMul", "SparseInt8MatMulSplit2"),
        ((1, 32), "SparseInt8MatMulRelu", "SparseInt8MatMul", "SparseInt8FeedForwardRelu"),
    }
    assert (ops(attention), ops(mlp)) == (["SparseInt8MatMulSplit2"], ["SparseInt8FeedForwardRelu"])


@pytest.mark.parametrize(
    ("median", "apart"), [(0.7, True), (0.94, True), (0.96, False), (1.0, False), (1.5, False)]
)
def test_they_stay_apart_where_one_is_surely_slower(median, apart, model, guard, timed):
    timed[0][SMALL["X"]] = median
    for step, body, outputs in (
        (MergeLinears, ATTENTION, {"Q": 32, "R": 32}),
        (FuseFeedForward, MLP, {"Y": K}),
    ):
        found = model(body, outputs)
        before = ops(found)
        result = step(guard())(found)
        assert result.modified != apart
        assert (ops(found) == before) == apart
        assert ["is slower as one operator" in one.reason for one in result.declined] == [True] * apart


def test_the_worst_target_decides_or_their_mean(model, guard, timed):
    timed[0].update({SMALL["X"]: 0.5, LARGE["X"]: 2.0})
    found = model(MLP, {"Y": K})
    result = FuseFeedForward(guard(SMALL, LARGE))(found)
    assert [one.reason for one in result.declined] == ["is slower as one operator: 0.50x (0.45 to 0.55)"]
    assert FuseFeedForward(guard(SMALL, LARGE, weights=[1, 9]))(found).modified


def test_equal_operators_are_timed_once(model, guard, timed):
    body = f"{MLP} v = MatMul(Y, V) b = Relu(v) Z = MatMul(b, E)"
    asked = guard({"X": (1, 32), "Y": (1, 32)})
    for _ in range(2):
        found = model(body, {"Z": K})
        FuseFeedForward(asked)(found)
        assert ops(found) == ["SparseInt8FeedForwardRelu"] * 2
    assert len(timed[1]) == STARTS
    other = dataclasses.replace(asked, targets=(LARGE | {"Y": (64, 32)},))
    FuseFeedForward(other)(model(body, {"Z": K}))
    assert [shape for shape, *_ in timed[1]] == [(1, 32)] * STARTS + [(64, 32)] * STARTS


def test_an_input_of_no_known_shape_holds_nothing_back(model, guard, timed):
    timed[0][SMALL["X"]] = 0.5
    assert FuseFeedForward(guard({"other": (1, 32)}))(model(MLP, {"Y": K})).modified
    assert FuseFeedForward(JoinGuard(guard().bench, ()))(model(MLP, {"Y": K})).modified
    assert timed[1] == []


def test_floats_are_joined_as_ever(model, guard, timed):
    timed[0][SMALL["X"]] = 0.5
    found = model(MLP, {"Y": K}, LowerSparseMatMul)
    assert FuseFeedForward(guard())(found).modified
    assert timed[1] == []


def test_layers_are_lowered_and_asked_about(model, guard, timed):
    timed[0][SMALL["X"]] = 0.5
    found = model(f"{MLP} {ATTENTION}", {"Y": K, "Q": 32, "R": 32}, None)
    QuantizeWeights(method="rtn", bits=8, group_size=0)(found)
    context = PassContext()
    chosen = [
        (candidate, form)
        for candidate in find_candidates(found)[0]
        for form in candidate.forms
        if form.name == "int8-quads"
    ]
    apart, declined = lower_layers(found, chosen, Packer(context), context, guard())
    assert len(ops(apart)) == 4
    assert sum("slower as one operator" in one.reason for one in declined) == 2
    as_one, declined = lower_layers(found, chosen, Packer(context), context)
    assert sorted(ops(as_one)) == ["SparseInt8FeedForwardRelu", "SparseInt8MatMulSplit2"]
    assert declined == ()


def test_sessions_are_timed(model, guard):
    """With true times one of the two comes out: nothing but the reason is wanted."""
    found = model(MLP, {"Y": K})
    result = FuseFeedForward(guard(LARGE))(found)
    assert result.modified or "is slower as one operator" in result.declined[0].reason
