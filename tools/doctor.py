"""``sparse-onnx doctor``: is everything here that the other commands need, and how fast is this machine?"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import click

from sparse_onnx.errors import HostError, SparseOnnxError
from sparse_onnx.tools.console import format_option
from sparse_onnx.units import format_bytes

__all__ = ["Finding", "command", "examine"]

_OLDEST_RUNTIME = (1, 17)
_OLDEST_PYTHON = (3, 11)
_FEATURES = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "amx_tile",
)
_ARM_FEATURES = ("asimd", "asimddp", "i8mm", "sve", "sve2")
_EXPORT = ("torch", "transformers", "onnxscript")
_SCRATCH = 10**9
_SYMBOLS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``status`` is ok, note (works, but worth knowing) or problem (does not)."""

    subject: str
    status: str
    detail: str
    fix: str = ""


@click.command(short_help="Check this machine, ONNX Runtime and the kernel library.")
@format_option
def command(output_format: str) -> int:
    """Check Python, ONNX Runtime, the kernel library and this machine; measure its speed in two seconds.

    Exit code 6 if something essential is missing or broken; each problem is shown with its fix.
    """
    findings = list(examine())
    problems = [finding for finding in findings if finding.status == "problem"]
    if output_format == "json":
        document = {"ok": not problems, "findings": [dataclasses.asdict(finding) for finding in findings]}
        click.echo(json.dumps(document, indent=2))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            click.echo(f"{_SYMBOLS[finding.status]}  {finding.subject:<{width}}  {finding.detail}")
            if finding.fix:
                click.echo(f"{'':<{width + 9}}  -> {finding.fix}")
        click.echo(
            f"{len(problems)} problem{'' if len(problems) == 1 else 's'} found"
            if problems
            else "All is well."
        )
    return HostError.exit_code if problems else 0


def examine() -> Iterator[Finding]:
    """All findings, in the order in which they are shown. A check that fails itself is a problem, too."""
    for subject, check in _CHECKS:
        try:
            yield from check()
        except SparseOnnxError as error:
            yield Finding(subject, "problem", str(error))
        except Exception as error:  # whatever is broken here, the other checks must still be made
            yield Finding(subject, "problem", f"the check failed: {type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    new = sys.version_info >= _OLDEST_PYTHON
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    fix = "" if new else f"use Python {wanted} or newer"
    yield Finding(
        "Python", "ok" if new else "problem", f"{platform.python_version()} ({sys.executable})", fix
    )
    yield Finding("platform", "ok", platform.platform())


def _packages() -> Iterator[Finding]:
    for name in ("sparse-onnx", "onnx", "onnx-ir", "numpy"):
        yield Finding(name, "ok", metadata.version(name))
    missing = [name for name in _EXPORT if importlib.util.find_spec(name) is None]
    if missing:
        fix = "pip install 'sparse-onnx[export]', only if you want to export"
        yield Finding("export", "note", f"not installed: {', '.join(missing)}", fix)
    else:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in _EXPORT)
        yield Finding("export", "ok", versions)


