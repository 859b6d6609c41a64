"""prune.magnitude, prune.random and prune.threshold on models."""

import itertools

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.random import Random
from sparse_onnx.passes.prune.threshold import Threshold
from sparse_onnx.passes.solvers.masks import MaskStructure, obeys

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
RNG = np.random.default_rng(7)
U = RNG.standard_normal((8, 6)).astype(np.float32)
W = RNG.standard_normal((6, 4)).astype(np.float32) * 3


@pytest.fixture
def model(from_text):
    """Two linears: U [8, 6] stored as it is, W [6, 4] stored transposed."""
    return from_text(
        f"{HEAD} g (float[B, 8] X) => (float[B, 4] Y) {{ A = MatMul(X, U) Y = Gemm<transB = 1>(A, W) }}",
        U=U,
        W=np.ascontiguousarray(W.T),
    )


def matrices(model):
    return {weight.name: np.array(weight.matrix()) for weight in find_weights(model)[0]}


def zeros(array):
    return int(np.count_nonzero(array == 0))


def kept_are_unchanged(before, after):
    return bool(((after == before) | (after == 0)).all())


@pytest.mark.parametrize("cls", [Magnitude, Random])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.81])
def test_every_weight_reaches_the_sparsity(model, cls, sparsity):
    result = cls(sparsity=sparsity)(model)
    after = matrices(model)
    for name, before in (("U", U), ("W", W)):
        assert zeros(after[name]) == round(sparsity * before.size)
        assert kept_are_unchanged(before, after[name])
        assert model.graph.initializers[name].metadata_props[STRUCTURE_KEY] == "unstructured"
    assert result.modified
    assert [(layer.name, layer.size, layer.zeros_before) for layer in result.layers] == [
        ("U", 48, 0),
        ("W", 24, 0),
    ]
    assert [layer.zeros_after for layer in result.layers] == [zeros(after["U"]), zeros(after["W"])]
    assert result.statistics["sparsity"] == sum(map(zeros, after.values())) / 72
    assert not result.declined


