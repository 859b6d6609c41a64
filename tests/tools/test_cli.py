"""The entry point: help, errors of every kind, and their exit codes."""

import errno
import json
import subprocess
import sys
from importlib import metadata

import click
import pytest

from sparse_onnx import errors
from sparse_onnx.tools import cli


def replace_command(monkeypatch, action):
    """Make ``sparse-onnx inspect`` do ``action`` instead."""

    @click.command(name="inspect")
    @click.option("--format", "output_format", default="text")
    @click.option("--some-option")
    def command(output_format, some_option):
        return action(some_option)

    monkeypatch.setattr(cli._Commands, "get_command", lambda self, context, name: command)


def raises(error):
    def action(_option):
        raise error

    return action


def test_help_lists_every_command(run_cli):
    ran = run_cli("--help")
    assert ran.code == 0
    for name, text in cli.COMMANDS.items():
        assert name in ran.out
        assert text.split()[0] in ran.out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(run_cli, name):
    ran = run_cli(name, "--help")
    assert ran.code == 0
    assert f"sparse-onnx {name}" in ran.out
    assert "--format" in ran.out


def test_version(run_cli):
    ran = run_cli("--version")
    assert ran.code == 0
    assert metadata.version("sparse-onnx") in ran.out


@pytest.mark.parametrize(("word", "near"), [("optimise", "optimize"), ("benchmark", "bench"), ("xyz", None)])
def test_unknown_command(run_cli, word, near):
    ran = run_cli(word)
    assert ran.code == 2
    assert f"No such command '{word}'." in ran.err
    assert (f"Did you mean '{near}'?" in ran.err) == (near is not None)
    assert ", ".join(cli.COMMANDS) in ran.err
    assert "Usage:" in ran.err


def test_no_command_is_help(run_cli):
    ran = run_cli()
    assert ran.code == 2
    assert "Commands:" in ran.out + ran.err


def test_exit_codes_are_in_the_help(run_cli):
    text = run_cli("--help").out
    for code, meaning in cli.EXIT_CODES.items():
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{code} "))
        assert meaning.split()[0] in line


HEAVY = {
    *("numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "transformers", "onnxscript"),
    *("jinja2", "yaml", "scipy", "joblib", "ray"),
}
"""What --help has no need of: each takes longer to import than everything else together."""


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_imports_nothing_heavy(name):
    """So it answers at once; time itself is not tested."""
    arguments = ["--help"] if name is None else [name, "--help"]
    code = (
        "import sys\n"
        "from sparse_onnx.tools import cli\n"
        "try:\n"
        f"    cli.main({arguments})\n"
        "except SystemExit:\n"
        "    print('imported', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert modules[0] == "imported"
    assert HEAVY & set(modules) == set()
    commands = {module.rpartition(".")[2] for module in modules} & cli.COMMANDS.keys()
    assert commands - {"inspect"} == ({name} - {None, "inspect"}), "other commands are not loaded"


def test_usage_is_shown_for_a_wrong_option(run_cli):
    ran = run_cli("inspect", "--nosuch")
    assert ran.code == 2
    assert "--nosuch" in ran.err
    assert "Usage: sparse-onnx inspect" in ran.err


def test_underscores_in_options_are_hyphens(run_cli, monkeypatch):
    seen = []
    replace_command(monkeypatch, seen.append)
    assert run_cli("inspect", "--some_option", "a_b").code == 0
    assert seen == ["a_b"], "values stay as they are"


@pytest.mark.parametrize("code", [0, 3, 4, 5])
def test_number_of_a_command_is_the_exit_code(run_cli, monkeypatch, code):
    replace_command(monkeypatch, lambda _option: code)
    assert run_cli("inspect").code == code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.UsageError("bad shape"), 2, "Error: bad shape\n"),
        (errors.ModelFileError("no model"), 2, "Error: no model\n"),
        (errors.DataError("no samples"), 2, "Error: no samples\n"),
        (errors.RunError("refused"), 2, "Error: refused\n"),
        (errors.VerificationError("differs"), 3, "Error: differs\n"),
        (errors.GoalNotMetError("missed"), 4, "Error: missed\n"),
        (errors.HostError("no library"), 6, "Error: no library\n"),
        (errors.PassError("pass x failed"), 1, "Error: pass x failed\n"),
        (click.UsageError("not so"), 2, "Error: not so\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            6,
            "Error: /x/y: No space left on device\n",
        ),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), 6, "Error: /x/y: Permission denied\n"),
        (MemoryError(), 6, "Error: out of memory\n"),
        (
            KeyboardInterrupt(),
            130,
            "Error: interrupted by SIGINT; nothing was written. Run the same command again",
        ),
        (ValueError("oops"), 1, "internal error: ValueError: oops"),
        (OSError(errno.EIO, "Input/output error", "/x/y"), 1, "internal error: OSError"),
    ],
)
def test_errors_are_one_message_and_a_code(run_cli, monkeypatch, error, code, said):
    monkeypatch.delenv("SPARSE_ONNX_DEBUG", raising=False)
    replace_command(monkeypatch, raises(error))
    ran = run_cli("inspect")
    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_a_damaged_file_is_no_interruption(run_cli, monkeypatch):
    """click takes EOFError for Ctrl-D."""
    replace_command(monkeypatch, raises(EOFError("no data left")))
    ran = run_cli("inspect")
    assert ran.code == 1
    assert "internal error: EOFError: no data left" in ran.err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_wrong_usage_as_json(run_cli, name):
    ran = run_cli(name, "--nosuch", "--format", "json")
    document = ran.json()
    assert ran.code == document["exit_code"] == 2
    assert "--nosuch" in document["error"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_quiet(run_cli, name):
    assert "--quiet" in run_cli(name, "--help").out


@pytest.mark.parametrize("flags", [["--format", "json"], ["--format=json"]])
def test_errors_as_json(run_cli, monkeypatch, flags):
    replace_command(monkeypatch, raises(errors.HostError("no library")))
    ran = run_cli("inspect", *flags)
    assert json.loads(ran.out) == {"error": "no library", "exit_code": 6}
    assert "Error: no library" in ran.err


def test_defects_show_where_on_request(monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_DEBUG", "1")
    replace_command(monkeypatch, raises(ValueError("oops")))
    with pytest.raises(ValueError, match="oops"):
        cli.main(["inspect"])


def test_telemetry_is_turned_off_unless_it_was_asked_for(run_cli, monkeypatch):
    import os

    replace_command(monkeypatch, lambda _option: 0)
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    run_cli("inspect")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    run_cli("inspect")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "sparse_onnx", "--version"], capture_output=True, text=True, check=True
    )
    assert metadata.version("sparse-onnx") in done.stdout


def test_output_that_nobody_reads_is_no_traceback(tmp_path):
    """``sparse-onnx ... | head -0``: the reader closes the pipe first."""
    command = f"{sys.executable} -m sparse_onnx doctor --format json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
