"""``sparse-onnx doctor``: a healthy machine, and every kind of trouble with its fix."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.errors import HostError
from sparse_onnx.sparse_ops.library import LibraryInfo
from sparse_onnx.tools import doctor

KEYS = [
    "python", "glibc", "packages", "installation", "extra_cpu", "extra_export", "onnxruntime", "telemetry", "library",
    "isa", "self_test_standard_operators", "self_test_library", "processor", "cpu_limit", "memory_limit",
    "scratch", "memory", "arithmetic",
]  # fmt: skip
"""Of a healthy machine, in their order. Programs rely on them."""


def by_key(findings):
    return {finding.key: finding for finding in findings}


def find(key, check):
    return by_key(doctor.examine("check", check))[key]


def test_this_machine(run_cli):
    ran = run_cli("doctor", "--format", "json", "--quiet")
    document = ran.json()
    found = {finding["key"]: finding for finding in document["findings"]}
    assert ran.code == document["exit_code"] == 0, found
    assert ran.err == ""
    assert document["ok"] is True
    assert [key for key in found if key in KEYS] == KEYS
    assert all(set(row) == {"key", "subject", "status", "detail", "fix", "values"} for row in found.values())
    assert all(row["status"] in ("ok", "note") and row["detail"] for row in found.values())
    values = {key: row["values"] for key, row in found.items()}
    version = importlib.metadata.version("onnxruntime")
    assert values["onnxruntime"]["version"] == version
    assert values["onnxruntime"]["api"] == int(version.split(".")[1])
    assert values["isa"]["isa"] == sparse_ops.info().isa
    assert values["isa"]["features"] == list(sparse_ops.info().features)
    assert values["library"]["path"] == str(sparse_ops.library_path())
    assert values["self_test_library"]["relative_error"] < 1e-5
    # No claims about speed, but units: a processor of the last 20 years makes between 1 and 10 000 GFLOP/s.
    assert 1 < values["arithmetic"]["gflop_per_s_one_thread"] < 1e4
    assert 0.1 < values["memory"]["gb_per_s_one_thread"] < 1e4


def test_speed_is_measured_in_two_seconds(monkeypatch):
    """The seconds that it asks for, on one thread and on all."""
    asked = []

    def peak(_kernel, seconds):
        asked.append(seconds)
        return 2e9

    def read(arrays, seconds):
        asked.append(seconds)
        return 1e9 * len(arrays)

    from sparse_onnx.sparse_ops import library

    monkeypatch.setattr(library, "peak", peak)
    monkeypatch.setattr(doctor.machine, "read_bandwidth", read)
    monkeypatch.setattr(doctor, "_BUFFER", 1 << 12)
    monkeypatch.setattr("sparse_onnx.running.host.available_cores", lambda: 3)
    found = by_key(doctor._speed())
    assert found["memory"].values == {"gb_per_s_one_thread": 1.0, "gb_per_s_all_threads": 3.0}
    assert found["arithmetic"].values == {"gflop_per_s_one_thread": 2.0, "gflop_per_s_all_threads": 6.0}
    assert len(asked) == 6  # the last three at once
    assert sum(asked[:4]) <= 2.0


def checks(monkeypatch, *findings):
    monkeypatch.setattr(doctor, "_CHECKS", (("thing", lambda: iter(findings)),))


def test_what_is_well_shares_a_line(run_cli, monkeypatch):
    checks(
        monkeypatch,
        doctor.Finding("a", "thing", "ok", "fine"),
        doctor.Finding("b", "thing", "ok", "good"),
        doctor.Finding("c", "long thing", "note", "so", "do"),
        doctor.Finding("d", "long thing", "ok", "fair"),
    )
    ran = run_cli("doctor")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "ok       thing       fine; good",
        "ok       long thing  fair",
        "note     long thing  so",
        "                     -> do",
        "Everything works; 1 note.",
    ]


def test_all_is_well(run_cli, monkeypatch):
    checks(monkeypatch, doctor.Finding("a", "thing", "ok", "fine"))
    assert run_cli("doctor").out.splitlines()[-1] == "All is well."


def test_problem_is_exit_6_with_its_fix(run_cli, monkeypatch):
    checks(monkeypatch, doctor.Finding("a", "thing", "problem", "is broken", "mend it"))
    ran = run_cli("doctor")
    assert ran.code == 6
    assert "PROBLEM  thing  is broken" in ran.out
    assert "-> mend it" in ran.out
    assert "1 problem found" in ran.out


def test_problem_as_json(run_cli, monkeypatch):
    checks(monkeypatch, doctor.Finding("a", "thing", "problem", "is broken", "mend it", {"x": 1}))
    ran = run_cli("doctor", "--format", "json")
    assert ran.code == 6
    row = {"key": "a", "subject": "thing", "status": "problem", "detail": "is broken", "fix": "mend it"}
    assert ran.json() == {"ok": False, "findings": [{**row, "values": {"x": 1}}], "exit_code": 6}


@pytest.mark.parametrize(
    ("error", "detail"),
    [(HostError("no library"), "no library"), (KeyError("x"), "the check failed: KeyError: 'x'")],
)
def test_failing_check_does_not_hide_the_others(run_cli, monkeypatch, error, detail):
    def fail():
        yield doctor.Finding("before", "first thing", "ok", "fine")
        raise error

    second = doctor.Finding("second", "second", "ok", "fine")
    monkeypatch.setattr(doctor, "_CHECKS", (("first thing", fail), ("second", lambda: iter([second]))))
    rows = run_cli("doctor", "--format", "json").json()["findings"]
    assert [(row["key"], row["status"]) for row in rows] == [
        ("before", "ok"), ("first_thing", "problem"), ("second", "ok"),
    ]  # fmt: skip
    assert rows[1]["detail"] == detail


def test_missing_runtime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = find("onnxruntime", doctor._runtime)
    assert found.status == "problem"
    assert "cannot be imported" in found.detail
    assert found.fix == "pip install 'sparse-onnx[cpu]'"


@pytest.mark.parametrize(("version", "status"), [("1.16.3", "problem"), ("1.17.0", "ok"), ("1.28.1", "ok")])
def test_version_of_the_runtime(monkeypatch, version, status):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    found = find("onnxruntime", doctor._runtime)
    assert found.status == status
    assert found.fix == ("pip install 'onnxruntime>=1.17'" if status == "problem" else "")
    assert found.values["version"] == version


@pytest.mark.parametrize(
    ("version", "given", "status"),
    [("1.28.1", None, "ok"), ("1.29.0", None, "note"), ("1.29.0", "0", "note"), ("1.29.0", "1", "ok")],
)
def test_telemetry(monkeypatch, version, given, status):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(doctor, "_set_outside", {"ORT_DISABLE_TELEMETRY": given}.get)
    found = find("telemetry", doctor._runtime)
    assert found.status == status
    assert ("ORT_DISABLE_TELEMETRY=1" in found.fix) == (status == "note")


def test_the_environment_that_the_process_was_started_with():
    """What the process sets itself does not count."""
    code = (
        "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'\n"
        "from sparse_onnx.tools.doctor import _set_outside as value\n"
        "print(value('ORT_DISABLE_TELEMETRY'), value('GIVEN'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "GIVEN": "a=b"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["None", "a=b"]


def install(folder, name, *, version="1.0", files=()):
    """Metadata of an installed distribution, as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_two_packages_with_the_same_module(monkeypatch, tmp_path):
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path, name, files=["onnxruntime/__init__.py"])
    install(tmp_path, "onnxruntime-genai", files=["onnxruntime_genai/__init__.py"])  # beside it, not over it
    install(tmp_path, "other", files=["onnxruntime/__init__.py"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor._runtime_packages() == ["onnxruntime", "onnxruntime-gpu"]
    found = find("onnxruntime_packages", doctor._runtime)
    assert found.status == "note"
    assert "onnxruntime and onnxruntime-gpu are installed and overwrite each other" in found.detail
    assert found.fix.startswith("pip uninstall onnxruntime onnxruntime-gpu, then")


def test_one_package_is_none_too_many(monkeypatch, tmp_path):
    install(tmp_path, "onnxruntime-gpu", files=["onnxruntime/__init__.py"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "onnxruntime_packages" not in by_key(doctor.examine("check", doctor._runtime))


def test_packages_that_are_not_there_are_not_installed():
    assert doctor._installed("numpy")
    assert not doctor._installed("no-such-package")


def test_missing_extra(monkeypatch):
    """Whatever is installed here."""
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else "1.2.3")
    found = by_key(doctor._extras())
    assert found["extra_cpu"].status == "ok"
    assert found["extra_ray"].values == {"missing": [], "versions": {"ray": "1.2.3"}}
    assert found["extra_export"].status == "note"
    assert found["extra_export"].values["missing"] == ["torch"]
    assert "pip install 'sparse-onnx[export]'" in found["extra_export"].fix
    assert not {"extra_test", "extra_gpu"} & found.keys()


def test_missing_library(monkeypatch):
    def missing(*_arguments):
        raise HostError("the kernel library is not installed: pip install .")

    monkeypatch.setattr(sparse_ops, "info", missing)
    monkeypatch.setattr(sparse_ops, "library_path", missing)
    (only,) = doctor.examine("kernel library", doctor._library)
    assert (only.key, only.status) == ("kernel_library", "problem")
    assert "pip install ." in only.detail
    monkeypatch.setattr(doctor, "_BUFFER", 1 << 12)
    monkeypatch.setattr(doctor, "_SPEED_SECONDS", 0.0)
    assert set(by_key(doctor._speed())) == {"memory"}
    assert doctor._glibc().status == "ok"


def test_library_of_another_version(monkeypatch):
    other = LibraryInfo(sparse_ops.library_path(), "0.0.1", "avx2", ("avx2", "fma"), ("avx2_t8",))
    monkeypatch.setattr(sparse_ops, "info", lambda: other)
    found = find("library", doctor._library)
    assert found.status == "problem"
    assert "is version 0.0.1, the package is" in found.detail
    assert found.fix == "install the package again"


def test_forced_instructions_are_told(monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_FORCE_ISA", "generic")
    found = find("isa", doctor._library)
    assert found.status == "note"
    assert found.detail == "generic, forced by SPARSE_ONNX_FORCE_ISA=generic"
    assert found.values == {"isa": "generic", "features": [], "forced": "generic"}


def test_instructions_that_do_not_exist_are_a_problem(monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_FORCE_ISA", "mmx")
    (only,) = doctor.examine("kernel library", doctor._library)
    assert only.status == "problem"
    assert "SPARSE_ONNX_FORCE_ISA" in only.detail
    found = by_key(doctor._self_test())
    assert found["self_test_standard_operators"].status == "ok"
    assert found["self_test_library"].status == "problem"
    assert "SPARSE_ONNX_FORCE_ISA" in found["self_test_library"].detail


def self_test_that_prints(monkeypatch, *lines, code=0, stderr=""):
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    done = subprocess.CompletedProcess([], code, text, stderr)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_arguments, **_options: done)
    return list(doctor._self_test())


def test_library_that_takes_the_process_down(monkeypatch):
    fine = {"library": False, "relative_error": 1e-8}
    first, second = self_test_that_prints(monkeypatch, fine, code=-4)
    assert first.status == "ok"
    assert second.status == "problem"
    assert second.detail == "kernel library: the process was ended by SIGILL"


def test_self_test_that_cannot_start(monkeypatch):
    (only,) = self_test_that_prints(monkeypatch, code=1, stderr="Traceback\nImportError: no numpy\n")
    assert only.status == "problem"
    assert only.detail == "standard operators: the process ended with code 1: ImportError: no numpy"


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_wrong_results(monkeypatch, error):
    lines = ({"library": False, "relative_error": 1e-8}, {"library": True, "relative_error": error})
    first, second = self_test_that_prints(monkeypatch, *lines)
    assert first.status == "ok"
    assert second.status == "problem"
    assert "wrong results" in second.detail


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    found = find("python", doctor._python)
    assert found.status == "problem"
    assert found.fix == "use Python 3.11 or newer"


@pytest.mark.parametrize(
    ("have", "status"), [("glibc 2.30", "problem"), ("glibc 2.31", "ok"), ("glibc 3.0", "ok"), (None, "note")]
)
def test_c_library(monkeypatch, tmp_path, have, status):
    library = tmp_path / "library.so"
    library.write_bytes(b"\0GLIBC_2.4\0GLIBC_2.31\0GLIBC_2.2.5\0GLIBCXX_3.4\0")
    monkeypatch.setattr(sparse_ops, "library_path", lambda: library)
    monkeypatch.setattr(doctor.os, "confstr", lambda _name: have)
    found = doctor._glibc()
    assert found.status == status
    assert bool(found.fix) == (status != "ok")
    if have:
        assert found.values == {"version": have.split()[1], "needed": "2.31"}


@pytest.fixture
def editable(monkeypatch, tmp_path):
    """An editable installation of a folder, up to date."""
    source, library = tmp_path / "my source", tmp_path / "library.so"
    (source / "sparse_ops/csrc/kernels").mkdir(parents=True)
    for path in (source / "sparse_ops/csrc/library.cc", source / "sparse_ops/csrc/kernels/spmm.h", library):
        path.write_text("")
        os.utime(path, (1000, 1000))
    version = importlib.metadata.version("sparse-onnx")
    (source / "pyproject.toml").write_text(f"[project]\nname = 'sparse-onnx'\nversion = '{version}'\n")
    url = json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}})
    monkeypatch.setattr(importlib.metadata.Distribution, "read_text", lambda self, name: url, raising=False)
    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", lambda self, name: url)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version)
    monkeypatch.setattr(sparse_ops, "library_path", lambda: library)
    return source


def test_editable_installation(editable):
    found = doctor._installation()
    assert (found.status, found.detail) == ("ok", f"editable, from {editable}")


def newer_code(source):
    os.utime(source / "sparse_ops/csrc/kernels/spmm.h", (2000, 2000))


def other_version(source):
    (source / "pyproject.toml").write_text("[project]\nversion = '99.0'\n")


def gone(source):
    shutil.rmtree(source)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (newer_code, "1 C++ files are newer than the kernel library (spmm.h, say)"),
        (other_version, "the sources are 99.0"),
        (gone, "its folder is gone"),
    ],
)
def test_editable_installation_that_is_out_of_date(editable, change, said):
    change(editable)
    found = doctor._installation()
    assert found.status == "note"
    assert said in found.detail
    assert found.fix == f"pip install -e {editable}"


