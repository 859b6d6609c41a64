"""Time several engines on their models in turn, each in a process of its own.

Every round runs every engine once, so that drift of the machine hits all alike and a ratio holds on a noisy one.
Sessions of ONNX Runtime have ``session.force_spinning_stop`` set: else the threads of an idle engine would go on
spinning after a run, for a while, and take a core from the engine whose turn is next.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Engine", "EngineError", "EngineSpec", "Measurement", "compare"]

_WORKER = Path(__file__).with_name("engine_worker.py")
_PATIENCE = 600.0  # seconds for an answer: some engines compile for minutes


class EngineError(Exception):
    """A worker that does not start, dies or does not answer; the message is the last line that it wrote."""


@dataclass(frozen=True)
class EngineSpec:
    """What to run: ``kind`` is one of engine_worker.py, ``python`` an interpreter that has it, ``library`` a library
    of custom operators for ONNX Runtime. ``name`` is for the reader."""

    name: str
    kind: str
    python: Path
    model: Path
    threads: int
    library: Path | None = None


@dataclass
class Measurement:
    """``ms`` has one time a round. An engine that failed has no times, and says why in ``problem``."""

    spec: EngineSpec
    load_s: float | None = None
    rss_bytes: int | None = None
    ms: list[float] = field(default_factory=list)
    problem: str = ""


class Engine:
    """A running worker; leaving the context ends it.

    Raises EngineError from the constructor and from :meth:`run`.
    """

    def __init__(self, spec: EngineSpec, *, batch: int, length: int) -> None:
        # -I: the folder of the worker is not searched for modules.
        command = [str(spec.python), "-I", str(_WORKER), spec.kind, str(spec.model)]
        sizes = {"threads": spec.threads, "batch": batch, "length": length}
        command += [f"--{name}={value}" for name, value in sizes.items()]
        if spec.library is not None:
            command.append(f"--library={spec.library}")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed on exit
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise EngineError(f"{spec.python} cannot be started: {error.strerror}") from error
        try:
            ready = self._answer()
        except EngineError:
            self._end()
            raise
        self.load_s, self.rss_bytes = float(ready["load_s"]), int(ready["rss_bytes"])

    def run(self) -> float:
        """Milliseconds of one run."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: reading says so, and why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return float(self._answer()["ms"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(_PATIENCE, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            if line:
                self._process.kill()
                raise EngineError(f"answered {line.strip()!r}, which is no JSON") from None
            raise EngineError(self._last_words()) from None
        return answer

    def _last_words(self) -> str:
        code = self._wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing said")
        return f"exit code {code}: {said}"

    def _wait(self) -> int:
        try:
            return self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def compare(specs: Sequence[EngineSpec], *, batch: int, length: int, rounds: int) -> list[Measurement]:
    """Load every engine, then ``rounds`` times run each once, in turn. An engine that fails is left out from then on.

    A first dimension of an input that has no number is ``batch``, any other ``length``.
    """
    measured = [Measurement(spec) for spec in specs]
    with ExitStack() as stack:
        running: list[tuple[Engine, Measurement]] = []
        for one in measured:
            try:
                engine = stack.enter_context(Engine(one.spec, batch=batch, length=length))
            except EngineError as error:
                one.problem = str(error)
                continue
            one.load_s, one.rss_bytes = engine.load_s, engine.rss_bytes
            running.append((engine, one))
        for _ in range(rounds):
            for engine, one in running:
                if one.problem:
                    continue
                try:
                    one.ms.append(engine.run())
                except EngineError as error:
                    one.problem, one.ms = str(error), []
    return measured
