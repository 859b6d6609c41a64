"""``sparse-onnx doctor``: is everything here that the other commands need, and how fast is this machine?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import click

from sparse_onnx.errors import HostError, SparseOnnxError
from sparse_onnx.running import host
from sparse_onnx.tools import machine
from sparse_onnx.tools.console import format_option, progress, quiet_option, show
from sparse_onnx.units import format_bytes

__all__ = ["Finding", "command", "examine"]

_PACKAGE = "sparse-onnx"
_OLDEST_RUNTIME = (1, 17)
_TELEMETRY_SINCE = (1, 29)
_OLDEST_PYTHON = (3, 11)
_OPTIONAL_EXTRAS = ("gpu", "test")  # other packages for the same job, and what only developers need
_SCRATCH = 10**9
_BUFFER = 1 << 28  # bytes that bandwidth is measured on: more than most caches hold
_SPEED_SECONDS = 2.0
_SYMBOLS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        key: Names it for programs; it stays the same from version to version.
        subject: What it is about; findings of one subject share a line where all is well.
        status: ok, note (works, but worth knowing) or problem (does not work).
        detail: What was found.
        fix: What to do about a note or a problem.
        values: What was found, for programs.
    """

    key: str
    subject: str
    status: str
    detail: str
    fix: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@click.command(short_help="Check this machine, ONNX Runtime and the kernel library.")
@format_option
@quiet_option
def command(output_format: str, quiet: bool) -> int:
    """Check Python, ONNX Runtime, the kernel library and this machine; measure its speed in two seconds.

    Exit code 6 if something essential is missing or broken; each problem is shown with its fix.
    """
    findings = []
    with progress(quiet) as say:
        for name, check in _CHECKS:
            say(f"checking {name}")
            findings += examine(name, check)
    problems = [finding for finding in findings if finding.status == "problem"]
    document = {"ok": not problems, "findings": [dataclasses.asdict(finding) for finding in findings]}
    return show(_text(findings), document, output_format, HostError.exit_code if problems else 0)


def _text(findings: list[Finding]) -> str:
    """A line for each subject that is well, and one for everything that is not, with its fix below."""
    rows: list[tuple[str, str, str, str]] = []
    for subject, group in itertools.groupby(findings, key=lambda finding: finding.subject):
        found = list(group)
        if well := [finding.detail for finding in found if finding.status == "ok"]:
            rows.append(("ok", subject, "; ".join(well), ""))
        rows += [(f.status, subject, f.detail, f.fix) for f in found if f.status != "ok"]
    width = max((len(subject) for _, subject, _, _ in rows), default=0)
    lines = []
    for status, subject, detail, fix in rows:
        lines.append(f"{_SYMBOLS[status]}  {subject:<{width}}  {detail}")
        if fix:
            lines.append(f"{'':<{width + 9}}  -> {fix}")
    return "\n".join([*lines, _verdict([status for status, _, _, _ in rows])])


def _verdict(statuses: Sequence[str]) -> str:
    counts = {status: statuses.count(status) for status in ("problem", "note")}
    said = [f"{count} {status}{'' if count == 1 else 's'}" for status, count in counts.items() if count]
    if counts["problem"]:
        return f"{' and '.join(said)} found"
    return f"Everything works; {said[0]}." if said else "All is well."


