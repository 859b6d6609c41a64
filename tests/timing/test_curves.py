"""Curves of layers: what is read off between measured points, and what is measured. Times themselves are not judged."""

import dataclasses
import itertools

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.document import SPARSE_FORMS
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits
from sparse_onnx.passes.quantize.by_bits import usual_grid
from sparse_onnx.timing.curves import Curve, LayerCurves, combine, count_points, curve_of, measure_curves

SHARES = (0.5, 0.7, 0.9)


def curve(times, sparsities=SHARES):
    return Curve(sparsities, times, tuple(0.9 * time for time in times), tuple(1.2 * time for time in times))


def test_points_are_met_and_lines_lie_between():
    found = curve((0.8, 0.6, 0.2))
    assert [found.time(share) for share in SHARES] == pytest.approx([0.8, 0.6, 0.2])
    assert found.time(0.6) == pytest.approx(0.7)
    assert found.time(0.8) == pytest.approx(0.4)
    assert found.spread(0.8) == pytest.approx((0.36, 0.48))


def test_below_the_first_point_the_line_goes_on_and_beyond_the_last_nothing_is_gained():
    found = curve((0.8, 0.6, 0.2))
    assert found.time(0.4) == pytest.approx(0.9)
    assert found.time(0.95) == found.time(0.99) == pytest.approx(0.2)
    assert curve((0.7,), (0.5,)).time(0.3) == pytest.approx(0.7)


def nearest_falling(times):
    """The best non-increasing sequence in squares whose steps lie at all possible places: by trying all."""
    best, cost = None, np.inf
    for cuts in itertools.product((False, True), repeat=len(times) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(times)]
        parts = list(itertools.pairwise(bounds))
        fitted = np.concatenate([np.full(b - a, np.mean(times[a:b])) for a, b in parts])
        if (np.diff(fitted) <= 1e-12).all() and ((fitted - times) ** 2).sum() < cost:
            best, cost = fitted, ((fitted - times) ** 2).sum()
    return best


def test_times_never_rise_with_the_sparsity():
    rng = np.random.default_rng(0)
    shares = (0.5, 0.6, 0.7, 0.8, 0.9)
    for _ in range(50):
        times = rng.uniform(0.2, 1.5, 5)
        found = curve(tuple(times), shares)
        np.testing.assert_allclose([found.time(share) for share in shares], nearest_falling(times), rtol=1e-9)


def test_break_even_is_where_the_speedup_is_reached():
    found = curve((1.2, 0.8, 0.4))
    share = found.break_even(1.02)
    assert 0.5 < share < 0.7
    assert found.time(share) == pytest.approx(1 / 1.02)
    assert curve((0.8, 0.6, 0.2)).break_even(1.02) == pytest.approx(0.5 - (1 / 1.02 - 0.8) / 1.0)
    assert curve((1.3, 1.2, 1.0)).break_even(1.02) is None
    assert curve((0.5,), (0.5,)).break_even(1.02) == 0.5
    assert curve((0.5, 0.5, 0.2)).break_even(1.02) == 0.5


PLAIN = ("sparse", "unstructured")


def test_layers_of_one_weight_add_up():
    uses = [
        LayerCurves(3.0, {PLAIN: curve((0.8, 0.6, 0.2))}),
        LayerCurves(1.0, {PLAIN: curve((0.4, 0.2, 0.2))}),
    ]
    both = combine(uses)
    assert both.dense_ms == 4
    assert both.curves[PLAIN].times == pytest.approx((0.7, 0.5, 0.2))
    assert combine(uses[:1]).curves[PLAIN].times == pytest.approx((0.8, 0.6, 0.2))


MODEL = """<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 36] X) => (float[batch, 24] Y) { h = MatMul(X, W) a = Add(h, b) Y = Relu(a) }"""


