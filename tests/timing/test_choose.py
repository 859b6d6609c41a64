"""Decisions of the guard: by which times, at which target, how sure, and from which run. Times are made up here."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing import cache, choose
from sparse_onnx.timing.cache import TimingCache
from sparse_onnx.timing.choose import Bench, decide, measure
from sparse_onnx.timing.forms import fastest
from sparse_onnx.timing.rounds import STARTS, Ratio, overall, repeat

MODEL = """<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 32] X) => (float[batch, 16] Y)
{{ m = MatMul(X, A) r = {activation}(m) n = MatMul(r, B) Y = MatMul(n, C) }}"""

SMALL, LARGE = {"X": (1, 32), "r": (1, 32), "n": (1, 32)}, {"X": (64, 32), "r": (64, 32), "n": (64, 32)}


def zeros(shape, sparsity, seed=0):
    """Exactly that share of zeros, at random places."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape).astype(np.float32)
    array.reshape(-1)[rng.permutation(array.size)[: round(sparsity * array.size)]] = 0
    return array


@pytest.fixture
def chain(from_text):
    """A has an activation behind it; B is as A but without; C is narrower."""

    def build(sparsity=0.75, activation="Relu", structure=None):
        model = from_text(
            MODEL.format(activation=activation),
            A=zeros((32, 32), sparsity),
            B=zeros((32, 32), sparsity, seed=1),
            C=zeros((32, 16), sparsity),
        )
        if structure is not None:
            for value in model.graph.initializers.values():
                value.metadata_props[STRUCTURE_KEY] = structure
        return model

    return build


def speedup(median, *, spread=0.0, dense=2.0, quiet=True):
    return Ratio(dense, dense / median, median, median - spread, median + spread, quiet=quiet)


@pytest.fixture
def timed(monkeypatch):
    """Replaces the measurement by ``timed.times(rows)``; ``timed.calls`` counts by the first input's shape."""

    class Timed:
        def __init__(self):
            self.calls = []

        def times(self, rows):
            return speedup(2.0)

        def forms(self, models, feeds, *, threads, work, rounds, seconds):
            (array,) = feeds.values()
            self.calls.append((array.shape, threads))
            assert list(models) == ["dense", "sparse"]
            assert [node.domain for node in models["sparse"].graph] == ["sparse_onnx"]
            assert all(node.domain == "" for node in models["dense"].graph)
            return {("dense", "sparse"): self.times(len(array))}

    timed = Timed()
    monkeypatch.setattr(choose, "time_forms", timed.forms)
    return timed


def decided(model, tmp_path, targets=(SMALL,), *, cache=None, lines=None, **options):
    weights = options.pop("weights", None)
    say = (lambda _line: None) if lines is None else lines.append
    workbench = Workbench(options.pop("threads", 1), tmp_path, progress=say)
    bench = Bench(workbench, cache or TimingCache(), **options)
    candidates, _ = find_candidates(model)
    packer = Packer(PassContext())
    decisions = decide(model, candidates, targets, packer, bench, weights=weights)
    return {decision.candidate.weight.name: decision for decision in decisions}


# One target


def test_the_faster_one_wins_and_the_reason_has_the_interval(chain, timed, tmp_path):
    timed.times = lambda rows: speedup(1.5, spread=0.1)
    decision = decided(chain(), tmp_path)["A"]
    assert decision.form == "sparse"
    assert decision.reason == "1.50x dense (1.50 to 1.50)"  # three measurements that all say 1.5
    assert decision.times == {"dense": 2.0, "sparse": pytest.approx(2.0 / 1.5)}
    assert (decision.target, decision.close, decision.cached, decision.quiet) == (0, False, False, True)


def test_the_slower_one_stays_dense(chain, timed, tmp_path):
    timed.times = lambda rows: speedup(0.9)
    decision = decided(chain(), tmp_path)["A"]
    assert decision.form == "dense"
    assert decision.reason == "0.90x dense (0.90 to 0.90), below min_speedup 1.02"


