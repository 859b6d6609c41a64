"""prune.gradient: ranks by weight and gradient, exact sparsity, weights without an entry, and bad files."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.data.gradient_file import WeightGradients, open_gradients, write_gradients
from sparse_onnx.errors import DataError, UsageError
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.prune.gradient import Gradient
from sparse_onnx.passes.solvers.masks import MaskStructure, obeys

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
RNG = np.random.default_rng(7)
U = RNG.standard_normal((8, 6)).astype(np.float32)
W = RNG.standard_normal((6, 4)).astype(np.float32) * 3


def moments(shape):
    """Of few and heavy-tailed gradients, so that the mean of squares ranks otherwise than the mean."""
    g = RNG.standard_normal((3, *shape)).astype(np.float32) ** 3
    return WeightGradients(np.abs(g).mean(0), (g**2).mean(0))


GRADIENTS = {"U": moments((8, 6)), "W": moments((6, 4))}
IMPORTANCE = {
    "first": {name: np.abs(w) * GRADIENTS[name].grad_abs for name, w in (("U", U), ("W", W))},
    "fisher": {name: w**2 * GRADIENTS[name].fisher for name, w in (("U", U), ("W", W))},
}


@pytest.fixture
def model(from_text):
    """Two linears: U [8, 6] stored as it is, W [6, 4] stored transposed."""
    return from_text(
        f"{HEAD} g (float[B, 8] X) => (float[B, 4] Y) {{ A = MatMul(X, U) Y = Gemm<transB = 1>(A, W) }}",
        U=U,
        W=np.ascontiguousarray(W.T),
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "gradients.npz"
    write_gradients(path, GRADIENTS)
    return str(path)


def matrices(model):
    return {weight.name: np.array(weight.matrix()) for weight in find_weights(model)[0]}


def zeros(array):
    return int(np.count_nonzero(array == 0))


def serialized(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.parametrize("order", ["first", "fisher"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.81])
def test_the_least_important_go_and_exactly_so_many(model, file, order, sparsity):
    result = Gradient(gradients=file, sparsity=sparsity, order=order, scope="layer")(model)
    after = matrices(model)
    for name, before in (("U", U), ("W", W)):
        score = IMPORTANCE[order][name]
        count = round(sparsity * before.size)
        cut = np.sort(score, axis=None)[count]
        np.testing.assert_array_equal(after[name], np.where(score < cut, 0, before))
        assert zeros(after[name]) == count
        assert model.graph.initializers[name].metadata_props[STRUCTURE_KEY] == "unstructured"
    assert result.modified
    assert not result.declined
    assert result.statistics["sparsity"] == sum(map(zeros, after.values())) / 72


@pytest.mark.parametrize("order", ["first", "fisher"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.81])
def test_every_output_channel_has_its_share_with_scope_row(model, file, order, sparsity):
    """The default: gradients differ so much between channels that one cut for the layer would empty some."""
    Gradient(gradients=file, sparsity=sparsity, order=order)(model)
    after = matrices(model)
    for name, before in (("U", U), ("W", W)):
        score = IMPORTANCE[order][name]
        cut = np.sort(score, axis=0)[round(sparsity * len(score))]
        np.testing.assert_array_equal(after[name], np.where(score < cut, 0, before))


def test_blocks_of_a_row_are_ranked_among_themselves(model, file):
    Gradient(gradients=file, sparsity=0.5, mask_structure="block:2x2", ignore=("W",))(model)
    sums = IMPORTANCE["fisher"]["U"].reshape(4, 2, 3, 2).sum((1, 3))
    keep = np.kron(sums >= np.sort(sums, axis=0)[2], np.ones((2, 2), bool))
    np.testing.assert_array_equal(matrices(model)["U"], np.where(keep, U, 0))


def test_the_orders_and_magnitude_differ(model, file):
    masks = []
    for order in ("first", "fisher"):
        pruned = model.clone()
        Gradient(gradients=file, sparsity=0.5, order=order)(pruned)
        masks.append(matrices(pruned)["U"] == 0)
    masks.append(np.abs(U) < np.sort(np.abs(U), axis=None)[24])
    assert not any(np.array_equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("order", ["first", "fisher"])
@pytest.mark.parametrize(("structure", "tile"), [("unstructured", (1, 1)), ("block:2x1", (1, 2))])
def test_global_scope_is_one_threshold_for_sums_of_importance(model, file, order, structure, tile):
    Gradient(gradients=file, sparsity=0.5, scope="global", mask_structure=structure, order=order)(model)

    def sums(score):
        K, N = score.shape
        return score.astype(np.float64).reshape(K // tile[0], tile[0], N // tile[1], tile[1]).sum((1, 3))

    units = {name: sums(score) for name, score in IMPORTANCE[order].items()}
    together = np.sort(np.concatenate([unit.ravel() for unit in units.values()]))
    cut = together[together.size // 2]
    after = matrices(model)
    for name, before in (("U", U), ("W", W)):
        keep = np.kron(units[name] >= cut, np.ones(tile, bool))
        np.testing.assert_array_equal(after[name], np.where(keep, before, 0))


@pytest.mark.parametrize("structure", ["2:4", "1:2", "block:2x2", "channel"])
def test_structures_hold(from_text, file, structure):
    model = from_text(f"{HEAD} g (float[B, 8] X) => (float[B, 6] Y) {{ Y = MatMul(X, U) }}", U=U)
    write_gradients(Path(file), {"U": GRADIENTS["U"]})
    parsed = MaskStructure.parse(structure)
    Gradient(gradients=file, sparsity=0.5, mask_structure=structure)(model)
    after = matrices(model)["U"]
    assert zeros(after) == 24
    if parsed.kind == "n:m":
        assert obeys(after != 0, parsed)
    else:
        rows, columns = parsed.tile((8, 6))
        tiles = (after == 0).reshape(8 // rows, rows, 6 // columns, columns).mean((1, 3))
        assert set(tiles.ravel()) == {0.0, 1.0}


def test_convolutions_are_seen_as_matrices(from_text, file):
    filters = RNG.standard_normal((6, 2, 2, 2)).astype(np.float32)
    model = from_text(
        f"{HEAD} g (float[B, 2, 5, 5] X) => (float[B, 6, 4, 4] Y) {{ Y = Conv(X, C) }}", C=filters
    )
    write_gradients(Path(file), {"C": GRADIENTS["U"]})
    Gradient(gradients=file, sparsity=0.5, order="first", scope="layer")(model)
    score = np.abs(filters.reshape(6, 8).T) * GRADIENTS["U"].grad_abs
    keep = score >= np.sort(score, axis=None)[24]
    np.testing.assert_array_equal(matrices(model)["C"] != 0, keep)


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_zeros_count_and_a_second_run_changes_nothing(model, file, scope):
    """Also where gradients are zero: such a weight comes behind those that are zero already."""
    u = U.copy()
    u[:4, :3] = 0
    model.graph.initializers["U"].const_value = ir.tensor(u, name="U")
    dead = WeightGradients(
        *(np.where(np.arange(6) > 2, part, 0) for part in dataclasses.astuple(GRADIENTS["U"]))
    )
    write_gradients(Path(file), {"U": dead, "W": GRADIENTS["W"]})
    step = Gradient(gradients=file, sparsity=0.4, scope=scope)
    step(model)
    after = matrices(model)
    expected = {
        # Three channels have more zeros than asked for, and keep them.
        "row": {"U": 3 * 4 + 3 * round(0.4 * 8), "W": 4 * round(0.4 * 6)},
        "layer": {"U": round(0.4 * 48), "W": round(0.4 * 24)},
    }
    if scope == "global":
        assert zeros(after["U"]) + zeros(after["W"]) == round(0.4 * 72)
    else:
        assert {name: zeros(array) for name, array in after.items()} == expected[scope]
    assert (after["U"][:4, :3] == 0).all()
    first = serialized(model)
    assert not step(model).modified
    assert serialized(model) == first


def test_the_same_bytes_on_a_rerun(model, file):
    other = model.clone()
    for one in (model, other):
        Gradient(gradients=file, sparsity=0.5)(one)
    assert serialized(model) == serialized(other)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes(from_text, file, dtype):
    name = {np.float16: "float16", np.float64: "double"}[dtype]
    model = from_text(
        f"{HEAD} g ({name}[B, 8] X) => ({name}[B, 6] Y) {{ Y = MatMul(X, U) }}", U=U.astype(dtype)
    )
    write_gradients(Path(file), {"U": GRADIENTS["U"]})
    Gradient(gradients=file, sparsity=0.5)(model)
    after = matrices(model)["U"]
    assert after.dtype == dtype
    assert zeros(after) == 24


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_nan_and_infinity_in_a_weight_are_kept_and_named(model, file, scope):
    u = U.copy()
    u[0, 0], u[1, 1] = np.nan, np.inf
    model.graph.initializers["U"].const_value = ir.tensor(u, name="U")
    write_gradients(Path(file), {**GRADIENTS, "U": WeightGradients(np.zeros((8, 6)), np.zeros((8, 6)))})
    result = Gradient(gradients=file, sparsity=0.5, scope=scope)(model)
    after = matrices(model)["U"]
    assert np.isnan(after[0, 0])
    assert np.isinf(after[1, 1])
    if scope != "global":
        assert zeros(after) == 24
    assert [(place.place, place.reason) for place in result.declined] == [("U", "2 NaN or Inf values kept")]


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_weights_without_an_entry_are_left_alone_and_named(model, file, scope):
    write_gradients(Path(file), {"U": GRADIENTS["U"]})
    result = Gradient(gradients=file, sparsity=0.5, scope=scope)(model)
    after = matrices(model)
    assert zeros(after["U"]) == 24
    np.testing.assert_array_equal(after["W"], W)
    assert STRUCTURE_KEY not in model.graph.initializers["W"].metadata_props
    assert [(p.pass_name, p.place, p.reason) for p in result.declined] == [
        ("prune.gradient", "W", f"has no entry in {file}")
    ]
    assert result.statistics["weights"] == 1


def test_targets_and_ignore_choose(model, file):
    result = Gradient(gradients=file, sparsity=0.5, ignore=("W",))(model)
    assert zeros(matrices(model)["W"]) == 0
    assert [(place.place, place.reason) for place in result.declined] == [("W", "listed in ignore")]
    with pytest.raises(UsageError, match="targets: 'V' matches no weight"):
        Gradient(gradients=file, sparsity=0.5, targets=("V",))(model)


def test_entries_that_the_model_lacks_are_named(model, file):
    write_gradients(Path(file), {**GRADIENTS, "gone": GRADIENTS["U"]})
    result = Gradient(gradients=file, sparsity=0.5)(model)
    assert [(p.place, p.reason) for p in result.declined] == [("gone", f"is in {file}, but not in the model")]


def test_a_model_without_weights_is_left_alone(from_text, file):
    model = from_text(f"{HEAD} g (float[B] X) => (float[B] Y) {{ Y = Relu(X) }}")
    assert not Gradient(gradients=file, sparsity=0.5)(model).modified


def test_a_recipe_can_have_it(file):
    modifier = f"prune.gradient: {{gradients: {file}, sparsity: 0.5}}"
    recipe = parse_recipe(f"version: 1\nstages:\n  - name: prune\n    modifiers:\n      - {modifier}\n")
    assert Gradient(gradients=file, sparsity=0.5) in recipe.stages[0].modifiers


# What is refused


def write(path, **arrays):
    np.savez(path, **arrays)


def whole(name="U", shape=(8, 6), value=1.0, dtype=np.float32):
    array = np.full(shape, value, dtype)
    return {f"{name}.grad_abs": array, f"{name}.fisher": array}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            whole("V"),
            "has no entry for any of the 2 weights to prune, such as 'U'; it has 'V': is it of this",
        ),
        (whole(shape=(6, 8)), r"U\.fisher is float32\[6, 8\]; the weight needs float32\[8, 6\]"),
        (whole(shape=(48,)), r"float32\[48\]; the weight needs"),
        (whole(dtype=np.int32), r"U\.fisher is int32\[8, 6\]"),
        (whole(value=np.nan), r"U\.fisher holds NaN, Inf or negative"),
        (whole(value=np.inf), "holds NaN, Inf or negative"),
        (whole(value=-1.0), "holds NaN, Inf or negative"),
        ({"U.grad_abs": np.ones((8, 6), np.float32)}, r"U\.fisher is missing"),
        ({"U": np.ones((8, 6), np.float32)}, "holds no gradients; write the file with `sparse-onnx export"),
        ({"U.fisher": np.ones((8, 6), np.float32), "input_ids": np.ones(3)}, "holds no gradients"),
        ({}, "holds no gradients"),
    ],
)
def test_files_that_do_not_fit(model, file, arrays, message):
    write(file, **arrays)
    before = serialized(model)
    with pytest.raises(UsageError, match=message):
        Gradient(gradients=file, sparsity=0.5)(model)
    assert serialized(model) == before


def test_a_missing_file_a_folder_text_and_a_single_array(model, tmp_path):
    text, single = tmp_path / "text.npz", tmp_path / "single.npz"
    text.write_text("no archive")
    with single.open("wb") as stream:
        np.save(stream, U)
    for path, message in (
        (tmp_path / "absent.npz", "no such file of gradients"),
        (tmp_path, "no such file of gradients"),
        (text, "cannot be read as .npz"),
        (single, "is a single array"),
    ):
        with pytest.raises(DataError, match=message):
            Gradient(gradients=str(path), sparsity=0.5)(model)


def test_a_damaged_file(model, file):
    content = bytearray(Path(file).read_bytes())
    content[300] ^= 0xFF  # in the values of the first array
    Path(file).write_bytes(content)
    with pytest.raises(DataError, match=r"U\.grad_abs is damaged"):
        Gradient(gradients=file, sparsity=0.5, order="first")(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a sparsity"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.5, "order": "second"}, "order must be one of first, fisher"),
        ({"sparsity": 0.5, "scope": "model"}, "scope must be one of row, layer, global"),
        ({"mask_structure": "2:4", "scope": "global"}, "'global' needs unstructured or block:RxC, not 2:4"),
        ({"sparsity": 0.5, "mask_structure": "channel", "scope": "global"}, "'global' needs unstructured"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        Gradient(gradients="any.npz", **options)


# The file


def test_what_is_written_is_read_and_the_same_bytes_again(tmp_path):
    paths = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for path in paths:
        write_gradients(path, GRADIENTS)
    with open_gradients(paths[0]) as file:
        assert file.names == ("U", "W")
        np.testing.assert_array_equal(file.read("W", "fisher", (6, 4)), GRADIENTS["W"].fisher)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths  # nothing temporary is left
