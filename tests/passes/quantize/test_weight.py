"""quant.weight: integers against a search over all values, zeros, types, what is left alone; in a compilation."""

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
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import CalibrationData, PassContext, Pipeline, Stage, fingerprint, in_memory
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot_methods import Auto
from sparse_onnx.passes.quantize import weight as weight_module
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.solvers import GridOptions, RtnQuantizer
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
    return {weight.name: np.array(weight.matrix()) for weight in find_weights(model, encoded=True)[0]}


def rounding(**options):
    """Plain rounding with a scale for each channel."""
    return QuantizeWeights(method="rtn", group_size=0, **options)


def nearest(matrix, bits):
    """The nearest of all values that each channel may have, by looking at every one of them."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wide = matrix.astype(np.float64)
    scale = np.maximum(wide.min(0) / low, wide.max(0) / high)
    grid = np.arange(low, high + 1)[:, None, None] * scale
    return np.take_along_axis(grid, np.abs(grid - wide).argmin(0)[None], 0)[0]


@pytest.mark.parametrize("storage", ["unpack", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_is_the_nearest_of_its_channels_values(model, bits, storage):
    result = rounding(bits=bits, storage=storage, scale_type="float32")(model)
    for name, matrix in matrices(model).items():
        np.testing.assert_allclose(matrix, nearest({"U": U, "W": W}[name], bits), rtol=1e-6, atol=1e-7)
        assert all(len(np.unique(channel)) <= 2**bits for channel in matrix.T)
    assert (result.statistics["weights"], result.statistics["changed"]) == (2, 2)
    for layer in result.layers:
        assert layer.zeros_after == np.count_nonzero(matrices(model)[layer.name] == 0)
        assert (layer.bits, layer.group_size) == (bits, 0)
    assert result.statistics["bytes"] == sum(layer.nbytes for layer in result.layers)


def test_bytes_are_those_of_integers_and_scales(model):
    result = rounding(bits=4)(model)
    assert {layer.name: layer.nbytes for layer in result.layers} == {
        "U": 16 * 8 // 2 + 8 * 2,
        "W": 8 * 4 // 2 + 4 * 2,
    }


def test_answers_move_by_half_a_step_at_most(model, run):
    x = RNG.standard_normal((5, 16)).astype(np.float32)
    rounding(bits=8, targets=("U",))(model)
    bound = np.abs(x).sum(1, keepdims=True) @ (np.abs(U).max(0) / 127 / 2)[None] @ np.abs(W)
    error = np.abs(run(model, {"X": x})["Y"] - x.astype(np.float64) @ U @ W)
    assert (error <= 1.01 * bound + 1e-5).all()
    assert error.max() > 1e-4, "else nothing was rounded"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_keep_their_type(from_text, dtype):
    name = {"float64": "double", "float32": "float"}.get(np.dtype(dtype).name, np.dtype(dtype).name)
    model = from_text(
        f'<ir_version: 9, opset_import: ["" : 17]> g ({name}[B, 16] X) => ({name}[B, 8] Y) {{ Y = MatMul(X, U) }}',
        U=U.astype(dtype),
    )
    rounding(bits=5, storage="float")(model)
    assert model.graph.initializers["U"].const_value.numpy().dtype == dtype
    assert all(len(np.unique(channel)) <= 32 for channel in matrices(model)["U"].astype(np.float32).T)


@given(
    arrays.arrays(np.float32, (5, 3), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    st.integers(2, 8),
    st.booleans(),
)
def test_any_finite_weight(matrix, bits, symmetric):
    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 17]> g (float[B, 5] X) => (float[B, 3] Y) <float[5, 3] M = {'
            + ", ".join(["1.0"] * 15)
            + "}> { Y = MatMul(X, M) }"
        )
    )
    model.graph.initializers["M"].const_value = ir.tensor(matrix, name="M")
    rounding(bits=bits, symmetric=symmetric, scale_type="float32")(model)
    after = matrices(model)["M"]
    assert np.isfinite(after).all()
    assert (after[matrix == 0] == 0).all()
    step = (matrix.max(0).clip(0) - matrix.min(0).clip(None, 0)) / (2**bits - 1) * (2 if symmetric else 1)
    assert (np.abs(after.astype(np.float64) - matrix) <= 1.01 * step + 1e-37).all()


# -- what is left alone ------------------------------------------------------------------------------


def test_what_is_left_alone(model):
    model.graph.initializers["U"].const_value = ir.tensor(np.where(U > 2, np.nan, U), name="U")
    result = rounding(ignore=("W",))(model)
    assert not result.modified
    assert {(place.place, place.reason) for place in result.declined} == {
        ("U", "holds NaN or Inf"),
        ("W", "listed in ignore"),
    }


def test_a_group_that_is_longer_than_the_inputs(model):
    result = QuantizeWeights(group_size=16)(model)
    assert {layer.name for layer in result.layers} == {"U"}
    assert [(place.place, place.reason) for place in result.declined] == [
        ("W", "its 8 inputs are fewer than a group of 16")
    ]


def test_a_scale_that_float16_does_not_have(model):
    model.graph.initializers["U"].const_value = ir.tensor(U * np.float32(1e7), name="U")
    result = rounding(bits=4)(model)
    (place,) = result.declined
    assert place.place == "U"
    assert "above 6.55e+04, the largest float16 scale: store scales as float32" in place.reason
    assert {layer.name for layer in result.layers} == {"W"}
    assert not rounding(bits=4, scale_type="float32")(model).declined[1:]


def test_weights_with_bits_of_their_own(model):
    """More than 4 bits: a symmetric scale an output, whatever groups and zero points the others have."""
    step = QuantizeWeights(method="rtn", bits=4, group_size=16, symmetric=False).with_bits({"U": 3, "W": 8})
    grouped = QuantizeWeights(method="rtn", bits=8, group_size=16).with_bits({"U": 7})(model.clone())
    assert [(layer.bits, layer.group_size) for layer in grouped.layers] == [(7, 16)]
    result = step(model)
    assert step.targets == ("U", "W")
    assert {layer.name: (layer.bits, layer.group_size) for layer in result.layers} == {
        "U": (3, 16),
        "W": (8, 0),
    }
    np.testing.assert_allclose(matrices(model)["W"], nearest(W, 8), atol=1e-3 * np.abs(W).max())
    assert step.stand_in() == step


def test_what_has_no_bits_of_its_own_has_those_of_all(model):
    step = rounding(bits=4, bits_of={"W": 8})
    assert {layer.name: layer.bits for layer in step(model.clone()).layers} == {"U": 4, "W": 8}
    alone = rounding(bits=4).with_bits({"U": 2})(model)
    assert {layer.name: layer.bits for layer in alone.layers} == {"U": 2}
    assert [(place.place, place.reason) for place in alone.declined] == [("W", "not among targets")]
    with pytest.raises(UsageError, match="bits_of: 'V' is no weight of a layer"):
        rounding(bits_of={"V": 8})(model)


def test_what_is_quantized_already(model):
    rounding(bits=4)(model)
    result = rounding(bits=8)(model)
    assert not result.modified
    assert {place.reason for place in result.declined} == {
        "is quantized: 4 bits with a scale for 16 inputs",
        "is quantized: 4 bits with a scale for 8 inputs",
    }


def test_dequantize_falls_back_and_says_so(model):
    result = rounding(bits=4, storage="dequantize")(model)
    assert {place.reason for place in result.declined} == {
        "unpacked, not by DequantizeLinear: 4 bits need opset 21, the model has 17"
    }
    assert len(result.layers) == 2
    assert {node.op_type for node in model.graph} == {"Unpack4", "Transpose", "MatMul", "Gemm"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"quant\.weight: bits must be 2 to 8, not 1"),
        ({"bits": 9}, "bits must be 2 to 8, not 9"),
        ({"bits": 8.0}, "bits must be an integer"),
        ({"bits_of": {"U": 9}}, r"bits_of\['U'\] must be 2 to 8, not 9"),
        ({"group_size": 8}, "group_size must be 16 to 256, or 0"),
        ({"group_size": 512}, "group_size must be 16 to 256, or 0"),
        ({"method": "best"}, "method must be"),
        ({"storage": "zip"}, "storage must be"),
        ({"scale_type": "float64"}, "scale_type must be"),
        ({"method": "gptq", "dampening_frac": -1.0}, "dampening_frac must be 0 or more"),
        ({"calibration": "oneshot"}, "hqq uses no data: give no calibration"),
        ({"method": "rtn", "bias_correction": True}, "rtn uses no data"),
        ({"method": "hqq", "unseen_tokens": 0.5}, "hqq uses no data"),
        ({"method": "auto", "unseen_tokens": 1.5}, r"unseen_tokens must be in \[0, 1\]"),
        ({"method": "auto", "keep": 1.0}, r"keep must be in \[0, 1\)"),
        ({"method": "hqq", "keep": 0.1}, "keep leaves layers in 8 bits by what data shows"),
        ({"method": "gptq", "bits": 8, "keep": 0.1}, "give fewer, and another method"),
        ({"targets": ("re:[",)}, "is not a regular expression"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        QuantizeWeights(**options)


def test_an_unknown_target(model):
    with pytest.raises(UsageError, match="'V' matches no weight"):
        QuantizeWeights(targets=("V",))(model)


@pytest.mark.parametrize("method", ["gptq", "auto"])
def test_data_that_is_missing(model, method):
    with pytest.raises(UsageError, match=r"quant\.weight needs calibration data: give --calibration-data"):
        QuantizeWeights(method=method, group_size=0)(model)


# -- with data ---------------------------------------------------------------------------------------


@pytest.fixture
def wide(from_text):
    """U [96, 64], then W [64, 32], with biases; and inputs that are far from independent."""
    rng = np.random.default_rng(8)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 96] X) => (float[B, 32] Y)
           { M = MatMul(X, U) A = Add(M, b) H = Relu(A) Y = Gemm(H, W, c) }""",
        U=rng.standard_normal((96, 64)).astype(np.float32) / 10,
        W=rng.standard_normal((64, 32)).astype(np.float32) / 8,
        b=rng.standard_normal(64).astype(np.float32),
        c=rng.standard_normal(32).astype(np.float32),
    )
    mix = rng.standard_normal((24, 96)).astype(np.float32)
    x = [
        (rng.standard_normal((64, 24)) @ mix + rng.standard_normal((64, 96)) / 4).astype(np.float32)
        for _ in range(9)
    ]
    return model, x


