"""Nothing is given away for nothing: what gains nothing is not pruned, and what stays dense has its weights back."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.compilation import settle, worth_pruning, write
from sparse_onnx.compilation.give_back import Originals, exchange
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.passes.base import LayerChange
from sparse_onnx.timing import choose, curves
from sparse_onnx.timing.curves import Curve, LayerCurves
from sparse_onnx.timing.rounds import Ratio

D = 64
RNG = np.random.default_rng(0)
FASTER, SLOWER = Ratio(4.0, 2.0, 2.0, 1.9, 2.1), Ratio(2.0, 4.0, 0.5, 0.48, 0.52)


def save(path, nodes, arrays, *, inputs=None, outputs=None, dtype=TensorProto.FLOAT):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        inputs or [info("X", dtype, ["batch", "tokens", D])],
        outputs or [info("Y", dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def weight(*shape):
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


ARRAYS = {
    "W1": weight(D, 2 * D),
    "b1": RNG.standard_normal(2 * D).astype(np.float32),
    "W2": weight(2 * D, D),
    "b2": RNG.standard_normal(D).astype(np.float32),
    "W3": weight(D, D),
    "b3": RNG.standard_normal(D).astype(np.float32),
}


@pytest.fixture
def model(tmp_path):
    """Three linears with biases."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["X", "W1"], ["h"]),
        node("Add", ["h", "b1"], ["hb"]),
        node("Relu", ["hb"], ["a"]),
        node("MatMul", ["a", "W2"], ["o"]),
        node("Add", ["o", "b2"], ["ob"]),
        node("Relu", ["ob"], ["p"]),
        node("MatMul", ["p", "W3"], ["q"]),
        node("Add", ["q", "b3"], ["Y"]),
    ]
    return save(tmp_path / "model.onnx", nodes, ARRAYS)


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", X=RNG.standard_normal((32, 16, D)).astype(np.float32))
    return tmp_path / "data.npz"


@pytest.fixture
def times(monkeypatch):
    """``times.layer`` maps (K, N) to what is measured of such a layer, ``times.others`` is that of others;
    ``times.curve`` has its time in units of dense before it is pruned, and ``times.whole`` is the whole."""

    class Times:
        def __init__(self):
            self.layer, self.others, self.curve, self.whole = {}, FASTER, {}, FASTER

    times = Times()

    def time_forms(models, _feeds, **_options):
        weights = models["dense"].graph.initializers.values()
        shape = next(tuple(v.const_value.shape) for v in weights if len(v.shape) == 2)
        return {("dense", "sparse"): times.layer.get(shape, times.others)}

    def measure_curves(_model, candidate, _layer, _shapes, *, sparsities, structures, **_options):
        time = times.curve.get(candidate.weight.shape, 0.5)
        share = sparsities[0] if sparsities else 0.5
        return LayerCurves(1.0, {("sparse", structures[0]): Curve((share,), (time,), (time,), (time,))})

    monkeypatch.setattr(choose, "time_forms", time_forms)
    monkeypatch.setattr(worth_pruning, "measure_curves", measure_curves)
    monkeypatch.setattr(
        write, "time_whole", lambda _optimized, _job, _source, inputs: [times.whole] * len(inputs.targets)
    )
    return times


def optimize(model, **options):
    shapes = {"X": (1, 16, D)}
    defaults = {"method": "magnitude", "sparsity": 0.8, "timing_cache": False, "threads": 1}
    given = {**defaults, "input_shapes": shapes, **options}
    return sparse_onnx.optimize(model, model.parent / "out", overwrite=True, **given)


def rows(result):
    return {row["name"]: row for row in result.report["layers"]}