def _runtime() -> Iterator[Finding]:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(installed) == 2:
        fix = "pip uninstall onnxruntime onnxruntime-gpu, then install the one that you want"
        detail = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        yield Finding("ONNX Runtime", "note", detail, fix)
    try:
        import onnxruntime
    except ImportError as error:
        yield Finding(
            "ONNX Runtime", "problem", f"cannot be imported: {error}", "pip install 'sparse-onnx[cpu]'"
        )
        return
    version = str(onnxruntime.__version__)
    providers = ", ".join(
        name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()
    )
    new = tuple(int(part) for part in version.split(".")[:2]) >= _OLDEST_RUNTIME
    wanted = ".".join(map(str, _OLDEST_RUNTIME))
    fix = "" if new else f"pip install 'onnxruntime>={wanted}'"
    yield Finding("ONNX Runtime", "ok" if new else "problem", f"{version}, providers: {providers}", fix)
    if tuple(int(part) for part in version.split(".")[:2]) >= (1, 29):
        detail = "ONNX Runtime reports usage from 1.29 on; this tool turns that off"
        yield Finding("telemetry", "note", detail, "set ORT_DISABLE_TELEMETRY=1 for your own programs, too")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _library() -> Iterator[Finding]:
    from sparse_onnx.sparse_ops import info

    found = info()
    package = metadata.version("sparse-onnx")
    detail = f"{found.version}, {len(found.kernels)} kernels for this processor ({found.path})"
    if found.version == package:
        yield Finding("kernel library", "ok", detail)
    else:
        yield Finding(
            "kernel library", "problem", f"{detail}; the package is {package}", "install the package again"
        )
    forced = os.environ.get("SPARSE_ONNX_FORCE_ISA", "")
    if forced:
        detail = f"{found.isa}, forced by SPARSE_ONNX_FORCE_ISA={forced}"
        yield Finding("instructions", "note", detail, "unset it to use the best that the processor has")
    else:
        yield Finding("instructions", "ok", f"{found.isa} in use")


def _self_test() -> Iterator[Finding]:
    """In a process of its own: a broken library may take that down."""
    from sparse_onnx.self_test import MAX_ERROR

    child = [sys.executable, "-m", "sparse_onnx.self_test"]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {line["library"]: line for line in lines}
    for library, subject in ((False, "self-test, standard operators"), (True, "self-test, kernel library")):
        result = results.get(library)
        if result is None:
            yield Finding(subject, "problem", _death(done), "report this with the output of this command")
            break
        if "error" in result:
            yield Finding(subject, "problem", result["error"])
        elif not result["relative_error"] <= MAX_ERROR:
            detail = f"wrong results: relative error {result['relative_error']:.1e}"
            yield Finding(subject, "problem", detail, "report this with the output of this command")
        else:
            yield Finding(subject, "ok", f"relative error {result['relative_error']:.1e}")


def _death(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"the process ended with code {done.returncode}: {last[0]}"


def _machine() -> Iterator[Finding]:
    from sparse_onnx.report import available_cores, cpu_name

    yield Finding("processor", "ok", f"{cpu_name()}, {available_cores()} cores usable")
    features = _cpu_features()
    if features is not None:
        yield Finding("features", "ok", " ".join(features) or "none that the kernels use")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    fix = "" if free >= _SCRATCH else "set TMPDIR to a folder on a larger disk"
    detail = f"{format_bytes(free)} free in {tempfile.gettempdir()}"
    yield Finding("scratch space", "ok" if not fix else "note", detail, fix)


def _cpu_features() -> list[str] | None:
    """Those of the instruction sets named here that the operating system lists; None if it lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            have = set(value.split())
            return [name for name in (*_FEATURES, *_ARM_FEATURES) if name in have]
    return None


def _speed() -> Iterator[Finding]:
    from sparse_onnx.sparse_ops import info
    from sparse_onnx.sparse_ops.library import peak

    with contextlib.suppress(HostError):  # said already by the check of the library
        detail = f"{peak(info().kernels[0], 0.3) / 1e9:.0f} GFLOP/s in multiply-adds, one thread"
        yield Finding("arithmetic", "ok", detail)
    yield Finding(
        "memory", "ok", f"{_copy_bandwidth() / 1e9:.1f} GB/s read and written in a copy, one thread"
    )


def _copy_bandwidth(nbytes: int = 1 << 27, seconds: float = 0.5) -> float:
    """Bytes a second, read plus written, of the best copy of ``nbytes`` bytes: more than most caches hold."""
    import numpy as np

    source = np.ones(nbytes // 8)
    target = np.zeros_like(source)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * nbytes / best


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("Python", _python),
    ("packages", _packages),
    ("ONNX Runtime", _runtime),
    ("kernel library", _library),
    ("self-test", _self_test),
    ("machine", _machine),
    ("speed", _speed),
)
