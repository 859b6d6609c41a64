"""A schema of typed dictionaries takes what they allow, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jsonschema
import pytest

from sparse_onnx.document import Limits
from sparse_onnx.report.json_schema import json_schema

Share = Annotated[float, Limits(minimum=0, maximum=1)]


class PartOfIt(TypedDict):
    """A part."""

    kind: Annotated[Literal["a", "b"], "One of two."]


class Whole(TypedDict):
    """What it is,
    on two lines."""

    version: Annotated[Literal[3], "Always the same."]
    share: Annotated[Share | None, "May be missing."]
    names: Annotated[Annotated[list[str], Limits(min_items=1)], "At least one."]
    parts: Annotated[dict[str, PartOfIt], "By name."]
    other: NotRequired[Annotated[PartOfIt | None, "Need not be there."]]
    free: NotRequired[Annotated[dict[str, Any], "Whatever."]]
    above: NotRequired[Annotated[Annotated[float, Limits(exclusive_minimum=0)], "Above 0."]]
    text: NotRequired[Annotated[Annotated[str, Limits(min_length=1)], "Not empty."]]
    flag: NotRequired[Annotated[bool | None, "Yes, no, not known."]]


GOOD: dict[str, Any] = {"version": 3, "share": 0.5, "names": ["x"], "parts": {"p": {"kind": "a"}}}


def fits(document: object) -> bool:
    validator = jsonschema.Draft202012Validator(json_schema(Whole, "whole"))
    return validator.is_valid(document)


def test_it_is_a_schema_and_says_what_the_types_say() -> None:
    schema = json_schema(Whole, "whole")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (schema["title"], schema["description"]) == ("whole", "What it is, on two lines.")
    assert list(schema["properties"]) == list(Whole.__annotations__)
    assert schema["required"] == ["version", "share", "names", "parts"]
    assert schema["properties"]["version"] == {"description": "Always the same.", "const": 3}
    assert schema["$defs"]["part_of_it"]["properties"]["kind"]["enum"] == ["a", "b"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"share": None},
        {"share": 0},
        {"share": 1},
        {"parts": {}},
        {"other": {"kind": "b"}},
        {"other": None},
        {"free": {"anything": [1]}},
        {"above": 1e-9},
        {"text": "x"},
        {"flag": None},
        {"flag": False},
    ],
)
def test_what_the_types_allow_fits(change: dict[str, Any]) -> None:
    assert fits({**GOOD, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 4},
        {"share": 1.5},
        {"share": -0.1},
        {"share": "half"},
        {"names": []},
        {"names": [1]},
        {"parts": {"p": {"kind": "c"}}},
        {"parts": {"p": {}}},
        {"parts": {"p": {"kind": "a", "more": 1}}},
        {"other": {}},
        {"free": 3},
        {"above": 0},
        {"text": ""},
        {"flag": 1},
        {"unknown": 1},
    ],
)
def test_anything_else_does_not(change: dict[str, Any]) -> None:
    assert not fits({**GOOD, **change})


@pytest.mark.parametrize("key", ["version", "share", "names", "parts"])
def test_a_required_key_is_missed(key: str) -> None:
    assert not fits({name: value for name, value in GOOD.items() if name != key})


def test_a_type_that_has_no_schema_is_refused() -> None:
    class Odd(TypedDict):
        """With bytes in it."""

        raw: Annotated[bytes, "No JSON."]

    Odd.__annotations__["raw"] = Annotated[bytes, "No JSON."]
    with pytest.raises(TypeError, match="no schema is made of <class 'bytes'>"):
        json_schema(Odd, "odd")
