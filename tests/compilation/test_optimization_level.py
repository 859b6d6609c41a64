"""Where ONNX Runtime's own optimizations break a model it runs with fewer, and that is said and recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.data.inputs import Feeds
from sparse_onnx.errors import UsageError
from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.runtime import LEVELS, at_best_level, open_runner, open_session, run_session
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing.profile import profile_model

WIDTH = 64
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)}


def write(folder: Path, *, gamma: int = 1, zeros: float = 0.85) -> Path:
    """A norm behind a residual: ONNX Runtime fuses the two, and its fused operator takes no gamma of one element."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    weight[rng.random(weight.shape) < zeros] = 0
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", "x"], ["s"]),
            helper.make_node("LayerNormalization", ["s", "g", "b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m", WIDTH])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.full(gamma, 2, np.float32), "g"),
            numpy_helper.from_array(np.zeros(gamma, np.float32), "b"),
        ],
    )
    path = folder / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def expected(feeds: Feeds, path: Path) -> np.ndarray:
    weight = numpy_helper.to_array(onnx.load(path).graph.initializer[0]).astype(np.float64)
    x = feeds["x"].astype(np.float64)
    s = x @ weight + x
    result: np.ndarray = 2 * (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-5)
    return result


def test_the_reason_for_all_this(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(UsageError, match="SkipLayerNormalization"):
        run_session(open_session(path, threads=1, library=False), FEEDS)
    run_session(open_session(path, threads=1, library=False, level="basic"), FEEDS)


@pytest.mark.parametrize("budget", [1 << 30, 1000])
def test_a_runner_goes_on_with_fewer_optimizations(tmp_path: Path, budget: int) -> None:
    path = write(tmp_path)
    said: list[str] = []
    model = load_model(path)
    with open_runner(model, Workbench(1, tmp_path, budget, said.append), path, library=False) as runner:
        for _ in range(2):
            np.testing.assert_allclose(runner.run(FEEDS)["y"], expected(FEEDS, path), atol=1e-4)
        assert runner.milliseconds(FEEDS) > 0
        if budget > 1000:  # in parts, the norm and the residual meet in none
            assert runner.level == "basic"
            (warning,) = [line for line in said if line.startswith("warning")]
            assert "default optimizations; here it runs with basic ones" in warning
            assert "SkipLayerNormalization" in warning


def test_sound_models_keep_all_of_them(tmp_path: Path) -> None:
    path = write(tmp_path, gamma=WIDTH)
    said: list[str] = []
    with open_runner(
        load_model(path), Workbench(1, tmp_path, 1 << 30, said.append), path, library=False
    ) as runner:
        runner.run(FEEDS)
        assert runner.level == "all"
        with pytest.raises(
            UsageError, match=r"cannot be run with inputs.*fewer or no graph optimizations it is the same"
        ):
            runner.run({"x": np.ones((2, 3, 7), np.float32)})
        assert runner.level == "all"
        np.testing.assert_allclose(runner.run(FEEDS)["y"], expected(FEEDS, path), atol=1e-4)
    assert not said


def test_levels_are_tried_in_order() -> None:
    tried: list[str] = []

    def attempt(level: str) -> int:
        tried.append(level)
        if level != "disabled":
            raise UsageError(f"not with {level}")
        return 7

    said: list[str] = []
    assert at_best_level(attempt, said.append) == ("disabled", 7)
    assert tried == list(LEVELS)
    assert "runs with none: not with all" in said[0]
    assert at_best_level(attempt, said.append, "disabled") == ("disabled", 7)
    assert len(said) == 1
    with pytest.raises(UsageError, match=r"not with all\. With fewer"):
        at_best_level(lambda level: attempt("all" if level == "all" else "basic"), said.append)


def test_the_commands_go_on_and_tell(tmp_path: Path) -> None:
    path = write(tmp_path)
    said: list[str] = []
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1, progress=said.append)
    assert sum("default optimizations" in line for line in said) == 1
    assert result.report["verification"]["optimization_levels"] == {
        "pruned_dense": "basic",
        "with_library": "basic",
        "without_library": "basic",
    }
    assert sparse_onnx.verify(path, result.folder / "model.onnx", threads=1).passed
    profile = profile_model(load_model(path), {}, FEEDS, threads=1, work=tmp_path)
    assert "LayerNormalization" in profile.others


def test_nothing_is_recorded_where_nothing_came_up(tmp_path: Path) -> None:
    result = sparse_onnx.optimize(write(tmp_path, gamma=WIDTH), tmp_path / "out", benchmark=False, threads=1)
    assert "optimization_levels" not in result.report["verification"]
    assert "left_out" not in result.report["verification"]
    assert "converted_from_opset" not in result.report
