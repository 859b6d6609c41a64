"""A command that sees a processor with AVX2 and nothing wider."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_onnx.tools.benchmarks.avx2_only import masked_cpuinfo

_SET_CPUID = 0x1012  # of arch_prctl, system call 158 on x86-64


def _can_trap() -> bool:
    if platform.system() != "Linux" or platform.machine() != "x86_64" or os.geteuid() != 0:
        return False
    # In a process of its own: a trapped instruction would end this one.
    code = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).syscall(158, {_SET_CPUID}, 1) != 0)"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparse_onnx.tools.benchmarks.avx2_only", *command],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_flags_of_wider_instructions_are_gone() -> None:
    before = (
        "flags\t\t: fpu avx avx2 fma avx512f avx512_vnni avx_vnni amx_tile avxfoo\nmodel name\t: avx512f\n"
    )
    after = "flags\t\t: fpu avx avx2 fma avxfoo\nmodel name\t: avx512f\n"
    assert masked_cpuinfo(before) == after
    assert masked_cpuinfo(after) == after


def test_no_command() -> None:
    found = run()
    assert (found.returncode, found.stdout) == (2, "")
    assert "write the command" in found.stderr


needs_trap = pytest.mark.skipif(
    not _can_trap(), reason="takes Linux on x86-64, root, and a kernel that traps cpuid"
)


@needs_trap
def test_everything_in_the_command_sees_avx2(tmp_path: Path) -> None:
    # NumPy asks the processor, our library too, and some engines read the file; so does what the command starts.
    code = """if True:
        import subprocess, sys
        from numpy._core._multiarray_umath import __cpu_features__ as features
        from sparse_onnx import sparse_ops
        wide = [name for name, there in features.items() if there and "512" in name]
        listed = [word for word in open("/proc/cpuinfo").read().split() if word.startswith(("avx512", "amx"))]
        print(wide, listed, sparse_ops.info().isa)
        sys.stdout.flush()
        if len(sys.argv) == 1:
            subprocess.run([sys.executable, __file__, "again"], check=True)"""
    script = tmp_path / "script.py"
    script.write_text(code)
    found = run(sys.executable, str(script))
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2
    assert len(set(lines)) == 1
    assert lines[0] in ("[] [] avx2", "[] [] generic")  # an older processor stays one


@needs_trap
@pytest.mark.parametrize(("command", "status"), [("exit 7", 7), ("kill -SEGV $$", 139)])
def test_the_command_s_own_end_is_told(command: str, status: int) -> None:
    assert run("sh", "-c", command).returncode == status


@needs_trap
def test_other_faults_reach_the_program() -> None:
    assert run(sys.executable, "-c", "import ctypes; ctypes.string_at(0)").returncode == 139
    handled = run(
        sys.executable, "-X", "faulthandler", "-c", "import ctypes; ctypes.string_at(0)"
    )  # with a handler of its own
    assert "Segmentation fault" in handled.stderr