def loss(model, reference, x, run):
    expected, found = (run(each, {"X": x})["Y"].astype(np.float64) for each in (reference, model))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def with_data(model, x, tmp_path, **options):
    data = CalibrationData(Samples.of([{"X": batch} for batch in x], "test"), tmp_path)
    return QuantizeWeights(bits=3, group_size=32, **options)(model, PassContext(calibration=data))


def test_data_makes_the_outputs_better_on_other_data(wide, tmp_path, run):
    model, x = wide
    losses = {}
    for method in ("rtn", "gptq", "auto"):
        copy = model.clone()
        result = with_data(copy, x[:8], tmp_path, method=method)
        losses[method] = loss(copy, model, x[8], run)
        assert not result.declined
        assert all((layer.error is None) == (method == "rtn") for layer in result.layers)
        assert result.statistics["biases"] == (2 if method == "auto" else 0)
    assert losses["auto"] < losses["gptq"] < losses["rtn"]
    assert losses["auto"] < 0.7 * losses["rtn"]


@pytest.mark.parametrize("method", ["awq", "gptq", "auto"])
def test_the_layer_that_matters_most_keeps_eight_bits(wide, tmp_path, run, method):
    """W does: what U gives it is small beside its bias, which rounding leaves alone."""
    model, x = wide
    U = model.graph.initializers["U"]
    U.const_value = ir.tensor(U.const_value.numpy() / 50, name="U")
    plain, kept = model.clone(), model.clone()
    with_data(plain, x[:8], tmp_path, method=method)
    result = with_data(kept, x[:8], tmp_path, method=method, keep=0.3)
    assert {layer.name: (layer.bits, layer.group_size) for layer in result.layers} == {
        "U": (3, 32),
        "W": (8, 0),
    }
    (place,) = [place for place in result.declined if "8 bits" in place.reason]
    assert place.place == "W"
    assert "in 8 bits, not 3: rounded alone it moves the outputs by" in place.reason
    assert loss(kept, model, x[8], run) < 0.5 * loss(plain, model, x[8], run)


