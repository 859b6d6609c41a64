"""Speed, size and error of plans, from curves that are given: arithmetic, decisions, and bad plans."""

import dataclasses

import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.forecast import Forecast, LayerForecast
from sparse_onnx.analysis.sensitivity import Loss
from sparse_onnx.analysis.time_model import Anchor, Sums, fit
from sparse_onnx.errors import UsageError
from sparse_onnx.passes.lower.dynamic_int8 import LowerDynamicInt8
from sparse_onnx.passes.lower.encoded_linear import EncodedForm
from sparse_onnx.passes.lower.forms import Form, sparse_form
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.sparse_ops.formats.base import ONE_RUN
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC
from sparse_onnx.timing.curves import Curve

PLAIN = ("sparse", "unstructured")


def curve(*times, sparsities=(0.5, 0.7, 0.9)):
    return Curve(sparsities, times, times, times)


FAST = {PLAIN: curve(0.8, 0.5, 0.2), ("sparse", "2:4"): curve(0.7, sparsities=(0.5,))}
SLOW = {PLAIN: curve(1.4, 1.1, 0.9)}


def layer(name, curves, **changes):
    values = {
        "name": name,
        "module": "",
        "op_type": "MatMul",
        "kind": "linear",
        "shape": (64, 128),
        "rows": 10,
        "sparsity": 0.0,
        "reason": "",
        "companion": False,
        "outputs": ONE_RUN,
        "forms": (sparse_form(LowerSparseMatMul),),
        "packed_bytes": {"sparse": 0},
        "key": 0,
        "dense_ms": 10.0,
        "share": None,
        "curves": curves,
        **changes,
    }
    return LayerForecast(**values)


def forecast(*layers, rest=5.0, dense_ms=None, **changes):
    """A model whose time is ``rest`` and the sum of its layers' times."""
    total = sum(each.dense_ms for each in layers)
    values = {
        "layers": layers,
        "structures": ("unstructured", "2:4"),
        "times": fit([Anchor(Sums(total, 0.0, 0.0), rest + total, 0.0)]),
        "dense_ms": rest + total if dense_ms is None else dense_ms,
        "dense_bytes": 100_000,
        "rest_bytes": 1000.0,
        "min_speedup": 1.02,
        "anchored": ("unstructured",),
        **changes,
    }
    return Forecast(**values)


def test_times_and_bytes_add_up():
    model = forecast(layer("a", FAST), layer("b", SLOW), layer("c", FAST))
    found = model.outlook(model.uniform(0.7))
    assert found.forms == {"a": "sparse", "c": "sparse"}
    assert found.milliseconds == pytest.approx(5 + 5 + 10 + 5)
    assert found.speedup == pytest.approx(35 / 25)
    assert found.low < found.speedup < found.high
    assert found.nbytes == pytest.approx(1000 + 4 * 64 * 128 + 2 * CHUNKED_CSC.expected_nbytes(64, 128, 0.7))
    assert model.layer_milliseconds("a", Choice(0.7)) == pytest.approx(5)
    assert model.layer_milliseconds("b", Choice(0.7)) == pytest.approx(10)
    assert model.layer_bytes("b", Choice(0.9)) == pytest.approx(CHUNKED_CSC.expected_nbytes(64, 128, 0.9))


def test_plans_may_differ_by_layer_and_pattern():
    model = forecast(layer("a", FAST), layer("b", FAST), layer("c", FAST))
    found = model.outlook({"a": Choice(0.9), "b": Choice(0.5, "2:4")})
    assert found.milliseconds == pytest.approx(5 + 2 + 7 + 10)
    assert found.forms == {"a": "sparse", "b": "sparse"}


def test_nothing_changes_without_zeros():
    model = forecast(layer("a", FAST), rest_bytes=500.0)
    found = model.outlook({})
    assert (found.speedup, found.low, found.high, found.forms) == (1, 1, 1, {})
    assert (found.nbytes, found.smaller) == (model.dense_bytes, 1), "the file is written as it was"
    # Few zeros prune the layer but leave it dense.
    assert model.outlook({"a": Choice(0.2)}).forms == {}


def test_zeros_that_are_there_count():
    model = forecast(layer("a", FAST, sparsity=0.7, packed_bytes={"sparse": 123}), layer("b", FAST))
    found = model.outlook({})
    assert found.forms == {"a": "sparse"}
    assert found.milliseconds == pytest.approx(5 + 5 + 10)
    assert found.nbytes == 1000 + 123 + 4 * 64 * 128
    assert model.outlook({"a": Choice(0.5)}).milliseconds == pytest.approx(found.milliseconds)


