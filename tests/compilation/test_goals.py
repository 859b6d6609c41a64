"""Goals as gates: sizes, what is met, what is missed, and what was not measured."""

import math

import pytest

from sparse_onnx.compilation.goals import Gate, gates, goal_document
from sparse_onnx.compilation.groups import Goal
from sparse_onnx.compilation.recipe import Recipe, dump_recipe
from sparse_onnx.compilation.recipe_flags import override
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.errors import UsageError
from sparse_onnx.units import parse_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0.5, 500), ("0.5", 500), (".25", 250), ("50%", 500), ("12.5 %", 125), (1, 1000), ("100%", 1000),
        ("7B", 7), ("120MB", 120_000_000), ("1.5 GiB", 3 << 29), ("2kib", 2048), ("3 tb", 3 * 10**12),
    ],
)  # fmt: skip
def test_sizes(size, expected):
    assert parse_size(size, 1000) == expected


@pytest.mark.parametrize(
    "size", [0, "0", -1, 1.5, "120", "0%", "101%", "0MB", "MB", "1 XB", "1e3", "", "nan", "1MB2", "1e30tb"]
)
def test_no_sizes(size):
    with pytest.raises(ValueError, match="no size"):
        parse_size(size, 1000)


def reached(goal, *, drop=0.01, speedup=2.0, before=1000, after=400):
    return gates(goal, drop=drop, speedup=speedup, bytes_before=before, bytes_after=after)


def test_only_what_is_asked_is_a_gate():
    assert reached(Goal()) == ()
    assert goal_document(()) == {"met": True, "gates": []}


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal(max_drop=0.01), True),
        (Goal(max_drop=0.009), False),
        (Goal(target_speedup=2), True),
        (Goal(target_speedup=2.01), False),
        (Goal(target_size=0.4), True),
        (Goal(target_size="400B"), True),
        (Goal(target_size="39.9%"), False),
    ],
)
def test_a_gate_is_met_up_to_its_bound(goal, met):
    (gate,) = reached(goal)
    assert gate.met is met
    assert goal_document([gate])["met"] is met


def test_every_gate_says_what_was_asked_and_reached():
    found = reached(Goal(max_drop=0.5, target_speedup=3, target_size="50%"))
    assert [(gate.name, gate.asked, gate.reached, gate.met) for gate in found] == [
        ("max_drop", 0.5, 0.01, True),
        ("target_speedup", 3, 2.0, False),
        ("target_size", 500, 400, True),
    ]
    assert [gate.text for gate in found] == [
        "1 - cosine is 0.0100, allowed are 0.5",
        "the speedup is 2.00, asked for are 3",
        "the size is 400 B, allowed are 500 B",
    ]


def test_one_missed_is_missed_whatever_was_not_measured():
    found = reached(Goal(max_drop=0.5, target_speedup=3), speedup=None)
    assert [gate.met for gate in found] == [True, None]
    assert goal_document(found)["met"] is None
    missed = Gate("target_size", 1, 2, True, "too large")
    assert goal_document([*found, missed])["met"] is False


def test_a_loss_that_is_no_number_is_a_miss():
    (gate,) = reached(Goal(max_drop=0.5), drop=math.nan)
    assert gate.to_dict() == {
        "name": "max_drop", "asked": 0.5, "reached": None, "met": False, "text": "1 - cosine is nan, allowed are 0.5"
    }  # fmt: skip


def test_recipes_carry_goals():
    recipe = parse_recipe("version: 1\ngoal: {target_speedup: 2, target_size: 40%}")
    assert recipe.goal == Goal(target_speedup=2, target_size="40%")
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert override(Recipe(), target_speedup=1.5, target_size="120MB").goal == Goal(
        target_speedup=1.5, target_size="120MB"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target_speedup": 0}, "target_speedup must be above 0, not 0"),
        ({"target_size": "120"}, "target_size must be a share .0.5 or 50%. or a size .120MB., not '120'"),
        ({"target_size": 0}, "target_size must be a share"),
    ],
)
def test_goals_that_nothing_can_meet_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        override(Recipe(), **flags)
