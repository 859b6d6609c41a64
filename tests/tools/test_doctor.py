"""``sparse-onnx doctor``: a healthy machine, and every kind of trouble with its fix."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.errors import HostError
from sparse_onnx.sparse_ops.library import LibraryInfo
from sparse_onnx.tools import doctor


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_healthy_machine(run_cli):
    ran = run_cli("doctor", "--format", "json")
    document = ran.json()
    found = {finding["subject"]: finding for finding in document["findings"]}
    assert ran.code == 0, [finding for finding in document["findings"] if finding["status"] == "problem"]
    assert document["ok"] is True
    for subject in (
        "Python", "platform", "sparse-onnx", "ONNX Runtime", "kernel library", "instructions", "processor",
        "self-test, standard operators", "self-test, kernel library", "scratch space", "arithmetic", "memory",
    ):  # fmt: skip
        assert found[subject]["status"] in ("ok", "note"), found[subject]
        assert found[subject]["detail"]
    assert importlib.metadata.version("onnxruntime") in found["ONNX Runtime"]["detail"]
    assert sparse_ops.info().isa in found["instructions"]["detail"]
    assert str(sparse_ops.library_path()) in found["kernel library"]["detail"]
    assert "GFLOP/s" in found["arithmetic"]["detail"]
    assert "GB/s" in found["memory"]["detail"]


def one_check(monkeypatch, *findings):
    monkeypatch.setattr(doctor, "_CHECKS", (("thing", lambda: iter(findings)),))


def test_text_of_a_healthy_machine(run_cli, monkeypatch):
    one_check(
        monkeypatch, doctor.Finding("thing", "ok", "fine"), doctor.Finding("long thing", "note", "so", "do")
    )
    ran = run_cli("doctor")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "ok       thing       fine",
        "note     long thing  so",
        "                     -> do",
        "All is well.",
    ]


def test_problem_is_exit_6_with_its_fix(run_cli, monkeypatch):
    one_check(monkeypatch, doctor.Finding("thing", "problem", "is broken", "mend it"))
    ran = run_cli("doctor")
    assert ran.code == 6
    assert "PROBLEM  thing  is broken" in ran.out
    assert "-> mend it" in ran.out
    assert "1 problem found" in ran.out


def test_problem_as_json(run_cli, monkeypatch):
    one_check(monkeypatch, doctor.Finding("thing", "problem", "is broken", "mend it"))
    ran = run_cli("doctor", "--format", "json")
    assert ran.code == 6
    assert ran.json() == {
        "ok": False,
        "findings": [{"subject": "thing", "status": "problem", "detail": "is broken", "fix": "mend it"}],
    }


@pytest.mark.parametrize(
    ("error", "detail"),
    [(HostError("no library"), "no library"), (KeyError("x"), "the check failed: KeyError: 'x'")],
)
def test_failing_check_does_not_hide_the_others(monkeypatch, error, detail):
    def fail():
        raise error
        yield

    checks = (("first", fail), ("second", lambda: iter([doctor.Finding("second", "ok", "fine")])))
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    first, second = doctor.examine()
    assert (first.subject, first.status, first.detail) == ("first", "problem", detail)
    assert second.status == "ok"


def test_missing_runtime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = by_subject(doctor._runtime())["ONNX Runtime"]
    assert found.status == "problem"
    assert "cannot be imported" in found.detail
    assert found.fix == "pip install 'sparse-onnx[cpu]'"


@pytest.mark.parametrize(
    ("version", "status", "telemetry"),
    [("1.16.3", "problem", False), ("1.17.0", "ok", False), ("1.28.1", "ok", False), ("1.29.0", "ok", True)],
)
def test_version_of_the_runtime(monkeypatch, version, status, telemetry):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    found = by_subject(doctor._runtime())
    assert found["ONNX Runtime"].status == status
    assert bool(found["ONNX Runtime"].fix) == (status == "problem")
    assert ("telemetry" in found) == telemetry


def test_both_runtimes_installed(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: True)
    first = next(iter(doctor._runtime()))
    assert first.status == "note"
    assert "overwrite each other" in first.detail
    assert "pip uninstall onnxruntime onnxruntime-gpu" in first.fix


def test_packages_that_are_not_there_are_not_installed():
    assert doctor._installed("numpy")
    assert not doctor._installed("no-such-package")


def test_missing_library(monkeypatch):
    def missing():
        raise HostError("the kernel library is not installed: pip install .")

    monkeypatch.setattr(sparse_ops, "info", missing)
    monkeypatch.setattr(doctor, "_CHECKS", (("kernel library", doctor._library), ("speed", doctor._speed)))
    found = by_subject(doctor.examine())
    assert found["kernel library"].status == "problem"
    assert "pip install ." in found["kernel library"].detail
    assert "arithmetic" not in found
    assert found["memory"].status == "ok"


def test_library_of_another_version(monkeypatch):
    other = LibraryInfo(sparse_ops.library_path(), "0.0.1", "avx2", ("avx2_t8",))
    monkeypatch.setattr(sparse_ops, "info", lambda: other)
    found = by_subject(doctor._library())["kernel library"]
    assert found.status == "problem"
    assert found.fix == "install the package again"


def test_forced_instructions_are_told(monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_FORCE_ISA", "generic")
    found = by_subject(doctor._library())["instructions"]
    assert found.status == "note"
    assert found.detail == "generic, forced by SPARSE_ONNX_FORCE_ISA=generic"


def test_instructions_that_do_not_exist_are_a_problem(monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_FORCE_ISA", "mmx")
    monkeypatch.setattr(
        doctor, "_CHECKS", (("kernel library", doctor._library), ("self-test", doctor._self_test))
    )
    found = by_subject(doctor.examine())
    assert found["kernel library"].status == "problem"
    assert "SPARSE_ONNX_FORCE_ISA" in found["kernel library"].detail
    assert found["self-test, standard operators"].status == "ok"
    assert found["self-test, kernel library"].status == "problem"
    assert "SPARSE_ONNX_FORCE_ISA" in found["self-test, kernel library"].detail


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
    assert second.detail == "the process was ended by SIGILL"


def test_self_test_that_cannot_start(monkeypatch):
    (only,) = self_test_that_prints(monkeypatch, code=1, stderr="Traceback\nImportError: no numpy\n")
    assert only.status == "problem"
    assert only.detail == "the process ended with code 1: ImportError: no numpy"


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_wrong_results(monkeypatch, error):
    lines = ({"library": False, "relative_error": 1e-8}, {"library": True, "relative_error": error})
    first, second = self_test_that_prints(monkeypatch, *lines)
    assert first.status == "ok"
    assert second.status == "problem"
    assert "wrong results" in second.detail


def test_missing_export_packages_are_no_problem(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    found = by_subject(doctor._packages())["export"]
    assert found.status == "note"
    assert found.detail == "not installed: torch"
    assert "sparse-onnx[export]" in found.fix


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    found = by_subject(doctor._python())["Python"]
    assert found.status == "problem"
    assert found.fix == "use Python 3.11 or newer"


def test_little_scratch_space(monkeypatch):
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage._replace(free=10**6))
    found = by_subject(doctor._machine())["scratch space"]
    assert found.status == "note"
    assert "TMPDIR" in found.fix


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags : fpu avx2 fma avx2\nflags : none\n", ["fma", "avx2"]),
        ("Features\t: fp asimd sve\n", ["asimd", "sve"]),
        ("model name: x\n", None),
    ],
)
def test_features_of_the_processor(monkeypatch, tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(doctor, "Path", lambda _path: tmp_path / "cpuinfo")
    assert doctor._cpu_features() == expected


def test_features_are_unknown_without_a_list(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "Path", lambda _path: tmp_path / "nosuch")
    assert doctor._cpu_features() is None