def test_layers_that_pruning_leaves_alone_are_in_no_uniform_plan():
    model = forecast(layer("a", FAST), layer("b", FAST, reason="listed in ignore"), layer("c", SLOW))
    assert model.uniform(0.7) == {"a": Choice(0.7), "c": Choice(0.7)}
    assert model.uniform(None, "2:4") == {"a": Choice(0.5, "2:4")}  # c cannot have the pattern


def test_companions_follow_the_layers_of_their_kind():
    why = "belongs to a depthwise convolution"
    beside = layer("d", {PLAIN: curve(0.5, sparsities=(0.0,))}, companion=True, reason=why)
    model = forecast(layer("a", FAST), beside)
    assert model.outlook(model.uniform(0.9)).forms == {"a": "sparse", "d": "sparse"}
    assert model.outlook({}).forms == {}
    assert model.outlook({"d": Choice(0.9)}).forms == {}
    other = forecast(layer("a", FAST), beside, layer("e", FAST, kind="convolution"))
    assert other.outlook({"e": Choice(0.9)}).forms == {"e": "sparse"}


def test_a_companion_that_is_pruned_is_a_layer_like_others():
    narrow = layer("n", {PLAIN: curve(0.9, 0.8, 0.4, sparsities=(0.0, 0.5, 0.9))}, companion=True)
    model = forecast(narrow, layer("a", FAST))
    assert model.outlook({"n": Choice(0.5)}).forms == {"n": "sparse"}
    assert model.outlook({}).forms == {}
    found = model.outlook({"a": Choice(0.9)})
    assert found.forms == {"n": "sparse", "a": "sparse"}  # with the zeros that it has


@dataclasses.dataclass(frozen=True)
class Halved(Form):
    """Made up: any weight in half the bytes."""

    def expected_nbytes(self, shape, sparsity, structure, block):
        return 2.0 * shape[0] * shape[1]


FORMS = (sparse_form(LowerSparseMatMul), Halved("halved", LowerSparseMatMul))
BOTH = FAST | {("halved", "unstructured"): curve(0.6, 0.6, 0.6)}


def test_of_several_forms_the_fastest_is_taken():
    model = forecast(layer("a", BOTH, forms=FORMS))
    few, many = (model.outlook({"a": Choice(share)}) for share in (0.5, 0.9))
    assert (few.forms, many.forms) == ({"a": "halved"}, {"a": "sparse"})
    assert few.milliseconds == pytest.approx(5 + 6)
    assert few.nbytes == 1000 + 2 * 64 * 128
    assert model.outlook({"a": Choice(0.5, "2:4")}).forms == {"a": "sparse"}  # the other has no such curve
    (own,) = model.layers
    alone = [own.form_break_even(form, "unstructured", 1.02) for form in FORMS]
    assert alone == [pytest.approx(0.5 - (1 / 1.02 - 0.8) / 1.5), 0.5]
    assert own.break_even("unstructured", 1.02) == min(alone)
    assert own.break_even("2:4", 1.02) == own.form_break_even(FORMS[0], "2:4", 1.02) == 0.5
    none = forecast(layer("a", BOTH, forms=FORMS, packed_bytes={"halved": 77}))
    assert none.outlook({}).nbytes == 1000 + 77


def test_companions_get_the_forms_around_them():
    """Alone it would be fastest halved, and with sparse layers around it sparse."""
    beside = layer(
        "d",
        {PLAIN: curve(0.5, sparsities=(0.0,)), ("halved", "unstructured"): curve(0.4, sparsities=(0.0,))},
        companion=True,
        forms=FORMS,
        packed_bytes={"sparse": 1, "halved": 2},
    )
    model = forecast(layer("a", FAST, forms=FORMS), beside)
    assert model.outlook({"a": Choice(0.9)}).forms == {"a": "sparse", "d": "sparse"}
    assert model.outlook({}).forms == {}
    other = forecast(layer("a", BOTH, forms=FORMS), beside)
    assert other.outlook({"a": Choice(0.5)}).forms == {"a": "halved", "d": "halved"}


def test_the_least_gainful_half_is_given_up_while_the_whole_is_slower():
    anchors = [
        Anchor(Sums(30, 0, 0), 20, 0),
        Anchor(Sums(0, 21, 0.9), 22, 0),
        Anchor(Sums(15, 10, 0.5), 21, 0),
    ]
    layers = [layer(name, FAST, dense_ms=ms) for name, ms in (("a", 5.0), ("b", 10.0), ("c", 15.0))]
    model = forecast(*layers, times=fit(anchors), dense_ms=20.0)
    found = model.outlook(model.uniform(0.5))
    assert found.given_up[:2] == ("a", "b")
    assert not set(found.given_up) & set(found.forms)
    assert found.speedup <= 1.05


