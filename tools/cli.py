"""The entry point ``sparse-onnx``: finds the command, and turns every error into one message and an exit code.

A command is a module of this folder with a ``click.Command`` named ``command``; it is imported only when it is
asked for, so that ``--help`` and each command start fast.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import click

from sparse_onnx.errors import HostError, SparseOnnxError

__all__ = ["COMMANDS", "EXIT_CODES", "main"]

COMMANDS = {
    "analyze": "Predict speed, size and error before any pruning.",
    "optimize": "Compile a model into a smaller, faster, verified one.",
    "verify": "Compare an optimized model with its original on real or generated inputs.",
    "generate": "Let a decoder continue a prompt, and tell its tokens a second.",
    "bench": "Time models side by side, and their sparse layers against dense ones.",
    "report": "Rebuild the page of a run, or compare two runs.",
    "inspect": "Show a model's layers, zeros and sizes, and what can be touched.",
    "doctor": "Check this machine, ONNX Runtime and the kernel library.",
    "export": "Export a Hugging Face folder or a torch module to ONNX.",
    "demo": "Run the main job on a small trained model that ships with the package.",
}
"""The commands in the order of --help, with their one-line help."""

EXIT_CODES = {
    0: "ok",
    1: "internal error",
    2: "usage, recipe, or model file",
    3: "verification failed; nothing was written",
    4: "a goal was not met; the best so far was written",
    5: "not proven faster; where no layer is sparse, the dense model was written",
    6: "environment: permissions, disk, a missing package or library",
    130: "interrupted (Ctrl-C; 143 when terminated); nothing was written",
}
"""What the exit codes of all commands mean; README has the same table."""

_CLEANUP_SECONDS = 2.0


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sparse_onnx.tools.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            nearest = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{nearest} The commands are {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Not from the commands themselves: that would import all of them.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def _hyphens(token: str) -> str:
    return token.replace("_", "-")


@click.group(
    cls=_Commands, context_settings={"token_normalize_func": _hyphens, "help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="sparse-onnx", prog_name="sparse-onnx")
def cli() -> None:
    """Make sparse models actually run faster, on stock ONNX Runtime."""


def _wants_json(arguments: list[str]) -> bool:
    return "--format=json" in arguments or any(
        first == "--format" and second == "json" for first, second in itertools.pairwise(arguments)
    )


class _Interrupted(KeyboardInterrupt):
    """A signal asked to stop: like Ctrl-C, for code that must clean up after it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise :class:`_Interrupted`, unless the caller has them ignored.

    More of them are disregarded for a moment, so that they do not cut the cleaning up short.
    """
    last = -math.inf

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _CLEANUP_SECONDS:
            last = now
            raise _Interrupted(number)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last one is not everywhere
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names need not fit the locale
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        typed = shlex.join(["sparse-onnx", *arguments])  # reports say what they were asked for
        with _interruptible():
            code = cli.main(args=arguments, prog_name="sparse-onnx", standalone_mode=False, obj=typed)
    except click.exceptions.Abort as abort:
        if not isinstance(abort.__cause__, KeyboardInterrupt):  # click takes EOFError for one, too
            _internal(abort.__cause__ or abort, arguments)
        _stopped(abort.__cause__, arguments)
    except KeyboardInterrupt as stop:
        _stopped(stop, arguments)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        usage = (
            f"\n{context.get_usage()}\nTry '{context.command_path} --help'." if context is not None else ""
        )
        _fail(error.format_message() + usage, 2, arguments)
    except SparseOnnxError as error:
        _fail(str(error), error.exit_code, arguments)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"{error.filename or 'a file'}: {error.strerror}", HostError.exit_code, arguments)
        _internal(error, arguments)
    except MemoryError:
        _fail("out of memory", HostError.exit_code, arguments)
    except Exception as error:  # what is no error of ours is a defect, and reported as one
        _internal(error, arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _stopped(stop: BaseException | None, arguments: list[str]) -> NoReturn:
    """An interruption; whoever was interrupted may have noted how to go on."""
    number = getattr(stop, "number", signal.SIGINT)
    how = " ".join(getattr(stop, "__notes__", ())) or "Run the same command again to start over."
    _fail(
        f"interrupted by {signal.Signals(number).name}; nothing was written. {how}", 128 + number, arguments
    )


def _internal(error: BaseException, arguments: list[str]) -> NoReturn:
    if os.environ.get("SPARSE_ONNX_DEBUG"):
        raise error
    what = f"internal error: {type(error).__name__}: {error}"
    _fail(f"{what} (a defect; SPARSE_ONNX_DEBUG=1 shows where)", 1, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> NoReturn:
    if _wants_json(arguments):
        click.echo(json.dumps({"error": message, "exit_code": code}))
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
