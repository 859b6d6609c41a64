"""The entry point ``sparse-onnx``: finds the command, and turns every error into one message and an exit code.

A command is a module of this folder with a ``click.Command`` named ``command``; it is imported only when it is
asked for, so that ``--help`` and each command start fast.
"""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import os
import shlex
import sys
from importlib import metadata

import click

from sparse_onnx.errors import HostError, SparseOnnxError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "optimize": "Compile a model into a smaller, faster, verified one.",
    "verify": "Compare an optimized model with its original on real or generated inputs.",
    "bench": "Time models side by side, and their sparse layers against dense ones.",
    "inspect": "Show a model's layers, zeros and sizes, and what can be touched.",
    "doctor": "Check this machine, ONNX Runtime and the kernel library.",
    "export": "Export a Hugging Face folder or a torch module to ONNX.",
    "demo": "Run the main job on a small trained model that ships with the package.",
}
"""The commands in the order of --help, with their one-line help."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sparse_onnx.tools.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Not from the commands themselves: that would import all of them.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _hyphens(token: str) -> str:
    return token.replace("_", "-")


@click.group(
    cls=_Commands, context_settings={"token_normalize_func": _hyphens, "help_option_names": ["-h", "--help"]}
)
@click.version_option(metadata.version("sparse-onnx"), prog_name="sparse-onnx")
def cli() -> None:
    """Make sparse models actually run faster, on stock ONNX Runtime.

    Exit codes: 0 ok, 1 internal error, 2 usage or recipe, 3 verification failed, 4 goal not met (best so far is
    written), 5 nothing was faster (the dense model is written), 6 environment.
    """


def _wants_json(arguments: list[str]) -> bool:
    return "--format=json" in arguments or any(
        first == "--format" and second == "json" for first, second in itertools.pairwise(arguments)
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        typed = shlex.join(["sparse-onnx", *arguments])  # reports say what they were asked for
        code = cli.main(args=arguments, prog_name="sparse-onnx", standalone_mode=False, obj=typed)
    except click.exceptions.Abort:
        _fail("interrupted; nothing was written", 130, arguments)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        usage = f"\n{context.get_usage()}" if context is not None else ""
        _fail(error.format_message() + usage, 2, arguments)
    except SparseOnnxError as error:
        _fail(str(error), error.exit_code, arguments)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"{error.filename or 'a file'}: {error.strerror}", HostError.exit_code, arguments)
        _internal(error, arguments)
    except MemoryError:
        _fail("out of memory", HostError.exit_code, arguments)
    except Exception as error:
        _internal(error, arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _internal(error: Exception, arguments: list[str]) -> None:
    if os.environ.get("SPARSE_ONNX_DEBUG"):
        raise error
    what = f"internal error: {type(error).__name__}: {error}"
    _fail(f"{what} (a defect; SPARSE_ONNX_DEBUG=1 shows where)", 1, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> None:
    if _wants_json(arguments):
        click.echo(json.dumps({"error": message, "exit_code": code}))
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
