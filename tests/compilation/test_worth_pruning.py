"""Zeros beside few bits: forms that make no use of zeros may be faster than all that do."""

import numpy as np
import pytest

from sparse_onnx.compilation.worth_pruning import below_break_even
from sparse_onnx.document import SPARSE_FORMS
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.by_bits import usual_grid
from sparse_onnx.timing.curves import Curve, LayerCurves

K, N = 128, 96
RNG = np.random.default_rng(0)


@pytest.fixture
def model(from_text):
    return from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (float[B, {K}] X) => (float[B, {N}] Y)
           {{ Y = MatMul(X, W) }}""",
        W=RNG.standard_normal((K, N)).astype(np.float32),
    )


def curves(times, spread=0.01):
    """Of forms by their names, with times of dense = 1; those that make no use of zeros have one at none."""

    def of(_candidate, _layer, _shapes, share, structure, _grid):
        found = {}
        for name, time in times.items():
            key = (name, structure if name in SPARSE_FORMS else "unstructured")
            at = share if name in SPARSE_FORMS else 0.0
            found[key] = Curve((at,), (time,), (time - spread,), (time + spread,))
        return LayerCurves(1.0, found)

    return of


def spared(model, times, grid, structure="unstructured", **options):
    return below_break_even(
        model,
        [Magnitude(sparsity=0.6, mask_structure=structure)],
        [{"X": (16, K)}],
        curves(times, **options),
        weights=None,
        min_speedup=1.02,
        grid_of=lambda _weight: grid,
    )


def test_zeros_that_the_fastest_form_has_no_use_for_are_not_made(model):
    times = {"sparse": 0.7, "int8-token": 0.3, "int8-quads": 0.4, "int8-bitmap": 0.6}
    found = spared(model, times, usual_grid(8))
    assert found == {
        "W": "not pruned: with 60.0% zeros its fastest form would be int8-token, which makes no use of them"
    }


@pytest.mark.parametrize(
    ("times", "grid"),
    [
        ({"sparse": 0.7, "int8-token": 0.3, "int8-quads": 0.2, "int8-bitmap": 0.6}, usual_grid(8)),
        ({"sparse": 0.7, "int8-token": 0.3, "int8-quads": 0.4, "int8-bitmap": 0.2}, usual_grid(8)),
        ({"sparse": 0.7, "int4-nbits": 0.5, "int4-bitmap": 0.4}, usual_grid(4)),
        (
            {"sparse": 0.4, "int4-nbits": 0.5, "int4-bitmap": 0.6},
            usual_grid(4),
        ),  # then they become floats again
        ({"sparse": 0.7, "int8-token": 0.3}, None),  # no integers are allowed
    ],
)
def test_zeros_that_the_fastest_form_uses_are_made(model, times, grid):
    assert spared(model, times, grid) == {}


def test_what_lies_within_the_noise_is_tried(model):
    times = {"sparse": 0.7, "int8-token": 0.3, "int8-quads": 0.31, "int8-bitmap": 0.6}
    assert spared(model, times, usual_grid(8), spread=0.05) == {}
    assert spared(model, times, usual_grid(8), spread=0.001).keys() == {"W"}


def test_no_form_at_all_is_faster_than_dense(model):
    times = {"sparse": 1.2, "int8-token": 1.3, "int8-quads": 1.1, "int8-bitmap": 1.6}
    (reason,) = spared(model, times, usual_grid(8)).values()
    assert "its int8-quads form would be 0.91x dense" in reason
