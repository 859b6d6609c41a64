"""What a plan is as a recipe: passes, bits of single weights, whose inputs stay floats, and tables."""

import numpy as np
import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.compilation.groups import Target
from sparse_onnx.compilation.recipe import Recipe, RecipeStage
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import Stage
from sparse_onnx.passes.quantize import layers
from sparse_onnx.passes.quantize.embedding import QuantizeEmbeddings
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.registry import pass_by_name
from sparse_onnx.search.recipes import Templates, mean_bits, modifiers, recipe_of, with_passes

_SIZES = {"a": 100, "b": 100, "c": 200}


@pytest.fixture(autouse=True)
def _exact_products_of_bytes(monkeypatch):
    monkeypatch.setattr(layers, "cpu_features", lambda: {"avx512_vnni"})


def test_a_plan_of_a_one_shot_method_is_one_pass_for_each_pattern():
    template = pass_by_name("prune.alps")(sparsity=0.5, dampening_frac=0.05)
    plan = {"a": Choice(0.5), "b": Choice(0.5, "2:4"), "c": Choice(0.8)}
    first, second = modifiers(plan, template, {"a": 100, "b": 100, "c": 300})
    assert (first.mask_structure, first.targets) == ("unstructured", ("a", "c"))
    assert first.sparsities == {"a": 0.5, "c": 0.8}
    assert first.sparsity == pytest.approx(0.725)
    assert (second.mask_structure, second.targets, second.sparsity) == ("2:4", ("b",), None)
    assert first.dampening_frac == second.dampening_frac == 0.05


def test_a_plan_by_magnitude_is_one_pass_for_each_share():
    template = pass_by_name("prune.magnitude")(sparsity=0.5)
    plan = {
        "a": Choice(0.5),
        "b": Choice(0.8),
        "c": Choice(0.5),
    }
    first, second = modifiers(plan, template, dict.fromkeys("abc", 10))
    assert (first.targets, first.sparsity) == (("a", "c"), 0.5)
    assert (second.targets, second.sparsity) == (("b",), 0.8)


def test_no_layer_is_no_pass():
    assert modifiers({}, pass_by_name("prune.magnitude")(sparsity=0.5), {}) == ()


def test_pruning_comes_before_what_has_to_follow_it():
    ffn, quant, prune = (
        pass_by_name(name)(**options)
        for name, options in (
            ("prune.ffn", {"sparsity": 0.25}),
            ("quant.weight", {}),
            ("prune.magnitude", {"sparsity": 0.5}),
        )
    )
    recipe = Recipe((RecipeStage("all", (ffn, quant)),))
    stages = with_passes(recipe, Stage.PRUNE, (prune,)).stages
    assert stages == (
        RecipeStage("all", (ffn,)),
        RecipeStage("prune", (prune,)),
        RecipeStage("all", (quant,)),
    )
    assert with_passes(recipe, Stage.PRUNE, ()).stages == (stages[0], stages[2])
    assert with_passes(Recipe(), Stage.PRUNE, (prune,)).stages == (stages[1],)


def test_bits_are_one_pass_that_solves_all_together():
    template = QuantizeWeights(method="hqq", bits=4, symmetric=False)
    plan = {"a": Choice(bits=8, activations=8), "b": Choice(bits=8), "c": Choice(bits=3)}
    found = recipe_of(plan, Recipe(), Templates(bits=template), _SIZES)
    (step,) = found.modifiers()
    assert step == template.with_bits({"a": 8, "b": 8, "c": 3})
    assert (found.target.precision, found.target.float_inputs) == ("int4", ("b", "c"))
    assert mean_bits(plan, _SIZES) == pytest.approx((8 * 200 + 3 * 200) / 400)


