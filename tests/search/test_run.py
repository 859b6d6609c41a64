"""A whole search on a small model: what is written, what the report says, and that it can be interrupted."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.compilation.compile import compile_into
from sparse_onnx.compilation.recipe import Recipe
from sparse_onnx.compilation.recipe_flags import override
from sparse_onnx.errors import UsageError
from sparse_onnx.report.schema import check_report
from sparse_onnx.search import run
from sparse_onnx.search.driver import Search

WIDTH, LAYERS = 384, 3
SHAPES = {"X": (128, WIDTH)}


@pytest.fixture
def model(tmp_path):
    """A chain of MatMul + bias + GELU layers; the last weight is named so that pruning leaves it alone."""
    rng = np.random.default_rng(0)
    steps, arrays, last = [], {}, "X"
    for i in range(LAYERS):
        name = "lm_head" if i == LAYERS - 1 else f"W{i}"
        arrays[name] = (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        arrays[f"b{i}"] = rng.standard_normal(WIDTH).astype(np.float32)
        out = "Y" if i == LAYERS - 1 else f"g{i}"
        steps.append(f"m{i} = MatMul({last}, {name}) a{i} = Add(m{i}, b{i}) {out} = Gelu(a{i})")
        last = out
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        chain (float[batch, {WIDTH}] X) => (float[batch, {WIDTH}] Y) {{ {" ".join(steps)} }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def data(tmp_path):
    np.savez(
        tmp_path / "data.npz", X=np.random.default_rng(1).standard_normal((48, WIDTH)).astype(np.float32)
    )
    return tmp_path / "data.npz"


def _optimize(model, output, **options):
    return sparse_onnx.optimize(
        model, output, **{"method": "magnitude", "input_shapes": SHAPES, "threads": 1} | options
    )


def _faster(result):
    """The exit code of a result that meets its goals: whatever else runs on the machine, what was measured decides."""
    return 0 if result.report["summary"]["speedup_low"] > 1 else 5


def _zeros(path):
    loaded = onnx.load(path)
    return sum(node.domain == "sparse_onnx" for node in loaded.graph.node)


def test_a_search_writes_the_best_and_the_front(model, tmp_path):
    result = _optimize(model, tmp_path / "out", max_drop=0.2, search_trials=6)
    report = result.report
    check_report(report)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert {path.name for path in result.folder.iterdir()} == {
        "model.onnx", "model.onnx.data", "recipe.yaml", "report.json", "report.html",
    }  # fmt: skip
    search = report["search"]
    assert search["evaluated"] <= 6
    assert search["budget"] == {"target_speedup": None, "target_bytes": None, "max_drop": 0.2}
    (chosen,) = (point for point in search["pareto"] if point["chosen"])
    assert chosen["drop"] == pytest.approx(1 - report["summary"]["cosine"])
    assert chosen["speedup"] == report["summary"]["speedup"]
    assert result.exit_code == _faster(result)
    assert chosen["drop"] <= 0.2
    assert search["met"]
    assert report["goal"]["met"]
    assert report["source"] == "model.onnx"
    assert _zeros(tmp_path / "out" / "model.onnx") == sum(r["decision"] == "sparse" for r in report["layers"])
    (head,) = (row for row in report["layers"] if row["name"] == "lm_head")
    assert head["sparsity"] == 0


def test_the_written_recipe_makes_the_same_model(model, data, tmp_path):
    found = _optimize(
        model, tmp_path / "found", method="wanda", calibration_data=data, target_speedup=1.2, search_trials=3
    )
    again = sparse_onnx.optimize(model, tmp_path / "again", recipe=tmp_path / "found" / "recipe.yaml")
    shares = [{row["name"]: row["sparsity"] for row in r.report["layers"]} for r in (found, again)]
    assert shares[0] == shares[1]
    assert found.report["search"]["pareto"]


def test_goals_out_of_reach_are_exit_4_and_the_best_is_written(model, tmp_path):
    result = _optimize(model, tmp_path / "out", target_speedup=50, max_drop=1e-4, search_trials=8)
    assert result.exit_code == 4
    assert (tmp_path / "out" / "model.onnx").is_file()
    reached = {gate["name"]: gate["met"] for gate in result.report["goal"]["gates"]}
    assert reached["target_speedup"] is False
    assert not result.report["search"]["met"]
    drops = [point["drop"] for point in result.report["search"]["pareto"]]
    assert max(drops) > 1e-4  # the front shows what the speed would cost


def test_processes_find_what_one_finds(model, tmp_path):
    pytest.importorskip("joblib")
    result = _optimize(model, tmp_path / "out", target_size=0.5, search_trials=2, jobs=2)
    assert result.report["summary"]["bytes_after"] <= 0.5 * result.report["summary"]["bytes_before"]
    assert result.exit_code == _faster(result)


def test_an_interrupted_search_goes_on(model, tmp_path, monkeypatch):
    original, added = Search._add, []

    def stop_after_two(self, trial, folder, report):
        original(self, trial, folder, report)
        added.append(trial)
        if len(added) == 2:
            raise KeyboardInterrupt

    options = {"max_drop": 0.05, "search_trials": 4, "checkpoint": tmp_path / "kept"}
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_add", stop_after_two)
        with pytest.raises(KeyboardInterrupt) as stopped:
            _optimize(model, tmp_path / "out", **options)
    assert "to go on: finished trials are kept" in stopped.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    lines = []
    monkeypatch.setattr(run, "analyze", lambda *_args, **_options: pytest.fail("planned again"))
    result = _optimize(model, tmp_path / "out", progress=lines.append, **options)
    assert "note: going on after 2 trials" in lines
    assert result.report["search"]["evaluated"] <= 4
    (tmp_path / "kept" / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match="not of a search"):
        _optimize(model, tmp_path / "other", **options)


def test_a_choice_of_patterns(model, tmp_path):
    result = _optimize(model, tmp_path / "out", mask_structure="2:4, 1:4", target_size=0.6, search_trials=2)
    patterns = {row["mask_structure"] for row in result.report["layers"] if row["sparsity"]}
    assert patterns <= {"2:4", "1:4"}
    assert patterns


# -- bits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed_once(monkeypatch):
    """Where a size is asked for the speed is near 1, and would be measured until that is sure."""
    monkeypatch.setattr(run, "settle", lambda measure, _overall, **_options: list(measure()))


def _bits(report):
    return {row["name"]: row["bits"] for row in report["quantized"]}


def test_bits_alone_are_searched_for(model, data, tmp_path, timed_once):
    """Without a method nothing is pruned. The head, which is left alone, is a third of the file."""
    result = _optimize(
        model,
        tmp_path / "out",
        method=None,
        precision="int8",
        calibration_data=data,
        target_size=0.55,
        max_drop=0.02,
        search_trials=2,
    )
    report = result.report
    check_report(report)
    assert result.exit_code == _faster(result), report["goal"]
    assert report["summary"]["bytes_after"] <= 0.55 * report["summary"]["bytes_before"]
    assert 0 <= 1 - report["summary"]["cosine"] <= 0.02
    assert _bits(report) == {"W0": 8, "W1": 8}
    assert not any(row["sparsity"] > 0.1 for row in report["layers"])
    (chosen,) = (point for point in report["search"]["pareto"] if point["chosen"])
    assert chosen["bits"] == 8
    modifiers = [
        name for stage in report["recipe"]["stages"] for entry in stage["modifiers"] for name in entry
    ]
    assert modifiers == ["quant.weight"]
    assert report["recipe"]["target"]["precision"] == "int8"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "2 weights in 8 bits" in page
    assert '<td data-label="bits">8</td>' in page, "of a plan"
    assert '<td data-label="bits" data-sort="8">8</td>' in page, "of a layer"
    X = np.load(data)["X"][:4]
    before, after = (
        sparse_onnx.InferenceSession(path).run(None, {"X": X})[0]
        for path in (model, tmp_path / "out" / "model.onnx")
    )
    assert np.linalg.norm(after - before) < 0.2 * np.linalg.norm(before)


def test_zeros_and_bits_are_searched_for_together(model, tmp_path, timed_once):
    """Without data, by magnitude and scales that are searched."""
    result = _optimize(
        model, tmp_path / "out", precision="auto", target_size=0.48, max_drop=0.02, search_trials=3
    )
    report = result.report
    check_report(report)
    assert result.exit_code == _faster(result), report["goal"]
    assert report["summary"]["bytes_after"] <= 0.48 * report["summary"]["bytes_before"]
    assert 4 in _bits(report).values()
    again = sparse_onnx.optimize(
        model, tmp_path / "again", recipe=tmp_path / "out" / "recipe.yaml", benchmark=False
    )
    assert "search" not in again.report, "what was found is a recipe, and not searched for again"
    assert _bits(again.report) == _bits(report)


def test_what_dense_meets_already_stays_dense(model, tmp_path, timed_once):
    result = _optimize(
        model, tmp_path / "out", method=None, precision="auto", target_size=1.0, max_drop=0.1, search_trials=4
    )
    assert result.exit_code == 5, "not faster"
    assert result.report["goal"]["met"]
    assert result.report["search"]["evaluated"] == 1
    assert result.report["summary"]["written"] == "original"
    assert not result.report.get("quantized")


def test_an_interrupted_search_for_bits_goes_on(model, data, tmp_path, monkeypatch, timed_once):
    original = Search._add

    def stop(self, trial, folder, report):
        original(self, trial, folder, report)
        raise KeyboardInterrupt

    options = {
        "method": None,
        "precision": "int4",
        "calibration_data": data,
        "target_size": 0.4,
        "search_trials": 2,
        "checkpoint": tmp_path / "kept",
    }
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_add", stop)
        with pytest.raises(KeyboardInterrupt):
            _optimize(model, tmp_path / "out", **options)
    monkeypatch.setattr(run, "analyze", lambda *_args, **_options: pytest.fail("planned again"))
    result = _optimize(model, tmp_path / "out", **options)
    assert set(_bits(result.report).values()) == {4}
    assert {point["bits"] < 32 for point in result.report["search"]["pareto"]} == {True}


@pytest.mark.parametrize(("weight", "collected"), [("", [1, 0]), (":0.5", [1, 1])])
def test_what_layers_see_is_collected_once_for_several_compilations(model, data, tmp_path, weight, collected):
    """But for data with weights, of which no file holds statistics."""
    recipe = override(
        Recipe(),
        method="wanda",
        sparsity=0.5,
        calibration_data=f"{data}{weight}",
        input_shapes=SHAPES,
        keep_pruned=True,
    )
    found, zeros = [], []
    for number in range(2):
        lines, folder = [], tmp_path / str(number)
        folder.mkdir()
        _, report = compile_into(
            folder,
            model,
            recipe,
            command="test",
            benchmark=False,
            statistics=tmp_path / "inputs.stats",
            progress=lines.append,
        )
        found.append(sum(line.startswith("prune: calibration: 11/11") for line in lines))
        zeros.append([row["sparsity"] for row in report["layers"]])
        assert "inputs.stats" not in (folder / "recipe.yaml").read_text(), "others have no such file"
    assert found == collected
    assert zeros[0] == zeros[1]


def test_a_search_leaves_what_layers_see_to_its_trials(model, data, tmp_path, timed_once):
    kept = tmp_path / "kept"
    options = {"calibration_data": data, "target_size": 0.6, "search_trials": 1, "checkpoint": kept}
    _optimize(model, tmp_path / "out", method="wanda", **options)
    assert (kept / "inputs.stats").is_file()
    # Another question makes it anew: the same file would be refused as one of other data.
    again = _optimize(model, tmp_path / "other", method="wanda", num_calibration_samples=40, **options)
    assert again.report["search"]["evaluated"] == 1


def test_a_model_in_which_nothing_can_have_few_bits(model, tmp_path):
    with pytest.raises(UsageError, match="no layer of the model can be changed"):
        _optimize(
            model,
            tmp_path / "out",
            method=None,
            precision="auto",
            target_size=0.5,
            settings={"quant.weight.ignore": ["re:.*"]},
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random", "target_speedup": 2}, "no share of zeros to search"),
        ({"target_speedup": 2, "dry_run": True}, "a search measures"),
        ({"target_speedup": 2, "benchmark": False}, "a search measures"),
        ({"target_speedup": 2, "search_trials": 0}, "search_trials"),
        ({"sparsity": 0.5, "jobs": 2}, "jobs is for a search"),
        ({"target_speedup": 2, "mask_structure": "unstructured,3-4"}, "mask_structure"),
        ({"target_speedup": 2, "targets": ["W9"]}, "W9"),
        ({"target_speedup": 2, "ignore": ["re:.*"]}, "no layer of the model can be pruned"),
    ],
)
def test_what_cannot_be_searched_for(model, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        _optimize(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