def test_patterns_that_no_anchor_has_are_less_sure():
    model = forecast(layer("a", {name: curve(0.5, sparsities=(0.5,)) for name in FAST}))
    first, second = model.outlook(model.uniform(0.5)), model.outlook(model.uniform(None, "2:4"))
    assert first.speedup == pytest.approx(second.speedup)
    assert second.high > first.high


def test_sums_beyond_all_anchors_are_less_sure():
    anchors = [Anchor(Sums(20, 0, 0), 16, 0), Anchor(Sums(0, 16, 0.5), 12, 0), Anchor(Sums(0, 10, 0.7), 6, 0)]
    model = forecast(layer("a", FAST), layer("b", FAST), times=fit(anchors), dense_ms=16.0)
    inside, beyond = (model.outlook(model.uniform(share)) for share in (0.7, 0.9))
    assert inside.high / inside.speedup == pytest.approx(1.05)
    assert beyond.high / beyond.speedup > 1.2
    assert beyond.speedup > 16 / 2.4, "4 ms alone: proportion makes it 2.4"


def test_errors_add_up_in_squares():
    def loss(gain):
        shares = (0.5, 0.9)
        return Loss(
            gain, {"unstructured": shares, "2:4": (0.5,)}, {"unstructured": (0.1, 0.5), "2:4": (0.2,)}
        )

    model = forecast(layer("a", FAST, loss=loss(0.3)), layer("b", FAST, loss=loss(0.4)))
    found = model.outlook(model.uniform(0.5)).error
    assert found == pytest.approx(2 / 3 * 0.05, rel=2e-3)
    assert model.error({"a": Choice(0.7)}) == pytest.approx(2 / 3 * 0.3 * 0.3, rel=5e-3)
    assert model.error({"a": Choice(0.5, "2:4")}) == pytest.approx(2 / 3 * 0.06, rel=2e-3)
    assert model.error({}) == 0
    huge = forecast(layer("a", FAST, loss=loss(1e3)))
    assert huge.error({"a": Choice(0.9)}) == pytest.approx(1, rel=1e-3)


def test_no_error_is_made_up():
    model = forecast(layer("a", FAST))
    assert model.outlook(model.uniform(0.5)).error is None
    assert model.outlook({}).error is None
    left_alone = forecast(layer("a", FAST, reason="listed in ignore"))
    assert left_alone.outlook(left_alone.uniform(0.5)).error is None
    assert forecast().outlook({}).error is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"z": Choice(0.5)}, "unknown layer"),
        ({"a": Choice(1.0)}, "below 1"),
        ({"a": Choice(0.7, "2:4")}, "implies sparsity 0.5"),
        ({"a": Choice(0.5, "block:4x1")}, "valid: 2:4, unstructured"),
    ],
)
def test_bad_plans_say_what_is_wrong(plan, message):
    with pytest.raises(UsageError, match=message):
        forecast(layer("a", FAST)).outlook(plan)


def test_uniform_plans_are_checked():
    model = forecast(layer("a", FAST))
    with pytest.raises(UsageError, match="needs a sparsity"):
        model.uniform(None)
    with pytest.raises(UsageError, match="was measured"):
        model.uniform(0.5, "block:8x1")


DYNAMIC = EncodedForm("int8-dynamic", LowerDynamicInt8, exact=False, bits=8, activations=8)
BLOCKS8 = EncodedForm("int8-nbits", LowerMatMulNBits, exact=False, bits=8, block=16)
BLOCKS4 = EncodedForm("int4-nbits", LowerMatMulNBits, exact=False, bits=4, block=16, zero_points=True)


def encoded_layer(name, times, **changes):
    """A layer that can have 8, 4 and 3 bits; ``times`` of its forms for these, by their names."""
    few = {(form, "unstructured"): curve(time, sparsities=(0.0,)) for form, time in times.items()}
    forms = tuple(form for form in (DYNAMIC, BLOCKS8, BLOCKS4) if form.name in times)
    return layer(
        name,
        FAST | few,
        **{"forms": (sparse_form(LowerSparseMatMul), *forms), "encoded": {8: 8448, 4: 4600, 3: 3500}}
        | changes,
    )


