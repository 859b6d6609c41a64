"""Families of plans, on a forecast whose curves are straight lines."""

import dataclasses
import itertools

import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.forecast import Forecast, LayerForecast
from sparse_onnx.analysis.time_model import TimeModel
from sparse_onnx.passes.lower.dynamic_int8 import LowerDynamicInt8
from sparse_onnx.passes.lower.encoded_linear import EncodedForm
from sparse_onnx.passes.lower.forms import sparse_form
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.search.plans import allocated, choices_of, families, uniform
from sparse_onnx.search.strategy import Goals
from sparse_onnx.search.tables import Table
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


# -- bits ----------------------------------------------------------------------------------------------------------

_ROUNDED, _STORED, _FOUR, _THREE = (
    Choice(bits=bits, activations=activations) for bits, activations in ((8, 8), (8, 32), (4, 32), (3, 32))
)
_FORMS = (
    sparse_form(LowerSparseMatMul),
    EncodedForm("int8-dynamic", LowerDynamicInt8, exact=False, activations=8),
    EncodedForm("int4-nbits", LowerMatMulNBits, exact=False, bits=4),
)
_COSTS = {_ROUNDED: 1e-3, _STORED: 1e-5, _FOUR: 1e-2, _THREE: 5e-2}


def _with_bits(forecast, dynamic=0.4, nbits=0.6):
    layers = tuple(
        dataclasses.replace(
            layer,
            forms=_FORMS,
            curves={
                **layer.curves,
                ("int8-dynamic", "unstructured"): Curve((0.0,), (dynamic,), (dynamic,), (dynamic,)),
                ("int4-nbits", "unstructured"): Curve((0.0,), (nbits,), (nbits,), (nbits,)),
            },
            encoded={bits: layer.nbytes * bits // 32 for bits in (8, 4, 3)},
        )
        for layer in forecast.layers
    )
    return dataclasses.replace(forecast, layers=layers, bits=(8, 4, 3))


def _few(*choices):
    return {name: list(choices) for name in ("large", "small")}


def _bit_loss(**scales):
    return lambda name, choice: (
        scales.get(name, 1.0) * (_COSTS.get(choice._replace(sparsity=0.0), 0.0) + choice.sparsity**2)
    )


def test_bits_go_from_dense_to_all_layers(forecast):
    family = allocated(
        _with_bits(forecast), _few(_ROUNDED, _STORED), _bit_loss(large=100.0), Goals(speedup=2), name="int8"
    )
    assert family.name == "int8"
    assert family.plans == ({}, {"small": _ROUNDED}, {"small": _ROUNDED, "large": _ROUNDED})
    assert family.expected[-1].speedup == pytest.approx(15 / (3 + 0.4 * 12))
    assert family.expected[-1].loss == pytest.approx(101e-3)


def test_rounded_inputs_are_left_where_only_the_size_counts(forecast):
    family = allocated(_with_bits(forecast), _few(_ROUNDED, _STORED), _bit_loss(), Goals(nbytes=1000))
    assert set(family.plans[-1].values()) == {_STORED}
    assert family.expected[-1].nbytes == 256**2 + 64**2


def test_a_layer_that_cannot_bear_rounded_inputs_gets_another_form(forecast):
    def loss(name, choice):
        return 10.0 if (name, choice) == ("large", _ROUNDED) else _COSTS[choice]

    plans = allocated(_with_bits(forecast), _few(_ROUNDED, _FOUR), loss, Goals(speedup=1.5)).plans
    assert {"small": _ROUNDED, "large": _FOUR} in plans


def test_zeros_and_bits_compete(forecast):
    options = dict.fromkeys(("large", "small"), choices_of(["unstructured"], [(8, 8)]))
    plans = allocated(_with_bits(forecast), options, _bit_loss(), Goals(speedup=2)).plans
    assert {choice for plan in plans for choice in plan.values()} >= {_ROUNDED, Choice(0.95)}
    # Zeros beside bits lose and save no time: no form of few bits has a use for them here.
    assert not any(choice.sparsity and choice.bits < 32 for plan in plans for choice in plan.values())


def test_bits_that_are_slower_here_are_in_no_plan_for_speed(forecast):
    slow = _with_bits(forecast, dynamic=1.5, nbits=1.2)
    found = families(slow, _few(_ROUNDED, _STORED, _FOUR), _bit_loss(), Goals(speedup=2, drop=0.1))
    assert [(family.name, family.plans) for family in found] == [("allocated", ({},))]


def test_families_of_all_kinds_none_twice(forecast):
    options = dict.fromkeys(("large", "small"), choices_of(["unstructured"], [(8, 8), (8, 32), (4, 32)]))
    model = _with_bits(forecast)
    found = families(model, options, _bit_loss(), Goals(speedup=2))
    assert [family.name for family in found] == ["allocated", "int8", "int4", "uniform"]
    bits = [{choice.bits for plan in family.plans for choice in plan.values()} for family in found]
    assert bits[1:] == [{8}, {4}, {32}]
    alone = families(model, _few(_ROUNDED), _bit_loss(), Goals(speedup=2))
    assert [family.name for family in alone] == ["allocated"], "int8 has the same plans"
    zeros = families(
        model, dict.fromkeys(options, choices_of(["unstructured"])), _bit_loss(), Goals(speedup=2)
    )
    assert [family.name for family in zeros] == ["allocated", "uniform"]
    patterns = families(model, dict.fromkeys(options, choices_of(["2:4"])), _bit_loss(), Goals(speedup=2))
    assert [family.name for family in patterns] == ["allocated"]


def test_tables_are_rounded_where_size_counts(forecast):
    model = _with_bits(dataclasses.replace(forecast, dense_bytes=10**6, rest_bytes=700_000.0))
    tables = {"words": Table(64, {8: 300_000, 4: 350_000}, {8: 1e-6, 4: 0.5})}
    small = allocated(model, _few(_STORED), _bit_loss(), Goals(nbytes=1e5), tables)
    assert small.plans[1] == {"words": Choice(bits=8)}, "the most bytes for the least loss come first"
    assert small.expected[1].nbytes == 10**6 - 300_000
    assert small.plans[-1]["words"] == Choice(bits=4)
    assert small.expected[-1].loss == pytest.approx(0.5 + 2e-5)
    fast = allocated(model, _few(_ROUNDED), _bit_loss(), Goals(speedup=2), tables)
    assert not any("words" in plan for plan in fast.plans)


def test_what_a_weight_may_become():
    assert choices_of(["2:4"], [(8, 32)]) == [Choice(0.5, "2:4"), Choice(bits=8), Choice(0.5, "2:4", 8)]
    assert choices_of([], [(4, 32)]) == [Choice(bits=4)]
    assert choices_of([]) == []