def test_magnitude_takes_the_smallest(model):
    Magnitude(sparsity=0.5)(model)
    for name, before in (("U", U), ("W", W)):
        cut = np.sort(np.abs(before), axis=None)[before.size // 2]
        np.testing.assert_array_equal(matrices(model)[name], np.where(np.abs(before) < cut, 0, before))


@pytest.mark.parametrize(
    ("structure", "unit"), [("unstructured", (1, 1)), ("block:2x2", (2, 2)), ("block:1x2", (2, 1))]
)
def test_global_scope_is_one_threshold_for_all(model, structure, unit):
    Magnitude(sparsity=0.5, scope="global", mask_structure=structure)(model)
    rows, columns = unit

    def norms(array):
        K, N = array.shape
        return (array.astype(np.float64) ** 2).reshape(K // rows, rows, N // columns, columns).sum((1, 3))

    together = np.sort(np.concatenate([norms(U).ravel(), norms(W).ravel()]))
    cut = together[together.size // 2]
    after = matrices(model)
    for name, before in (("U", U), ("W", W)):
        keep = np.kron(norms(before) >= cut, np.ones(unit, bool))
        np.testing.assert_array_equal(after[name], np.where(keep, before, 0))
    assert zeros(after["U"]) > zeros(after["W"])


def test_global_scope_breaks_ties_in_the_order_of_the_layers(from_text):
    model = from_text(
        f"{HEAD} g (float[1, 2] X) => (float[1, 2] Y) {{ A = MatMul(X, U) Y = MatMul(A, V) }}",
        U=np.ones((2, 2), np.float32),
        V=np.ones((2, 2), np.float32),
    )
    Magnitude(sparsity=5 / 8, scope="global")(model)
    assert matrices(model)["U"].tolist() == [[0, 0], [0, 0]]
    assert matrices(model)["V"].tolist() == [[0, 1], [1, 1]]


def test_global_scope_over_several_dtypes(from_text):
    model = from_text(
        f"""{HEAD} g (float[1, 2] X) => (double[1, 2] Y) {{
            A = MatMul(X, U) B = Cast<to = 11>(A) Y = MatMul(B, V) }}""",
        U=np.array([[1, 4], [2, 8]], np.float32),
        V=np.array([[1 + 1e-12, 1 - 1e-12], [3, 2 + 1e-12]], np.float64),
    )
    Magnitude(sparsity=0.25, scope="global")(model)
    assert matrices(model)["U"].tolist() == [[0, 4], [2, 8]]
    assert matrices(model)["V"].tolist() == [[1 + 1e-12, 0], [3, 2 + 1e-12]]


@pytest.mark.parametrize("cls", [Magnitude, Random])
@pytest.mark.parametrize("structure", ["2:4", "1:2", "3:4"])
def test_n_of_m_holds_along_the_input_channels(model, cls, structure):
    """U has 8 input channels, W has 6."""
    parsed = MaskStructure.parse(structure)
    messages = []
    result = cls(mask_structure=structure)(model, PassContext(progress=messages.append))
    after = matrices(model)
    assert obeys(after["U"], parsed)
    assert zeros(after["U"]) == round((1 - parsed.size[0] / parsed.size[1]) * U.size)
    share = 100 * zeros(after["U"]) / U.size
    assert messages[0].startswith(f"U: {structure}, {share:.1f} % zeros (1/{len(messages)}")
    if 6 % parsed.size[1]:
        np.testing.assert_array_equal(after["W"], W)
        reason = f"6 input channels are not a multiple of {parsed.size[1]}, as {structure} needs"
        assert [(place.place, place.reason) for place in result.declined] == [("W", reason)]
        assert STRUCTURE_KEY not in model.graph.initializers["W"].metadata_props
    else:
        assert obeys(after["W"], parsed)
        assert not result.declined
    assert model.graph.initializers["U"].metadata_props[STRUCTURE_KEY] == structure


@pytest.mark.parametrize("cls", [Magnitude, Random])
def test_blocks_are_output_by_input_channels(model, cls):
    result = cls(sparsity=0.5, mask_structure="block:2x4")(model)  # 2 columns, 4 rows of [K, N]
    tiles = (matrices(model)["U"] != 0).reshape(2, 4, 3, 2).sum((1, 3))
    assert sorted(tiles.ravel()) == [0, 0, 0, 8, 8, 8]
    assert [place.place for place in result.declined] == ["W"]
    assert "4 output by 6 input channels" in result.declined[0].reason


@pytest.mark.parametrize("cls", [Magnitude, Random])
def test_channels_are_whole_outputs(model, cls):
    cls(sparsity=0.5, mask_structure="channel")(model)
    after = matrices(model)
    assert sorted((after["U"] != 0).sum(0)) == [0, 0, 0, 8, 8, 8]
    assert sorted((after["W"] != 0).sum(0)) == [0, 0, 6, 6]


OPTIONS = [
    Magnitude(sparsity=0.6),
    Magnitude(sparsity=0.6, scope="global"),
    Magnitude(mask_structure="1:2"),
    Magnitude(sparsity=0.5, mask_structure="block:2x2", norm="l1"),
    Magnitude(sparsity=0.5, mask_structure="channel"),
    Random(sparsity=0.6, seed=3),
    Random(mask_structure="1:2"),
    Random(sparsity=0.5, mask_structure="block:2x2"),
    Threshold(theta=0.5),
]


@pytest.mark.parametrize("step", OPTIONS, ids=repr)
def test_the_second_run_changes_nothing(model, step):
    assert step(model).modified
    first = matrices(model)
    again = step(model)
    assert not again.modified
    assert not again.layers
    for name, array in matrices(model).items():
        np.testing.assert_array_equal(array, first[name])


@pytest.mark.parametrize("step", OPTIONS, ids=repr)
def test_zeros_that_are_there_stay(model, step):
    holes = RNG.random((8, 6)) < 0.3
    model.graph.initializers["U"].const_value = ir.tensor(np.where(holes, np.float32(0), U), name="U")
    result = step(model)
    after = matrices(model)["U"]
    assert (after[holes] == 0).all()
    (layer,) = (layer for layer in result.layers if layer.name == "U")
    assert layer.zeros_before == holes.sum()


@pytest.mark.parametrize("cls", [Magnitude, Random])
def test_zeros_that_are_there_count(model, cls):
    sparse = U.copy()
    sparse[:3] = -0.0
    model.graph.initializers["U"].const_value = ir.tensor(sparse, name="U")
    result = cls(sparsity=0.5, targets=("U",))(model)
    assert zeros(matrices(model)["U"]) == 24
    assert result.statistics["zeros_before"] == 18
    assert result.statistics["already_sparser"] == 0


@pytest.mark.parametrize("cls", [Magnitude, Random])
def test_a_sparser_weight_keeps_its_zeros(model, cls):
    sparse = U.copy()
    sparse[:7] = 0
    tensor = ir.tensor(sparse, name="U")
    model.graph.initializers["U"].const_value = tensor
    result = cls(sparsity=0.5, targets=("U",))(model)
    assert not result.modified
    assert model.graph.initializers["U"].const_value is tensor
    assert result.statistics["already_sparser"] == 1
    assert result.statistics["zeros_after"] == 42


@pytest.mark.parametrize(
    "step", [Magnitude(sparsity=0.0), Random(sparsity=0.0), Threshold(theta=0)], ids=repr
)
def test_asking_for_nothing_changes_nothing(model, step):
    assert not step(model).modified
    np.testing.assert_array_equal(matrices(model)["U"], U)


def test_random_depends_on_the_seed_and_the_name_only(from_text, model):
    alone = from_text(f"{HEAD} g (float[B, 8] X) => (float[B, 6] Y) {{ Y = MatMul(X, U) }}", U=U)
    Random(sparsity=0.5, seed=1)(model)
    Random(sparsity=0.5, seed=1)(alone)
    np.testing.assert_array_equal(matrices(model)["U"], matrices(alone)["U"])
    other = from_text(f"{HEAD} g (float[B, 8] X) => (float[B, 6] Y) {{ Y = MatMul(X, U) }}", U=U)
    Random(sparsity=0.5, seed=2)(other)
    assert (matrices(other)["U"] != matrices(alone)["U"]).any()


def test_random_draws_anew_for_every_weight(from_text):
    tensors = {"U": np.ones((8, 8), np.float32), "V": np.ones((8, 8), np.float32)}
    model = from_text(
        f"{HEAD} g (float[B, 8] X) => (float[B, 8] Y) {{ A = MatMul(X, U) Y = MatMul(A, V) }}", **tensors
    )
    Random(sparsity=0.5)(model)
    assert (matrices(model)["U"] != matrices(model)["V"]).any()


def test_random_keeps_a_weight_of_nothing_but_nan(model):
    model.graph.initializers["U"].const_value = ir.tensor(np.full((8, 6), np.nan, np.float32), name="U")
    Random(sparsity=0.9, targets=("U",))(model)
    assert np.isnan(matrices(model)["U"]).all()


def test_random_takes_all_places_alike(from_text):
    """1000 of 2000 ones: a fair draw leaves 500 ± 5 σ, σ = √(2000)/4, in either half and on even places."""
    model = from_text(
        f"{HEAD} g (float[B, 50] X) => (float[B, 40] Y) {{ Y = MatMul(X, U) }}",
        U=np.ones((50, 40), np.float32),
    )
    Random(sparsity=0.5)(model)
    kept = matrices(model)["U"]
    assert abs(kept[:25].sum() - 500) < 56
    assert abs(kept.ravel()[::2].sum() - 500) < 56


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.7, 5, 1e9])
def test_threshold_is_strict(model, theta):
    Threshold(theta=theta)(model)
    np.testing.assert_array_equal(matrices(model)["U"], np.where(np.abs(U) < theta, 0, U))


def test_threshold_is_not_rounded_to_the_dtype(from_text):
    low, high = np.float16(0.1), np.nextafter(np.float16(0.1), np.float16(1))
    model = from_text(
        f"{HEAD} g (float16[1, 2] X) => (float16[1, 2] Y) {{ Y = MatMul(X, U) }}",
        U=np.array([[low, high], [-low, -high]], np.float16),
    )
    assert float(low) < 0.1 < float(high)
    Threshold(theta=0.1)(model)
    assert matrices(model)["U"].tolist() == [[0, high], [0, -high]]


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.float16, "float16"), (np.float64, "double"), (ml_dtypes.bfloat16, "bfloat16")]
)
@pytest.mark.parametrize(
    "step", [Magnitude(sparsity=0.5), Random(sparsity=0.5), Threshold(theta=0.6)], ids=repr
)
def test_the_dtype_stays(from_text, dtype, kind, step):
    array = U.astype(dtype)
    model = from_text(f"{HEAD} g ({kind}[B, 8] X) => ({kind}[B, 6] Y) {{ Y = MatMul(X, U) }}", U=array)
    assert step(model).modified
    after = model.graph.initializers["U"].const_value.numpy()
    assert after.dtype == dtype
    assert kept_are_unchanged(array, after)
    if not isinstance(step, Threshold):
        assert zeros(after) == 24


