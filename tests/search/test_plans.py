"""Families of plans and the passes that they become, on a forecast whose curves are straight lines."""

import dataclasses
import itertools

import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.forecast import Forecast, LayerForecast
from sparse_onnx.analysis.time_model import TimeModel
from sparse_onnx.compilation.recipe import Recipe, RecipeStage
from sparse_onnx.passes.base import Stage
from sparse_onnx.passes.lower.forms import sparse_form
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.registry import pass_by_name
from sparse_onnx.search.plans import allocated, choices_of, uniform
from sparse_onnx.search.recipes import modifiers, with_passes
from sparse_onnx.search.strategy import Goals
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.timing.curves import Curve

_SHARES = (0.3, 0.95)


def _curve(factor=1.3):
    times = tuple(factor * (1 - share) for share in _SHARES)
    return Curve(_SHARES, times, times, times)


def _layer(name, ms, size, **options):
    return LayerForecast(
        name=name,
        module=name,
        op_type="MatMul",
        kind="linear",
        shape=(size, size),
        rows=128,
        sparsity=0.0,
        reason="",
        companion=False,
        outputs=Outputs(32, apart=True),
        forms=(sparse_form(LowerSparseMatMul),),
        packed_bytes={"sparse": 0},
        key=size,
        dense_ms=ms,
        share=None,
        **{
            "curves": {
                ("sparse", "unstructured"): _curve(),
                ("sparse", "2:4"): Curve((0.5,), (0.6,), (0.6,), (0.6,)),
            }
        }
        | options,
    )


@pytest.fixture
def forecast():
    layers = (_layer("large", 10.0, 256), _layer("small", 2.0, 64))
    times = TimeModel(3.0, 1.0, 1.0, (0.0,), (1.0,), 0.02)
    nbytes = 4 * (256**2 + 64**2)
    return Forecast(layers, ("unstructured", "2:4"), times, 15.0, nbytes, 0.0, 1.02, ("unstructured",))


def _loss(**scales):
    return lambda name, choice: (
        scales[name] * choice.sparsity**2 if choice.structure == "unstructured" else None
    )


def _allocated(forecast, names, loss, goals):
    return allocated(forecast, dict.fromkeys(names, choices_of(["unstructured", "2:4"])), loss, goals)


@pytest.mark.parametrize("make", [_allocated, uniform])
@pytest.mark.parametrize("goals", [Goals(speedup=2), Goals(nbytes=1000), Goals(speedup=2, nbytes=1000)])
def test_a_family_goes_from_dense_to_sparsest_with_rising_speed_and_loss(forecast, make, goals):
    family = make(forecast, ["large", "small"], _loss(large=1.0, small=1.0), goals)
    assert family.plans[0] == {}
    assert family.expected[0].speedup == 1
    assert set(family.plans[-1].values()) == {Choice(0.95)}
    for first, second in itertools.pairwise(family.expected):
        assert first.speedup < second.speedup
        assert first.loss < second.loss
        assert first.nbytes > second.nbytes


def test_the_layer_that_loses_less_becomes_sparser_first(forecast):
    family = _allocated(forecast, ["large", "small"], _loss(large=100.0, small=0.001), Goals(speedup=2))
    assert list(family.plans[1]) == ["small"]
    last = next(plan for plan in family.plans if "large" in plan)
    assert last["small"] == Choice(0.95)


@pytest.mark.parametrize("make", [_allocated, uniform])
def test_weights_that_go_along_get_the_same(forecast, make):
    layers = (dataclasses.replace(forecast.layers[0], others=("recurrent",)), forecast.layers[1])
    family = make(
        dataclasses.replace(forecast, layers=layers),
        ["large", "small"],
        _loss(large=1.0, small=1.0),
        Goals(speedup=2),
    )
    assert any("large" in plan for plan in family.plans)
    assert all(plan.get("recurrent") == plan.get("large") for plan in family.plans)


@pytest.mark.parametrize("make", [_allocated, uniform])
def test_a_layer_that_no_sparsity_speeds_up_stays_dense(forecast, make):
    slow = dataclasses.replace(forecast.layers[1], curves={("sparse", "unstructured"): _curve(30)})
    changed = dataclasses.replace(forecast, layers=(forecast.layers[0], slow))
    family = make(changed, ["large", "small"], _loss(large=1.0, small=1e-9), Goals(speedup=2))
    assert len(family.plans) > 5
    assert all("small" not in plan for plan in family.plans)


def test_other_layers_are_left_alone(forecast):
    family = uniform(forecast, ["large"], _loss(large=1.0), Goals(drop=0.1))
    assert {name for plan in family.plans for name in plan} == {"large"}


def test_the_uniform_family_has_one_share(forecast):
    for plan in uniform(forecast, ["large", "small"], _loss(large=1.0, small=2.0), Goals(drop=0.1)).plans:
        assert len(set(plan.values())) <= 1


def test_patterns_compete(forecast):
    plain = _loss(large=1.0, small=1.0)

    def loss(name, choice):
        return 1e-6 if choice == Choice(0.5, "2:4") and name == "large" else plain(name, choice)

    plans = _allocated(forecast, ["large", "small"], loss, Goals(speedup=1.5)).plans
    assert any(plan.get("large") == Choice(0.5, "2:4") for plan in plans)
    assert all(plan.get("small", (0, ""))[1] != "2:4" for plan in plans)


def test_a_plan_of_a_one_shot_method_is_one_pass_for_each_pattern():
    template = pass_by_name("prune.alps")(sparsity=0.5, dampening_frac=0.05)
    plan = {"a": Choice(0.5), "b": Choice(0.5, "2:4"), "c": Choice(0.8)}
    first, second = modifiers(plan, template, {"a": 100, "b": 100, "c": 300})
    assert (first.mask_structure, first.targets) == ("unstructured", ("a", "c"))
    assert first.sparsities == {"a": 0.5, "c": 0.8}
    assert first.sparsity == pytest.approx(0.725)
    assert (second.mask_structure, second.targets, second.sparsity) == ("2:4", ("b",), None)
    assert first.dampening_frac == second.dampening_frac == 0.05


def test_a_plan_by_magnitude_is_one_pass_for_each_share():
    template = pass_by_name("prune.magnitude")(sparsity=0.5)
    plan = {
        "a": Choice(0.5),
        "b": Choice(0.8),
        "c": Choice(0.5),
    }
    first, second = modifiers(plan, template, dict.fromkeys("abc", 10))
    assert (first.targets, first.sparsity) == (("a", "c"), 0.5)
    assert (second.targets, second.sparsity) == (("b",), 0.8)


def test_no_layer_is_no_pass():
    assert modifiers({}, pass_by_name("prune.magnitude")(sparsity=0.5), {}) == ()


def test_pruning_comes_before_what_has_to_follow_it():
    ffn, quant, prune = (
        pass_by_name(name)(**options)
        for name, options in (
            ("prune.ffn", {"sparsity": 0.25}),
            ("quant.weight", {}),
            ("prune.magnitude", {"sparsity": 0.5}),
        )
    )
    recipe = Recipe((RecipeStage("all", (ffn, quant)),))
    stages = with_passes(recipe, Stage.PRUNE, (prune,)).stages
    assert stages == (
        RecipeStage("all", (ffn,)),
        RecipeStage("prune", (prune,)),
        RecipeStage("all", (quant,)),
    )
    assert with_passes(recipe, Stage.PRUNE, ()).stages == (stages[0], stages[2])
    assert with_passes(Recipe(), Stage.PRUNE, (prune,)).stages == (stages[1],)
