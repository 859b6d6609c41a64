"""One-shot pruning of graphs: exact budgets, better than magnitude, biases, aims, and what is left alone."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.compilation.recipe import dump_recipe
from sparse_onnx.compilation.recipe_flags import override
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.passes.base import CalibrationData, PassContext, Pipeline
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot import OneShot
from sparse_onnx.passes.prune.oneshot_methods import (
    Admm,
    Alps,
    Auto,
    SparseGPT,
    Wanda,
)
from sparse_onnx.passes.registry import PASSES
from sparse_onnx.passes.solvers.masks import MaskStructure, obeys

RNG = np.random.default_rng(0)
D, H = 24, 48
ONE_SHOT = [cls for cls in PASSES if issubclass(cls, OneShot)]


def weight(*shape):
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


TENSORS = {
    "Q": weight(D, D), "V": weight(D, D), "bq": weight(D), "bv": weight(D),
    "W1": weight(D, H), "b1": weight(H), "W2": weight(H, D), "b2": weight(D),
    "W3": weight(D, H), "W4": weight(H, D), "g": np.ones(D, np.float32), "b": np.zeros(D, np.float32),
}  # fmt: skip
# Two residual blocks with normalization, the second without biases; Q and V read the same value.
BODY = """
    q = MatMul(X, Q) qb = Add(q, bq) v = MatMul(X, V) vb = Add(v, bv) t = Tanh(qb) m = Mul(t, vb)
    r = Add(m, X) n = LayerNormalization(r, g, b)
    h1 = MatMul(n, W1) hb = Add(h1, b1) a = Relu(hb) h2 = MatMul(a, W2) h2b = Add(h2, b2) s = Add(n, h2b)
    o = LayerNormalization(s, g, b) h3 = MatMul(o, W3) c = Relu(h3) h4 = MatMul(c, W4) Y = Add(h4, o)