@pytest.mark.parametrize("step", OPTIONS, ids=repr)
def test_nan_and_inf_are_kept_and_named(model, step):
    broken = U.copy()
    broken[0, 0], broken[3, 1], broken[6, 5] = np.nan, np.inf, -np.inf
    model.graph.initializers["U"].const_value = ir.tensor(broken, name="U")
    result = step(model)
    after = matrices(model)["U"]
    np.testing.assert_array_equal(after[~np.isfinite(broken)], broken[~np.isfinite(broken)])
    assert result.statistics["non_finite"] == 3
    assert [(place.place, place.reason) for place in result.declined] == [("U", "3 NaN or Inf values kept")]


def test_a_group_with_too_many_nans_is_left_alone(model):
    broken = U.copy()
    broken[:3, 0] = np.nan
    tensor = ir.tensor(broken, name="U")
    model.graph.initializers["U"].const_value = tensor
    result = Magnitude(mask_structure="2:4", targets=("U",))(model)
    assert model.graph.initializers["U"].const_value is tensor
    assert [(place.place, place.reason) for place in result.declined] == [
        ("W", "not among targets"),
        ("U", "more NaN or Inf values in a group than 2:4 keeps"),
    ]
    assert not result.modified


def test_unstructured_pruning_does_not_forget_a_structure(model):
    Magnitude(mask_structure="1:2")(model)
    Magnitude(sparsity=0.7)(model)
    assert model.graph.initializers["U"].metadata_props[STRUCTURE_KEY] == "1:2"
    assert obeys(matrices(model)["U"], MaskStructure.parse("1:2"))