@pytest.mark.parametrize(("min_speedup", "sparse"), [(1.0, True), (1.2, True), (1.21, False), (5.0, False)])
def test_min_speedup_is_the_least_that_wins(chain, timed, tmp_path, min_speedup, sparse):
    timed.times = lambda rows: speedup(1.2)
    assert decided(chain(), tmp_path, min_speedup=min_speedup)["A"].lowered is sparse


def test_too_few_zeros_are_not_timed(chain, timed, tmp_path):
    decision = decided(chain(sparsity=0.25), tmp_path)["A"]
    assert decision.form == "dense"
    assert decision.reason == "25.0% zeros: too few for any sparse kernel"
    assert timed.calls == []


def test_equal_layers_are_timed_once(chain, timed, tmp_path):
    """B has the shape of A but no activation, and C another shape: three kinds, each measured three times."""
    decided(chain(), tmp_path)
    assert len(timed.calls) == 3 * 3
    timed.calls.clear()
    decided(chain(activation="Cos"), tmp_path)  # not fused: now A and B are alike
    assert len(timed.calls) == 2 * 3


def test_threads_reach_every_measurement(chain, timed, tmp_path):
    decided(chain(), tmp_path, threads=7)
    assert {threads for _, threads in timed.calls} == {7}


# How sure


def alternating(*medians, **options):
    values = itertools.cycle(medians)
    return lambda rows: speedup(next(values), **options)


@pytest.mark.parametrize(
    ("medians", "sparse", "reason"),
    [
        ((1.0, 1.03, 1.06), True, "1.03x dense (1.00 to 1.06), close to min_speedup 1.02"),
        ((0.9, 1.01, 1.06), False, "1.01x dense (0.90 to 1.06), below min_speedup 1.02 but close"),
    ],
)
def test_an_interval_around_min_speedup_is_close(chain, timed, tmp_path, medians, sparse, reason):
    timed.times = alternating(*medians)
    decision = decided(chain(), tmp_path)["A"]
    assert decision.close
    assert (decision.lowered, decision.reason) == (sparse, reason)


def simulated(true, rng, *, between=0.01, within=0.03, rounds=5):
    """As sessions behave: each has a shift of its own, each round a deviation; some rounds are disturbed."""

    def once():
        own = true * np.exp(between * rng.standard_normal())
        deviations = np.exp(within * rng.standard_normal(rounds))
        deviations[rng.random(rounds) < 0.05] *= 3
        return speedup(float(np.median(own * deviations)))

    return once


def repeated(true, rng):
    once = simulated(true, rng)
    return repeat(lambda: {0: once()}, close=lambda found: found[0].close_to(1.02), seconds=60)[0]


@pytest.mark.parametrize("true", [0.9, 0.97, 1.07, 1.3])
def test_decisions_are_the_same_in_every_run_away_from_min_speedup(true):
    rng = np.random.default_rng(0)
    wins = [repeated(true, rng).median >= 1.02 for _ in range(300)]
    assert sum(wins) in (0, 300)


def test_where_runs_may_differ_the_interval_says_so():
    """At min_speedup itself either decision is right, and nine in ten are marked as close."""
    rng = np.random.default_rng(0)
    found = [repeated(1.02, rng) for _ in range(300)]
    wins = [ratio.median >= 1.02 for ratio in found]
    assert 100 < sum(wins) < 200
    assert sum(ratio.close_to(1.02) for ratio in found) > 0.9 * 300


# The machine


def test_times_beside_other_programs_are_said_and_not_kept(chain, timed, tmp_path):
    lines, file = [], tmp_path / "timings.jsonl"
    timed.times = lambda rows: speedup(2.0, quiet=False)
    decision = decided(chain(), tmp_path, cache=TimingCache(file), lines=lines)["A"]
    assert decision.form == "sparse"
    assert decision.reason.endswith("timed beside other programs")
    assert not decision.quiet
    assert [
        line for line in lines if line.startswith("warning: other programs took processors while 3 layers")
    ]
    assert not file.exists()


