"""Families of plans and the passes that they become, on a model of costs that is a formula."""

import itertools

import pytest

from sparse_onnx.passes import pass_by_name
from sparse_onnx.search.plans import SPARSITIES, allocated, modifiers, uniform
from sparse_onnx.search.strategy import Goals

_DENSE = {"large": 10.0, "small": 2.0}


class _Costs:
    """The layers and a rest of 3 ms; sparse time is 1.3 · (1 − s) of dense, and so are the bytes."""

    def milliseconds(self, name, structure, sparsity):
        return _DENSE[name] * (1.3 * (1 - sparsity) if sparsity else 1.0)

    def nbytes(self, name, structure, sparsity):
        return 100 * self.milliseconds(name, structure, sparsity)

    def whole(self, plan):
        ms = 3 + sum(self.milliseconds(name, *plan.get(name, ("unstructured", 0.0))) for name in _DENSE)
        return 15 / ms, 100 * ms


def _losses(large, small):
    return {
        name: {("unstructured", s): scale * s**2 for s in SPARSITIES}
        for name, scale in (("large", large), ("small", small))
    }


@pytest.mark.parametrize("make", [allocated, uniform])
def test_a_family_goes_from_dense_to_sparsest_with_rising_speed_and_loss(make):
    family = make(_Costs(), _losses(1.0, 1.0), Goals(speedup=2))
    assert family.plans[0] == {}
    assert family.forecasts[0].speedup == 1
    assert set(family.plans[-1].values()) == {("unstructured", 0.95)}
    for first, second in itertools.pairwise(family.forecasts):
        assert first.speedup < second.speedup
        assert first.loss < second.loss
        assert first.nbytes > second.nbytes


def test_the_layer_that_loses_less_becomes_sparser_first():
    family = allocated(_Costs(), _losses(100.0, 0.001), Goals(speedup=2))
    assert list(family.plans[1]) == ["small"]
    assert family.plans[1]["small"][1] == 0.95 or family.plans[2].keys() == {"small"}


def test_a_layer_that_no_sparsity_speeds_up_stays_dense():
    class Slow(_Costs):
        def milliseconds(self, name, structure, sparsity):
            slow = name == "small" and sparsity > 0
            return 5.0 if slow else super().milliseconds(name, structure, sparsity)

    for make in (allocated, uniform):
        assert all("small" not in plan for plan in make(Slow(), _losses(1.0, 1.0), Goals(speedup=2)).plans)


def test_the_uniform_family_has_one_share():
    for plan in uniform(_Costs(), _losses(1.0, 1.0), Goals(drop=0.1)).plans:
        assert len(set(plan.values())) <= 1


def test_patterns_compete():
    losses = _losses(1.0, 1.0)
    losses["large"]["2:4", 0.5] = 1e-6
    plans = allocated(_Costs(), losses, Goals(speedup=1.5)).plans
    assert any(plan.get("large") == ("2:4", 0.5) for plan in plans)


def test_a_plan_of_a_one_shot_method_is_one_pass_for_each_structure():
    template = pass_by_name("prune.alps")(sparsity=0.5, dampening_frac=0.05)
    plan = {"a": ("unstructured", 0.5), "b": ("2:4", 0.5), "c": ("unstructured", 0.8)}
    first, second = modifiers(plan, template, {"a": 100, "b": 100, "c": 300})
    assert (first.mask_structure, first.targets) == ("unstructured", ("a", "c"))
    assert first.sparsities == {"a": 0.5, "c": 0.8}
    assert first.sparsity == pytest.approx(0.725)
    assert (second.mask_structure, second.targets, second.sparsity) == ("2:4", ("b",), None)
    assert first.dampening_frac == second.dampening_frac == 0.05


def test_a_plan_by_magnitude_is_one_pass_for_each_share():
    template = pass_by_name("prune.magnitude")(sparsity=0.5)
    plan = {"a": ("unstructured", 0.5), "b": ("unstructured", 0.8), "c": ("unstructured", 0.5)}
    first, second = modifiers(plan, template, dict.fromkeys("abc", 10))
    assert (first.targets, first.sparsity) == (("a", "c"), 0.5)
    assert (second.targets, second.sparsity) == (("b",), 0.8)
