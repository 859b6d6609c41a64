"""Groups of options: what is declared once is what the command line, the Python function and the recipe have."""

import dataclasses
import inspect

import click
import pytest

import sparse_onnx
from sparse_onnx.compilation.groups import Calibration, Goal, Prune, Quantize, Run, Target
from sparse_onnx.compilation.recipe import SECTIONS
from sparse_onnx.options import keywords, option_names, option_of
from sparse_onnx.passes.base import Stage
from sparse_onnx.passes.registry import PASSES
from sparse_onnx.search.limits import Limits
from sparse_onnx.tools.optimize import command

GROUPS = (Prune, Quantize, Calibration, Target, Goal, Run, Limits)
CALL = {"model", "output", "recipe", "command", "progress"}
"""What a call is about, which no group has."""

DECLARED = [(group, name, keyword) for group in GROUPS for keyword, name in keywords(group).items()]
SIGNATURE = inspect.signature(sparse_onnx.optimize).parameters


def test_the_keywords_of_optimize_are_those_of_the_groups():
    names = [keyword for *_, keyword in DECLARED]
    assert len(names) == len(set(names))
    assert set(SIGNATURE) - CALL == set(names)


@pytest.mark.parametrize(("group", "name", "keyword"), DECLARED, ids=lambda value: str(value))
def test_every_option_is_given_the_same_way_everywhere(group, name, keyword):
    said = option_of(group, name)
    fields = {field.name: field for field in dataclasses.fields(group)}
    default = fields[name].default if group is Run else None  # what is not given leaves the recipe as it is
    assert SIGNATURE[keyword].default == default
    assert f"\n    {keyword}: {said.documentation[:40]}" in inspect.getdoc(sparse_onnx.optimize)
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}
    if said.flag is None:
        assert keyword not in options
        return
    assert said.flag in options[keyword].opts
    assert options[keyword].help == said.with_default


def test_the_command_line_has_nothing_else():
    options = {option.name for option in command.params if isinstance(option, click.Option)}
    alone = {"output", "recipe", "no_timing_cache", "output_format", "quiet"}
    flags = {keyword for group, name, keyword in DECLARED if option_of(group, name).flag is not None}
    assert options == flags | alone


def test_sections_have_their_options_as_keys():
    assert {"target": Target, "calibration": Calibration, "goal": Goal} == SECTIONS
    without = {
        (key, name)
        for key, cls in SECTIONS.items()
        for name in option_names(cls) - set(keywords(cls).values())
    }
    assert without == {("calibration", "padding_mask"), ("target", "float_inputs")}, (
        "what only a recipe can say"
    )


def test_every_option_of_pruning_is_one_of_a_method():
    known = set().union(*(option_names(cls) for cls in PASSES if cls.stage is Stage.PRUNE))
    assert set(keywords(Prune)) - {"method"} <= known
