"""Flags and settings over a recipe: each reaches what it belongs to, nothing else, and never nothing."""

import contextlib
import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparse_onnx
from sparse_onnx.compilation.recipe import Recipe, RecipeStage, dump_recipe
from sparse_onnx.compilation.recipe_flags import override, parse_settings
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.errors import UsageError
from sparse_onnx.passes.base import Pass, PassResult, Stage
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot_methods import Wanda
from sparse_onnx.passes.prune.random import Random
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.structured.ffn import Ffn


@dataclasses.dataclass(frozen=True)
class Grid(Pass):
    """A quantizer whose options have the names of those of pruning."""

    name: ClassVar[str] = "quant.grid"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    scope: str = "row"
    sparsity: float = 0.0
    seed: int = 0
    targets: tuple[str, ...] = ()

    def apply(self, model, context):
        return PassResult(model, False)


def recipe_of(*modifiers):
    return Recipe((RecipeStage("all", modifiers),))


def modifiers_of(recipe):
    return tuple(recipe.modifiers())


# -- flags -------------------------------------------------------------------------------------------


def test_flags_of_pruning_reach_pruning_alone():
    recipe = recipe_of(Ffn(sparsity=0.25), Magnitude(sparsity=0.5), Grid())
    flags = {"sparsity": 0.8, "scope": "global", "targets": ["a"], "seed": 3}
    assert modifiers_of(override(recipe, **flags)) == (
        Ffn(sparsity=0.25),
        Magnitude(sparsity=0.8, scope="global", targets=("a",)),
        Grid(),
    )


@pytest.mark.parametrize("flags", [{"scope": "layer"}, {"targets": ["a"]}])
def test_a_flag_that_only_another_stage_could_take_is_refused(flags):
    with pytest.raises(UsageError, match="has no effect, since nothing is pruned"):
        override(recipe_of(Grid()), **flags)


def test_a_method_is_added_before_what_follows_pruning_only_if_the_order_allows():
    with pytest.raises(
        UsageError, match=r"prune\.magnitude \(prune\) cannot run after quant\.grid \(quantize\)"
    ):
        override(recipe_of(Grid()), "magnitude", sparsity=0.5)


def test_what_removes_units_is_no_method():
    with pytest.raises(UsageError, match=r"unknown method 'ffn'"):
        override(Recipe(), "ffn", sparsity=0.5)


# -- settings ----------------------------------------------------------------------------------------

TWO = recipe_of(
    Magnitude(sparsity=0.5, targets=("a",)), Random(sparsity=0.7), Magnitude(sparsity=0.6, targets=("b",))
)


def test_a_setting_reaches_every_modifier_of_the_name():
    assert modifiers_of(override(TWO, settings={"prune.magnitude.norm": "l1"})) == (
        Magnitude(sparsity=0.5, targets=("a",), norm="l1"),
        Random(sparsity=0.7),
        Magnitude(sparsity=0.6, targets=("b",), norm="l1"),
    )


def test_an_index_picks_one_and_wins():
    settings = {"prune.magnitude[1].sparsity": 0.9, "prune.magnitude.sparsity": 0.8}
    found = modifiers_of(override(TWO, settings=settings))
    assert [modifier.sparsity for modifier in found] == [0.8, 0.7, 0.9]
    assert [modifier.targets for modifier in found] == [("a",), (), ("b",)]


def test_settings_reach_every_stage():
    recipe = recipe_of(Ffn(sparsity=0.25), Wanda(sparsity=0.5))
    settings = {
        "prune.ffn.multiple_of": 4,
        "prune.wanda.sparsities": {"a": 0.1},
        "prune.wanda.targets": ["a", "b"],
    }
    assert modifiers_of(override(recipe, settings=settings)) == (
        Ffn(sparsity=0.25, multiple_of=4),
        Wanda(sparsity=0.5, sparsities={"a": 0.1}, targets=("a", "b")),
    )


def test_settings_win_over_flags_and_serve_a_method_that_flags_add():
    recipe = override(Recipe(), "magnitude", {"prune.magnitude.sparsity": 0.8})
    assert modifiers_of(recipe) == (Magnitude(sparsity=0.8),)
    assert modifiers_of(override(recipe, sparsity=0.9, settings={"prune.magnitude.sparsity": 0.7})) == (
        Magnitude(sparsity=0.7),
    )


