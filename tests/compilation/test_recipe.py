"""Recipes: reading, writing, flags, and one clear message for everything that is wrong."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.compilation.groups import Calibration, Goal, Target
from sparse_onnx.compilation.recipe import Recipe, RecipeStage, dump_recipe
from sparse_onnx.compilation.recipe_flags import override
from sparse_onnx.compilation.recipe_reader import load_recipe, parse_recipe
from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.clean.cleanup import Unused
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.random import Random
from sparse_onnx.passes.prune.threshold import Threshold

EXAMPLE = """
version: 1
stages:
  - name: clean
    modifiers:
      - clean.unused:
  - name: prune
    modifiers:
      - prune.magnitude: {sparsity: 0.8, ignore: ["re:.*classifier.*"], targets: [MatMul, on, 1e5x]}
      - prune.magnitude: {mask_structure: 2:4}
      - prune.threshold: {theta: 1e-4}
target: {shapes: {input_ids: [1, 128], mask: []}, threads: 4}
calibration: {data: samples.npz, num_calibration_samples: 64, seed: 7}
goal: {max_drop: 0.01, min_speedup: 2}
"""


def test_a_recipe_is_read():
    recipe = parse_recipe(EXAMPLE)
    assert recipe == Recipe(
        (
            RecipeStage("clean", (Unused(),)),
            RecipeStage(
                "prune",
                (
                    Magnitude(sparsity=0.8, ignore=("re:.*classifier.*",), targets=("MatMul", "on", "1e5x")),
                    Magnitude(mask_structure="2:4"),
                    Threshold(theta=1e-4),
                ),
            ),
        ),
        Target({"input_ids": (1, 128), "mask": ()}, 4),
        Calibration("samples.npz", 64, seed=7),
        Goal(0.01, 2),
    )
    assert recipe.pipeline() == Pipeline(tuple(recipe.modifiers()))
    assert [step.name for step in recipe.modifiers()][-1] == "prune.threshold"


@pytest.mark.parametrize(
    "text", ["version: 1", "version: 1\nstages:", "version: 1\nstages: []\ntarget: {}\ngoal:"]
)
def test_everything_but_the_version_may_be_left_out(text):
    assert parse_recipe(text) == Recipe()
    assert not Recipe().pipeline().passes


def test_writing_and_reading_gives_the_same():
    recipe = parse_recipe(EXAMPLE)
    text = dump_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert dump_recipe(parse_recipe(text)) == text
    assert parse_recipe(dump_recipe(Recipe())) == Recipe()


SEVERAL = """version: 1
target:
  shapes: [{input_ids: [1, 128]}, {input_ids: [8, 128], mask: [8]}]
  weights: [3, 0.5]