def written(result):
    """The initializers of the main graph that are there under their own names."""
    proto = onnx.load(result.folder / "model.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


# Not pruned


def test_what_no_kernel_takes_is_not_pruned(tmp_path):
    """Conv of a rank that the kernels lack, float16, and a linear inside an If, beside a linear that pays."""
    node, info = helper.make_node, helper.make_tensor_value_info
    inner = helper.make_graph(
        [node("MatMul", ["a", "inside"], ["t"])], "then", [], [info("t", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight(D, D), "inside")],
    )  # fmt: skip
    other = helper.make_graph(
        [node("Identity", ["a"], ["e"])], "else", [], [info("e", TensorProto.FLOAT, None)]
    )
    arrays = {
        "W": weight(D, D),
        "half": weight(D, D).astype(np.float16),
        "volume": weight(1, D, 3, 3, 3)[:, :1].reshape(1, 1, 3, 3, 3),
        "shape": np.array([1, 1, 4, 16, 16], np.int64),
    }
    nodes = [
        node("MatMul", ["X", "W"], ["a"]),
        node("If", ["C"], ["b"], then_branch=inner, else_branch=other),
        node("Cast", ["b"], ["c16"], to=TensorProto.FLOAT16),
        node("MatMul", ["c16", "half"], ["d16"]),
        node("Cast", ["d16"], ["d"], to=TensorProto.FLOAT),
        node("Reshape", ["d", "shape"], ["r"]),
        node("Conv", ["r", "volume"], ["Y"]),
    ]
    inputs = [info("X", TensorProto.FLOAT, [1, 16, D]), info("C", TensorProto.BOOL, [])]
    path = save(tmp_path / "model.onnx", nodes, arrays, inputs=inputs)
    result = optimize(path, benchmark=False, input_shapes=None)
    assert result.exit_code == 0
    assert rows(result)["W"]["decision"] == "sparse"
    kept = written(result)
    for name in ("half", "volume"):
        np.testing.assert_array_equal(kept[name], arrays[name])
    said = {
        place["place"]: place["reason"]
        for place in result.report["declined"]
        if place["pass_name"] == "prune.magnitude"
    }
    for name in ("half", "volume", "inside"):
        assert said[name].startswith("not pruned: no sparse kernel could take it ("), name
    forced = optimize(path, benchmark=False, input_shapes=None, keep_pruned=True)
    assert np.mean(written(forced)["half"] == 0) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_is_that_of_what_is_pruned(tmp_path, scope):
    node = helper.make_node
    arrays = {"W": weight(D, D), "half": weight(D, D).astype(np.float16) / 100}
    nodes = [
        node("MatMul", ["X", "W"], ["a"]),
        node("Cast", ["a"], ["c16"], to=TensorProto.FLOAT16),
        node("MatMul", ["c16", "half"], ["Y"]),
    ]
    path = save(
        tmp_path / "model.onnx",
        nodes,
        arrays,
        outputs=[helper.make_tensor_value_info("Y", TensorProto.FLOAT16, None)],
    )
    result = optimize(path, benchmark=False, scope=scope)
    assert rows(result)["W"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert not (written(result)["half"] == 0).any()


def test_what_would_be_slower_is_not_pruned(model, times):
    times.curve = {(D, D): 1.2}
    result = optimize(model)
    found = rows(result)
    assert [found[name]["pruning"] for name in ("W1", "W2", "W3")] == ["pruned", "pruned", "never"]
    assert found["W3"]["pruning_reason"].startswith(
        "not pruned: with 80.0% zeros its sparse form would be 0.83x"
    )
    assert found["W3"]["pruning_reason"] in found["W3"]["reason"]
    np.testing.assert_array_equal(written(result)["W3"], ARRAYS["W3"])
    assert found["W1"]["sparsity"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("scope", "judged"), [("layer", True), ("global", False)])
def test_a_share_that_is_not_known_beforehand_is_not_judged(model, times, scope, judged):
    times.curve = {(D, D): 1.2}
    assert rows(optimize(model, scope=scope))["W3"]["pruning"] == ("never" if judged else "pruned")


def test_too_few_zeros_for_any_kernel_are_not_made(model, times):
    result = optimize(model, sparsity=0.2)
    assert {row["pruning"] for row in rows(result).values()} == {"never"}
    assert all("20.0% zeros are too few" in row["reason"] for row in rows(result).values())
    assert (result.exit_code, result.report["summary"]["written"]) == (5, "original")


def test_every_method_leaves_alone_what_gains_nothing(model, data, times):
    times.curve = {(D, D): 1.2}
    for method in ("magnitude", "random", "wanda", "omp", "auto"):
        options = {} if method in ("magnitude", "random") else {"calibration_data": data}
        result = optimize(model, method=method, **options)
        np.testing.assert_array_equal(written(result)["W3"], ARRAYS["W3"])
        assert rows(result)["W3"]["pruning"] == "never", method


def test_shares_given_by_name_stay_as_given_where_one_is_left_alone(tmp_path, data):
    """The mean is over all that were chosen: others are not pruned more since one cannot be."""
    node = helper.make_node
    arrays = {"W": weight(D, D), "V": weight(D, D), "half": weight(D, D).astype(np.float16)}
    nodes = [
        node("MatMul", ["X", "W"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "V"], ["b"]),
        node("Cast", ["b"], ["c16"], to=TensorProto.FLOAT16),
        node("MatMul", ["c16", "half"], ["d"]),
        node("Cast", ["d"], ["Y"], to=TensorProto.FLOAT),
    ]
    path = save(tmp_path / "model.onnx", nodes, arrays)
    shares = {"W": 0.9, "V": 0.8, "half": 0.7}
    result = optimize(
        path, method="sparsegpt", sparsity=0.8, sparsities=shares, calibration_data=data, benchmark=False
    )
    assert rows(result)["W"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert rows(result)["V"]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_a_plan_does_not_prune_what_no_kernel_takes(tmp_path):
    node = helper.make_node
    arrays = {"half": weight(D, D).astype(np.float16)}
    info = helper.make_tensor_value_info
    path = save(
        tmp_path / "model.onnx",
        [node("MatMul", ["X", "half"], ["Y"])],
        arrays,
        inputs=[info("X", TensorProto.FLOAT16, [1, D])],
        outputs=[info("Y", TensorProto.FLOAT16, None)],
    )
    result = sparse_onnx.optimize(path, tmp_path / "out", method="magnitude", sparsity=0.8, dry_run=True)
    reasons = [place["reason"] for place in result.report["declined"]]
    assert any(reason.startswith("not pruned: no sparse kernel") for reason in reasons)


# Given back


@pytest.mark.parametrize(
    ("method", "options"),
    [("magnitude", {}), ("sparsegpt", {}), ("sparsegpt", {"bias_correction": True}), ("auto", {})],
)
def test_what_the_guard_turns_down_has_its_weights_and_biases_back(model, data, times, method, options):
    times.layer = {(D, D): SLOWER}
    result = optimize(model, method=method, calibration_data=data, **options)
    found = rows(result)
    assert [found[name]["decision"] for name in ("W1", "W2", "W3")] == ["sparse", "sparse", "dense"]
    if found["W3"]["pruning"] == "pruned":  # later layers were solved for the pruned ones before them
        assert method == "auto"
        assert "its zeros are kept" in found["W3"]["reason"]
        return
    assert found["W3"]["pruning"] == "given back"
    assert found["W3"]["reason"].endswith("its original weight was given back")
    assert (found["W3"]["sparsity"], found["W3"]["relative_error"]) == (0.0, 0.0)
    assert found["W3"]["output_error"] is None
    kept = written(result)
    np.testing.assert_array_equal(kept["W3"], ARRAYS["W3"])
    np.testing.assert_array_equal(kept["b3"], ARRAYS["b3"])
    assert result.report["verification"]["against_pruned_dense"]["relative_error"] < 1e-5


@pytest.mark.parametrize("method", ["magnitude", "auto"])
def test_the_nearer_of_the_two_ships(model, data, times, monkeypatch, method):
    """With and without giving back: what is measured decides."""
    times.layer = {(D, D): SLOWER}
    real, found = settle.compare, []

    def compare(reference, candidate, *others):
        difference = real(reference, candidate, *others)
        found.append(difference.relative_error)
        return difference

    monkeypatch.setattr(settle, "compare", compare)
    result = optimize(model, method=method, calibration_data=data)
    before, after = found[:2]  # with zeros, and without
    given_back = rows(result)["W3"]["pruning"] == "given back"
    assert given_back == (after <= before)
    assert result.report["summary"]["relative_error"] == pytest.approx(min(before, after), rel=1e-3)


def test_zeros_are_kept_for_whoever_wants_them(model, times):
    times.layer = {(D, D): SLOWER}
    result = optimize(model, keep_pruned=True)
    assert rows(result)["W3"]["pruning"] == "pruned"
    assert np.mean(written(result)["W3"] == 0) == pytest.approx(0.8, abs=1e-3)
    assert result.report["recipe"]["goal"]["keep_pruned"] is True


@pytest.mark.parametrize(("keep", "what"), [(False, "original"), (True, "pruned")])
def test_nothing_faster_is_the_original_unless_zeros_are_wanted(model, times, keep, what):
    times.others = SLOWER
    result = optimize(model, keep_pruned=keep)
    assert (result.exit_code, result.report["summary"]["written"]) == (5, what)
    zeros = np.mean(written(result)["W1"] == 0)
    assert zeros == pytest.approx(0.8 if keep else 0.0, abs=1e-3)
    error = result.report["summary"]["relative_error"]
    assert error > 0.1 if keep else error == 0
    assert result.speedup is None


def test_layers_given_up_for_the_whole_have_their_weights_back(model, times, monkeypatch):
    def time_whole(optimized, *_others):
        count = sum(node.domain == "sparse_onnx" for node in optimized.graph)
        return [SLOWER if count > 1 else FASTER]

    times.layer = {(D, D): Ratio(9.0, 3.0, 3.0, 2.9, 3.1)}  # saves most
    monkeypatch.setattr(write, "time_whole", time_whole)
    result = optimize(model)
    found = rows(result)
    dense = [name for name, row in found.items() if row["decision"] == "dense"]
    assert dense
    for name in dense:
        assert found[name]["pruning"] == "given back"
        np.testing.assert_array_equal(written(result)[name], ARRAYS[name])
    assert result.exit_code == 0


def test_without_a_benchmark_what_the_table_turns_down_is_given_back(model):
    result = optimize(model, sparsity=0.5, benchmark=False)
    assert {row["pruning"] for row in rows(result).values()} == {"given back"}
    assert (result.exit_code, result.report["summary"]["written"]) == (5, "original")


def test_structures_that_were_removed_stay_removed(model, data, times):
    recipe = parse_recipe(
        """
version: 1
stages:
- name: remove
  modifiers: [prune.ffn: {sparsity: 0.25}]
- name: prune
  modifiers: [prune.magnitude: {sparsity: 0.8}]
"""
    )
    times.others = SLOWER
    result = optimize(model, recipe=recipe, method=None, sparsity=None, calibration_data=data)
    shapes = {name: tuple(row["shape"]) for name, row in rows(result).items()}
    assert all(row["decision"] == "dense" for row in rows(result).values())
    removed = shapes != {name: array.shape for name, array in ARRAYS.items() if name[0] == "W"}
    assert removed
    assert result.report["summary"]["written"] == "compiled"
    assert result.exit_code == 0, "smaller, and timed as faster"
    assert all(row["pruning"] == "given back" for row in rows(result).values())
    assert all(row["sparsity"] == 0 for row in rows(result).values())


def test_zeros_that_were_there_before_stay(model, times, tmp_path):
    proto = onnx.load(model)
    array = ARRAYS["W3"].copy()
    array[np.abs(array) < np.quantile(np.abs(array), 0.4)] = 0
    next(t for t in proto.graph.initializer if t.name == "W3").CopyFrom(numpy_helper.from_array(array, "W3"))
    onnx.save(proto, model)
    times.layer = {(D, D): SLOWER}
    result = optimize(model)
    np.testing.assert_array_equal(written(result)["W3"], array)


# The parts


def tensors(**arrays):
    graph = ir.Graph([], [], nodes=[])
    model = ir.Model(graph, ir_version=9)
    for name, array in arrays.items():
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return model


def test_exchange_is_its_own_inverse():
    model = tensors(W=np.ones(2, np.float32))
    copy = model.clone()
    originals = Originals.of(model)
    value = model.graph.initializers["W"]
    value.const_value = ir.tensor(np.zeros(2, np.float32), name="W")
    copy.graph.initializers["W"].const_value = value.const_value
    value.metadata_props["sparse_onnx.mask_structure"] = "2:4"
    zeros = exchange([model, copy], originals.changed(model))
    for each in (model, copy):
        assert each.graph.initializers["W"].const_value.numpy().all()
    assert originals.changed(model) == []
    exchange([model, copy], zeros)
    assert not copy.graph.initializers["W"].const_value.numpy().any()


@pytest.mark.parametrize(("kept", "back"), [((), ["W", "b"]), (("W",), [])])
def test_a_bias_goes_with_its_weight(kept, back):
    model = tensors(W=np.ones(2, np.float32), b=np.ones(2, np.float32), other=np.ones(2, np.float32))
    originals = Originals.of(model)
    for name in ("W", "b"):
        model.graph.initializers[name].const_value = ir.tensor(np.zeros(2, np.float32), name=name)
    before = ir.tensor(np.ones(2, np.float32), name="b")
    changes = [LayerChange("W", 2, 0, 2, 0.5, ("b", before))]
    assert [state.name for state in originals.changed(model, changes, kept)] == back


def test_a_copy_of_a_shared_bias_gets_what_it_was_made_from():
    model = tensors(W=np.ones(2, np.float32), b=np.full(2, 7, np.float32))
    originals = Originals.of(model)
    old = model.graph.initializers["b"].const_value
    model.graph.initializers["W"].const_value = ir.tensor(np.zeros(2, np.float32), name="W")
    model.graph.register_initializer(
        ir.Value(name="b.corrected", const_value=ir.tensor(np.zeros(2, np.float32), name="b.corrected"))
    )
    changes = [
        LayerChange("W", 2, 0, 1, 0.5, ("b.corrected", old)),
        LayerChange(
            "W", 2, 1, 2, 0.5, ("b.corrected", ir.tensor(np.ones(2, np.float32), name="b.corrected"))
        ),
    ]
    exchange([model], originals.changed(model, changes))
    assert (model.graph.initializers["b.corrected"].const_value.numpy() == 7).all()


def test_a_layer_is_really_measured_before_it_is_pruned(model, tmp_path):
    """At four rows of 64 there is nothing to gain from 35 % zeros, or there is: the curve has that point."""
    curve = curves.measure_curves
    measured = []

    def spy(*arguments, **options):
        measured.append(curve(*arguments, **options))
        return measured[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worth_pruning, "measure_curves", spy)
        patch.setattr(write, "time_whole", lambda *_arguments: [FASTER])
        optimize(model, sparsity=0.35)
    assert len(measured) == 3
    for found in measured:
        (point,) = found.curves["sparse", "unstructured"].sparsities
        assert point == pytest.approx(0.35, abs=1e-3)