def test_plain_installation(monkeypatch):
    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", lambda self, name: None)
    assert doctor._installation().values == {"editable": False, "stale": []}


@pytest.mark.parametrize(
    ("limit", "status", "threads"),
    [(None, "ok", 4), (4.0, "ok", 4), (2.5, "note", 2), (0.5, "note", 1)],
)
def test_container_with_fewer_processors_than_are_visible(monkeypatch, limit, status, threads):
    monkeypatch.setattr("sparse_onnx.running.host.processors", lambda: (0, 1, 2, 3))
    monkeypatch.setattr("sparse_onnx.running.host.cpu_limit", lambda *_root: limit)
    found = find("cpu_limit", doctor._machine)
    assert found.status == status
    assert found.values == {"limit": limit}
    assert find("processor", doctor._machine).values["cores"] == threads
    if status == "note":
        assert f"{limit:g} of the 4 cores" in found.detail
        assert f"intra_op_num_threads = {threads} " in found.fix


def machine_of(root, limit, *, total=16_000, available=9_000, used=500):
    """A machine with ``total`` megabytes, of which a container of version 2 may take ``limit``; see test_host."""
    files = {
        "proc/meminfo": f"MemTotal: {total * 1000} kB\nMemFree: 1 kB\nMemAvailable: {available * 1000} kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "max\n" if limit is None else f"{limit * 1_024_000}\n",
        "sys/fs/cgroup/memory.current": f"{used * 1_024_000}\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("limit", "status", "available", "said"),
    [
        (None, "ok", 9_000, "9.2 GB of 16.4 GB available, no tighter limit by a control group"),
        (
            2_000,
            "note",
            1_500,
            "1.5 GB of 16.4 GB available; a control group (container) allows 2.0 GB in all",
        ),
        (
            12_000,
            "note",
            9_000,
            "9.2 GB of 16.4 GB available; a control group (container) allows 12.3 GB in all",
        ),
        (16_000, "ok", 9_000, "9.2 GB of 16.4 GB available, no tighter limit by a control group"),
        (64_000, "ok", 9_000, "9.2 GB of 16.4 GB available, no tighter limit by a control group"),
    ],
)
def test_container_with_less_memory_than_the_machine_has(tmp_path, limit, status, available, said):
    found = doctor._memory_limit(machine_of(tmp_path, limit))
    assert (found.key, found.status, found.detail) == ("memory_limit", status, said)
    assert bool(found.fix) is (status == "note")
    assert found.values == {
        "limit_bytes": None if limit is None else limit * 1_024_000,
        "machine_bytes": 16_000 * 1_024_000,
        "available_bytes": available * 1_024_000,
    }


def test_memory_of_a_machine_that_tells_nothing(tmp_path):
    found = doctor._memory_limit(tmp_path)
    assert found.status == "ok"
    assert found.values["limit_bytes"] is None
    assert 0 < found.values["available_bytes"] <= found.values["machine_bytes"]


@pytest.mark.parametrize(
    ("kind", "free", "said"),
    [
        ("ext4", 10**10, None),
        ("ext4", 10**6, "1.0 MB free"),
        ("tmpfs", 10**10, "which is memory (tmpfs)"),
        ("", 10**10, None),
    ],
)
def test_scratch_folder(monkeypatch, kind, free, said):
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage._replace(free=free))
    monkeypatch.setattr(doctor.host, "file_system", lambda _path: kind)
    found = find("scratch", doctor._machine)
    assert found.values["free_bytes"] == free
    assert found.status == ("ok" if said is None else "note")
    if said is not None:
        assert said in found.detail
        assert "TMPDIR" in found.fix