ALL = {"int8-dynamic": 0.4, "int8-nbits": 0.6, "int4-nbits": 0.3}


def few_bits(*layers, **changes):
    return forecast(*layers, **{"bits": (8, 4, 3)} | changes)


@pytest.mark.parametrize(
    ("choice", "form", "time", "nbytes"),
    [
        (Choice(), "dense", 1, 4 * 64 * 128),
        (Choice(bits=8, activations=8), "int8-dynamic", 0.4, 64 * 128 + 4 * 128),
        (Choice(bits=8), "int8-nbits", 0.6, 64 * 128 + 4 * 4 * 128),  # may not round all of the input
        (Choice(bits=4), "int4-nbits", 0.3, 64 * 64 + 4 * 128 * 4.5),
        (Choice(bits=4, activations=8), "int4-nbits", 0.3, 64 * 64 + 4 * 128 * 4.5),
        (
            Choice(bits=3, activations=8),
            "dense",
            1,
            3500,
        ),  # no form is for 3 bits: unpacked when it is loaded
        (Choice(0.5, bits=8, activations=8), "int8-dynamic", 0.4, 64 * 128 + 4 * 128),
        (Choice(0.5, "2:4", bits=8, activations=8), "int8-dynamic", 0.4, 64 * 128 + 4 * 128),
    ],
)
def test_bits_have_their_forms_times_and_bytes(choice, form, time, nbytes):
    model = few_bits(encoded_layer("a", ALL))
    assert model.outlook({"a": choice}).forms == ({} if form == "dense" else {"a": form})
    assert model.layer_milliseconds("a", choice) == pytest.approx(10 * time)
    assert model.layer_bytes("a", choice) == pytest.approx(nbytes)
    assert model.outlook({"a": choice}).nbytes == pytest.approx(
        model.dense_bytes if choice == Choice() else 1000 + nbytes
    )


def test_a_model_in_few_bits_is_fused_though_no_layer_is_faster():
    times = fit([Anchor(Sums(10.0, 0.0, 0.0), 12.0, 0.0)])  # fused; the source takes 15
    model = few_bits(encoded_layer("a", {}), times=times, dense_ms=15.0)
    found = model.outlook({"a": Choice(bits=4)})
    assert (found.forms, found.milliseconds) == ({}, pytest.approx(12))
    assert model.outlook({}).milliseconds == 15


def test_a_sparse_form_of_floats_takes_few_bits_only_where_that_is_no_larger():
    model = few_bits(encoded_layer("a", {"int8-nbits": 0.9}))
    for bits, share, form in ((8, 0.9, "sparse"), (8, 0.5, "int8-nbits"), (4, 0.8, "dense")):
        found = model.outlook({"a": Choice(share, bits=bits)})
        assert found.forms == ({} if form == "dense" else {"a": form})
    assert CHUNKED_CSC.expected_nbytes(64, 128, 0.9) < 8448 < CHUNKED_CSC.expected_nbytes(64, 128, 0.5)


def test_a_form_of_few_bits_may_have_a_curve_over_zeros():
    sparse8 = EncodedForm("sparse8", LowerDynamicInt8, exact=False, bits=8, least_zeros=0.3)
    curves = FAST | {("sparse8", "unstructured"): curve(0.3, 0.2, 0.1)}
    both = layer("a", curves, forms=(sparse_form(LowerSparseMatMul), sparse8), encoded={8: 8448})
    model = few_bits(both)
    assert model.layer_milliseconds("a", Choice(0.7, bits=8)) == pytest.approx(2)
    assert model.outlook({"a": Choice(0.2, bits=8)}).forms == {}, "too few zeros"
    assert model.outlook({"a": Choice(0.5, "2:4", bits=8)}).forms == {}, "not measured with that pattern"
    assert model.outlook({"a": Choice(0.7)}).forms == {"a": "sparse"}, "floats have no such form"


def test_which_layers_round_tokens_is_told_by_their_fastest_form():
    token = dataclasses.replace(DYNAMIC, name="int8-token", by_token=True)
    curves = FAST | {
        ("int8-dynamic", "unstructured"): curve(0.4, sparsities=(0.0,)),
        ("int8-token", "unstructured"): curve(0.3, sparsities=(0.0,)),
    }
    both = layer("a", curves, forms=(sparse_form(LowerSparseMatMul), DYNAMIC, token), encoded={8: 8448})
    assert both.rounds_tokens(1.02)
    assert not dataclasses.replace(both, forms=both.forms[:2]).rounds_tokens(1.02)
    assert not layer("b", FAST).rounds_tokens(1.02)
    assert not both.rounds_tokens(100.0), "it stays dense"
    assert both.best_form(Choice(bits=8, activations=8), 1.02) == "int8-token"


