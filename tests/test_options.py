"""Types and ranges of options, and what is said about a wrong one."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.options import (
    at,
    build,
    check_types,
    documented,
    holds_numbers,
    keywords,
    option,
    option_names,
    option_of,
    require,
    unknown,
)


@dataclasses.dataclass(frozen=True)
class Options:
    number: float = 0.5
    count: int | None = None
    flag: bool = False
    names: tuple[str, ...] = ()
    mode: Literal["fast", "exact"] = "fast"
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"number": 1},
        {"number": np.float64(2)},
        {"count": 3},
        {"count": None},
        {"flag": True},
        {"names": ("a", "b")},
        {"mode": "exact"},
        {"shapes": {"x": (1, 2), "y": ()}},
    ],
)
def test_values_of_the_declared_type_pass(given):
    assert check_types(Options(**given)) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"number": "1"}, "number must be a finite number, not '1'"),
        ({"number": True}, "number must be a finite number, not True"),
        ({"number": float("nan")}, "number must be a finite number, not nan"),
        ({"number": float("inf")}, "number must be a finite number, not inf"),
        ({"number": 10**400}, "number must be a finite number"),
        ({"number": None}, "number must be a finite number, not None"),
        ({"count": 1.0}, "count must be an integer, not 1.0"),
        ({"count": False}, "count must be an integer, not False"),
        ({"flag": 1}, "flag must be true or false, not 1"),
        ({"names": "ab"}, "names must be a list of strings, not 'ab'"),
        ({"names": ("a", 1)}, "names must be a list of strings"),
        ({"mode": "fsat"}, "mode must be one of fast, exact, not 'fsat'"),
        ({"mode": ["fast"]}, "mode must be one of fast, exact"),
        ({"shapes": [1]}, "shapes must be names with a list of integers each"),
        ({"shapes": {"x": 1}}, "shapes must be names with a list of integers each"),
        ({"shapes": {1: (1,)}}, "shapes must be names with a list of integers each"),
    ],
)
def test_a_value_of_another_type_is_named(given, message):
    with pytest.raises(UsageError) as caught:
        check_types(Options(**given))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_require_names_option_value_and_range():
    assert require(True, "theta", 1, "0 or more") is None
    with pytest.raises(UsageError, match="theta must be 0 or more, not -1"):
        require(False, "theta", -1, "0 or more")


def test_unknown_gives_the_nearest_and_the_list():
    assert unknown("key", "sparsty", ["targets", "sparsity"]) == (
        "unknown key 'sparsty'; the nearest is 'sparsity' (valid: sparsity, targets)"
    )
    assert unknown("key", "zzz", ["a"]) == "unknown key 'zzz' (valid: a)"
    assert unknown("key", 7, []) == "unknown key 7 (valid: none)"


# -- declared once -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    size: int = option(4, "How many.", least=1)
    path: str | None = option(None, "Where.", keyword="from_path", kind="path", otherwise="nowhere")
    on: bool = option(True, "Whether.", about="True: it is on.", flag=None)
    names: tuple[str, ...] = option(None, "Which.", factory=tuple)
    inner: int = 3


def test_what_is_said_of_an_option():
    assert keywords(Group) == {"size": "size", "from_path": "path", "on": "on", "names": "names"}
    size, path, on = (option_of(Group, name) for name in ("size", "path", "on"))
    assert (size.flag, size.keyword, size.with_default) == ("--size", "size", "How many.  [default: 4]")
    assert (path.flag, path.keyword, path.with_default) == (
        "--from-path",
        "from_path",
        "Where.  [default: nowhere]",
    )
    assert (on.flag, on.help, on.documentation) == (None, "Whether.", "True: it is on.")
    assert path.documentation == "Where. Default: nowhere."
    assert Group() == Group(4, None, True, (), 3)


def test_documentation_is_put_in():
    @documented(Group)
    def function():
        """What it does.

        Args:
            first: One.
        {options}
        """

    lines = function.__doc__.splitlines()
    assert [line.strip() for line in lines[4:8]] == [
        "size: How many. Default: 4.",
        "from_path: Where. Default: nowhere.",
        "on: True: it is on.",
        "names: Which.",
    ]


def test_values_from_plain_data():
    assert build(Options, {"names": ["a"], "count": None, "shapes": {"x": [1]}}) == Options(
        names=("a",), shapes={"x": (1,)}
    )
    assert option_names(Group) == {"size", "path", "on", "names", "inner"}
    with pytest.raises(UsageError, match=r"^Needs: value must be given$"):
        build(dataclasses.make_dataclass("Needs", [("value", int)]), {"value": None})
    with pytest.raises(UsageError, match=r"^here: number must be above 0, not 0$"), at("here"):
        require(False, "number", 0, "above 0")


@pytest.mark.parametrize(
    ("value", "holds"),
    [(1, True), (0.5, True), (False, True), ((1, (2, 3)), True), ((), False), ((1, ()), False), ("1", False)],
)
def test_numbers_and_tuples_of_them(value, holds):
    assert holds_numbers(value) == holds