def test_none_is_the_default():
    recipe = recipe_of(Magnitude(sparsity=0.5, scope="global"))
    assert modifiers_of(override(recipe, settings={"prune.magnitude.scope": None})) == (
        Magnitude(sparsity=0.5),
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "prune.magnitud.sparsity",
            0.5,
            "unknown modifier 'prune.magnitud'; the nearest is 'prune.magnitude'",
        ),
        (
            "prune.magnitude.sparsty",
            0.5,
            "unknown option of prune.magnitude 'sparsty'; the nearest is 'sparsity'",
        ),
        ("prune.magnitude.sparsity", "80%", "prune.magnitude: sparsity must be a finite number, not '80%'"),
        ("prune.magnitude.sparsity", 1, "prune.magnitude: sparsity must be at least 0 and below 1, not 1"),
        ("prune.magnitude.norm", "l3", "prune.magnitude: norm must be one of "),
        ("prune.magnitude[2].sparsity", 0.5, "the recipe has 2 of prune.magnitude, counted from 0"),
        (
            "prune.threshold.theta",
            0.5,
            "prune.threshold is not in the recipe, which has prune.magnitude, prune.random",
        ),
        ("lower.sparse-matmul.min_sparsity", 0.5, "unknown modifier 'lower.sparse-matmul'"),
        ("prune.magnitude", 0.5, "names no option: write NAME.OPTION"),
        ("sparsity", 0.5, "names no option: write NAME.OPTION"),
        ("", 0.5, "names no option"),
        ("prune.magnitude[x].sparsity", 0.5, "names no option"),
        ("prune.magnitude[-1].sparsity", 0.5, "names no option"),
        ("prune.magnitude[].sparsity", 0.5, "names no option"),
    ],
)
def test_settings_that_reach_nothing(key, value, message):
    with pytest.raises(UsageError) as caught:
        override(TWO, settings={key: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_as_text():
    texts = [
        "a.b=0.8",
        "a.c=2:4",
        "a.d=[x, re:y.*]",
        "a.e={w: 0.5}",
        "a.f=",
        "a.g=true",
        "a.h=p=q",
        "a.i='1'",
    ]
    assert parse_settings(texts) == {
        "a.b": 0.8,
        "a.c": "2:4",
        "a.d": ["x", "re:y.*"],
        "a.e": {"w": 0.5},
        "a.f": None,
        "a.g": True,
        "a.h": "p=q",
        "a.i": "1",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a.b"], "--set a.b: write NAME.OPTION=VALUE"),
        (["a.b=1", "a.b=2"], "--set a.b=2: a.b is given twice"),
        (["a.b=[1"], "--set a.b=[1: not valid YAML"),
        (["a.b=*x"], "aliases (*name) are not allowed"),
        (["a.b=" + "[" * 5000], ": not valid YAML: nested too deeply"),
    ],
)
def test_texts_that_are_no_settings(texts, message):
    with pytest.raises(UsageError) as caught:
        parse_settings(texts)
    assert message in str(caught.value)


@given(st.lists(st.text(max_size=20), max_size=3), st.text(max_size=12))
def test_any_text_is_a_setting_or_refused(texts, value):
    for settings in ([*texts], [f"prune.magnitude.sparsity={value}"], [f"prune.magnitude[{value}].norm=l1"]):
        with contextlib.suppress(UsageError):  # and no other error
            assert len(modifiers_of(override(TWO, settings=parse_settings(settings)))) == 3


# -- one modifier for different targets --------------------------------------------------------------

REPEATED = """
version: 1
stages:
  - name: prune
    modifiers:
      - prune.magnitude: {sparsity: 0.75, targets: [Q]}
      - prune.magnitude: {mask_structure: 2:4, targets: [K]}
"""


@pytest.fixture
def linears(from_text):
    """Two linears in a row, and a third."""
    rng = np.random.default_rng(0)
    return from_text(
        """<ir_version: 9, opset_import: ["" : 20]> g (float[b, 16] X) => (float[b, 16] Y)
           { q = MatMul(X, Q) k = MatMul(q, K) Y = MatMul(k, O) }""",
        **{name: rng.standard_normal((16, 16)).astype(np.float32) for name in "QKO"},
    )


def test_a_modifier_may_be_repeated_and_each_keeps_its_own(linears):
    recipe = parse_recipe(REPEATED)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    recipe.pipeline()(linears)
    zeros = {name: np.mean(linears.graph.initializers[name].const_value.numpy() == 0) for name in "QKO"}
    assert zeros == {"Q": 0.75, "K": 0.5, "O": 0}


def test_settings_from_python(linears, tmp_path):
    ir.save(linears, tmp_path / "model.onnx")
    settings = {"prune.magnitude[0].sparsity": 0.25}
    result = sparse_onnx.optimize(
        tmp_path / "model.onnx", "", recipe=parse_recipe(REPEATED), dry_run=True, settings=settings
    )
    (stage,) = result.report["recipe"]["stages"]
    assert [modifier["prune.magnitude"].get("sparsity") for modifier in stage["modifiers"]] == [0.25, None]
    zeros = {layer["name"]: layer["sparsity"] for layer in result.report["layers"]}
    assert zeros == {"Q": 0.25, "K": 0.5, "O": 0}
    assert f"settings={settings!r}" in result.report["command"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prune.magnitude.sparsity": 0.5, "prune.magnitude.sparsity2": 1}, "unknown option"),
        ({"prune.magnitude.mask_structure": "block:4x1"}, "a search chooses the pattern"),
    ],
)
def test_settings_of_a_search(linears, tmp_path, settings, said):
    ir.save(linears, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match=said):
        sparse_onnx.optimize(
            tmp_path / "model.onnx", tmp_path / "out", method="magnitude", target_speedup=2, settings=settings
        )


