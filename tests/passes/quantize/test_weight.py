"""quant.round: the grid against an independent one, zeros, types, what is left alone; as a part of a compilation."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import sparse_onnx
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import Pipeline, Stage, in_memory
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.round import Round, on_grid
from sparse_onnx.verification.dense_reference import dense_reference

RNG = np.random.default_rng(3)
U, W = (RNG.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 4)))


@pytest.fixture
def model(from_text):
    """U [16, 8] stored as it is, W [8, 4] transposed."""
    return from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 16] X) => (float[B, 4] Y)
           { A = MatMul(X, U) Y = Gemm<transB = 1>(A, W) }""",
        U=U,
        W=np.ascontiguousarray(W.T),
    )


def matrices(model):
    return {weight.name: np.array(weight.matrix()) for weight in find_weights(model)[0]}


def nearest(matrix, bits):
    """The nearest of all values that each channel may have, by looking at every one of them."""
    top = 2 ** (bits - 1) - 1
    grid = np.arange(-top, top + 1)[:, None, None] / top * np.abs(matrix.astype(np.float64)).max(0)
    return np.take_along_axis(grid, np.abs(grid - matrix).argmin(0)[None], 0)[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_is_the_nearest_of_its_channels_values(model, bits):
    result = Round(bits=bits)(model)
    for name, matrix in matrices(model).items():
        np.testing.assert_allclose(matrix, nearest({"U": U, "W": W}[name], bits), rtol=1e-6)
        assert all(len(np.unique(np.abs(channel))) <= 2 ** (bits - 1) for channel in matrix.T)
    assert result.statistics == {"weights": 2, "changed": 2}
    assert {layer.name: layer.zeros_after for layer in result.layers} == {
        name: np.count_nonzero(matrix == 0) for name, matrix in matrices(model).items()
    }


def test_answers_move_by_half_a_step_at_most(model, run):
    x = RNG.standard_normal((5, 16)).astype(np.float32)
    Round(bits=8, targets=("U",))(model)
    bound = np.abs(x).sum(1, keepdims=True) @ (np.abs(U).max(0) / 127 / 2)[None] @ np.abs(W)
    error = np.abs(run(model, {"X": x})["Y"] - x.astype(np.float64) @ U @ W)
    assert (error <= bound + 1e-5).all()
    assert error.max() > 1e-4, "else nothing was rounded"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_types_are_kept_and_a_second_time_changes_nothing(dtype, bits):
    matrix = RNG.standard_normal((64, 8)).astype(dtype)
    once = on_grid(matrix, bits)
    assert once.dtype == dtype
    np.testing.assert_array_equal(on_grid(once, bits), once)


@given(
    arrays.arrays(np.float32, (5, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(2, 8),
)
def test_any_finite_weight(matrix, bits):
    once = on_grid(matrix, bits)
    assert np.isfinite(once).all()
    assert (once[matrix == 0] == 0).all()
    np.testing.assert_array_equal(np.abs(once).max(0), np.abs(matrix).max(0))
    np.testing.assert_array_equal(on_grid(once, bits), once)


def test_what_is_left_alone(model):
    model.graph.initializers["U"].const_value = ir.tensor(np.where(U > 2, np.nan, U), name="U")
    result = Round(ignore=("W",))(model)
    assert not result.modified
    assert {(place.place, place.reason) for place in result.declined} == {
        ("U", "holds NaN or Inf"),
        ("W", "listed in ignore"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"quant\.round: bits must be 2 to 8, not 1"),
        ({"bits": 9}, "bits must be 2 to 8, not 9"),
        ({"bits": 8.0}, "bits must be an integer"),
        ({"targets": ("re:[",)}, "is not a regular expression"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        Round(**options)


def test_an_unknown_target(model):
    with pytest.raises(UsageError, match="'V' matches no weight"):
        Round(targets=("V",))(model)


# -- in a recipe -------------------------------------------------------------------------------------

RECIPE = """
version: 1
stages:
  - name: prune
    modifiers: [prune.magnitude: {sparsity: 0.75, targets: [U]}]
  - name: quantize
    modifiers: [quant.round: {bits: 8}]
"""


def test_it_comes_after_pruning():
    assert Round.stage is Stage.QUANTIZE
    assert [step.name for step in parse_recipe(RECIPE).modifiers()] == ["prune.magnitude", "quant.round"]
    with pytest.raises(
        UsageError, match=r"prune\.magnitude \(prune\) cannot run after quant\.round \(quantize\)"
    ):
        Pipeline((Round(), Magnitude(sparsity=0.5)))


@pytest.mark.parametrize(("sparsity", "decision"), [(0.5, "dense"), (0.75, "sparse")])
def test_a_compilation_keeps_what_was_rounded(model, tmp_path, sparsity, decision):
    """Also in a layer that stays dense, whose zeros alone would be given back."""
    ir.save(model, tmp_path / "model.onnx")
    result = sparse_onnx.optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        recipe=parse_recipe(RECIPE),
        settings={"quant.round.bits": 4, "prune.magnitude.sparsity": sparsity},
        benchmark=False,
    )
    rows = {row["name"]: row for row in result.report["layers"]}
    assert {name: row["decision"] for name, row in rows.items()} == {"U": decision, "W": "dense"}
    assert (rows["U"]["pruning"], rows["W"]["pruning"]) == ("pruned", "never")
    pruned = np.where(np.abs(U) < np.sort(np.abs(U), axis=None)[int(sparsity * U.size)], 0, U)
    written = ir.from_proto(onnx.load(result.folder / "model.onnx"))
    dense = dense_reference(written, in_memory).graph.initializers.values()
    found = {array.shape: array for array in (value.const_value.numpy() for value in dense)}
    np.testing.assert_array_equal(found[U.shape], on_grid(pruned, 4))
    np.testing.assert_array_equal(found[W.T.shape], on_grid(W, 4).T)
    assert result.report["summary"]["written"] == "compiled"
    assert result.report["verification"]["against_original"]["relative_error"] > 1e-3
    assert result.report["verification"]["against_pruned_dense"]["relative_error"] < 1e-5


def test_alone_it_is_written_too(model, tmp_path):
    ir.save(model, tmp_path / "model.onnx")
    recipe = parse_recipe("version: 1\nstages: [{name: quantize, modifiers: [quant.round: {bits: 3}]}]")
    result = sparse_onnx.optimize(tmp_path / "model.onnx", tmp_path / "out", recipe=recipe, benchmark=False)
    for name, matrix in matrices(ir.from_proto(onnx.load(result.folder / "model.onnx"))).items():
        np.testing.assert_array_equal(matrix, on_grid({"U": U, "W": W}[name], 3))
