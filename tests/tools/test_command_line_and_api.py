"""The command line and the Python functions take the same options, with the same defaults, and tell the same."""

import importlib
import inspect
import json

import click
import pytest

import sparse_onnx
from sparse_onnx.tools.cli import COMMANDS

PRINTING = {"output_format", "quiet"}
"""Options of every command that say how to print."""

CALLING = {"progress", "command"}
"""Keywords that tell a function who calls it."""

COMMAND_ALONE = {
    "optimize": {"no_timing_cache"},  # timing_cache=False
    "analyze": {
        "sparsity",
        "mask_structure",
        "precision",
        "save_table",
    },  # Analysis.sentence(), bits, .table()
}
FUNCTION_ALONE = {
    "optimize": {"sparsities"},  # a mapping: from a recipe on the command line
    "analyze": {"sparsities", "mask_structures", "bits", "encoded_structures"},  # what to measure
}
WITHOUT_FUNCTION = {"bench", "doctor", "demo", "export", "generate", "inspect", "report"}
"""Commands that a program has other means for: sessions, exporter, inspection, report.json."""

ARGUMENTS = {"optimize": ["m", "-o", "out"], "verify": ["a", "b"], "analyze": ["m"]}
"""What must be given."""

PAIRS = [name for name in COMMANDS if name in sparse_onnx.__all__]


def command_of(name):
    return importlib.import_module(f"sparse_onnx.tools.{name}").command


def test_every_command_has_its_function_or_is_known_to_have_none():
    assert set(COMMANDS) == {*PAIRS, *WITHOUT_FUNCTION}
    assert len(COMMANDS) == len(PAIRS) + len(WITHOUT_FUNCTION)


@pytest.mark.parametrize("name", PAIRS)
def test_options_are_keywords(name):
    options = {parameter.name for parameter in command_of(name).params} - PRINTING
    keywords = set(inspect.signature(getattr(sparse_onnx, name)).parameters) - CALLING
    assert options - keywords == COMMAND_ALONE.get(name, set())
    assert keywords - options == FUNCTION_ALONE.get(name, set())


@pytest.mark.parametrize("name", PAIRS)
def test_defaults_are_the_same(name):
    """Or the command says nothing, which leaves it to the function."""
    command = command_of(name)
    given = {parameter.name for parameter in command.params if isinstance(parameter, click.Argument)}
    keywords = inspect.signature(getattr(sparse_onnx, name)).parameters
    with command.make_context(name, list(ARGUMENTS[name])) as context:
        values = {key: value for key, value in context.params.items() if key not in {*given, "output"}}
    shared = values.keys() & keywords.keys()
    assert shared
    for key in shared:
        assert values[key] is None or values[key] == keywords[key].default, key


@pytest.mark.parametrize("name", PAIRS)
def test_functions_document_their_keywords(name):
    function = getattr(sparse_onnx, name)
    for keyword in inspect.signature(function).parameters:
        assert keyword in inspect.getdoc(function), keyword


def test_optimize_reports_the_same(run_cli, tmp_path, pruned):
    """But for the time that it took, and what the call is called."""
    shapes = {"X": (1, 8, 64)}
    result = sparse_onnx.optimize(pruned, tmp_path / "a", input_shapes=shapes, threads=1, benchmark=False)
    ran = run_cli(
        "optimize", pruned, "-o", tmp_path / "b", "--input-shape", "X:1,8,64", "--threads", "1",
        "--no-benchmark", "--format", "json",
    )  # fmt: skip
    printed = ran.json()
    assert printed.pop("exit_code") == ran.code == result.exit_code
    assert printed == json.loads((tmp_path / "b/report.json").read_text())
    for report in (printed, result.report):
        for key in ("command", "stages"):
            del report[key]
    assert printed == json.loads(json.dumps(result.report))


def test_verify_reports_the_same(run_cli, pruned, compiled):
    result = sparse_onnx.verify(pruned, compiled / "model.onnx", input_shapes={"X": (1, 8, 64)})
    ran = run_cli("verify", pruned, compiled, "--input-shape", "X:1,8,64", "--format", "json")
    document = ran.json()
    assert document.pop("exit_code") == ran.code == 0
    assert document == json.loads(json.dumps(result.to_dict()))