def test_zeros_come_before_bits_and_both_may_be_of_one_layer():
    prune = pass_by_name("prune.magnitude")(sparsity=0.5)
    plan = {"a": Choice(0.5, bits=8, activations=8), "b": Choice(0.8), "c": Choice(bits=8, activations=8)}
    found = recipe_of(plan, Recipe(), Templates(prune, QuantizeWeights(method="hqq")), _SIZES)
    names = [(step.name, step.targets) for step in found.modifiers()]
    assert names == [("prune.magnitude", ("a",)), ("prune.magnitude", ("b",)), ("quant.weight", ("a", "c"))]
    assert (found.target.precision, found.target.float_inputs) == ("int8", ())
    assert mean_bits(plan, _SIZES) == pytest.approx((8 * 300 + 32 * 100) / 400)


def test_a_plan_without_bits_is_of_floats():
    prune = pass_by_name("prune.magnitude")(sparsity=0.5)
    recipe = Recipe(target=Target(precision="auto", threads=3))
    found = recipe_of({"a": Choice(0.5)}, recipe, Templates(prune, QuantizeWeights()), _SIZES)
    assert found.target == Target(threads=3)
    assert recipe_of({}, recipe, Templates(bits=QuantizeWeights()), _SIZES) == Recipe(
        target=Target(threads=3)
    )


def test_weights_for_products_of_bytes_have_seven_bits_where_these_saturate(monkeypatch):
    monkeypatch.setattr(layers, "cpu_features", lambda: {"avx2"})
    plan = {"a": Choice(bits=8, activations=8), "b": Choice(bits=8)}
    (step,) = recipe_of(plan, Recipe(), Templates(bits=QuantizeWeights()), _SIZES).modifiers()
    assert step.bits_of == {"a": 7, "b": 8}


def test_tables_get_passes_of_their_own():
    plan = {"a": Choice(bits=8), "words": Choice(bits=8), "places": Choice(bits=4), "odd": Choice(bits=4)}
    rows = {"words": 384, "places": 384, "odd": 24}
    found = list(recipe_of(plan, Recipe(), Templates(bits=QuantizeWeights()), _SIZES, rows).modifiers())
    assert found == [
        QuantizeEmbeddings(bits=4, group_size=64, targets=("places",)),
        QuantizeEmbeddings(bits=4, group_size=0, targets=("odd",)),
        QuantizeEmbeddings(bits=8, targets=("words",)),
        QuantizeWeights().with_bits({"a": 8}),
    ]


@pytest.fixture
def weight(from_text):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 32] X) => (float[B, 8] Y) { Y = MatMul(X, W) }""",
        W=np.ones((32, 8), np.float32),
    )
    return find_weights(model)[0][0]


def test_what_a_weight_may_become_by_its_shape_and_the_selections(weight):
    bits = QuantizeWeights(bits=4)
    pairs = [(8, 8), (4, 32)]
    assert Templates(bits=bits).choices(weight, [], pairs) == [Choice(bits=8, activations=8)], (
        "32 < 64 inputs"
    )
    prune = pass_by_name("prune.magnitude")(sparsity=0.5, targets=("V",))
    assert Templates(prune).choices(weight, ["2:4"], pairs) == []
    both = Templates(pass_by_name("prune.magnitude")(sparsity=0.5), bits)
    assert Choice(0.5, "2:4", 8, 8) in both.choices(weight, ["2:4"], pairs)


def test_the_selection_is_what_any_of_them_is_for():
    prune = pass_by_name("prune.magnitude")(sparsity=0.5, targets=("V",), ignore=("a",))
    assert Templates(prune).selection == prune.selection
    both = Templates(prune, QuantizeWeights(ignore=("a", "b"))).selection
    assert (both.targets, both.ignore) == ((), ("a",))


def test_groups_of_another_size_are_those_of_few_bits():
    bits = (8, 4, 3)
    assert Templates(bits=QuantizeWeights()).group_sizes(bits) == {}
    assert Templates().group_sizes(bits) == {}
    assert Templates(bits=QuantizeWeights(bits=4, group_size=128)).group_sizes(bits) == {4: 128, 3: 128}
    assert Templates(bits=QuantizeWeights(bits=8, group_size=128)).group_sizes([8]) == {8: 128}
    assert Templates(bits=QuantizeWeights(bits=8, group_size=0)).group_sizes([8]) == {}