"""


def test_several_targets_are_read_and_written():
    recipe = parse_recipe(SEVERAL)
    shapes = ({"input_ids": (1, 128)}, {"input_ids": (8, 128), "mask": (8,)})
    assert recipe.target == Target(shapes, weights=(3, 0.5))
    assert recipe.target.all_shapes == shapes
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert override(Recipe(), input_shapes=list(shapes), shape_weights=[3, 0.5]) == recipe
    assert "weights" not in dump_recipe(Recipe())


def test_one_target_is_a_mapping_or_a_list_of_one():
    assert Target().all_shapes == ({},)
    assert Target({"x": (1,)}).all_shapes == Target(({"x": (1,)},)).all_shapes == ({"x": (1,)},)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{shapes: []}", "target: shapes must be one target or more"),
        ("{shapes: [{x: [1]}, {x: [0]}]}", r"target: shapes\[1\].x must be sizes of 1 or more"),
        (
            "{shapes: [{x: [1]}, 3]}",
            "target: shapes must be names with a list of integers each or a list of names",
        ),
        (
            "{shapes: [{x: [1]}, {x: [2]}], weights: [1]}",
            r"must be numbers above 0, as many as shapes has targets \(2\)",
        ),
        ("{shapes: [{x: [1]}, {x: [2]}], weights: []}", "must be numbers above 0"),
        ("{shapes: [{x: [1]}, {x: [2]}], weights: [1, 0]}", "must be numbers above 0"),
        ("{shapes: [{x: [1]}, {x: [2]}], weights: [1, .inf]}", "weights must be a list of numbers"),
        ("{shapes: {x: [1]}, weights: [1, 2]}", "must be numbers above 0"),
    ],
)
def test_targets_that_do_not_fit(target, message):
    with pytest.raises(UsageError, match=message):
        parse_recipe(f"version: 1\ntarget: {target}")


def test_other_shapes_need_other_weights():
    with pytest.raises(UsageError, match=r"weights \(--shape-weights\) must be numbers above 0, as many"):
        override(parse_recipe(SEVERAL), input_shapes={"input_ids": (1, 64)})


# Words that some YAML reader takes for a number, a date, a list, nothing at all, ...
words = st.sampled_from(
    ["2:4", "1e5", "1e-4", "0o7", "010", "0x1F", "yes", "null", "~", "", "- a", "a: b", "#c", "é"]
)
words |= st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=8)
names = words.filter(lambda word: not word.startswith("re:"))


@settings(max_examples=100, deadline=None)
@given(
    targets=st.lists(names, max_size=3),
    sparsity=st.floats(0, 1, exclude_max=True),
    shapes=st.dictionaries(words, st.lists(st.integers(1, 10**12), max_size=3), max_size=2),
    theta=st.floats(0, allow_infinity=False),
    seed=st.integers(0, 10**17),
    data=st.none() | words,
    stage=words.filter(bool),
)
def test_any_recipe_comes_back_exactly(targets, sparsity, shapes, theta, seed, data, stage):
    passes = (
        Magnitude(sparsity=sparsity, targets=tuple(targets), ignore=()),
        Random(mask_structure="1:2", seed=seed),
        Threshold(theta=theta),
    )
    recipe = Recipe(
        (RecipeStage(stage, passes),),
        Target({name: tuple(shape) for name, shape in shapes.items()}),
        Calibration(data, None, seed=seed),
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe


def modifiers(text):
    return f"version: 1\nstages:\n- name: s\n  modifiers: {text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "version must be 1, not None"),
        ("version: 2", "version must be 1, not 2"),
        ("version: true", "version must be 1, not True"),
        ("version: '1'", "version must be 1, not '1'"),
        ("[]", "the recipe: must be keys and values, not a list"),
        ("text", "the recipe: must be keys and values, not text"),
        (
            "version: 1\nstagess: []",
            "unknown key 'stagess'; the nearest is 'stages' (valid: calibration, goal, ",
        ),
        ("version: 1\nversion: 1", "not valid YAML: the key 'version' comes twice (line 2, column 1)"),
        (
            "version: 1\ngoal: {max_drop: 1, max_drop: 2}",
            "the key 'max_drop' comes twice (line 2, column 21)",
        ),
        ("version: 1\n? [a]\n: 1", "a key must be a word"),
        ("version: 1\n1: 1", "a key must be a word"),
        ("version: 1\ntarget: {shapes: {1: [1]}}", "a key must be a word"),
        ("version: &a 1\ngoal: *a", "aliases (*name) are not allowed (line 2, column 7)"),
        ("version: !!int '1'", "tags (!name) are not allowed"),
        ("version: !!python/object/apply:os.getcwd []", "tags (!name) are not allowed"),
        ("version: 1\n---\nversion: 1", "not valid YAML: but found another document"),
        ("version: [1", "not valid YAML:"),
        ("version: 1\x00", "not valid YAML: special characters are not allowed"),
        ("[" * 5000, "not valid YAML: nested too deeply"),
        (
            "version: 1\nstages: {}",
            "stages: must be a list (lines that start with '- '), not keys and values",
        ),
        ("version: 1\nstages: [prune]", "stages[0]: must be keys and values, not text"),
        ("version: 1\nstages: [{modifiers: []}]", "stages[0]: name must be a word, not None"),
        ("version: 1\nstages: [{name: [a]}]", "stages[0]: name must be a word, not ['a']"),
        (
            "version: 1\nstages: [{name: a, modifier: []}]",
            "stages[0]: unknown key 'modifier'; the nearest is 'modifiers'",
        ),
        (modifiers("5"), "stages[0].modifiers: must be a list (lines that start with '- '), not a number"),
        (modifiers("[prune.magnitude]"), "stages[0].modifiers[0]: must be one pass with its options"),
        (modifiers("[{clean.unused: , clean.constants: }]"), "stages[0].modifiers[0]: must be one pass"),
        (
            modifiers("[prune.magnitud: {}]"),
            "unknown modifier 'prune.magnitud'; the nearest is 'prune.magnitude' (valid: ",
        ),
        (
            modifiers("[Magnitude: {sparsity: 0.5}]"),
            "unknown modifier 'Magnitude'; the nearest is 'prune.magnitude'",
        ),
        (modifiers("[prune.magnitude: 0.5]"), "prune.magnitude: must be keys and values, not a number"),
        (modifiers("[prune.magnitude: ]"), "prune.magnitude: mask_structure unstructured needs a sparsity"),
        (
            modifiers("[prune.magnitude: {sparsity: 80%}]"),
            "prune.magnitude: sparsity must be a finite number, not '80%'",
        ),
        (
            modifiers("[prune.magnitude: {sparsity: 1}]"),
            "prune.magnitude: sparsity must be at least 0 and below 1, not 1",
        ),
        (modifiers("[prune.magnitude: {sparsity: .nan}]"), "sparsity must be a finite number, not nan"),
        (
            modifiers("[prune.magnitude: {sparsty: 1}]"),
            "unknown key 'sparsty'; the nearest is 'sparsity' (valid: ignore, ",
        ),
        (
            modifiers("[prune.magnitude: {mask_structure: 3:2}]"),
            "mask_structure '3:2' is not known; the nearest is '2:3'",
        ),
        (
            modifiers("[prune.magnitude: {mask_structure: 2:4, sparsity: 0.8}]"),
            "2:4 implies sparsity 0.5, not 0.8",
        ),
        (
            modifiers("[prune.magnitude: {sparsity: 0.5, targets: fc}]"),
            "targets must be a list of strings, not 'fc'",
        ),
        (
            modifiers("[prune.magnitude: {sparsity: 0.5, targets: [1]}]"),
            "targets must be a list of strings, not (1,)",
        ),
        (modifiers("[prune.threshold: {}]"), "prune.threshold: theta must be given"),
        (modifiers("[prune.threshold: {theta: null}]"), "prune.threshold: theta must be given"),
        (
            modifiers("[prune.threshold: {theta: 1}, clean.unused: ]"),
            "clean.unused (clean) cannot run after prune.threshold",
        ),
        (
            modifiers("[prune.threshold: {theta: 1}, prune.threshold: {theta: 1.0}]"),
            "prune.threshold comes twice",
        ),
        (
            modifiers("[prune.random: {sparsity: 0.5, seed: -1}]"),
            "prune.random: seed must be 0 or more, not -1",
        ),
        ("version: 1\ntarget: [1]", "target: must be keys and values, not a list"),
        ("version: 1\ntarget: {shapes: {x: [0]}}", "target: shapes.x must be sizes of 1 or more, not [0]"),
        (
            "version: 1\ntarget: {shapes: {x: [a]}}",
            "target: shapes must be names with a list of integers each",
        ),
        ("version: 1\ntarget: {threads: 0}", "target: threads must be 1 or more, not 0"),
        ("version: 1\ntarget: {threads: 1.5}", "target: threads must be an integer, not 1.5"),
        (
            "version: 1\ncalibration: {data: 5}",
            "calibration: data must be a string or a list of strings, not 5",
        ),
        (
            "version: 1\ncalibration: {num_calibration_samples: 0}",
            "num_calibration_samples must be 1 or more, not 0",
        ),
        ("version: 1\ngoal: {min_speedup: 0}", "goal: min_speedup must be above 0, not 0"),
        ("version: 1\ngoal: {max_drop: -1}", "goal: max_drop must be 0 or more, not -1"),
        ("version: 1\ngoal: {maxdrop: 1}", "goal: unknown key 'maxdrop'; the nearest is 'max_drop'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, message):
    with pytest.raises(UsageError) as caught:
        parse_recipe(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(UsageError, match="there is no such recipe file"):
        load_recipe(path)
    with pytest.raises(UsageError, match="is a folder"):
        load_recipe(tmp_path)
    path.write_text(EXAMPLE, encoding="utf-8")
    assert load_recipe(path) == parse_recipe(EXAMPLE)
    path.write_text("version: 3", encoding="utf-8")
    with pytest.raises(UsageError, match=r"recipe\.yaml: version must be 1, not 3"):
        load_recipe(path)
    path.write_bytes(b"version: \xff")
    with pytest.raises(UsageError, match=r"recipe\.yaml: is not text in UTF-8"):
        load_recipe(path)
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml: larger than 1 MiB"):
        load_recipe(path)


def test_a_file_that_cannot_be_read_is_the_hosts_fault(tmp_path):
    path = tmp_path / ("x" * 300)
    with pytest.raises(HostError, match="cannot be read: File name too long"):
        load_recipe(path)


# -- flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        ({}, ()),
        ({"sparsity": None, "targets": None}, ()),
        ({"method": "magnitude", "sparsity": 0.5}, (Magnitude(sparsity=0.5),)),
        ({"sparsity": 0.5}, (Magnitude(sparsity=0.5),)),
        ({"mask_structure": "2:4", "targets": ["a"]}, (Magnitude(mask_structure="2:4", targets=("a",)),)),
        ({"sparsity": 0.5, "scope": "global"}, (Magnitude(sparsity=0.5, scope="global"),)),
        ({"method": "random", "sparsity": 0.5, "seed": 3}, (Random(sparsity=0.5, seed=3),)),
        ({"method": "threshold", "theta": 0.1, "ignore": []}, (Threshold(theta=0.1, ignore=()),)),
    ],
)
def test_flags_alone_make_a_recipe(flags, passes):
    recipe = override(Recipe(), **flags)
    assert tuple(recipe.modifiers()) == passes
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_flags_reach_the_sections():
    flags = {
        "input_shapes": {"x": [1, 2]},
        "threads": 2,
        "calibration_data": "a.npz",
        "num_calibration_samples": 5,
        "seed": 3,
        "max_drop": 0.1,
        "min_speedup": 1.5,
    }
    recipe = override(Recipe(), **flags)
    assert recipe == Recipe((), Target({"x": (1, 2)}, 2), Calibration("a.npz", 5, seed=3), Goal(0.1, 1.5))


def two_prunings():
    passes = (Magnitude(sparsity=0.5, scope="global"), Random(sparsity=0.7))
    return Recipe((RecipeStage("a", (Unused(),)), RecipeStage("b", passes)), goal=Goal(0.5))


def test_flags_win_over_a_recipe():
    recipe = override(two_prunings(), sparsity=0.6, seed=2, min_speedup=1.1)
    assert recipe.stages[0] == RecipeStage("a", (Unused(),))
    assert recipe.stages[1].modifiers == (
        Magnitude(sparsity=0.6, scope="global"),
        Random(sparsity=0.6, seed=2),
    )
    assert recipe.goal == Goal(0.5, 1.1)
    assert recipe.calibration.seed == 2


def test_a_flag_reaches_every_modifier_that_has_it_and_no_other():
    recipe = override(two_prunings(), scope="layer")
    assert recipe.stages[1].modifiers == (Magnitude(sparsity=0.5), Random(sparsity=0.7))


def test_no_flags_leave_a_recipe_as_it_is():
    assert override(two_prunings()) == two_prunings()
    assert override(two_prunings(), None, sparsity=None) == two_prunings()


def test_a_method_takes_the_place_of_the_only_pruning():
    recipe = Recipe((RecipeStage("b", (Magnitude(sparsity=0.7, targets=("a",), scope="global"),)),))
    assert override(recipe, "random").stages == (RecipeStage("b", (Random(sparsity=0.7, targets=("a",)),)),)
    assert list(override(recipe, "threshold", theta=1).modifiers()) == [Threshold(theta=1, targets=("a",))]
    assert override(recipe, "magnitude") == recipe


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            Recipe(),
            {"method": "magnitud"},
            "unknown method 'magnitud'; the nearest is 'magnitude' (valid: admm, ",
        ),
        (Recipe(), {"method": "wnd"}, "unknown method 'wnd'"),
        (Recipe(), {"theta": 1}, "theta has no effect, since nothing is pruned: give a method (threshold)"),
        (
            Recipe(),
            {"scope": "layer"},
            "scope has no effect, since nothing is pruned: give a method (admm, alps, ",
        ),
        (Recipe(), {"targets": ["a"]}, "targets has no effect, since nothing is pruned"),
        (
            Recipe(),
            {"sparsity": 0.5, "theta": 1},
            "theta is no option of prune.magnitude; it is one of method threshold",
        ),
        (
            Recipe(),
            {"method": "random", "sparsity": 0.5, "scope": "layer"},
            "scope is no option of prune.random",
        ),
        (Recipe(), {"method": "threshold"}, "prune.threshold: theta must be given"),
        (Recipe(), {"method": "magnitude"}, "prune.magnitude: mask_structure unstructured needs a sparsity"),
        (Recipe(), {"sparsity": 1.5}, "prune.magnitude: sparsity must be at least 0 and below 1, not 1.5"),
        (Recipe(), {"sparsitty": 0.5}, "unknown option 'sparsitty'; the nearest is 'sparsity'"),
        (Recipe(), {"threads": 0}, "threads must be 1 or more, not 0"),
        (
            two_prunings(),
            {"method": "random"},
            "cannot take the place of several pruning modifiers (prune.magnitude, ",
        ),
        (two_prunings(), {"mask_structure": "2:4"}, "implies sparsity 0.5, not 0.7"),
        (two_prunings(), {"theta": 1}, "theta is no option of prune.magnitude or prune.random"),
    ],
)
def test_flags_that_do_not_fit_are_refused(recipe, flags, message):
    if "mask_structure" in flags:  # global scope would be refused first
        recipe = Recipe((RecipeStage("b", (Random(sparsity=0.7),)),))
    with pytest.raises(UsageError) as caught:
        override(recipe, **flags)
    assert message in str(caught.value)


def test_recipes_are_values():
    recipe = two_prunings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.stages = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.goal.max_drop = 1