def test_quiet_times_count_where_there_are_enough(chain, timed, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "_SECONDS", 60.0)
    noise = itertools.cycle([speedup(0.2, quiet=False), speedup(2.0)])
    timed.times = lambda rows: next(noise)
    lines = []
    decision = decided(chain(), tmp_path, lines=lines)["A"]
    assert decision.reason == "2.00x dense (2.00 to 2.00)"
    assert decision.quiet
    assert not any(line.startswith("warning") for line in lines)
    assert len(timed.calls) == 3 * 2 * STARTS


# Several targets


@pytest.mark.parametrize(
    ("small", "large", "sparse", "reason"),
    [
        (2.0, 0.8, False, "0.80x dense (0.80 to 0.80) at target 2 of 2, below min_speedup 1.02"),
        (0.8, 2.0, False, "0.80x dense (0.80 to 0.80) at target 1 of 2, below min_speedup 1.02"),
        (2.0, 1.5, True, "1.50x dense (1.50 to 1.50) at target 2 of 2"),
    ],
)
def test_the_worst_target_decides(chain, timed, tmp_path, small, large, sparse, reason):
    timed.times = lambda rows: speedup(small if rows == 1 else large)
    decision = decided(chain(), tmp_path, (SMALL, LARGE))["A"]
    assert (decision.lowered, decision.reason) == (sparse, reason)
    assert {shape[0] for shape, _ in timed.calls} == {1, 64}


def test_with_weights_the_mean_time_decides(chain, timed, tmp_path):
    """Dense takes 2 ms at both; sparse 1 ms at the small target and 4 ms at the large one."""
    timed.times = lambda rows: speedup(2.0 if rows == 1 else 0.5)
    often = decided(chain(), tmp_path, (SMALL, LARGE), weights=(3, 1))["A"]
    assert often.form == "sparse"  # 2 ms against (3 * 1 + 4) / 4
    assert often.reason == "1.14x dense (1.14 to 1.14) in the mean of 2 targets"
    assert (often.times, often.target) == ({"dense": 2.0, "sparse": 1.75}, None)
    seldom = decided(chain(), tmp_path, (SMALL, LARGE), weights=(1, 3))["A"]
    assert seldom.form == "dense"  # 2 ms against (1 + 3 * 4) / 4
    assert seldom.times == {"dense": 2.0, "sparse": 3.25}
    assert not decided(chain(), tmp_path, (SMALL, LARGE))["A"].lowered


def test_weights_are_proportions():
    targets = [speedup(2.0), speedup(0.5, dense=8.0)]
    assert overall(targets, (3, 1)) == overall(targets, (0.75, 0.25))
    found, worst = overall(targets, (3, 1))
    assert (found.first_ms, found.second_ms, worst) == (3.5, 4.75, None)
    assert found.median == pytest.approx(3.5 / 4.75)
    assert overall(targets, None) == (targets[1], 1)
    assert overall(targets[:1], None) == (targets[0], 0)


# From run to run


def test_another_run_takes_the_times_of_the_first_and_says_so(chain, timed, tmp_path):
    file = tmp_path / "timings.jsonl"
    timed.times = lambda rows: speedup(1.5 if rows == 1 else 1.2)
    first = decided(chain(), tmp_path, (SMALL, LARGE), cache=TimingCache(file))
    timed.calls.clear()
    timed.times = lambda rows: speedup(0.5)
    second = decided(chain(), tmp_path, (SMALL, LARGE), cache=TimingCache(file))
    assert timed.calls == []
    for name, decision in second.items():
        assert decision.cached
        assert decision.reason == f"{first[name].reason}, timed in an earlier run"
        assert decision.form == first[name].form
        assert decision.times == first[name].times


def test_a_target_more_is_timed_alone(chain, timed, tmp_path):
    file = tmp_path / "timings.jsonl"
    timed.times = lambda rows: speedup(2.0 if rows == 1 else 1.5)
    decided(chain(), tmp_path, (SMALL,), cache=TimingCache(file))
    timed.calls.clear()
    decision = decided(chain(), tmp_path, (SMALL, LARGE), cache=TimingCache(file))["A"]
    assert {shape[0] for shape, _ in timed.calls} == {64}
    assert (decision.target, decision.cached) == (1, False)