def model(zeros=0.0):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((36, 24)).astype(np.float32)
    weight[np.abs(weight) < np.quantile(np.abs(weight), zeros)] = 0
    proto = onnx.parser.parse_model(MODEL)
    for name, array in (("W", weight), ("b", np.ones(24, np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def measured(tmp_path, source, structures, **options):
    (candidate,) = find_candidates(source)[0]
    before = candidate.weight.tensor
    found = measure_curves(
        source,
        candidate,
        candidate.layers[0],
        [(4, 36)],
        sparsities=(0.5, 0.9),
        structures=structures,
        threads=1,
        work=tmp_path,
        **options,
    )
    assert candidate.weight.tensor is before
    assert list(tmp_path.iterdir()) == []
    assert count_points(candidate.weight, (0.5, 0.9), structures) >= sum(
        len(each.times) for each in found.curves.values()
    )
    return found


def test_every_pattern_that_fits_is_measured(tmp_path):
    found = measured(tmp_path, model(), ("unstructured", "2:4", "1:8", "block:8x1", "block:5x1"))
    # 36 inputs are no multiple of 8, and 24 outputs none of 5.
    assert {name: each.sparsities for name, each in found.curves.items()} == {
        PLAIN: (0.5, pytest.approx(0.9, abs=1e-3)),
        ("sparse", "2:4"): (0.5,),
        ("sparse", "block:8x1"): (0.5, pytest.approx(0.9, abs=0.01)),
    }
    assert found.dense_ms > 0
    for each in found.curves.values():
        assert all(
            low <= time <= high for low, time, high in zip(each.low, each.times, each.high, strict=True)
        )
        assert min(each.low) > 0


def test_zeros_that_are_there_make_points_one(tmp_path):
    found = measured(tmp_path, model(zeros=0.75), ("unstructured",))
    assert [round(share, 2) for share in found.curves[PLAIN].sparsities] == [0.75, 0.9]


@pytest.mark.parametrize(("zeros", "points"), [(0.0, {}), (0.75, {PLAIN: (0.75,)})])
def test_what_is_not_pruned_is_measured_as_it_is(tmp_path, zeros, points):
    found = measured(tmp_path, model(zeros), ("unstructured", "2:4"), prunable=False)
    assert {name: each.sparsities for name, each in found.curves.items()} == points
    assert found.dense_ms > 0


LINEAR = """<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 64] X) => (float[batch, 24] Y) { Y = MatMul(X, W) }"""


def linear():
    proto = onnx.parser.parse_model(LINEAR)
    weight = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    return ir.from_proto(proto)


def with_grids(tmp_path, bits, **options):
    source = linear()
    (candidate,) = find_candidates(source)[0]
    return measure_curves(
        source,
        candidate,
        candidate.layers[0],
        [(4, 64)],
        sparsities=(0.5, 0.9),
        structures=("unstructured", "2:4"),
        grids=[usual_grid(count) for count in bits],
        threads=1,
        work=tmp_path,
        **options,
    )


def test_forms_of_few_bits_are_measured_once(tmp_path):
    found = with_grids(tmp_path, (8, 4, 3))
    once = {"int8-nbits": 32, "int8-dynamic": 8, "int8-token": 8, "int4-nbits": 32}  # none is for 3 bits
    few = {name: each.sparsities for (name, _), each in found.curves.items() if name not in SPARSE_FORMS}
    assert few == dict.fromkeys(once, (0.0,))
    encoded = {form.name: form for form in found.encoded if form.name not in SPARSE_FORMS}
    assert {name: form.activations for name, form in encoded.items()} == once
    assert all(form.bits == int(name[3]) for name, form in encoded.items())
    for form in encoded.values():
        for structure in ("unstructured", "2:4"):
            assert curve_of(found.curves, form, structure) is found.curves[form.name, "unstructured"]


def test_a_form_of_few_bits_that_needs_zeros_is_measured_over_them(tmp_path, monkeypatch):
    found = LowerMatMulNBits.form_of

    def needs_zeros(weight, grid):
        form = found(weight, grid)
        return form if isinstance(form, str) else dataclasses.replace(form, least_zeros=0.3)

    monkeypatch.setattr(LowerMatMulNBits, "form_of", needs_zeros)
    curves = with_grids(tmp_path, (4,), encoded_structures=("unstructured",)).curves
    assert curves["int4-nbits", "unstructured"].sparsities == (0.5, pytest.approx(0.9, abs=0.01))
    assert ("int4-nbits", "2:4") not in curves
    curves = with_grids(tmp_path, (4,), encoded_structures=("unstructured", "2:4")).curves
    assert curves["int4-nbits", "2:4"].sparsities == (0.5,)


def test_a_form_for_one_pattern_is_found_where_weights_have_it(tmp_path, monkeypatch):
    found = LowerMatMulNBits.form_of

    def only_halves(weight, grid):
        if weight.value.metadata_props.get(STRUCTURE_KEY) != "2:4":
            return "has another pattern"
        form = found(weight, grid)
        return form if isinstance(form, str) else dataclasses.replace(form, least_zeros=0.3)

    monkeypatch.setattr(LowerMatMulNBits, "form_of", only_halves)
    measured = with_grids(tmp_path, (4,), encoded_structures=("unstructured", "2:4"))
    few = {key: each.sparsities for key, each in measured.curves.items() if key[0] == "int4-nbits"}
    assert few == {("int4-nbits", "2:4"): (0.5,)}
    (form,) = (form for form in measured.encoded if form.name == "int4-nbits")
    assert curve_of(measured.curves, form, "unstructured") is None


@pytest.mark.parametrize("options", [{"prunable": False}, {"grids": [usual_grid(4, 128)]}])
def test_what_is_left_alone_or_too_narrow_has_no_bits(tmp_path, options):
    source = linear()
    (candidate,) = find_candidates(source)[0]
    found = measure_curves(
        source,
        candidate,
        candidate.layers[0],
        [(4, 64)],
        **{"sparsities": (0.5,), "structures": ("unstructured",), "grids": [usual_grid(8)], "threads": 1}
        | options,
        work=tmp_path,
    )
    assert found.encoded == ()
    assert all(name == "sparse" for name, _ in found.curves)


def test_forms_that_not_all_uses_of_a_weight_have_are_left_out():
    once = Curve((0.0,), (0.5,), (0.5,), (0.5,))
    first = LayerCurves(3.0, {PLAIN: curve((0.8, 0.6, 0.2)), ("int8-dynamic", "unstructured"): once})
    both = combine([first, LayerCurves(1.0, {PLAIN: curve((0.4, 0.2, 0.2))})])
    assert set(both.curves) == {PLAIN}
    assert set(combine([first]).curves) == set(first.curves)
