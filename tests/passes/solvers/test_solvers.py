"""What every solver must satisfy, whatever its method."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.registry import PASSES
from sparse_onnx.passes.solvers import SOLVERS, InputStatistics, relative_error
from sparse_onnx.passes.solvers.masks import MaskStructure, obeys

STRUCTURES = [
    MaskStructure.parse(text) for text in ("unstructured", "2:4", "4:8", "1:4", "block:4x2", "channel")
]
ALL = sorted(SOLVERS)
TAKEN = [
    (name, structure)
    for name in ALL
    for structure in STRUCTURES
    if structure.kind in SOLVERS[name].structures
]
REFUSED = [
    (name, structure)
    for name in ALL
    for structure in STRUCTURES
    if structure.kind not in SOLVERS[name].structures
]
UPDATING = ["admm", "alps", "auto", "iht", "lasso", "omp", "sparsegpt"]


def zeros_of(W):
    return int(np.count_nonzero(W == 0))


def share_of(structure, share=0.6):
    return None if structure.kind == "n:m" else share


@pytest.mark.parametrize(("name", "structure"), TAKEN, ids=str)
def test_sparsity_is_exact_and_the_structure_is_obeyed(layer, name, structure):
    W, statistics = layer(32, 20)
    before = W.copy()
    pruned = SOLVERS[name]().solve(W, statistics, structure, share_of(structure))
    assert pruned.dtype == np.float32
    assert pruned.shape == W.shape
    np.testing.assert_array_equal(W, before)
    if structure.kind == "n:m":
        assert obeys(pruned, structure)
        assert zeros_of(pruned) == W.size * (1 - structure.size[0] / structure.size[1])
    else:
        height, width = structure.tile(W.shape)
        units = pruned.reshape(32 // height, height, 20 // width, width)
        empty = ~units.any(axis=(1, 3))
        assert np.count_nonzero(empty) == round(0.6 * empty.size)
        assert zeros_of(pruned) == np.count_nonzero(empty) * height * width
    again = SOLVERS[name]().solve(W, statistics, structure, share_of(structure))
    assert again.tobytes() == pruned.tobytes()


@pytest.mark.parametrize(("name", "structure"), REFUSED, ids=str)
def test_a_structure_that_a_method_does_not_take_is_refused(layer, name, structure):
    W, statistics = layer(32, 20)
    with pytest.raises(UsageError, match=rf"{name} does not take mask_structure {structure}: use "):
        SOLVERS[name]().solve(W, statistics, structure, share_of(structure))


@pytest.mark.parametrize("name", ALL)
def test_row_scope_has_the_same_zeros_in_every_output_channel(layer, name):
    W, statistics = layer(33, 7)
    pruned = SOLVERS[name]().solve(W, statistics, sparsity=0.55, scope="row")
    np.testing.assert_array_equal((pruned == 0).sum(axis=0), round(0.55 * 33))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(ALL),
    K=st.integers(1, 18),
    N=st.integers(1, 9),
    sparsity=st.floats(0, 0.99),
    scope=st.sampled_from(["row", "layer"]),
    tokens=st.integers(1, 40),
)
def test_any_shape_and_sparsity_even_with_fewer_tokens_than_inputs(name, K, N, sparsity, scope, tokens):
    generator = np.random.default_rng(K * 100 + N)
    X = generator.standard_normal((tokens, K))
    W = generator.standard_normal((K, N)).astype(np.float32)
    pruned = SOLVERS[name]().solve(W, InputStatistics(X.T @ X), sparsity=sparsity, scope=scope)
    assert np.isfinite(pruned).all()
    units = K if scope == "row" else K * N
    assert zeros_of(pruned) == round(sparsity * units) * (N if scope == "row" else 1)


@pytest.mark.parametrize("name", ALL)
def test_without_sparsity_the_layer_stays(layer, name):
    W, statistics = layer(24, 6)
    pruned = SOLVERS[name]().solve(W, statistics, sparsity=0.0)
    tolerance = 2e-3 if name in UPDATING else 0
    assert relative_error(W, pruned, statistics.gram) <= tolerance


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        (name, structure)
        for name, structure in TAKEN
        if SOLVERS[name].needs != "nothing" and structure in STRUCTURES[:2]
    ],
    ids=str,
)
def test_dead_inputs_go_first_and_count(layer, name, structure):
    W, statistics = layer(32, 12)
    gram = statistics.gram.copy()
    gram[[3, 8]] = gram[:, [3, 8]] = 0
    pruned = SOLVERS[name]().solve(W, InputStatistics(gram), structure, share_of(structure, 0.5))
    assert not pruned[[3, 8]].any()
    assert zeros_of(pruned) == W.size // 2
    nothing = SOLVERS[name]().solve(
        W, InputStatistics(np.zeros_like(gram)), structure, share_of(structure, 0.5)
    )
    assert not nothing.any()


@pytest.mark.parametrize("name", ALL)
def test_the_scale_of_the_inputs_does_not_matter(layer, name):
    W, statistics = layer(40, 16)
    pruned = SOLVERS[name]().solve(W, statistics, sparsity=0.5)
    louder = SOLVERS[name]().solve(W, InputStatistics(statistics.gram * 2.0**40), sparsity=0.5)
    np.testing.assert_allclose(louder, pruned, rtol=1e-3, atol=1e-4 * np.abs(W).max())


@pytest.mark.parametrize("name", UPDATING)
def test_whoever_updates_beats_wanda_on_correlated_inputs(layer, name):
    W, statistics = layer(64, 48, seed=3)
    wanda = SOLVERS["wanda"]().solve(W, statistics, sparsity=0.5)
    pruned = SOLVERS[name]().solve(W, statistics, sparsity=0.5)
    assert relative_error(W, pruned, statistics.gram) < relative_error(W, wanda, statistics.gram)


@pytest.mark.parametrize("name", ALL)
def test_a_diagonal_is_the_gram_of_independent_inputs(layer, name):
    W, statistics = layer(16, 8)
    diagonal = statistics.diagonal
    pruned = SOLVERS[name]().solve(W, InputStatistics(diagonal), sparsity=0.5)
    assert zeros_of(pruned) == W.size // 2
    if SOLVERS[name].needs == "gram":
        best = SOLVERS["wanda"]().solve(W, InputStatistics(diagonal), sparsity=0.5)
        np.testing.assert_array_equal(pruned, best)


@pytest.mark.parametrize(
    ("text", "scope"),
    [(text, scope) for text in ("unstructured", "2:4", "block:4x2") for scope in ("row", "layer")]
    + [("channel", "layer")],
)
def test_blocks_of_the_gram_share_the_budget(layer, text, scope):
    structure = MaskStructure.parse(text)
    W, statistics = layer(32, 12)
    blocks = (statistics.gram[:20, :20], statistics.gram[20:, 20:])
    pruned = SOLVERS["alps"]().solve(W, InputStatistics(blocks), structure, share_of(structure, 0.5), scope)
    assert zeros_of(pruned) == W.size // 2
    whole = np.zeros((32, 32))
    whole[:20, :20], whole[20:, 20:] = blocks
    wanda = SOLVERS["wanda"]().solve(W, InputStatistics(whole), structure, share_of(structure, 0.5), scope)
    assert relative_error(W, pruned, whole) <= relative_error(W, wanda, whole) * 1.001


def test_blocks_of_the_gram_must_fit_the_structure(layer):
    W, statistics = layer(32, 4)
    blocks = (statistics.gram[:18, :18], statistics.gram[18:, 18:])
    with pytest.raises(UsageError, match=r"18 input channels are not a multiple of 4"):
        SOLVERS["alps"]().solve(W, InputStatistics(blocks), STRUCTURES[1])


@pytest.mark.parametrize("name", ALL)
def test_a_target_replaces_the_weight(layer, name):
    W, statistics = layer(16, 8)
    target = W[::-1].copy()
    with_target = SOLVERS[name]().solve(W, statistics, sparsity=0.5, target=target)
    np.testing.assert_array_equal(with_target, SOLVERS[name]().solve(target, statistics, sparsity=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": np.zeros(3, np.float32)}, r"weight must be \[K, N\]"),
        ({"W": np.zeros((3, 0), np.float32)}, r"not empty"),
        ({"W": np.full((4, 2), np.nan, np.float32)}, r"NaN or Inf"),
        ({"W": np.zeros((5, 2), np.float32)}, r"4 input channels, the weight has 5"),
        ({"target": np.zeros((2, 4), np.float32)}, r"target must be \[4, 2\]"),
        ({"initial": np.zeros((2, 4), bool)}, r"mask must be \[4, 2\]"),
        ({"sparsity": 1.5}, r"sparsity"),
        ({"sparsity": None}, r"needs a sparsity"),
        (
            {"structure": MaskStructure("n:m", (2, 3)), "sparsity": None},
            r"4 input channels are not a multiple of 3",
        ),
        ({"structure": MaskStructure("channel"), "scope": "row"}, r"channel needs scope layer"),
    ],
)
def test_input_that_does_not_fit_is_refused(change, message):
    arguments = {
        "W": np.ones((4, 2), np.float32),
        "statistics": InputStatistics(np.eye(4)),
        "sparsity": 0.5,
    } | change
    with pytest.raises(UsageError, match=message):
        SOLVERS["alps"]().solve(**arguments)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random", {"seed": -1}),
        ("ria", {"exponent": -0.5}),
        ("sparsegpt", {"block": 0}),
        ("sparsegpt", {"damping": -1.0}),
        ("admm", {"gradual": 21}),
        ("admm", {"penalty": 0.0}),
        ("alps", {"steps": 0}),
        ("auto", {"growth": 1.0}),
        ("iht", {"steps": "many"}),
        ("lasso", {"steps": 0}),
        ("omp", {"damping": float("nan")}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        SOLVERS[name](**options)


def test_no_class_has_the_name_of_a_pass():
    assert not {solver.__name__ for solver in SOLVERS.values()} & {cls.__name__ for cls in PASSES}