@pytest.mark.parametrize("calibration", ["oneshot", "sequential", "asymmetric"])
def test_every_order_and_storage_stands_for_the_same_solution(wide, tmp_path, run, calibration):
    model, x = wide
    copies = [model.clone() for _ in range(2)]
    for copy, storage in zip(copies, ("unpack", "float"), strict=True):
        with_data(
            copy,
            x[:8],
            tmp_path,
            method="auto",
            calibration=calibration,
            storage=storage,
            scale_type="float32",
        )
    first, second = map(matrices, copies)
    assert first.keys() == second.keys() == {"U", "W"}
    for name, matrix in first.items():
        np.testing.assert_array_equal(matrix, second[name])
    answers = [run(copy, {"X": x[8]})["Y"] for copy in copies]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "auto"])
def test_pruned_zeros_stay_zero(wide, tmp_path, method):
    model, x = wide
    Magnitude(sparsity=0.6)(model)
    before = matrices(model)
    result = with_data(model, x[:8], tmp_path, method=method, symmetric=False)
    after = matrices(model)
    for name, matrix in before.items():
        assert (after[name][matrix == 0] == 0).all()
    assert all(layer.zeros_after >= layer.zeros_before > 0 for layer in result.layers)


@pytest.fixture
def reader(from_text):
    """A table of 200 tokens and a linear [48, 24] on their rows; text that has 60 of them, each sample some of its own,
    and text of the others."""
    rng = np.random.default_rng(11)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (int64[B, S] ids) => (float[B, S, 24] Y)
           { E = Gather(T, ids) Y = MatMul(E, W) }""",
        T=rng.standard_normal((200, 48)).astype(np.float32),
        W=rng.standard_normal((48, 24)).astype(np.float32) / 7,
    )
    text = [{"ids": rng.integers(0, 60, (4, 12))} for _ in range(8)]
    return model, text, {"ids": np.arange(60, 200)[None]}


def read(reader, tmp_path, run, **options):
    """The loss on tokens that were not in the text, and the bytes of the integers."""
    model, text, others = reader
    copy = model.clone()
    data = CalibrationData(Samples.of(text, "text"), tmp_path)
    QuantizeWeights(bits=3, group_size=16, **options)(copy, PassContext(calibration=data))
    expected, found = (run(each, others)["Y"].astype(np.float64) for each in (model, copy))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected), matrices(copy)["W"].tobytes()


@pytest.mark.parametrize("method", ["gptq", "auto"])
def test_tokens_that_the_text_lacks_are_drawn(reader, tmp_path, run, method):
    drawn, _ = read(reader, tmp_path, run, method=method, unseen_tokens=1.0)
    text_alone, _ = read(reader, tmp_path, run, method=method, unseen_tokens=0.0)
    assert drawn < 0.95 * text_alone


@pytest.mark.parametrize(("method", "share"), [("gptq", 0.0), ("auto", 0.5)])
def test_what_is_drawn_where_nothing_is_said(reader, tmp_path, run, method, share):
    default, same, all_batches = (
        read(reader, tmp_path, run, method=method, **given)[1]
        for given in ({}, {"unseen_tokens": share}, {"unseen_tokens": 1.0})
    )
    assert default == same != all_batches


def test_without_tokens_nothing_is_drawn(wide, tmp_path):
    model, x = wide
    copies = [model.clone(), model.clone()]
    for copy, share in zip(copies, (0.0, 1.0), strict=True):
        with_data(copy, x[:4], tmp_path, method="auto", unseen_tokens=share)
    one, other = map(matrices, copies)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_weights_of_several_bits_are_solved_together(wide, tmp_path, run):
    """What one loses the ones behind it make up for, in whatever bits."""
    model, x = wide
    together, apart = model.clone(), model.clone()
    options = {"method": "auto", "unseen_tokens": 0.0}
    with_data(together, x[:8], tmp_path, **options, bits_of={"W": 8})
    with_data(apart, x[:8], tmp_path, **options, targets=("U",))
    assert loss(together, model, x[8], run) < loss(apart, model, x[8], run)


def test_an_interrupted_run_goes_on(wide, tmp_path, monkeypatch):
    model, x = wide
    whole, again = model.clone(), model.clone()
    data = CalibrationData(
        Samples.of([{"X": batch} for batch in x[:8]], "test"), tmp_path, checkpoint=tmp_path / "kept"
    )
    step = QuantizeWeights(method="auto", group_size=32)
    step(whole, PassContext(calibration=data))
    monkeypatch.setattr(
        "sparse_onnx.passes.quantize.weight._quantizer", lambda *_: pytest.fail("solved again")
    )
    step(again, PassContext(calibration=data))
    for name, matrix in matrices(whole).items():
        np.testing.assert_array_equal(matrix, matrices(again)[name])


def test_a_layer_that_data_does_not_reach_is_rounded_without(from_text, tmp_path):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 16] X, bool C) => (float[B, 8] Y) {
           Y = If(C) <then_branch = t () => (float[B, 8] P) { P = MatMul(X, U) },
                      else_branch = e () => (float[B, 8] Q) { I = Neg(X) Q = MatMul(I, U) }> }""",
        U=U,
    )
    feeds = {"X": RNG.standard_normal((4, 16)).astype(np.float32), "C": np.array(True)}
    data = CalibrationData(Samples.of([feeds], "test"), tmp_path)
    result = QuantizeWeights(method="gptq", group_size=16)(model, PassContext(calibration=data))
    (place,) = result.declined
    assert place.reason.startswith("rounded without data, by hqq: ")
    assert {layer.name for layer in result.layers} == {"U"}