def test_a_structure_that_already_holds_is_noted(model):
    half = U.copy()
    half[::2] = 0
    model.graph.initializers["U"].const_value = ir.tensor(half, name="U")
    result = Magnitude(mask_structure="2:4", targets=("U",))(model)
    assert result.modified  # the note only
    assert not result.layers
    assert model.graph.initializers["U"].metadata_props[STRUCTURE_KEY] == "2:4"


@pytest.mark.parametrize(
    ("targets", "ignore", "pruned", "reasons"),
    [
        (("U",), (), ["U"], {"W": "not among targets"}),
        (("Gemm",), (), ["W"], {"U": "not among targets"}),
        ((), ("re:U",), ["W"], {"U": "listed in ignore"}),
        (("U", "W"), ("W",), ["U"], {"W": "listed in ignore"}),
        ((), (), ["U", "W"], {}),
    ],
)
def test_targets_and_ignore(model, targets, ignore, pruned, reasons):
    result = Magnitude(sparsity=0.5, targets=targets, ignore=ignore)(model)
    assert [layer.name for layer in result.layers] == pruned
    assert {place.place: place.reason for place in result.declined} == reasons


def test_the_output_head_is_ignored_by_default(from_text):
    model = from_text(
        f"{HEAD} g (float[B, 8] X) => (float[B, 6] Y) {{ Y = MatMul(X, lm_head_weight) }}", lm_head_weight=U
    )
    result = Magnitude(sparsity=0.5)(model)
    assert not result.modified
    assert [place.reason for place in result.declined] == ["listed in ignore"]


@pytest.mark.parametrize("targets", [("V",), ("U", "re:V"), ("Conv",)])
def test_targets_that_match_nothing_are_an_error(model, targets):
    with pytest.raises(UsageError, match=r"matches no weight.*the model has for example 'U', 'W'"):
        Magnitude(sparsity=0.5, targets=targets)(model)
    np.testing.assert_array_equal(matrices(model)["U"], U)