@pytest.mark.parametrize(
    ("model", "options", "again"),
    [
        ({}, {}, False),
        ({}, {"min_speedup": 1.5}, False),  # what is measured does not depend on what is asked for
        ({"sparsity": 0.752}, {}, False),
        ({"sparsity": 0.8}, {}, True),
        ({"structure": "2:4"}, {}, True),
        ({}, {"threads": 2}, True),
        ({}, {"targets": (LARGE,)}, True),
    ],
)
def test_what_a_time_depends_on_is_measured_again(chain, timed, tmp_path, model, options, again):
    file = tmp_path / "timings.jsonl"
    decided(chain(), tmp_path, cache=TimingCache(file))
    timed.calls.clear()
    decided(chain(**model), tmp_path, cache=TimingCache(file), **options)
    assert bool(timed.calls) is again


@pytest.mark.parametrize("what", ["onnxruntime", "isa", "features", "library_sha256", "cpu"])
def test_other_software_or_another_machine_is_measured_again(chain, timed, tmp_path, monkeypatch, what):
    file = tmp_path / "timings.jsonl"
    decided(chain(), tmp_path, cache=TimingCache(file))
    timed.calls.clear()
    real = cache.environment_key
    monkeypatch.setattr(choose, "environment_key", lambda threads: real(threads) | {what: "another"})
    decided(chain(), tmp_path, cache=TimingCache(file))
    assert len(timed.calls) == 3 * 3


# The measurement itself


def test_a_real_layer_is_measured_and_nothing_left(chain, tmp_path):
    model = chain()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    (candidate, *_), _ = find_candidates(model)
    cache = TimingCache()
    packer = Packer(PassContext())
    bench = Bench(Workbench(1, tmp_path), cache)
    (layer,) = candidate.layers

    def at(rows):
        (pair,) = measure(model, candidate, layer, [(rows, 32)], candidate.forms, packer, bench).items()
        assert pair[0] == ("dense", "sparse")
        return pair[1]

    found = at(4)
    assert found.first_ms > 0
    assert 0 < found.low <= found.median <= found.high
    assert at(4) == found
    assert at(5) != found
    assert list(tmp_path.iterdir()) == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# Forms that round activations coarser than others


@pytest.mark.parametrize(
    ("gain", "coarse", "best"),
    [
        (1.05, {"b"}, "a"),
        (1.05, set(), "b"),
        (1.05, {"a", "b"}, "b"),
        (1.2, {"b"}, "b"),
        (0.9, {"b"}, "a"),
    ],
)
def test_a_coarse_form_must_be_a_tenth_faster_than_others(gain, coarse, best):
    times = {("dense", "a"): speedup(2.0), ("dense", "b"): speedup(2.0 * gain), ("a", "b"): speedup(gain)}
    assert fastest([times], None, 1.02, coarse).form == best


@pytest.mark.parametrize(("gain", "form"), [(1.05, "int8-token"), (1.5, "int8-dynamic")])
def test_one_scale_for_all_tokens_ships_only_where_it_is_much_faster(
    chain, monkeypatch, tmp_path, gain, form
):
    model = chain(sparsity=0.0)
    QuantizeWeights(method="rtn", bits=8, group_size=0)(model)
    times = {"dense": 1.0, "int8-nbits": 1.1, "int8-token": 2.0, "int8-dynamic": 2.0 * gain}

    def made_up(models, _feeds, **_options):
        return {
            (one, other): speedup(times[other] / times[one])
            for one, other in itertools.combinations(models, 2)
        }

    monkeypatch.setattr(choose, "time_forms", made_up)
    bench = Bench(Workbench(1, tmp_path, progress=lambda _line: None), TimingCache())
    decisions = decide(
        model, find_candidates(model)[0], [SMALL], Packer(PassContext()), bench, allowed={*times}
    )
    assert {decision.form for decision in decisions} == {form}
    rounds_coarser = "0.95x int8-dynamic (0.95 to 0.95), which rounds coarser"
    assert all((rounds_coarser in decision.reason) == (form == "int8-token") for decision in decisions)