def examine(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What ``check`` finds. One that fails itself is a problem, too, and does not keep others from being made."""
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)
    except SparseOnnxError as error:
        found.append(Finding(name.replace(" ", "_"), name, "problem", str(error)))
    except Exception as error:  # whatever is broken here
        detail = f"the check failed: {type(error).__name__}: {error}"
        found.append(Finding(name.replace(" ", "_"), name, "problem", detail))
    return found


def _python() -> Iterator[Finding]:
    new = sys.version_info >= _OLDEST_PYTHON
    fix = "" if new else f"use Python {_dotted(_OLDEST_PYTHON)} or newer"
    version = platform.python_version()
    yield Finding(
        "python",
        "Python",
        "ok" if new else "problem",
        f"{version} ({sys.executable})",
        fix,
        {"version": version, "executable": sys.executable},
    )
    yield _glibc()


def _glibc() -> Finding:
    """The C library, against what the kernel library was linked with."""
    system = f"{platform.system()} {platform.machine()}"
    values: dict[str, Any] = {"version": None, "needed": None}
    if platform.system() != "Linux":
        return Finding("glibc", "Python", "ok", system, "", values)
    try:
        name, have = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (ValueError, OSError):
        detail = f"{system}, whose C library is not glibc: ONNX Runtime has no wheels for it"
        fix = "use a glibc distribution, or an ONNX Runtime that was built for this one"
        return Finding("glibc", "Python", "note", detail, fix, values)
    needed = _needed_glibc()
    values = {"version": have, "needed": _dotted(needed)}
    if _numbers(have) < needed:
        detail = f"{name} {have}; the kernel library was built for {_dotted(needed)}"
        fix = "build it on this machine: pip install . in a checkout"
        return Finding("glibc", "Python", "problem", detail, fix, values)
    return Finding("glibc", "Python", "ok", f"{system}, {name} {have}", "", values)


def _needed_glibc() -> tuple[int, ...]:
    """The newest version of glibc that a symbol of the kernel library asks for; () without the library."""
    from sparse_onnx.sparse_ops import library_path

    try:
        content = library_path().read_bytes()
    except HostError:  # said by the check of the library
        return ()
    return max((_numbers(text.decode()) for text in re.findall(rb"GLIBC_([0-9.]+)", content)), default=())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version)[:2])


def _packages() -> Iterator[Finding]:
    names = (_PACKAGE, "onnx", "onnx-ir", "numpy")
    versions = {name: metadata.version(name) for name in names}
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding("packages", "packages", "ok", text, "", versions)
    yield _installation()
    yield from _extras()


def _installation() -> Finding:
    """Whether an editable installation has fallen behind its sources."""
    url = json.loads(metadata.distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    if not url.get("dir_info", {}).get("editable"):
        return Finding("installation", "packages", "ok", "installed", "", {"editable": False, "stale": []})
    source = Path(unquote(urlparse(url["url"]).path))
    stale = list(_stale(source))
    values = {"editable": True, "source": str(source), "stale": stale}
    if not stale:
        return Finding("installation", "packages", "ok", f"editable, from {source}", "", values)
    detail = f"the editable installation of {source} is out of date: {'; '.join(stale)}"
    return Finding("installation", "packages", "note", detail, f"pip install -e {source}", values)


def _stale(source: Path) -> Iterator[str]:
    from sparse_onnx.sparse_ops import library_path

    try:
        project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, ValueError):
        yield "its folder is gone or is no project"
        return
    if project.get("version") != (installed := metadata.version(_PACKAGE)):
        yield f"version {installed}, the sources are {project.get('version')}"
    try:
        built = library_path().stat().st_mtime
    except HostError:  # said by the check of the library
        return
    code = [path for path in (source / "sparse_ops/csrc").rglob("*") if path.suffix in (".cc", ".h", ".inc")]
    if newer := [path.name for path in code if path.stat().st_mtime > built]:
        yield f"{len(newer)} C++ files are newer than the kernel library ({sorted(newer)[0]}, say)"


def _extras() -> Iterator[Finding]:
    """Every extra of the package with what is missing of it."""
    for extra, wanted in _extra_packages().items():
        missing = [name for name in wanted if not _installed(name)]
        have = {name: version for name in wanted if name not in missing and (version := _version(name))}
        values = {"missing": missing, "versions": have}
        if not missing:
            yield Finding(f"extra_{extra}", "packages", "ok", f"[{extra}] is there", "", values)
        elif extra != "cpu":  # without that, the check of ONNX Runtime says so
            detail = f"[{extra}] is not there: {', '.join(missing)} missing"
            fix = f"pip install 'sparse-onnx[{extra}]', only if you want it"
            yield Finding(f"extra_{extra}", "packages", "note", detail, fix, values)


def _extra_packages() -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires(_PACKAGE) or ():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra == ['\"]([^'\"]+)", requirement)
        if name and extra and extra[1] not in _OPTIONAL_EXTRAS:
            wanted.setdefault(extra[1], []).append(name[0])
    return wanted


def _runtime() -> Iterator[Finding]:
    packages = _runtime_packages()
    if len(packages) > 1:
        detail = f"{' and '.join(packages)} are installed and overwrite each other's files"
        fix = f"pip uninstall {' '.join(packages)}, then install the one that you want"
        yield Finding("onnxruntime_packages", "ONNX Runtime", "note", detail, fix, {"packages": packages})
    try:
        import onnxruntime
    except ImportError as error:
        detail, fix = f"cannot be imported: {error}", "pip install 'sparse-onnx[cpu]'"
        yield Finding("onnxruntime", "ONNX Runtime", "problem", detail, fix)
        return
    version, providers = str(onnxruntime.__version__), list(onnxruntime.get_available_providers())
    new = _numbers(version) >= _OLDEST_RUNTIME
    shown = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    yield Finding(
        "onnxruntime",
        "ONNX Runtime",
        "ok" if new else "problem",
        f"{version}, API {_numbers(version)[1]} ({_OLDEST_RUNTIME[1]} is needed), providers: {shown}",
        "" if new else f"pip install 'onnxruntime>={_dotted(_OLDEST_RUNTIME)}'",
        {"version": version, "api": _numbers(version)[1], "providers": providers},
    )
    reports = _numbers(version) >= _TELEMETRY_SINCE
    off = _set_outside("ORT_DISABLE_TELEMETRY") == "1"
    values = {"reports": reports, "turned_off": off}
    if reports and not off:
        detail = "ONNX Runtime reports usage from 1.29 on; this tool turns that off for itself"
        fix = "set ORT_DISABLE_TELEMETRY=1 for your own programs, too"
        yield Finding("telemetry", "ONNX Runtime", "note", detail, fix, values)
    else:
        yield Finding("telemetry", "ONNX Runtime", "ok", "no telemetry", "", values)


def _runtime_packages() -> list[str]:
    """The installed distributions that bring the module onnxruntime."""
    found = set()
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name.startswith(("onnxruntime", "ort-nightly")):
            files = distribution.files or ()
            if any(str(file).replace("\\", "/") == "onnxruntime/__init__.py" for file in files):
                found.add(name)
    return sorted(found)


def _set_outside(name: str) -> str | None:
    """A variable of the environment that this process was started with, before it changed its own."""
    try:
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get(name)
    values = dict(entry.partition(b"=")[::2] for entry in given)
    value = values.get(name.encode())
    return None if value is None else value.decode()


def _installed(name: str) -> bool:
    return _version(name) is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _library() -> Iterator[Finding]:
    from sparse_onnx.sparse_ops import info

    found = info()
    package = metadata.version(_PACKAGE)
    detail = f"{found.version}, {len(found.kernels)} kernels for this processor"
    values: dict[str, Any] = {
        "version": found.version,
        "path": str(found.path),
        "kernels": list(found.kernels),
    }
    if found.version == package:
        yield Finding("library", "kernel library", "ok", detail, "", values)
    else:
        detail = f"{found.path} is version {found.version}, the package is {package}"
        yield Finding("library", "kernel library", "problem", detail, "install the package again", values)
    forced = os.environ.get("SPARSE_ONNX_FORCE_ISA", "")
    values = {"isa": found.isa, "features": list(found.features), "forced": forced or None}
    if forced:
        detail = f"{found.isa}, forced by SPARSE_ONNX_FORCE_ISA={forced}"
        fix = "unset it to use the best that the processor has"
        yield Finding("isa", "kernel library", "note", detail, fix, values)
    else:
        yield Finding("isa", "kernel library", "ok", f"{found.isa} in use", "", values)


def _self_test() -> Iterator[Finding]:
    """In a process of its own: a broken library may take that down."""
    from sparse_onnx.running.self_test import MAX_ERROR

    child = [sys.executable, "-m", "sparse_onnx.running.self_test", "--while-stdin-is-open"]
    for_child, kept = os.pipe()  # closed with this process, however that ends
    try:
        done = subprocess.run(
            child, stdin=for_child, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        os.close(for_child)
        os.close(kept)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {line["library"]: line for line in lines}
    report = "report this with the output of this command"
    for library, key, way in (
        (False, "self_test_standard_operators", "standard operators"),
        (True, "self_test_library", "kernel library"),
    ):
        result = results.get(library)
        if result is None:
            yield Finding(key, "self-test", "problem", f"{way}: {_death(done)}", report)
            break
        error = result.get("relative_error")
        values = {"relative_error": error if error == error else None}
        if "error" in result:
            yield Finding(key, "self-test", "problem", f"{way}: {result['error']}", "", values)
        elif not error <= MAX_ERROR:
            detail = f"{way}: wrong results, relative error {error:.1e}"
            yield Finding(key, "self-test", "problem", detail, report, values)
        else:
            yield Finding(key, "self-test", "ok", f"{way}: relative error {error:.1e}", "", values)


def _death(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"the process ended with code {done.returncode}: {last[0]}"


def _machine() -> Iterator[Finding]:
    cores, features = host.available_cores(), host.cpu_features()
    named = f", {' '.join(features) or 'no vector instructions'}" if features is not None else ""
    yield Finding(
        "processor",
        "processor",
        "ok",
        f"{host.cpu_name()}, {cores} cores usable{named}",
        "",
        {"name": host.cpu_name(), "cores": cores, "features": features},
    )
    limit, visible = host.cpu_limit(), len(host.processors())
    values = {"limit": limit}
    if limit is not None and limit < visible:
        detail = f"a control group (container) grants {limit:g} of the {visible} cores that are visible"
        fix = (
            f"nothing for these commands, which take {cores} threads; ONNX Runtime alone would take {visible}: set "
            f"intra_op_num_threads = {cores} in your programs, or a higher limit"
        )
        yield Finding("cpu_limit", "processor", "note", detail, fix, values)
    else:
        yield Finding("cpu_limit", "processor", "ok", "no tighter limit by a control group", "", values)
    yield _memory_limit()
    yield _scratch()


def _memory_limit(root: Path = Path("/")) -> Finding:
    limit, whole, free = host.memory_limit(root), host.machine_memory(root), host.available_memory(root)
    values = {"limit_bytes": limit, "machine_bytes": whole, "available_bytes": free}
    there = f"{format_bytes(free)} of {format_bytes(whole)} available"
    if limit is None or limit >= whole:
        detail = f"{there}, no tighter limit by a control group"
        return Finding("memory_limit", "main memory", "ok", detail, "", values)
    detail = f"{there}; a control group (container) allows {format_bytes(limit)} in all"
    fix = "nothing for these commands, which keep to it as far as they can; for larger models a higher limit"
    return Finding("memory_limit", "main memory", "note", detail, fix, values)


def _scratch() -> Finding:
    folder = tempfile.gettempdir()
    free, kind = shutil.disk_usage(folder).free, host.file_system(Path(folder))
    in_memory = kind in ("tmpfs", "ramfs")
    values = {"folder": folder, "free_bytes": free, "file_system": kind}
    detail = f"{format_bytes(free)} free in {folder}"
    if in_memory:
        detail += f", which is memory ({kind}): scratch files take it from the models"
    if in_memory or free < _SCRATCH:
        fix = "set TMPDIR to a folder on a larger disk"
        return Finding("scratch", "scratch folder", "note", detail, fix, values)
    return Finding("scratch", "scratch folder", "ok", detail, "", values)


def _speed() -> Iterator[Finding]:
    """Multiply-adds and reads of memory, each on one thread and on all, in two seconds together."""
    import numpy as np

    from sparse_onnx.sparse_ops import info
    from sparse_onnx.sparse_ops.library import peak

    threads = host.available_cores()
    each = 0.9 * _SPEED_SECONDS / 4  # the rest is for the buffer
    yield _rates("memory", "read from memory", "GB/s", _bandwidths(np.ones(_BUFFER // 8), threads, each))
    try:
        kernel = info().kernels[0]
    except HostError:  # said by the check of the library
        return
    flops = [peak(kernel, each), machine.together(lambda _index: peak(kernel, each), threads)]
    yield _rates("arithmetic", "of multiply-adds", "GFLOP/s", (flops[0], flops[1]))


def _bandwidths(buffer: Any, threads: int, seconds: float) -> tuple[float, float]:
    import numpy as np

    one = machine.read_bandwidth([buffer], seconds)
    return one, machine.read_bandwidth(np.array_split(buffer, threads), seconds)


def _rates(key: str, what: str, unit: str, rates: tuple[float, float]) -> Finding:
    one, every = (rate / 1e9 for rate in rates)
    name = unit.lower().replace("/", "_per_")
    values = {f"{name}_one_thread": one, f"{name}_all_threads": every}
    return Finding(key, "speed", "ok", f"{one:.1f} {unit} {what}, {every:.1f} with all threads", "", values)


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("Python", _python),
    ("packages", _packages),
    ("ONNX Runtime", _runtime),
    ("kernel library", _library),
    ("self-test", _self_test),
    ("machine", _machine),
    ("speed", _speed),
)