@pytest.mark.parametrize(
    ("coarse", "best"), [(0.26, "int8-dynamic"), (0.285, "int8-token"), (0.31, "int8-token")]
)
def test_a_form_that_rounds_coarsely_must_be_a_tenth_faster_as_for_the_guard(coarse, best):
    token = dataclasses.replace(DYNAMIC, name="int8-token", by_token=True)
    curves = {
        ("int8-dynamic", "unstructured"): curve(coarse, sparsities=(0.0,)),
        ("int8-token", "unstructured"): curve(0.3, sparsities=(0.0,)),
    }
    found = layer("a", curves, forms=(DYNAMIC, token), encoded={8: 8448})
    assert found.best_form(Choice(bits=8, activations=8), 1.02) == best


def test_the_same_bits_everywhere_are_for_those_that_can_have_them():
    narrow = layer("b", FAST)
    ignored = encoded_layer("c", ALL, reason="listed in ignore", encoded={})
    model = few_bits(encoded_layer("a", ALL), narrow, ignored)
    assert model.uniform(0.0, bits=8)["a"] == Choice(bits=8, activations=8)
    assert model.uniform(0.5, bits=4) == {"a": Choice(0.5, bits=4, activations=8), "b": Choice(0.5)}
    assert model.outlook(model.uniform(0.0, bits=8)).forms == {"a": "int8-dynamic"}
    assert model.precisions("a") == ((32, 32), (8, 32), (8, 8), (4, 32), (3, 32))
    assert model.precisions("b") == ((32, 32),)


def test_bits_of_an_anchor_have_its_factor():
    layers = [encoded_layer(name, ALL) for name in "ab"]
    dense = Anchor(Sums(20.0, 0.0, 0.0), 25.0, 0.0)
    eight = Anchor(Sums(0.0, 0.0, 0.0, {8: 8.0}), 5 + 2 * 8.0, 0.0)  # twice as slow as alone
    model = few_bits(*layers, times=fit([dense, eight]))
    assert model.outlook(model.uniform(0.0, bits=8)).milliseconds == pytest.approx(eight.whole_ms, rel=1e-6)
    half = model.outlook({"a": Choice(bits=8, activations=8)}).milliseconds
    assert half == pytest.approx((dense.whole_ms + eight.whole_ms) / 2, rel=1e-6)
    plain = few_bits(*layers, times=fit([dense]))
    assert plain.outlook(plain.uniform(0.7)) == model.outlook(model.uniform(0.7)), "floats are as before"
    four = model.outlook(model.uniform(0.0, bits=4))
    assert four.milliseconds == pytest.approx(5 + 2 * 3, rel=0.01)
    assert four.high / four.speedup > 1.05, "no anchor has these bits"


def test_errors_of_bits_and_of_rounded_activations():
    loss = Loss(0.5, {"unstructured": (0.5,)}, {"unstructured": (0.3,)}, (0.0, 0.5), {8: (0.02, 0.0)}, 0.04)
    model = few_bits(encoded_layer("a", ALL, loss=loss))
    weights = 0.5 * 0.02  # layers behind make up for zeros, not for rounding
    assert model.error({"a": Choice(bits=8)}) == pytest.approx(weights, rel=1e-3)
    assert model.error({"a": Choice(bits=8, activations=8)}) == pytest.approx(
        (weights**2 + 0.02**2) ** 0.5, rel=1e-3
    )
    assert model.error({"a": Choice(0.5, bits=8)}) == pytest.approx(2 / 3 * 0.15, rel=0.01)
    assert model.error({"a": Choice(bits=4)}) is None, "not measured"
    # A layer that stays dense keeps its bits, with the zeros that they were found for, and rounds nothing.
    slow = few_bits(encoded_layer("a", {}, loss=loss), min_speedup=1e6)
    found = slow.outlook({"a": Choice(0.5, bits=8, activations=8)})
    assert (found.forms, found.error) == ({}, pytest.approx(2 / 3 * 0.15, rel=0.01))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"a": Choice(bits=2)}, "bits must be one that was measured"),
        ({"a": Choice(bits=7)}, r"8, 4, 3, 32\), not 7"),
    ],
)
def test_bits_that_were_not_measured(plan, message):
    with pytest.raises(UsageError, match=message):
        few_bits(encoded_layer("a", ALL)).outlook(plan)