def test_a_share_that_is_set_is_not_searched_for(linears, tmp_path):
    ir.save(linears, tmp_path / "model.onnx")
    result = sparse_onnx.optimize(
        tmp_path / "model.onnx", tmp_path / "out", method="magnitude", target_size=1.0, benchmark=False,
        settings={"prune.magnitude.sparsity": 0.5},
    )  # fmt: skip
    assert "search" not in result.report


# -- bits --------------------------------------------------------------------------------------------


def bits_of(recipe=None, **flags):
    """The options of quant.weight that flags bring."""
    (step,) = (
        step for step in modifiers_of(override(recipe or Recipe(), **flags)) if step.stage is Stage.QUANTIZE
    )
    return step


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"bits": 4}, {"method": "hqq", "bits": 4, "group_size": 64, "symmetric": False}),
        ({"bits": 3, "group_size": 32}, {"method": "hqq", "bits": 3, "group_size": 32, "symmetric": False}),
        ({"bits": 8}, {"method": "hqq", "bits": 8, "group_size": 0, "symmetric": True}),
        ({"precision": "int4"}, {"method": "hqq", "bits": 4, "group_size": 64, "symmetric": False}),
        ({"precision": "int8"}, {"method": "hqq", "bits": 8, "group_size": 0, "symmetric": True}),
        (
            {"bits": 4, "calibration_data": "x.npz"},
            {"method": "auto", "bits": 4, "group_size": 64, "symmetric": False},
        ),
        (
            {"bits": 8, "calibration_data": "x.npz"},
            {"method": "auto", "bits": 8, "group_size": 0, "symmetric": True},
        ),
    ],
)
def test_bits_bring_the_best_that_the_data_allows(flags, expected):
    assert bits_of(**flags) == QuantizeWeights(**expected)


@pytest.mark.parametrize("structure", ["8:16", "block:1x2", "block:1x4", "2:4", None])
def test_bits_come_behind_zeros_of_any_pattern(structure):
    flags = {"method": "auto", "bits": 4, "calibration_data": "x.npz", "mask_structure": structure}
    sparsity = None if structure in ("8:16", "2:4") else 0.5
    first, second = modifiers_of(override(Recipe(), sparsity=sparsity, **flags))
    assert (first.name, second.name) == ("prune.auto", "quant.weight")
    assert first.mask_structure == (structure or "unstructured")
    assert second == bits_of(bits=4, calibration_data="x.npz")


@pytest.mark.parametrize(
    ("structure", "symmetric"), [("6:16", True), ("2:16", True), ("7:16", False), ("4:8", False)]
)
def test_a_few_of_16_have_no_zero_points(structure, symmetric):
    flags = {"method": "auto", "bits": 4, "calibration_data": "x.npz", "mask_structure": structure}
    found = modifiers_of(override(Recipe(), **flags))[1]
    assert found == dataclasses.replace(bits_of(bits=4, calibration_data="x.npz"), symmetric=symmetric)


def test_bits_of_a_recipe_that_quantizes_reach_its_own_modifier():
    recipe = recipe_of(QuantizeWeights(method="rtn", group_size=32))
    assert bits_of(recipe, bits=8) == QuantizeWeights(method="rtn", group_size=32, bits=8)
    assert bits_of(recipe, precision="int8") == QuantizeWeights(method="rtn", group_size=32)
    assert not modifiers_of(override(Recipe(), precision="float32"))