def test_a_target_that_cannot_be_pruned_is_told_why(from_text):
    model = from_text(
        f"{HEAD} g (float[B, 8] X, float[8, 6] U) => (float[B, 6] Y) {{ Y = MatMul(X, U) }}", U=U
    )
    with pytest.raises(UsageError, match="'U' cannot be pruned: it is also a graph input"):
        Magnitude(sparsity=0.5, targets=("U",))(model)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Magnitude, {}, "prune.magnitude: mask_structure unstructured needs a sparsity"),
        (Magnitude, {"sparsity": 1}, "prune.magnitude: sparsity must be at least 0 and below 1, not 1"),
        (Magnitude, {"sparsity": "0.5"}, "prune.magnitude: sparsity must be a finite number, not '0.5'"),
        (Magnitude, {"sparsity": 0.5, "scope": "model"}, "scope must be one of layer, global, not 'model'"),
        (Magnitude, {"sparsity": 0.5, "norm": "l3"}, "norm must be one of l1, l2, not 'l3'"),
        (Magnitude, {"sparsity": 0.5, "targets": "U"}, "targets must be a list of strings, not 'U'"),
        (Magnitude, {"sparsity": 0.5, "targets": ("re:[",)}, "'re:[' is not a regular expression"),
        (Magnitude, {"mask_structure": "2:4", "sparsity": 0.8}, "2:4 implies sparsity 0.5, not 0.8"),
        (Magnitude, {"mask_structure": "2:4", "scope": "global"}, "scope 'global' needs"),
        (
            Magnitude,
            {"mask_structure": "channel", "scope": "global", "sparsity": 0.5},
            "scope 'global' needs",
        ),
        (Random, {"sparsity": -0.5}, "prune.random: sparsity must be at least 0"),
        (Random, {"sparsity": 0.5, "seed": -1}, "prune.random: seed must be 0 or more, not -1"),
        (Random, {"sparsity": 0.5, "seed": 1.5}, "prune.random: seed must be an integer"),
        (Random, {"mask_structure": "5:4"}, "the nearest is '4:5'"),
        (Threshold, {"theta": -1.0}, "prune.threshold: theta must be 0 or more, not -1.0"),
        (Threshold, {"theta": float("nan")}, "prune.threshold: theta must be a finite number, not nan"),
    ],
)
def test_wrong_options_are_named(cls, options, message):
    with pytest.raises(UsageError) as caught:
        cls(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("step", OPTIONS, ids=repr)
def test_one_weight_in_memory_at_a_time(tmp_path, from_text, step):
    """Weights in a file are mapped one after the other, and unmapped when done."""
    text = f"{HEAD} g (float[B, 8] X) => (float[B, 4] Y) {{ A = MatMul(X, U) Y = Gemm<transB = 1>(A, W) }}"
    small = from_text(text, U=U, W=np.ascontiguousarray(W.T))
    ir.save(small, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    content = (tmp_path / "model.onnx.data").read_bytes()
    model = ir.load(tmp_path / "model.onnx")
    old = [value.const_value for value in model.graph.initializers.values()]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in old)
    mapped = []

    def store(array, name):
        mapped.append([tensor.name for tensor in old if tensor.raw is not None])
        return ir.tensor(array, name=name)

    step(model, PassContext(store=store))
    assert mapped == [[], []]
    assert not [tensor.name for tensor in old if tensor.raw is not None]
    assert (tmp_path / "model.onnx.data").read_bytes() == content
    step(small)
    for name, array in matrices(small).items():
        np.testing.assert_array_equal(matrices(model)[name], array)


def test_stored_arrays_are_contiguous_in_the_stored_orientation(model):
    stored = {}

    def store(array, name):
        stored[name] = array
        return ir.tensor(array, name=name)

    Magnitude(sparsity=0.5)(model, PassContext(store=store))
    assert {name: array.shape for name, array in stored.items()} == {"U": (8, 6), "W": (4, 6)}
    assert all(array.flags.c_contiguous for array in stored.values())


def test_a_shared_weight_is_pruned_once(from_text, run):
    square = RNG.standard_normal((4, 4)).astype(np.float32)
    text = f"{HEAD} g (float[B, 4] X) => (float[B, 4] Y) {{ A = MatMul(X, W) Y = MatMul(A, W) }}"
    model = from_text(text, W=square)
    result = Magnitude(sparsity=0.5)(model)
    assert len(result.layers) == 1
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    pruned = matrices(model)["W"]
    np.testing.assert_allclose(run(model, {"X": x})["Y"], x @ pruned @ pruned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.permutations(["unstructured", "2:4", "block:2x4"], 2))
)
def test_structures_on_top_of_each_other(model, first, second):
    sparsity = {"unstructured": 0.5, "2:4": None, "block:2x4": 0.5}
    Magnitude(sparsity=sparsity[first], mask_structure=first, targets=("U",))(model)
    before = matrices(model)["U"]
    Magnitude(sparsity=sparsity[second], mask_structure=second, targets=("U",))(model)
    after = matrices(model)["U"]
    assert kept_are_unchanged(before, after)
    if "2:4" in (first, second):
        assert obeys(after, MaskStructure.parse("2:4"))