# -- in a recipe -------------------------------------------------------------------------------------

RECIPE = """
version: 1
stages:
  - name: prune
    modifiers: [prune.magnitude: {sparsity: 0.75, targets: [U]}]
  - name: quantize
    modifiers: [quant.weight: {method: rtn, group_size: 0, storage: float}]
"""


def on_grid(matrix, bits, scale_type):
    grid = GridOptions(bits=bits, scale_type=scale_type)
    return RtnQuantizer(grid=grid).solve(matrix).matrix()


def test_it_comes_after_pruning():
    assert QuantizeWeights.stage is Stage.QUANTIZE
    assert [step.name for step in parse_recipe(RECIPE).modifiers()] == ["prune.magnitude", "quant.weight"]
    with pytest.raises(
        UsageError, match=r"prune\.magnitude \(prune\) cannot run after quant\.weight \(quantize\)"
    ):
        Pipeline((QuantizeWeights(), Magnitude(sparsity=0.5)))


@pytest.mark.parametrize(("sparsity", "decision"), [(0.5, "dense"), (0.75, "sparse")])
def test_a_compilation_keeps_what_was_rounded(model, tmp_path, sparsity, decision):
    """Also in a layer that stays dense, whose zeros alone would be given back."""
    ir.save(model, tmp_path / "model.onnx")
    result = sparse_onnx.optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        recipe=parse_recipe(RECIPE),
        settings={"quant.weight.bits": 4, "prune.magnitude.sparsity": sparsity},
        benchmark=False,
    )
    rows = {row["name"]: row for row in result.report["layers"]}
    assert {name: row["decision"] for name, row in rows.items()} == {"U": decision, "W": "dense"}
    assert (rows["U"]["pruning"], rows["W"]["pruning"]) == ("pruned", "never")
    pruned = np.where(np.abs(U) < np.sort(np.abs(U), axis=None)[int(sparsity * U.size)], 0, U)
    written = ir.from_proto(onnx.load(result.folder / "model.onnx"))
    dense = dense_reference(written, in_memory).graph.initializers.values()
    found = {array.shape: array for array in (value.const_value.numpy() for value in dense)}
    np.testing.assert_array_equal(found[U.shape], on_grid(pruned, 4, "float32"))
    np.testing.assert_array_equal(found[W.T.shape], on_grid(W, 4, "float32").T)
    assert result.report["summary"]["written"] == "compiled"
    assert result.report["verification"]["against_original"]["relative_error"] > 1e-3
    assert result.report["verification"]["against_pruned_dense"]["relative_error"] < 1e-5


