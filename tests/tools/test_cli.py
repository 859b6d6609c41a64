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


def test_unknown_command(run_cli):
    ran = run_cli("nosuch")
    assert ran.code == 2
    assert "nosuch" in ran.err
    assert "Usage:" in ran.err


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
        (KeyboardInterrupt(), 130, "interrupted"),
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
