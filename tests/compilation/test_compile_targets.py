"""Compiling for several target shapes, and again with the timings of an earlier run. Times are made up here."""

import itertools

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.timing import choose, models
from sparse_onnx.timing.rounds import STARTS, Ratio

WIDTH = 64
ONE, MANY = {"X": (1, WIDTH)}, {"X": (32, WIDTH)}


@pytest.fixture
def source(tmp_path):
    """Two linears with 90 % zeros."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {WIDTH}] X) => (float[batch, {WIDTH}] Y) {{ h = MatMul(X, A) r = Relu(h) Y = MatMul(r, B) }}"""
    )
    rng = np.random.default_rng(0)
    for name in "AB":
        weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
        weight[rng.random(weight.shape) < 0.9] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def speedup(median, *, spread=0.0, dense=2.0):
    return Ratio(dense, dense / median, median, median - spread, median + spread)


@pytest.fixture
def times(monkeypatch):
    """``times.layer`` and ``times.whole`` are what is measured, the latter in turn for the targets of every attempt."""

    class Times:
        layer = speedup(2.0)
        whole = itertools.cycle([speedup(1.5)])

    times = Times()
    monkeypatch.setattr(
        choose, "time_forms", lambda *_arguments, **_options: {("dense", "sparse"): times.layer}
    )
    monkeypatch.setattr(models, "ratio", lambda *_arguments, **_options: next(times.whole))
    return times


def run(source, name, **options):
    return sparse_onnx.optimize(source, source.parent / name, threads=1, overwrite=True, **options)


def decisions(result):
    return [row["decision"] for row in result.report["layers"]]


def test_every_target_is_timed_and_the_summary_is_the_worst(source, times):
    times.whole = iter([speedup(3.0), speedup(1.5, spread=0.1)])
    result = run(source, "out", input_shapes=[ONE, MANY])
    assert [(t["input_shapes"], t["speedup"], t["weight"]) for t in result.report["targets"]] == [
        ({"X": [1, WIDTH]}, 3.0, None),
        ({"X": [32, WIDTH]}, 1.5, None),
    ]
    summary = result.report["summary"]
    assert (summary["speedup"], summary["speedup_low"], summary["speedup_high"]) == (1.5, 1.4, 1.6)
    assert result.speedup == 1.5
    assert result.report["input_shapes"] == {"X": [1, WIDTH]}
    assert result.report["verification"]["batches"] == 2, "verified at both"


def test_with_weights_the_summary_is_the_mean(source, times):
    times.whole = iter([speedup(2.0), speedup(0.5)])
    result = run(source, "out", input_shapes=[ONE, MANY], shape_weights=[3, 1])
    assert [target["weight"] for target in result.report["targets"]] == [3, 1]
    assert result.report["summary"]["dense_ms"] == 2.0
    assert result.report["summary"]["optimized_ms"] == 1.75
    assert result.speedup == pytest.approx(2.0 / 1.75)
    assert decisions(result) == ["sparse", "sparse"], "slower at one of them, but not in the mean"


def test_layers_are_given_up_while_one_target_is_slower(source, times):
    times.whole = iter([*[speedup(3.0), speedup(0.9)] * STARTS, speedup(2.0), speedup(1.1)])
    result = run(source, "out", input_shapes=[ONE, MANY])
    assert sorted(decisions(result)) == ["dense", "sparse"]
    assert [target["speedup"] for target in result.report["targets"]] == [2.0, 1.1]


def test_one_target_as_a_mapping_or_a_list(source, times):
    first, second = run(source, "a", input_shapes=MANY), run(source, "b", input_shapes=[MANY])
    assert first.report["targets"] == second.report["targets"]
    assert first.report["input_shapes"] == {"X": [32, WIDTH]}


def test_a_goal_for_speed_is_held_by_the_worst_target(source, times):
    times.whole = iter([speedup(3.0), speedup(1.5)])
    assert run(source, "out", input_shapes=[ONE, MANY], target_speedup=2).exit_code == 4


# With timings of an earlier run


def files(result):
    return {
        name: (result.folder / name).read_bytes() for name in ("model.onnx", "model.onnx.data", "recipe.yaml")
    }


def test_the_same_decisions_and_bytes_whatever_the_machine_does(source, times, tmp_path):
    first = run(source, "a", input_shapes=MANY, timing_cache=tmp_path / "times")
    times.layer = speedup(0.5)
    second = run(source, "b", input_shapes=MANY, timing_cache=tmp_path / "times")
    assert decisions(second) == ["sparse", "sparse"]
    assert all(row["cached"] for row in second.report["layers"])
    assert not any(row["cached"] for row in first.report["layers"])
    assert files(first) == files(second)
    without = run(source, "c", input_shapes=MANY, timing_cache=False)
    assert decisions(without) == ["dense", "dense"]


@pytest.mark.parametrize(
    ("whole", "kept"),
    [
        (speedup(0.99, spread=0.02), True),  # as before: now it cannot be told
        (speedup(0.9, spread=0.02), False),  # surely slower now
        (speedup(1.1, spread=0.02), True),
    ],
)
def test_a_whole_model_at_break_even_is_decided_as_before(source, times, tmp_path, whole, kept):
    times.whole = iter([speedup(1.3, spread=0.1)])
    run(source, "a", input_shapes=MANY, timing_cache=tmp_path / "times")
    times.whole = itertools.repeat(whole)
    result = run(source, "b", input_shapes=MANY, timing_cache=tmp_path / "times")
    assert (decisions(result) == ["sparse", "sparse"]) is kept
    if kept:
        assert result.speedup == whole.median, "what is reported was measured now"
        assert result.exit_code == (0 if whole.low > 1 else 5)


@pytest.mark.parametrize("median", [0.99, 1.01])
def test_what_cannot_be_told_is_written_as_compiled_and_not_called_faster(source, times, median):
    times.whole = itertools.repeat(speedup(median, spread=0.02))
    result = run(source, "out", input_shapes=MANY, timing_cache=False)
    assert decisions(result) == ["sparse", "sparse"]
    assert result.exit_code == 5
    assert result.report["summary"]["written"] == "compiled"
    assert result.speedup == median


def test_one_disturbed_measurement_gives_nothing_up(source, times):
    times.whole = itertools.chain([speedup(0.6, spread=0.01)], itertools.repeat(speedup(1.5, spread=0.01)))
    result = run(source, "out", input_shapes=MANY, timing_cache=False)
    assert (decisions(result), result.exit_code) == (["sparse", "sparse"], 0)


def test_what_is_slower_in_any_form_is_the_model_as_it_was(source, times):
    times.whole = itertools.repeat(speedup(0.9, spread=0.02))
    result = run(source, "out", input_shapes=MANY, timing_cache=False)
    assert (decisions(result), result.exit_code) == (["dense", "dense"], 5)
    assert result.report["summary"]["written"] == "original"
    assert result.speedup is None, "nothing that was written differs from the original"
    assert all("slower with it" in row["reason"] for row in result.report["layers"])


def test_a_cache_that_cannot_be_written_stops_nothing(source, times, tmp_path):
    (tmp_path / "file").write_text("no folder")
    lines = []
    result = run(source, "out", timing_cache=tmp_path / "file" / "times", progress=lines.append)
    assert decisions(result) == ["sparse", "sparse"]
    assert sum("timings are kept for this run only" in line for line in lines) == 1


def test_without_a_benchmark_no_cache_is_touched(source, times, tmp_path):
    run(source, "out", benchmark=False, timing_cache=tmp_path / "times")
    assert not (tmp_path / "times").exists()