def test_alone_it_is_written_too(model, tmp_path):
    ir.save(model, tmp_path / "model.onnx")
    recipe = parse_recipe(
        "version: 1\nstages: [{name: quantize, modifiers: [quant.weight: {method: rtn, group_size: 0, bits: 3}]}]"
    )
    result = sparse_onnx.optimize(tmp_path / "model.onnx", tmp_path / "out", recipe=recipe, benchmark=False)
    for name, matrix in matrices(ir.from_proto(onnx.load(result.folder / "model.onnx"))).items():
        np.testing.assert_array_equal(matrix, on_grid({"U": U, "W": W}[name], 3, "float16"))
    assert result.report["summary"]["bytes_after"] < result.report["summary"]["bytes_before"] + 20000
    rows = {row["name"]: row for row in result.report["quantized"]}
    assert {name: (row["bits"], row["group_size"]) for name, row in rows.items()} == {
        "U": (3, 0),
        "W": (3, 0),
    }
    assert rows["U"]["bytes"] == 16 * 8 * 3 // 8 + 8 * 2
    assert rows["U"]["elements"] == 128


# -- with zeros --------------------------------------------------------------------------------------


STRUCTURES = ["unstructured", "8:16", "2:4", "block:1x2", "block:1x4"]


def half_of_them(structure):
    """Zeros in half of all places; with N:M that is said by the structure."""
    fixed = structure in ("8:16", "2:4")
    return {"mask_structure": structure} | ({} if fixed else {"sparsity": 0.5})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_zeros_and_integers_are_solved_together(wide, tmp_path, run, structure):
    """What a mask alone has lost is made good where rounding aims at the model before pruning."""
    model, x = wide
    data = CalibrationData(Samples.of([{"X": batch} for batch in x[:8]], "test"), tmp_path)
    losses = []
    for dense in (None, model):
        copy = model.clone()
        Magnitude(**half_of_them(structure))(copy)
        masks = {name: matrix != 0 for name, matrix in matrices(copy).items()}
        step = QuantizeWeights(method="auto", bits=3, group_size=32)
        result = step(copy, PassContext(calibration=data, dense=dense))
        assert not result.declined
        for name, matrix in matrices(copy).items():
            assert not matrix[~masks[name]].any(), "zeros stay zeros"
            assert np.count_nonzero(matrix) > 0.4 * matrix.size
        losses.append(loss(copy, model, x[8], run))
    assert losses[1] < 0.8 * losses[0]


