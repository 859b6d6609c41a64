"""Options of commands: read by the type of their field, and the same wherever a command has them."""

import importlib

import click
import pytest

from sparse_onnx.compilation.groups import Goal, Prune, Run, Target
from sparse_onnx.search.limits import Limits
from sparse_onnx.tools.options import option, options

COMMANDS = ("analyze", "verify", "bench", "export", "demo")


def options_of(name):
    command = importlib.import_module(f"sparse_onnx.tools.{name}").command
    return {flag: found for found in command.params if isinstance(found, click.Option) for flag in found.opts}


def parsed(*decorators, arguments=()):
    """What a command with these options is given."""

    @click.command()
    def command(**given):
        return given

    for decorate in decorators:
        command = decorate(command)
    return command.main(list(arguments), standalone_mode=False)


@pytest.mark.parametrize(
    ("decorate", "arguments", "given"),
    [
        (option(Prune, "sparsity"), (), {"sparsity": None}),
        (option(Prune, "sparsity"), ("--sparsity", "0.5"), {"sparsity": 0.5}),
        (option(Prune, "sparsity", default=0.7), (), {"sparsity": 0.7}),
        (option(Prune, "targets"), (), {"targets": None}),
        (option(Prune, "targets"), ("--targets", "a", "--targets", "b"), {"targets": ("a", "b")}),
        (option(Prune, "bias_correction"), (), {"bias_correction": None}),
        (option(Prune, "bias_correction"), ("--no-bias-correction",), {"bias_correction": False}),
        (option(Goal, "keep_pruned"), (), {"keep_pruned": None}),
        (option(Goal, "keep_pruned"), ("--keep-pruned",), {"keep_pruned": True}),
        (option(Goal, "target_size"), ("--target-size", "50%"), {"target_size": "50%"}),
        (option(Run, "benchmark"), (), {"benchmark": True}),
        (option(Run, "benchmark"), ("--no-benchmark",), {"benchmark": False}),
        (option(Run, "dry_run"), (), {"dry_run": False}),
        (option(Run, "dry_run"), ("--dry-run",), {"dry_run": True}),
        (option(Run, "settings"), (), {"settings": None}),
        (option(Run, "settings"), ("--set", "a.b=1", "--set", "a.c=x"), {"settings": {"a.b": 1, "a.c": "x"}}),
        (option(Target, "threads"), ("--threads", "3"), {"threads": 3}),
        (option(Target, "weights"), ("--shape-weights", "3,1"), {"shape_weights": (3.0, 1.0)}),
        (option(Target, "shapes"), (), {"input_shapes": None}),
        (option(Target, "shapes"), ("--input-shape", "x:1,2"), {"input_shapes": {"x": (1, 2)}}),
        (
            option(Target, "shapes"),
            ("--input-shape", "x:1", "--input-shape", "x:2"),
            {"input_shapes": ({"x": (1,)}, {"x": (2,)})},
        ),
        (option(Target, "input_values"), ("--input", "r=16000"), {"input_values": {"r": 16000}}),
        (
            options(Limits, "trials", "ray"),
            ("--search-trials", "2"),
            {"search_trials": 2, "ray": None},
        ),
    ],
)
def test_what_a_command_is_given(decorate, arguments, given):
    assert parsed(decorate, arguments=arguments) == given


@pytest.mark.parametrize(
    ("decorate", "arguments"),
    [
        (option(Target, "threads"), ("--threads", "0")),
        (option(Target, "weights"), ("--shape-weights", "3;1")),
        (option(Limits, "minutes"), ("--search-minutes", "0")),
        (option(Prune, "sparsity"), ("--sparsity", "many")),
    ],
)
def test_what_no_command_takes(decorate, arguments):
    with pytest.raises(click.BadParameter):
        parsed(decorate, arguments=arguments)


def test_options_are_in_the_order_in_which_they_are_named():
    @click.command()
    @options(Prune, "theta", "sparsity", "method")
    def command(**_given):
        return None

    assert [found.name for found in command.params] == ["theta", "sparsity", "method"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_is_read_the_same_way_by_every_command(name):
    known, own = options_of("optimize"), options_of(name)
    shared = (known.keys() & own.keys()) - {"--output", "-o", "--quiet", "--format", "--gradients"}
    assert shared
    for flag in shared:
        assert (own[flag].name, own[flag].type.to_info_dict(), own[flag].multiple) == (
            known[flag].name,
            known[flag].type.to_info_dict(),
            known[flag].multiple,
        ), flag