"""
LINEARS = ("Q", "V", "W1", "W2", "W3", "W4")


def build(from_text, body=BODY, tensors=None, *, x=f"float[B, S, {D}] X", y=f"float[B, S, {D}] Y"):
    text = f'<ir_version: 9, opset_import: ["" : 17]> g ({x}) => ({y}) {{ {body} }}'
    return from_text(text, **(TENSORS if tensors is None else tensors))


def batches(count=12, seed=1, shape=(4, 16, D)):
    """Correlated inputs of very different scales, as real activations are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((D, D)) * np.logspace(0, -1.5, D)
    return [{"X": (rng.standard_normal(shape) @ mix + 0.3).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def context(tmp_path):
    return PassContext(calibration=CalibrationData(Samples.of(batches(), "test"), tmp_path))


def stored(model, name):
    return model.graph.initializers[name].const_value.numpy()


def output_error(run, from_text, model, seed=5):
    (feeds,) = batches(1, seed, (8, 32, D))
    want = run(build(from_text), feeds)["Y"].astype(np.float64)
    return float(np.linalg.norm(run(model, feeds)["Y"] - want) / np.linalg.norm(want))


def structures(cls):
    found = ["unstructured", "2:4", "4:8"]
    return [*found, "block:2x4"] if "block" in cls.solver.structures else found


@pytest.mark.parametrize(
    ("cls", "structure"), [(cls, structure) for cls in ONE_SHOT for structure in structures(cls)
                           if structure == "unstructured" or "n:m" in cls.solver.structures]
)  # fmt: skip
def test_budget_is_exact_and_nothing_else_changes(cls, structure, from_text, run, context):
    model = build(from_text)
    before = {name: stored(model, name).copy() for name in TENSORS}
    options = {"sparsity": 0.6} if ":" not in structure or "block" in structure else {}
    result = cls(mask_structure=structure, **options)(model, context)
    assert result.modified
    assert {change.name for change in result.layers} == set(LINEARS)
    share = 0.5 if not options else 0.6
    for name in LINEARS:
        pruned = stored(model, name)
        assert pruned.dtype == np.float32
        units = pruned.size if structure != "block:2x4" else pruned.size // 8
        zeros = np.count_nonzero(pruned == 0) / (pruned.size // units)
        row_scope = cls.__dataclass_fields__["scope"].default == "row"
        wanted = (
            round(share * len(pruned)) * pruned.shape[1]
            if row_scope and units == pruned.size
            else share * units
        )
        assert zeros == pytest.approx(wanted, abs=0.5) or structure == "block:2x4"
        if structure in ("2:4", "4:8"):
            assert obeys(pruned != 0, MaskStructure.parse(structure))
    if not cls.__dataclass_fields__["bias_correction"].default:
        for name in set(TENSORS) - set(LINEARS):
            np.testing.assert_array_equal(stored(model, name), before[name])
    assert np.isfinite(run(model, batches(1)[0])["Y"]).all()


@pytest.mark.parametrize(("cls", "share"), [(SparseGPT, 1), (Admm, 0.95), (Alps, 0.95), (Auto, 0.85)])
def test_solvers_beat_magnitude_and_wanda(cls, share, from_text, run, context):
    errors = []
    for step in (cls(sparsity=0.6), Wanda(sparsity=0.6), Magnitude(sparsity=0.6)):
        model = build(from_text)
        step(model, context)
        errors.append(output_error(run, from_text, model))
    assert errors[0] < share * min(errors[1:])


@pytest.mark.parametrize("bias_correction", [False, True])
def test_aiming_at_the_dense_output_beats_one_shot(bias_correction, from_text, run, context):
    errors = {}
    for calibration in ("oneshot", "sequential", "asymmetric"):
        model = build(from_text)
        Alps(sparsity=0.6, calibration=calibration, bias_correction=bias_correction)(model, context)
        errors[calibration] = output_error(run, from_text, model)
    assert errors["asymmetric"] < 0.95 * min(errors["oneshot"], errors["sequential"])


@pytest.mark.parametrize("calibration", ["oneshot", "sequential", "asymmetric"])
def test_corrected_biases_keep_the_mean_output(calibration, from_text, run, context):
    body = "h = MatMul(X, W1) Y = Add(h, b1)"
    tensors = {name: TENSORS[name] for name in ("W1", "b1")}
    dense, model = (build(from_text, body, tensors, y=f"float[B, S, {H}] Y") for _ in range(2))
    result = Alps(sparsity=0.7, calibration=calibration, bias_correction=True)(model, context)
    assert result.statistics["biases"] == 1
    means = []
    for which in (dense, model):
        outputs = [run(which, feeds)["Y"].reshape(-1, H) for feeds in batches()]
        means.append(np.concatenate(outputs).mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(means[1], means[0], atol=2e-5)


def test_a_bias_that_others_use_is_copied(from_text, run, context):
    body = "h = MatMul(X, Q) i = Add(h, bq) j = Add(X, bq) Y = Add(i, j)"
    tensors = {name: TENSORS[name] for name in ("Q", "bq")}
    model = build(from_text, body, tensors)
    Auto(sparsity=0.5)(model, context)
    np.testing.assert_array_equal(stored(model, "bq"), TENSORS["bq"])
    assert not np.array_equal(stored(model, "bq.corrected"), TENSORS["bq"])
    assert model.graph[2].inputs[1].name == "bq"
    assert np.isfinite(run(model, batches(1)[0])["Y"]).all()


def test_gemm_and_convolution_with_groups(from_text, run, tmp_path):
    rng = np.random.default_rng(3)
    tensors = {
        "C": weight(8, 4, 3, 3), "G": weight(8, 4, 1, 1), "bc": weight(8),
        "F": weight(10, 8 * 36), "bf": weight(10),
    }  # fmt: skip
    body = """a = Conv<pads = [1, 1, 1, 1]>(X, C, bc) r = Relu(a) g = Conv<group = 2>(r, G, bc) s = Add(g, r)
              f = Flatten(s) Y = Gemm<transB = 1>(f, F, bf)"""
    samples = [{"X": rng.standard_normal((4, 4, 6, 6)).astype(np.float32)} for _ in range(6)]
    known = CalibrationData(Samples.of(samples, "test"), tmp_path)
    errors = {}
    for step in (Auto(sparsity=0.5), Magnitude(sparsity=0.5)):
        dense, model = (
            build(from_text, body, tensors, x="float[B, 4, 6, 6] X", y="float[B, 10] Y") for _ in range(2)
        )
        step(model, PassContext(calibration=known))
        for name in ("C", "G", "F"):
            assert np.count_nonzero(stored(model, name) == 0) == round(0.5 * stored(model, name).size)
        want = run(dense, samples[0])["Y"]
        errors[step.name] = np.linalg.norm(run(model, samples[0])["Y"] - want)
    assert errors["prune.auto"] < errors["prune.magnitude"]


@pytest.mark.parametrize("allocation", ["uniform", "depth", "owl", "alpha", "error"])
def test_allocations_keep_the_mean(allocation, from_text, context):
    model = build(from_text)
    result = Alps(sparsity=0.6, allocation=allocation)(model, context)
    assert result.statistics["sparsity"] == pytest.approx(
        0.6, abs=len(LINEARS) / result.statistics["elements"]
    )
    shares = [change.zeros_after / change.size for change in result.layers]
    assert (max(shares) - min(shares) > 0.01) == (allocation != "uniform")


def test_sparsities_by_name(from_text, context):
    model = build(from_text)
    recipe = parse_recipe(
        "version: 1\nstages:\n- name: s\n  modifiers:\n"
        '  - prune.alps: {sparsity: 0.5, sparsities: {"re:W[12]": 0.7, Q: 0}}\n'
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe
    override(recipe, dampening_frac=0.02)
    result = recipe.pipeline()(model, context)
    shares = {change.name: change.zeros_after / change.size for change in result.layers}
    assert "Q" not in shares
    assert shares["W1"] == shares["W2"] == pytest.approx(0.7, abs=1e-3)
    assert result.statistics["prune.alps.sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_preserved_masks_are_refitted(sparsity, from_text, run, context):
    errors = []
    for preserve in (False, True):
        model = build(from_text)
        Magnitude(sparsity=0.5)(model, context)
        zeros = {name: stored(model, name) == 0 for name in LINEARS}
        if preserve:
            Alps(sparsity=sparsity, preserve_mask=True)(model, context)
            for name in LINEARS:
                assert not stored(model, name)[zeros[name]].any()
                assert np.count_nonzero(stored(model, name) == 0) == round(sparsity * zeros[name].size)
        errors.append(output_error(run, from_text, model))
    assert sparsity > 0.5 or errors[1] <= errors[0] * 1.0001


def test_two_runs_give_the_same_bytes(from_text, tmp_path):
    content = []
    for run in range(2):
        work = tmp_path / str(run)
        work.mkdir()
        model = build(from_text)
        Auto(sparsity=0.6)(
            model, PassContext(calibration=CalibrationData(Samples.of(batches(), "test"), work))
        )
        content.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert content[0] == content[1]


def test_statistics_are_kept_and_read_again(from_text, context, tmp_path):
    file = tmp_path / "calibration.stats"
    kept = dataclasses.replace(context, calibration=dataclasses.replace(context.calibration, statistics=file))
    first, second = build(from_text), build(from_text)
    SparseGPT(sparsity=0.5)(first, kept)
    assert file.exists()
    said = []
    SparseGPT(sparsity=0.5)(second, dataclasses.replace(kept, progress=said.append))
    for name in LINEARS:
        np.testing.assert_array_equal(stored(first, name), stored(second, name))


def test_an_interrupted_run_goes_on_and_gives_the_same(from_text, context, tmp_path):
    whole, again = build(from_text), build(from_text)
    Auto(sparsity=0.6)(whole, context)
    kept = dataclasses.replace(
        context, calibration=dataclasses.replace(context.calibration, checkpoint=tmp_path / "done")
    )

    def interrupt(message):
        if "(3/6" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Auto(sparsity=0.6)(build(from_text), dataclasses.replace(kept, progress=interrupt))
    assert len(list((tmp_path / "done").glob("*.npy"))) == 3
    Auto(sparsity=0.6)(again, kept)
    for name in TENSORS:
        np.testing.assert_array_equal(stored(again, name), stored(whole, name))


def test_without_data_it_says_what_is_missing(from_text):
    with pytest.raises(UsageError, match=r"prune\.auto needs calibration data: give --calibration-data"):
        Auto(sparsity=0.5)(build(from_text))


def test_nothing_to_prune_needs_no_data(from_text):
    model = build(from_text, "Y = Relu(X)", {})
    assert not Auto(sparsity=0.5)(model).modified


def test_weights_in_a_branch_are_pruned_by_magnitude_and_named(from_text, run, tmp_path):
    body = f"""h = MatMul(X, Q) Y = If(c) <then_branch = t () => (float[B, S, {D}] p) {{ p = MatMul(h, V) }},
                                  else_branch = e () => (float[B, S, {D}] i) {{ i = Identity(h) }}>"""
    tensors = {name: TENSORS[name] for name in ("Q", "V")}
    model = build(from_text, body, tensors, x=f"float[B, S, {D}] X, bool c")
    samples = Samples.of([{**feeds, "c": np.array(True)} for feeds in batches()], "test")
    result = Alps(sparsity=0.5)(model, PassContext(calibration=CalibrationData(samples, tmp_path)))
    (declined,) = result.declined
    assert (declined.place, declined.reason.split(":")[0]) == ("V", "pruned by magnitude")
    kept = stored(model, "V") != 0
    np.testing.assert_array_equal(stored(model, "V")[kept], TENSORS["V"][kept])
    assert np.abs(TENSORS["V"][~kept]).max() <= np.abs(TENSORS["V"][kept]).min()
    assert {change.name: change.error is None for change in result.layers} == {"Q": False, "V": True}


def test_nan_is_left_alone_and_named(from_text, context):
    broken = TENSORS["Q"].copy()
    broken[3, 4] = np.nan
    model = build(from_text, "h = MatMul(X, V) Y = MatMul(h, Q)", {"Q": broken, "V": TENSORS["V"]})
    result = Alps(sparsity=0.5)(model, context)
    assert [(d.place, d.reason) for d in result.declined] == [("Q", "holds NaN or Inf: not pruned")]
    np.testing.assert_array_equal(stored(model, "Q"), broken)


def test_dead_inputs_and_few_tokens(from_text, run, tmp_path):
    feeds = batches(1, 3, (1, 5, D))[0]
    feeds["X"][..., :6] = 0
    said = []
    data = CalibrationData(Samples.of([feeds], "test"), tmp_path)
    model = build(from_text)
    Auto(sparsity=0.5)(model, PassContext(progress=said.append, calibration=data))
    assert any("tokens" in line and "warning" in line for line in said)
    assert np.isfinite(run(model, feeds)["Y"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prune.alps: mask_structure unstructured needs a sparsity"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        ({"sparsity": 0.5, "scope": "global"}, "scope must be one of row, layer"),
        (
            {"sparsity": 0.5, "calibration": "seq"},
            "calibration must be one of oneshot, sequential, asymmetric",
        ),
        ({"sparsity": 0.5, "dampening_frac": -1}, "dampening_frac must be 0 or more"),
        ({"mask_structure": "2:4", "sparsity": 0.7}, "implies sparsity 0.5"),
        ({"mask_structure": "2:4", "allocation": "owl"}, "fixes the zeros of every layer"),
        ({"sparsity": 0.5, "allocation": "owl", "sparsities": {"a": 0.1}}, "not both"),
        ({"sparsity": 0.5, "allocation": "even"}, "allocation must be one of uniform"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        Alps(**options)


def test_structures_that_a_method_does_not_take():
    with pytest.raises(
        UsageError, match=r"prune\.sparsegpt: mask_structure must be one that the method takes"
    ):
        SparseGPT(sparsity=0.5, mask_structure="block:4x1")


def test_runs_in_a_pipeline(from_text, context):
    model = build(from_text)
    result = Pipeline((Alps(sparsity=0.5, targets=("W1", "W2")), Wanda(sparsity=0.5, targets=("Q",))))(
        model, context
    )
    assert {change.name for change in result.layers} == {"W1", "W2", "Q"}