def test_the_dense_model_is_left_as_it_is(wide, tmp_path):
    model, x = wide
    whole = model.clone()
    before = fingerprint(whole)
    data = CalibrationData(Samples.of([{"X": batch} for batch in x[:2]], "test"), tmp_path)
    Magnitude(sparsity=0.5)(model)
    QuantizeWeights(method="auto", group_size=32)(model, PassContext(calibration=data, dense=whole))
    assert fingerprint(whole) == before


def test_what_was_not_pruned_is_solved_as_alone(wide, tmp_path):
    """The model before pruning is then the model itself."""
    model, x = wide
    copies = [model.clone() for _ in range(2)]
    data = CalibrationData(Samples.of([{"X": batch} for batch in x[:8]], "test"), tmp_path)
    for copy, dense in zip(copies, (None, model), strict=True):
        context = PassContext(calibration=data, dense=dense)
        QuantizeWeights(method="auto", group_size=32)(copy, context)
    first, second = map(matrices, copies)
    for name, matrix in first.items():
        np.testing.assert_array_equal(matrix, second[name])


def test_a_compilation_aims_at_the_model_before_pruning(wide, tmp_path, run):
    model, x = wide
    ir.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "x.npz", X=np.concatenate(x[:8]))
    result = sparse_onnx.optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        method="auto",
        sparsity=0.5,
        bits=3,
        group_size=32,
        calibration_data=tmp_path / "x.npz",
        benchmark=False,
        keep_pruned=True,
    )
    written = ir.from_proto(onnx.load(result.folder / "model.onnx"))
    (tmp_path / "work").mkdir()
    apart = model.clone()
    data = CalibrationData(Samples.of([{"X": batch} for batch in x[:8]], "test"), tmp_path / "work")
    context = PassContext(calibration=data)
    Pipeline((Auto(sparsity=0.5), QuantizeWeights(method="rtn", bits=3, group_size=32)))(apart, context)
    assert loss(written, model, x[8], run) < 0.8 * loss(apart, model, x[8], run)
    assert {row["bits"] for row in result.report["quantized"]} == {3}
    assert all(np.count_nonzero(matrix) <= matrix.size / 2 for matrix in matrices(written).values())


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"method": "auto"}, 6),
        ({"method": "auto", "unseen_tokens": 0.0}, 4),
        ({"method": "auto", "unseen_tokens": 1.0}, 8),
        ({"method": "gptq"}, 4),
        ({"method": "gptq", "unseen_tokens": 0.25}, 5),
    ],
)
def test_tokens_that_the_data_lacks(from_text, tmp_path, monkeypatch, options, batches):
    rng = np.random.default_rng(2)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (int64[B, 8] ids) => (float[B, 8, 8] Y)
           { E = Gather(table, ids) Y = MatMul(E, U) }""",
        table=rng.standard_normal((300, 16)).astype(np.float32),
        U=U,
    )
    seen = []
    original = weight_module.Calibrator

    def calibrator(model, weights, samples, *rest, **named):
        seen.append(samples)
        return original(model, weights, samples, *rest, **named)

    monkeypatch.setattr(weight_module, "Calibrator", calibrator)
    given = [{"ids": rng.integers(0, 40, (3, 8))} for _ in range(4)]
    data = CalibrationData(Samples.of(given, "test"), tmp_path)
    QuantizeWeights(group_size=16, **options)(model, PassContext(calibration=data))
    (samples,) = seen
    assert len(samples) == batches
    unseen = [batch for batch in samples if (batch["ids"] >= 40).any()]
    assert len(unseen) == batches - 4
